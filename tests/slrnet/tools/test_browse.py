"""The browser of data sets: what it counts and measures, what it warns of, duplicates, damage, and its pictures."""

from __future__ import annotations

import io
import re
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
from slrnet.tools.browse import (
    ImageSurvey,
    contact_sheet,
    set_warnings,
    survey_images,
    survey_split,
    warnings_of,
)

CLASSES = ("background", "ant", "bee", "cat")


def pattern(seed: int, size: tuple[int, int], *, noise: int = 0) -> Image.Image:
    """Blocks of random grays, those of a seed alike at any size; `noise` is the seed of a little of it."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8), dtype=np.uint8)
    image = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).convert("RGB")).astype(int)
    image = image + np.random.default_rng(noise).integers(-4, 5, image.shape) * (noise > 0)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def encode(sample: Sample) -> tuple[bytes, bytes | None]:
    """An image of one colour if that is negative, else of a pattern, and a mask whose columns go through the ids."""
    colour, ids = sample.source
    picture, mask = io.BytesIO(), io.BytesIO()
    size = (sample.width, sample.height)
    if not isinstance(colour, Image.Image):
        colour = Image.new("RGB", size, (40 * -colour, 90, 30)) if colour < 0 else pattern(colour, size)
    colour.save(picture, "JPEG", quality=95)
    if ids is None:
        return picture.getvalue(), None
    columns = np.array(ids, dtype=np.uint8)[np.arange(sample.width) * len(ids) // sample.width]
    Image.fromarray(np.tile(columns, (sample.height, 1))).save(mask, "PNG")
    return picture.getvalue(), mask.getvalue()


def write(folder: Path, **samples: Any) -> ShardSet:
    """Samples by key: split, image labels, ids of the mask, colour or picture of the image, and perhaps its size."""
    write_dataset(
        folder,
        [
            Sample(key=key, split=split, width=size[0], height=size[1], classes=labels, source=(colour, ids))
            for key, (split, labels, ids, colour, *rest) in samples.items()
            for size in rest or [colour.size if isinstance(colour, Image.Image) else (48, 40)]
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
    "f": ("train", (2,), None, 6),
}


def test_labels_are_counted_and_masks_measured(tmp_path: Path) -> None:
    survey = survey_split(write(tmp_path / "shards", **GOOD), "train", measured=10)
    assert survey.kinds == {"mask and image labels": 2, "image labels alone": 2, "no label": 1}
    assert survey.num_samples == 5
    assert survey.images.tolist() == [2, 2, 1]
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
    assert ["bee", "2", "0.00%", "1", "33.33%", "#" * 30] in lines
    assert ["void", "25.00%", "0.00%"] in lines
    with Image.open(tmp_path / "seen" / "train.jpg") as sheet:
        pixels = np.asarray(sheet).astype(int)
    assert (sheet.width, pixels.ndim) == (10 + 6 * 210, 3)
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["report.txt", "train.jpg", "val.jpg"]


def test_a_sheet_shows_image_mask_and_labels_side_by_side(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", a=("train", (1,), [1], -5), b=("train", None, None, -1))
    sheet = np.asarray(contact_sheet(shards, "train", number=5)).astype(int)
    view = shards.split("train")
    lefts = {view.key(n): 10 + 2 * n * 210 for n in range(2)}  # tiles are 200 by 167 pixels, 10 apart
    assert np.abs(sheet[84, lefts["a"] + 100] - (200, 90, 30)).max() <= 4
    red = sheet[84, lefts["a"] + 310]
    assert red[0] > red[1] + 60  # class 1 is drawn in VOC's dark red over the gray image
    assert (sheet[34:134, lefts["b"] + 210 : lefts["b"] + 410] == 255).all()
    for left in (lefts["a"], lefts["a"] + 210, lefts["b"] + 210):  # key and labels are written above
        assert sheet[10:34, left : left + 200].min() < 60
    assert contact_sheet(shards, "train", number=1).width == 10 + 2 * 210


ODD = "images have an odd size"


@pytest.mark.parametrize(
    ("changes", "split", "expected"),
    [
        ({"d": ("train", (1,), [0, 1], 4)}, "train", "1 of 3 classes are in no image: cat; they cannot be learned"),
        ({"d": ("train", (3,), [255], 4)}, "train", "1 masks are void everywhere: d; they teach nothing"),
        ({"d": ("train", (3,), [3, 255, 255, 255], 4)}, "train", "38% of the pixels are void; losses and scores"),
        ({"d": ("train", (3,), [3, 2], 4)}, "train", "1 masks show classes that their image labels lack: d; training"),
        ({"d": ("train", (1, 3), [0, 3], 4)}, "train", "1 masks lack a class that their image labels name: d; "),
        ({"d": ("train", (3,), [0, 255], 4)}, "train", "1 masks hold 0 and 255 alone: d; 255 is void, so they show no"),
        ({"d": ("train", (3,), [3, 3, 255], 4)}, "train", "1 masks are one class everywhere: d; they teach no border"),
        (
            {"f": ("train", (1, 2), None, 6)},
            "train",
            "1 classes never occur alone: bee (mostly with ant); image labels",
        ),
        (
            {key: ("train", (1, 2, 3)[: n + 1], None, n) for n, key in enumerate("abdf")},
            "train",
            "1 classes are in every image: ant; image labels cannot tell them from the background: add images",
        ),
        ({"e": ("val", (1, 2, 3), None, 5)}, "val", "1 images have no mask, so nothing can be measured on them; add"),
        ({"e": ("val", None, None, 5)}, "val", "no image has a label of any kind: nothing can be learned from"),
        ({"d": ("train", (3,), [0, 3], 4, (20, 40))}, "train", f"1 {ODD}: d (20 x 40); a side below 32 pixels"),
        ({"d": ("train", (3,), [0, 3], 4, (33, 400))}, "train", f"1 {ODD}: d (33 x 400); "),
        ({"d": ("train", (3,), [0, 3], 4, (420, 400))}, "train", f"1 {ODD}: d (420 x 400); "),
    ],
)
def test_warnings(tmp_path: Path, changes: dict[str, Any], split: str, expected: str) -> None:
    good, shards = write(tmp_path / "good", **GOOD), write(tmp_path / "shards", **{**GOOD, **changes})
    before, found = (
        warnings_of(survey_split(of, split, measured=10), of.info, training=split == "train") for of in (good, shards)
    )
    assert before == []
    assert any(text.startswith(f"{split}: {expected}") for text in found), found


def test_a_list_names_ten_and_counts_the_others(tmp_path: Path) -> None:
    many = {f"k{n:02}": ("train", (3,), [255], 4) for n in range(13)}
    shards = write(tmp_path / "shards", **many)
    found = warnings_of(survey_split(shards, "train", measured=20), shards.info, training=True)
    (text,) = [text for text in found if "void everywhere" in text]
    assert text.startswith("train: 13 masks are void everywhere: k")
    assert (text.count("k", 0, text.index(" and 3 more; ")) - text.count("mask"), text.count(", k")) == (10, 9)


def test_images_that_look_alike_or_show_nothing_are_found_in_one_pass(tmp_path: Path) -> None:
    def near(seed: int, noise: int, size: tuple[int, int]) -> tuple[str, None, None, Image.Image]:
        return "val", None, None, pattern(seed, size, noise=noise)

    shards = write(
        tmp_path / "shards",
        **GOOD,
        again=near(3, 7, (64, 50)),  # like c, noisier and larger
        other=near(40, 7, (64, 50)),
        plain=("val", None, None, -2),
        dark=("train", None, None, Image.fromarray(np.arange(16, dtype=np.uint8).repeat(16).reshape(16, 16) % 12)),
        copy=("val", None, None, 2),
    )
    found = survey_images(shards)
    assert found.alike == ((("train", "c"), ("val", "again")),)
    assert found.duplicates == ((("train", "b"), ("val", "copy")),)
    assert sorted(found.constant) == [("train", "dark"), ("val", "plain")]
    warnings, errors = set_warnings(shards.info, found, {"train": 2, "val": 1})
    assert [text.split(":")[0] for text in (*warnings, *errors)] == [
        "1 images look alike in two splits",
        "2 images are nearly constant (fewer than 16 of 256 levels)",
        "1 duplicates in two splits",
    ]
    assert "train/c ~ val/again; scores on images that were trained on are too good" in warnings[0]


def test_every_image_finds_its_like_among_many(tmp_path: Path) -> None:
    train = {f"t{n:03}": ("train", None, None, pattern(n, (40, 40))) for n in range(60)}
    val = {f"v{n:03}": ("val", None, None, pattern(n, (40, 40), noise=n + 1)) for n in range(0, 60, 2)}
    found = survey_images(write(tmp_path / "shards", **train, **val))
    assert {pair[1][1]: pair[0][1] for pair in found.alike} == {f"v{n:03}": f"t{n:03}" for n in range(0, 60, 2)}


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"train": 4}, ["no split but train has a mask"]),
        ({"train": 4, "val": 0}, ["no split but train has a mask"]),
        ({"train": 0, "val": 2}, []),
        ({"test": 2}, []),
    ],
)
def test_a_data_set_without_masks_to_measure_on_is_told(
    tmp_path: Path, masks: dict[str, int], expected: list[str]
) -> None:
    info = write(tmp_path / "shards", **GOOD).info
    warnings, errors = set_warnings(info, ImageSurvey(), masks)
    assert ([text.split(",")[0] for text in warnings], errors) == (expected, [])


def test_texts_of_others_are_shown_with_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "shards", **GOOD, **{"k\x9b31m": ("train", (3,), [255], 9)})
    assert main(["browse", str(tmp_path / "shards"), "--out", str(tmp_path / "seen")]) == 0
    printed = capsys.readouterr().out + (tmp_path / "seen" / "report.txt").read_text()
    assert printed.count("masks are void everywhere: k\\x9b31m;") == 2
    assert "\x9b" not in printed


def test_duplicates_in_two_splits_are_an_error_and_within_one_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write(tmp_path / "shards", **{**GOOD, "f": ("val", (1,), [1], 3), "g": ("train", (2,), None, 1)})
    found = survey_images(shards)
    assert {frozenset(pair) for pair in found.duplicates} == {
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
    command = ["browse", str(tmp_path / "shards"), "--out", str(tmp_path / "seen")]
    assert main(command) == 3
    report = capsys.readouterr().out
    assert "damaged: 1 samples cannot be read and are left out above; " in report
    assert "rebuild the data set with" in report
    assert re.search(r"  train-000000.tar: (\w+): \S+", report)
    assert "train: 5 images" in report
    assert (tmp_path / "seen" / "train.jpg").is_file()
    assert main([*command, "--skip-damaged"]) == 0
    path.unlink()
    assert main(command) == 3
    assert "damaged: 5 samples" in capsys.readouterr().out
    assert main(["browse", str(tmp_path), "--out", str(tmp_path / "seen")]) == 2
    assert "no shards in" in capsys.readouterr().err
    assert main(["browse", str(tmp_path / "shards"), "--samples", "0"]) == 2
    assert "--samples 0" in capsys.readouterr().err
