"""What is found out about a file before it is copied or converted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from data_prep.source_files import ImageForm, checked_ids, copied, measure_mask
from slrnet.data.manifest import DataError


@pytest.mark.parametrize(("mode", "as_is"), [("P", True), ("L", True), ("1", False)])
def test_masks_that_training_reads_are_copied(tmp_path: Path, mode: str, as_is: bool) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert(mode).save(path)
    ids, found = measure_mask(path, remedy="draw it again")
    assert found is as_is
    assert ids.dtype == np.uint8
    assert ids.shape == (2, 2)


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 5)))
def test_ids_are_those_of_all_pixels(mask: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
    assert checked_ids(Path("mask.png"), mask, 6, remedy="") == sorted(set(mask.ravel().tolist()))


def test_an_id_without_a_class_is_named() -> None:
    with pytest.raises(DataError, match=r"mask\.png has ids \[7\]; allowed are 0 to 2 and 255 \(void\); draw it again"):
        checked_ids(Path("mask.png"), np.array([[0, 255, 7]], dtype=np.uint8), 3, remedy="draw it again")


@pytest.mark.parametrize(
    ("name", "mode", "as_is"), [("a.jpg", "RGB", True), ("a.jpg", "CMYK", False), ("a.png", "RGB", False)]
)
def test_images_that_training_reads_are_copied(tmp_path: Path, name: str, mode: str, as_is: bool) -> None:
    path = tmp_path / name
    Image.new(mode, (4, 3)).save(path)
    form = ImageForm()
    assert form.measure(path) == ((4, 3), as_is)
    assert (form.jpeg(path, as_is=as_is) == path.read_bytes()) is as_is


@pytest.mark.parametrize("progressive", [False, True])
def test_files_that_are_cut_off_are_found_wherever_they_end(tmp_path: Path, progressive: bool) -> None:
    """The smallest picture that the decoder makes needs as much of the file as the whole one."""
    path, pixels = tmp_path / "a.jpg", np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, progressive=progressive)
    data = path.read_bytes()
    assert ImageForm().measure(path) == ((50, 40), True)
    for length in [*range(0, len(data) - 2, len(data) // 60), len(data) - 3]:
        path.write_bytes(data[:length])
        with pytest.raises(OSError), Image.open(path) as image:  # noqa: PT011
            image.load()
        with pytest.raises(DataError, match=r"a\.jpg cannot be read"):
            ImageForm().measure(path)


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg was there a moment ago and cannot be read: .*; fetch it again"):
        copied(tmp_path / "gone.jpg", remedy="fetch it again")


def test_images_too_large_for_a_shard_are_refused_unless_scaled_down(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (66_000, 3)).save(path)
    with pytest.raises(DataError, match=r"a\.png cannot be read: it has 66000 x 3 pixels; .* --longest-side"):
        ImageForm().measure(path)
    assert ImageForm(longest_side=660).measure(path) == ((660, 1), False)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "CMYK"])
def test_scaling_down_early_changes_little(tmp_path: Path, mode: str) -> None:
    ramp = Image.fromarray(np.add.outer(np.arange(400), np.arange(600)).clip(0, 255).astype(np.uint8))
    kind = "jpg" if mode in ("L", "RGB", "CMYK") else "png"
    ramp.convert("RGB").convert(mode).save(tmp_path / f"a.{kind}")
    form = ImageForm(longest_side=60)
    assert form.measure(tmp_path / f"a.{kind}") == ((60, 40), False)
    with Image.open(io.BytesIO(form.jpeg(tmp_path / f"a.{kind}", as_is=False))) as image:
        small = np.asarray(image.convert("L")).astype(int)
    with Image.open(tmp_path / f"a.{kind}") as image:
        whole = np.asarray(image.convert("RGB").convert("L").resize((60, 40), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - whole).mean() < 6
