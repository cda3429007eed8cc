"""Folders of images that a training takes as they are: what is understood, and what is left to the user's words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from data_prep.own_folder import shards_of, understood
from slrnet.data.manifest import load_dataset


def fill(folder: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".csv"):
            (folder / name).write_text("image,labels,split\na.png,cat,train\nb.png,dog;cat,val\n")
        else:
            Image.new("RGB", (9, 7), (50 * shade, 0, 0)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("cat/a.png", "dog/b.png"), {"a": [1], "b": [2]}),
        (("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"), {"a": [1], "b": [2], "c": [1]}),
        (("labels.csv", "a.png", "b.png"), {"a": [1], "b": [1, 2]}),
        (("labels.csv", "images/a.png", "images/b.png"), {"a": [1], "b": [1, 2]}),
    ],
    ids=["folders by class", "in folders of splits", "a table", "a table beside the images"],
)
def test_shards_are_made_once(
    tmp_path: Path, names: tuple[str, ...], labels: dict[str, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "photos", *names)
    given = understood(folder)
    assert given is not None
    out = shards_of(folder, given, tmp_path / "runs", processes=1)
    rows = load_dataset(out).table.to_pylist()
    assert {row["key"].rpartition("/")[2].rpartition("_")[2]: sorted(row["classes"]) for row in rows} == labels
    assert "slrnet prepare folder --images" in capsys.readouterr().out
    before = (out / "manifest.parquet").stat().st_mtime_ns
    assert shards_of(folder, given, tmp_path / "runs", processes=1) == out
    assert (out / "manifest.parquet").stat().st_mtime_ns == before
    os.utime(folder / names[-1], (0, 0))  # as another file
    assert shards_of(folder, given, tmp_path / "runs", processes=1) != out


@pytest.mark.parametrize(
    "names",
    [
        ("a.png", "b.png"),
        ("cat/a.png",),
        ("cat/a.png", "dog/b.png", "c.png"),
        ("JPEGImages/a.png", "SegmentationClass/a.png"),
        ("images/a.png", "masks/a.png"),
        ("first/panels/a.png", "second/panels/a.png"),
        ("first/panels.png", "second/checkpoints/a.png"),
        ("one/train-000000.tar.png/a.png", "two/dataset.json.png"),
    ],
    ids=" ".join,
)
def test_other_folders_are_not_guessed_at(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert understood(fill(tmp_path / "photos", *names)) is None


def test_shards_and_missing_folders_are_left_alone(tmp_path: Path) -> None:
    assert understood(tmp_path / "none") is None
    (fill(tmp_path / "set", "cat/a.png", "dog/b.png") / "dataset.json").write_text("{}")
    assert understood(tmp_path / "set") is None
