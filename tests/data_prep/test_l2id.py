"""ILSVRC DET with the L2ID challenge's masks: labels by synset, odd image files, oversized images, refusals."""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.conversion import Output
from data_prep.l2id import convert, read_map
from data_prep.shard_writer import verify
from slrnet.cli.main import main
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, load_dataset
from tests.fixtures.shards import table_of

from .conftest import decode, stripes

CLASS_LIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "lists" / "l2id_classes.txt"
ANT, BOW, CAT = "n02219486", "n02880940", "n02121808"
MAP = f"{ANT} 1 ant\n{BOW} 2 bow tie\n{CAT} 3 domestic_cat\n"


class L2idBuilder:
    """Writes the folders that ILSVRC's and the challenge's archives unpack to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "devkit" / "data").mkdir(parents=True)
        (root / "devkit" / "data" / "map_det.txt").write_text(MAP)
        for folder in ("LID_track1/val", "track1_val_annotations_raw"):
            (root / folder).mkdir(parents=True)

    def train(self, name: str, synsets: Sequence[str] | None, image: Image.Image | None = None, **save: Any) -> Path:
        path = self.root / "ILSVRC" / "Data" / "DET" / "train" / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image or Image.new("RGB", (16, 10), (9, 99, 9))).save(path, **({"format": "JPEG"} | save))
        if synsets is not None:
            label = self.root / "ILSVRC" / "Annotations" / "DET" / "train" / f"{name}.xml"
            label.parent.mkdir(parents=True, exist_ok=True)
            objects = "".join(f"<object><name>{synset}</name><bndbox/></object>" for synset in synsets)
            label.write_text(f"<annotation><filename>x</filename>{objects}</annotation>")
        return path

    def val(self, key: str, ids: Sequence[int], size: tuple[int, int] = (16, 10)) -> None:
        Image.new("RGB", size, (9, 9, 99)).save(self.root / "LID_track1" / "val" / f"{key}.JPEG")
        Image.fromarray(stripes(ids, size)).save(self.root / "track1_val_annotations_raw" / f"{key}.png")

    def convert(self, out: Path, longest_side: int = 1000, **options: Any) -> dict[str, dict[str, Any]]:
        convert(
            self.root / "ILSVRC",
            Output(out, **options),
            val_images=self.root / "LID_track1" / "val",
            val_masks=self.root / "track1_val_annotations_raw",
            longest_side=longest_side,
        )
        return {row["key"]: row for row in table_of(out).to_pylist()}


@pytest.fixture
def l2id(tmp_path: Path) -> L2idBuilder:
    """Four training images, one of them without an annotation, and two of validation."""
    builder = L2idBuilder(tmp_path / "l2id")
    builder.train(f"ILSVRC2013_train/{ANT}/{ANT}_7", [ANT, ANT])
    builder.train("ILSVRC2014_train_0000/ILSVRC2014_train_00000001", [CAT, ANT])
    builder.train("ILSVRC2014_train_0000/ILSVRC2014_train_00000002", [])
    builder.train("ILSVRC2013_train_extra0/ILSVRC2013_train_00000001", None)
    builder.val("ILSVRC2012_val_00000001", [0, 2, 255])
    builder.val("ILSVRC2013_val_00000002", [0])
    return builder


def member(folder: Path, name: str) -> bytes:
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as archive:
            if name in archive.getnames():
                return archive.extractfile(name).read()  # type: ignore[union-attr]
    raise KeyError(name)


def test_labels_come_from_annotations_and_masks(
    l2id: L2idBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = l2id.convert(tmp_path / "out")
    assert {key: (row["split"], row["classes"], row["has_mask"]) for key, row in found.items()} == {
        f"{ANT}_7": ("train", [1], False),
        "ILSVRC2014_train_00000001": ("train", [1, 3], False),
        "ILSVRC2014_train_00000002": ("train", [], False),
        "ILSVRC2012_val_00000001": ("val", [2], True),
        "ILSVRC2013_val_00000002": ("val", [], True),
    }
    info = load_dataset(tmp_path / "out").info
    assert info.classes == ("background", "ant", "bow_tie", "domestic_cat")
    assert info.name == "l2id"
    assert all(row["has_image_labels"] for row in found.values())
    assert verify(tmp_path / "out") == []
    np.testing.assert_array_equal(
        decode(member(tmp_path / "out", "ILSVRC2012_val_00000001.png")), stripes([0, 2, 255], (16, 10))
    )
    printed = capsys.readouterr().out
    assert "train: 3 images; left out 1 whose classes nobody listed" in printed
    assert "val: 2 images; left out 0 without a mask" in printed


def test_odd_files_become_rgb_jpeg_files_and_good_ones_are_copied(l2id: L2idBuilder, tmp_path: Path) -> None:
    color = Image.new("RGB", (16, 10), (200, 30, 60))
    l2id.train("ILSVRC2014_train_0001/cmyk", [ANT], color.convert("CMYK"))
    l2id.train("ILSVRC2014_train_0001/png", [ANT], color, format="PNG")
    l2id.train("ILSVRC2014_train_0001/clear", [ANT], color.convert("RGBA"), format="PNG")
    gray = l2id.train("ILSVRC2014_train_0001/gray", [ANT], color.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = l2id.train("ILSVRC2014_train_0001/turned", [ANT], color, exif=exif)
    found = l2id.convert(tmp_path / "out")
    for key in ("cmyk", "png", "clear"):
        with Image.open(io.BytesIO(member(tmp_path / "out", f"{key}.jpg"))) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (16, 10))
            assert np.abs(np.asarray(image).astype(int) - (200, 30, 60)).max() <= 4, key
    assert member(tmp_path / "out", "gray.jpg") == gray.read_bytes()
    assert member(tmp_path / "out", "turned.jpg") == turned.read_bytes()
    assert (found["turned"]["width"], found["turned"]["height"]) == (16, 10)
    images = {sample.key: sample.image for sample in EvalLoader(load_dataset(tmp_path / "out"), split="train")}
    assert all(image.shape == (3, 10, 16) for image in images.values())


def test_oversized_images_are_scaled_down_with_their_masks(l2id: L2idBuilder, tmp_path: Path) -> None:
    l2id.val("wide", [1, 0, 255, 3], (160, 60))
    l2id.train("ILSVRC2014_train_0001/tall", [ANT], Image.new("RGB", (30, 200)))
    found = l2id.convert(tmp_path / "out", longest_side=40)
    assert (found["wide"]["width"], found["wide"]["height"]) == (40, 15)
    assert (found["tall"]["width"], found["tall"]["height"]) == (6, 40)
    np.testing.assert_array_equal(decode(member(tmp_path / "out", "wide.png")), stripes([1, 0, 255, 3], (40, 15)))
    samples = {sample.key: sample for sample in EvalLoader(load_dataset(tmp_path / "out"), split="val")}
    assert samples["wide"].image.shape == (3, 15, 40)
    assert (l2id.convert(tmp_path / "all", longest_side=0)["wide"]["width"]) == 160


def test_corrupt_images_are_left_out_by_name(
    l2id: L2idBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = l2id.train("ILSVRC2014_train_0001/torn", [ANT], Image.effect_noise((200, 200), 80))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"torn.JPEG cannot be read: .*truncated(.|\n)*--skip-damaged"):
        l2id.convert(tmp_path / "first")
    found = l2id.convert(tmp_path / "out", skip_damaged=True)
    assert "torn" not in found
    assert len(found) == 5
    assert "torn.JPEG cannot be read" in capsys.readouterr().err
    assert "--skip-damaged" in load_dataset(tmp_path / "out").info.made_by


def test_subsets(l2id: L2idBuilder, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text(f"ILSVRC2013_train/{ANT}/{ANT}_7\n")
    found = l2id.convert(tmp_path / "out", subsets={"some": tmp_path / "some.txt"})
    assert [key for key, row in found.items() if row["subsets"] == ["some"]] == [f"{ANT}_7"]


def test_the_devkits_map_gives_the_published_classes(tmp_path: Path) -> None:
    if not CLASS_LIST.is_file():
        pytest.skip("needs the list in ../shared/data/lists, which is not part of the project")
    names = CLASS_LIST.read_text().split()
    lines = [f"n{label:08} {label} {name}" for label, name in enumerate(names) if label]
    (tmp_path / "map_det.txt").write_text("\n".join(reversed(lines)) + "\n")
    found = read_map(tmp_path / "map_det.txt")
    assert ["background", *found.values()] == names
    assert len(found) == 200


class TestRefusals:
    def refuse(self, l2id: L2idBuilder, match: str, **options: Any) -> None:
        with pytest.raises(DataError, match=match):
            l2id.convert(l2id.root / "out", **options)
        assert not (l2id.root / "out").exists()

    def test_annotations(self, l2id: L2idBuilder) -> None:
        l2id.train("ILSVRC2014_train_0001/x", ["n99999999"])
        self.refuse(l2id, r"x.xml has objects of \['n99999999'\], which the map of synsets lacks; see --map-file")
        label = l2id.root / "ILSVRC/Annotations/DET/train/ILSVRC2014_train_0001/x.xml"
        label.write_text("<annotation>")
        self.refuse(l2id, "x.xml is not readable XML")
        label.write_text("<annotation/>")
        (l2id.root / "ILSVRC/Data/DET/train/ILSVRC2014_train_0001/x.JPEG").unlink()
        self.refuse(l2id, "x.JPEG is missing; fetch it again")

    def test_masks(self, l2id: L2idBuilder) -> None:
        l2id.val("v", [0, 4])
        self.refuse(l2id, r"v.png has ids \[4\]; allowed are 0 to 3 and 255 .*raw masks")
        l2id.val("v", [0, 1])
        Image.new("RGB", (16, 11)).save(l2id.root / "LID_track1/val/v.JPEG")
        self.refuse(l2id, "v.png is 16x10 pixels, its image v.JPEG 16x11")
        Image.new("RGB", (16, 11)).save(l2id.root / "track1_val_annotations_raw/v.png")
        self.refuse(l2id, "v.png is a RGB image; masks must be indexed .*track1_val_annotations_raw")
        self.refuse(l2id, "--longest-side is -1", longest_side=-1)

    def test_folders(self, l2id: L2idBuilder) -> None:
        for path in (l2id.root / "track1_val_annotations_raw").iterdir():
            path.unlink()
        self.refuse(l2id, "holds no masks KEY.png")
        (l2id.root / "devkit" / "data" / "map_det.txt").unlink()
        self.refuse(l2id, "name the devkit's map_det.txt with --map-file")
        (l2id.root / "ILSVRC" / "devkit" / "data").mkdir(parents=True)
        (l2id.root / "ILSVRC" / "devkit" / "data" / "map_det.txt").write_text(MAP)
        (l2id.root / "ILSVRC" / "Annotations").rename(l2id.root / "elsewhere")
        self.refuse(l2id, r"Annotations/DET/train is no folder; --root is the folder ILSVRC")

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (f"{ANT} 1\n", "line 1: 'n02219486 1' is not `synset id name`"),
            (f"{ANT} one ant\n", "line 1"),
            (f"{ANT} 1 ant\n{CAT} 1 cat\n", "line 2"),
            (f"{ANT} 1 ant\n{CAT} 3 cat\n", "has 2 classes; ids must run from 1"),
            (f"{ANT} 1 ant\n{ANT} 2 cat\n", "a synset or a name twice"),
            (f"{ANT} 1 ant\n{CAT} 2 background\n", "a synset or a name twice"),
            ("", "has 0 classes"),
        ],
    )
    def test_maps(self, text: str, match: str, tmp_path: Path) -> None:
        (tmp_path / "map_det.txt").write_text(text)
        with pytest.raises(DataError, match=match):
            read_map(tmp_path / "map_det.txt")


def test_command_makes_shards_that_its_own_record_makes_again(
    l2id: L2idBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    def run(*words: str) -> int:
        return main(["prepare", "l2id", *words, "--processes", "1"])

    folders = ["--val-images", str(l2id.root / "LID_track1" / "val")]
    folders += ["--val-masks", str(l2id.root / "track1_val_annotations_raw")]
    assert run("--root", str(l2id.root / "ILSVRC"), "--out", str(tmp_path / "first"), *folders) == 0
    _, script, *recorded = shlex.split(load_dataset(tmp_path / "first").info.made_by)
    assert script == "data_prep/l2id.py"
    assert run(*recorded, "--out", str(tmp_path / "second")) == 0
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()
    assert run("--root", str(l2id.root), "--out", str(tmp_path / "third")) == 2
    assert "--val-images is missing" in capsys.readouterr().err
