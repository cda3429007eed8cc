"""The browser of data sets: what it counts and measures, what it warns of, duplicates, damage, and its pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.shard_writer import Sample, write_dataset
from slrnet.cli.main import main
from slrnet.data.catalog import voc_palette
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.tools.browse import contact_sheet, find_duplicates, survey_split, warnings_of

CLASSES = ("background", "ant", "bee", "cat")


def encode(sample: Sample) -> tuple[bytes, bytes | None]:
    """An image of one colour, and a mask whose columns go through the ids."""
    colour, ids = sample.source
    picture, mask = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (sample.width, sample.height), (40 * colour, 90, 30)).save(picture, "JPEG")
    if ids is None:
        return picture.getvalue(), None
    columns = np.array(ids, dtype=np.uint8)[np.arange(sample.width) * len(ids) // sample.width]
    Image.fromarray(np.tile(columns, (sample.height, 1))).save(mask, "PNG")
    return picture.getvalue(), mask.getvalue()


def write(folder: Path, **samples: tuple[str, tuple[int, ...] | None, list[int] | None, int]) -> ShardSet:
    """Samples by key: split, image labels, ids of the mask, colour of the image."""
    write_dataset(
        folder,
        [
            Sample(key=key, split=split, width=12, height=6, classes=labels, source=(colour, ids))
            for key, (split, labels, ids, colour) in samples.items()
        ],
        encode,
        name="tiny",
        classes=CLASSES,
        palette=voc_palette(),
        made_by="python data_prep/tiny.py",
        shards=1,
    )
    return load_dataset(folder)


GOOD: Mapping[str, Any] = {
    "a": ("train", (1,), [0, 1, 1, 1], 1),
    "b": ("train", (1, 2), None, 2),
    "c": ("train", None, None, 3),
    "d": ("train", (3,), [0, 3, 255, 255], 4),
    "e": ("val", (1, 2, 3), [1, 2, 3], 5),
}


def test_labels_are_counted_and_masks_measured(tmp_path: Path) -> None:
    survey = survey_split(write(tmp_path / "shards", **GOOD), "train", measured=10)
    assert survey.kinds == {"mask and image labels": 2, "image labels alone": 1, "no label": 1}
    assert survey.num_samples == 4
    assert survey.images.tolist() == [2, 1, 1]
    assert survey.measured == 2
    np.testing.assert_allclose(survey.pixels, [1 / 3, 1 / 2, 0, 1 / 6])
    assert survey.void == 0.25
    assert survey.all_void == survey.beyond_labels == ()
    assert survey_split(load_dataset(tmp_path / "shards"), "train", measured=1).measured == 1


def test_a_good_data_set_has_no_warnings_and_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "shards", **GOOD)
    assert main(["browse", str(tmp_path / "shards"), "--out", str(tmp_path / "seen")]) == 0
    printed = capsys.readouterr().out
    assert "no warnings" in printed
    assert printed.startswith((tmp_path / "seen" / "report.txt").read_text())
    lines = [line.split() for line in printed.splitlines()]
    assert ["1", "no", "label"] in lines
    assert ["ant", "2", "50.00%", "1", "33.33%", "#" * 30] in lines
    assert ["bee", "1", "0.00%", "1", "33.33%", "#" * 15] in lines
    assert ["void", "25.00%", "0.00%"] in lines
    with Image.open(tmp_path / "seen" / "train.jpg") as sheet:
        pixels = np.asarray(sheet).astype(int)
    assert (sheet.width, pixels.ndim) == (10 + 6 * 210, 3)
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["report.txt", "train.jpg", "val.jpg"]


def test_a_sheet_shows_image_mask_and_labels_side_by_side(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", a=("train", (1,), [1], 5), b=("train", None, None, 1))
    sheet = np.asarray(contact_sheet(shards, "train", number=5)).astype(int)
    view = shards.split("train")
    lefts = {view.key(n): 10 + 2 * n * 210 for n in range(2)}  # tiles are 200 by 100 pixels, 10 apart
    assert np.abs(sheet[84, lefts["a"] + 100] - (200, 90, 30)).max() <= 4
    red = sheet[84, lefts["a"] + 310]
    assert red[0] > red[1] + 60  # class 1 is drawn in VOC's dark red over the gray image
    assert (sheet[34:134, lefts["b"] + 210 : lefts["b"] + 410] == 255).all()
    for left in (lefts["a"], lefts["a"] + 210, lefts["b"] + 210):  # key and labels are written above
        assert sheet[10:34, left : left + 200].min() < 60
    assert contact_sheet(shards, "train", number=1).width == 10 + 2 * 210


@pytest.mark.parametrize(
    ("changes", "split", "expected"),
    [
        ({"d": ("train", (1,), [0, 1], 4)}, "train", "train: 1 of 3 classes are in no image: cat"),
        ({"d": ("train", (3,), [255], 4)}, "train", "train: 1 masks are void everywhere: d"),
        ({"d": ("train", (3,), [3, 255, 255, 255], 4)}, "train", "train: 38% of the pixels are void"),
        ({"d": ("train", (3,), [3, 2], 4)}, "train", "train: 1 masks show classes that their image labels lack: d"),
        ({"e": ("val", (1, 2, 3), None, 5)}, "val", "val: 1 images have no mask, so nothing can be measured on them"),
        ({"e": ("val", None, None, 5)}, "val", "val: no image has a label of any kind"),
    ],
)
def test_warnings(tmp_path: Path, changes: dict[str, Any], split: str, expected: str) -> None:
    shards = write(tmp_path / "shards", **{**GOOD, **changes})
    found = warnings_of(survey_split(shards, split, measured=10), shards.info, training=split == "train")
    assert expected in found


def test_duplicates_in_two_splits_are_an_error_and_within_one_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write(tmp_path / "shards", **{**GOOD, "f": ("val", (1,), [1], 3), "g": ("train", (2,), None, 1)})
    found = find_duplicates(shards)
    assert {frozenset(pair) for pair in found} == {
        frozenset([("train", "c"), ("val", "f")]),
        frozenset([("train", "a"), ("train", "g")]),
    }
    assert main(["browse", str(tmp_path / "shards"), "--out", str(tmp_path / "seen")]) == 1
    printed = capsys.readouterr().out
    assert "error: 1 duplicates in two splits: train/c = val/f" in printed
    assert "warning: 1 duplicates within a split: " in printed
    assert main(["browse", str(tmp_path / "shards"), "--out", str(tmp_path / "seen"), "--no-duplicates"]) == 0


def test_damage_and_missing_shards_are_told_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "shards", **GOOD)
    path = tmp_path / "shards" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[520:540] = bytes(20)
    path.write_bytes(data)
    assert main(["browse", str(tmp_path / "shards"), "--out", str(tmp_path / "seen")]) == 2
    assert "rebuild the data set" in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()
    assert main(["browse", str(tmp_path), "--out", str(tmp_path / "seen")]) == 2
    assert "no shards in" in capsys.readouterr().err
    assert main(["browse", str(tmp_path / "shards"), "--samples", "0"]) == 2
    assert "--samples 0" in capsys.readouterr().err
