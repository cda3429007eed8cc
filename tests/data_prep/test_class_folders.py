"""Image labels from the names of folders."""

from __future__ import annotations

import pytest

from data_prep.class_folders import labels_of_folders
from slrnet.data.manifest import DataError


def paths(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def test_each_folder_is_a_class() -> None:
    found = labels_of_folders(
        paths("cats/1.jpg", "cats/more/2.jpg", "hot dogs/1.jpg", "background/1.jpg", "3.jpg"), None
    )
    assert found.class_names == ("cats", "hot dogs")
    assert found.labels == {
        "cats/1.jpg": ("cats",),
        "cats/more/2.jpg": ("cats",),
        "hot dogs/1.jpg": ("hot dogs",),
        "background/1.jpg": (),
    }
    assert found.splits is None


def test_splits_above() -> None:
    found = labels_of_folders(paths("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"), None)
    assert found.labels["val/cat/1.jpg"] == ("cat",)
    assert found.class_names == ("cat", "dog")
    assert found.splits == {"train/cat/1.jpg": "train", "train/dog/1.jpg": "train", "val/cat/1.jpg": "val"}


def test_trains_are_a_class_of_vehicles() -> None:
    assert labels_of_folders(paths("train/1.jpg", "car/1.jpg"), None).class_names == ("car", "train")
    assert labels_of_folders(paths("train/1.jpg", "train/2.jpg"), None).class_names == ("train",)


@pytest.mark.parametrize(
    ("names", "classes", "match"),
    [
        (["1.jpg"], None, "has no folders with images"),
        (
            ["training/cat/1.jpg", "validation/cat/1.jpg"],
            None,
            "'training' .*write 'train'.*'validation' .*write 'val'",
        ),
        (["train/cat/1.jpg", "val/cat/1.jpg", "extra/cat/1.jpg"], None, "some are splits and some are not"),
        (["Cat/1.jpg", "cat/1.jpg"], None, r"several ways: 'Cat' \(folder Cat\), 'cat'"),
        (["cat/1.jpg", "bird/1.jpg"], ["cat", "dog"], r"no class: 'bird' \(folder bird\)"),
    ],
)
def test_refused(names: list[str], classes: list[str] | None, match: str) -> None:
    with pytest.raises(DataError, match=match):
        labels_of_folders(paths(*names), classes)
