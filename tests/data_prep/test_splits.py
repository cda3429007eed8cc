"""Names of splits, and the split of each image."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.splits import checked_splits, meant_split, splits_of
from slrnet.data.manifest import DataError

KEYS = {"a": "a.jpg", "b": "b.jpg", "c": "c.jpg"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Train", "train"),
        ("training", "train"),
        ("Validation", "val"),
        ("valid", "val"),
        ("dev", "val"),
        ("vall", "val"),
        ("Testing", "test"),
        ("trian", "train"),
        ("cat", None),
        ("3", None),
        ("", None),
    ],
)
def test_meant_split(name: str, meant: str | None) -> None:
    assert meant_split(name) == meant


def test_unknown_splits_name_the_nearest() -> None:
    checked_splits({"train": "line 2", "val": "line 3", "test": "line 4"}, "l.csv")
    match = (
        r"l.csv has the splits 'Train' \(line 2: write 'train'\), 'vla' \(line 3: write 'val'\), 'fold 3' \(line 4\); "
        "allowed are train, val, test"
    )
    with pytest.raises(DataError, match=match):
        checked_splits({"Train": "line 2", "vla": "line 3", "fold 3": "line 4"}, "l.csv")


def splits(**options: Any) -> dict[str, str]:
    given: dict[str, Any] = {"lists": None, "stated": None, "stated_by": "l.csv", "val_fraction": 0.0, "seed": 0}
    return splits_of(KEYS, **given | options)


def test_the_rest_is_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert splits() == {"a": "train", "b": "train", "c": "train"}
    assert splits(lists={"b": "val"}) == {"a": "train", "b": "val", "c": "train"}
    assert not capsys.readouterr().out
    assert splits(stated={"a": "val", "b": "test"}) == {"a": "val", "b": "test", "c": "train"}
    assert capsys.readouterr().out == "l.csv states no split of 1 image(s), which go to train: c\n"


def test_a_list_of_train_must_be_complete() -> None:
    assert splits(lists={"a": "train", "b": "val", "c": "train"}) == {"a": "train", "b": "val", "c": "train"}
    with pytest.raises(DataError, match=r"1 image\(s\) are in no list of --split: c"):
        splits(lists={"a": "train", "b": "val"})


def test_one_way_to_split() -> None:
    with pytest.raises(DataError, match="in several ways"):
        splits(lists={"a": "val"}, val_fraction=0.5)
