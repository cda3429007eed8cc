"""Masks of a user's folder: ids by value whatever the bits, by color, by shape; and masks that disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.mask_files import MaskReader, MaskValues, check_masks
from data_prep.palettes import read_palette
from slrnet.data.manifest import DataError
from tests.fixtures.gray_png import gray_png

IDS = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_pngs_of_any_bits_are_read_by_value(bits: int, tmp_path: Path) -> None:
    ids = IDS % 2**bits if bits < 2 else IDS
    (tmp_path / "m.png").write_bytes(gray_png(ids, bits))
    found, as_is, colors = MaskReader().read(tmp_path / "m.png")
    assert found.tolist() == ids.tolist()
    assert as_is == (bits == 8)
    assert colors is None


@pytest.mark.parametrize("name", ["m.tif", "m.bmp", "m.gif", "m.png"])
def test_files_without_loss_are_read_by_value(name: str, tmp_path: Path) -> None:
    Image.fromarray(IDS).save(tmp_path / name)
    assert MaskReader().read(tmp_path / name)[0].tolist() == IDS.tolist()


def test_gray_maps_of_few_values(tmp_path: Path) -> None:
    (tmp_path / "m.pgm").write_bytes(b"P5 4 2 3\n" + IDS.tobytes())
    assert MaskReader().read(tmp_path / "m.pgm")[0].tolist() == IDS.tolist()


def test_what_is_no_mask(tmp_path: Path) -> None:
    Image.fromarray(IDS.astype(np.int32) * 100).save(tmp_path / "wide.tif")
    with pytest.raises(DataError, match="values from 0 to 300; class ids are 0 to 255"):
        MaskReader().read(tmp_path / "wide.tif")
    Image.fromarray(IDS).save(tmp_path / "m.jpg")
    for reader in (MaskReader(), MaskReader(binary=True)):
        with pytest.raises(DataError, match="m.jpg is a JPEG file, whose compression"):
            reader.read(tmp_path / "m.jpg")


class TestColors:
    @pytest.fixture
    def reader(self, tmp_path: Path) -> MaskReader:
        (tmp_path / "palette.txt").write_text("background #000000\ncat #ff0000\ndog #0000ff\n")
        return MaskReader(palette=read_palette(tmp_path / "palette.txt"))

    @pytest.fixture
    def pixels(self) -> npt.NDArray[np.uint8]:
        return np.array([[[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 255, 255], [0, 0, 0, 255]]], dtype=np.uint8)

    def test_transparent_black_is_black(
        self, reader: MaskReader, pixels: npt.NDArray[np.uint8], tmp_path: Path
    ) -> None:
        Image.fromarray(pixels).save(tmp_path / "m.png")
        assert reader.read(tmp_path / "m.png")[0].tolist() == [[0, 1, 2, 0]]

    def test_other_transparent_colors(self, reader: MaskReader, pixels: npt.NDArray[np.uint8], tmp_path: Path) -> None:
        pixels[0, 1:3, 3] = (128, 0)
        Image.fromarray(pixels).save(tmp_path / "m.png")
        with pytest.raises(DataError, match=r"m.png has 2 transparent pixel\(s\), first #ff000080 at row 0, column 1"):
            reader.read(tmp_path / "m.png")

    def test_indexed_masks_with_transparency(self, reader: MaskReader, tmp_path: Path) -> None:
        image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
        image.putpalette([0, 0, 0, 0, 0, 255, 255, 0, 0])
        image.save(tmp_path / "m.png", transparency=0)
        assert reader.read(tmp_path / "m.png")[0].tolist() == [[0, 2, 1]]
        assert MaskReader().read(tmp_path / "m.png")[0].tolist() == [[0, 1, 2]]

    def test_ids_are_not_colors(self, reader: MaskReader, tmp_path: Path) -> None:
        Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).save(tmp_path / "m.png")
        with pytest.raises(DataError, match=r"m.png has 2 pixel.*#010101 at row 0, column 1.*may be class ids"):
            reader.read(tmp_path / "m.png")


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "P", "I;16"])
def test_a_shape_of_any_mode(mode: str, tmp_path: Path) -> None:
    gray = Image.fromarray(np.array([[0, 255, 128, 0]], dtype=np.uint8))
    if mode == "1":
        image = gray.point(lambda value: 255 * (value > 0)).convert("1")
    elif mode == "I;16":
        image = Image.fromarray(np.array([[0, 65535, 300, 0]], dtype=np.uint16))
    else:
        image = gray.convert(mode)
    image.save(tmp_path / "m.png")
    assert MaskReader(binary=True).read(tmp_path / "m.png")[0].tolist() == [[0, 1, 1, 0]]


def values(*ids: int, colors: Any = b"") -> MaskValues:
    return MaskValues(bytes(ids), bytes(colors))


@pytest.mark.parametrize(
    ("masks", "num_classes", "refused"),
    [
        ([values(0, 255), values(0)], 2, True),
        ([values(0, 255), values(255)], 5, True),
        ([values(0, 255), values(0, 1)], 2, True),  # of one set, one exported in 0 and 255
        ([values(0, 255), values(0, 1, 255)], 2, False),  # void around objects, and an image of void alone
        ([values(0, 255), values(0, 3)], 5, False),
        ([values(0), values(0)], 2, False),
        ([values(0, 1)], 2, False),
    ],
)
def test_masks_of_0_and_255(masks: list[MaskValues], num_classes: int, refused: bool) -> None:
    named = [(f"{place}.png", mask) for place, mask in enumerate(masks)]
    if refused:
        with pytest.raises(DataError, match=r"mask\(s\) hold no value but 0 and 255, such as 0.png.*--binary-masks"):
            check_masks(named, num_classes)
    else:
        check_masks(named, num_classes)


def test_palettes_that_differ(tmp_path: Path) -> None:
    red, blue = (0, 0, 0, 255, 0, 0), (0, 0, 0, 0, 0, 255)
    check_masks([("a", values(0, 1, colors=red)), ("b", values(0, 1)), ("c", values(0, 1, colors=red))], 3)
    check_masks([("a", values(0, 255, colors=red)), ("b", values(0, 1, 255, colors=(*blue, 9, 9, 9)))], 3)
    match = "id 1 is #ff0000 in a and #0000ff in c; name the colors of the classes with --palette"
    with pytest.raises(DataError, match=match):
        check_masks([("a", values(0, 1, colors=red)), ("c", values(0, 1, colors=blue))], 3)


def test_a_palette_of_grays_says_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(IDS)
    image.putpalette([part for value in range(256) for part in (value, value, value)])
    image.save(tmp_path / "gray.png")
    assert MaskReader().read(tmp_path / "gray.png")[2] is None
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(tmp_path / "color.png")
    colors = MaskReader().read(tmp_path / "color.png")[2]
    assert colors is not None
    assert colors[1].tolist() == [200, 0, 0]
