"""The splits of a data set: their names, and the split of each image."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from data_prep.shard_writer import listed
from data_prep.source_files import drawn_split
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["OTHER_NAMES", "SPLITS", "checked_splits", "meant_split", "splits_of"]

SPLITS = ("train", "val", "test")
"""Names that a split may have: training and evaluation look for them."""
OTHER_NAMES = {
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "training": "train",
    "testing": "test",
}


def meant_split(name: str, *, likeness: float = 0.75) -> str | None:
    """The split that a name probably means, in any case and form: `val` for `Validation`; None if it means none.

    Misspelled names mean the nearest one if their share of common letters is at least `likeness`.
    """
    word = name.strip().lower()
    if word in SPLITS or word in OTHER_NAMES:
        return word if word in SPLITS else OTHER_NAMES[word]
    nearest = difflib.get_close_matches(word, [*SPLITS, *OTHER_NAMES], n=1, cutoff=likeness)
    return OTHER_NAMES.get(nearest[0], nearest[0]) if nearest else None


def checked_splits(names: Mapping[str, str], what: str) -> None:
    """Raises `DataError` if a name is not a split's; says which one is probably meant.

    Args:
        names: Where each name stands, such as `line 3`, by name.
        what: What has them: a file or an option.
    """
    unknown = []
    for name, where in names.items():
        if name not in SPLITS:
            meant = meant_split(name, likeness=0.6)
            unknown.append(f"{name!r} ({where}" + (f": write {meant!r})" if meant else ")"))
    if unknown:
        raise DataError(f"{what} has the splits {listed(unknown)}; allowed are {', '.join(SPLITS)}, written so")


def splits_of(
    keys: Mapping[str, object],
    *,
    lists: Mapping[str, str] | None,
    stated: Mapping[str, str] | None,
    stated_by: str,
    val_fraction: float,
    seed: int,
) -> dict[str, str]:
    """The split of each image.

    Args:
        keys: Keys of all images.
        lists: Splits by key from list files; None without list files.
        stated: Splits by key from the table of labels or the names of folders; None if those state none.
        stated_by: What messages call that source.
        val_fraction: Share of the images that becomes `val`, chosen by key and seed.
        seed: Seed of that choice.

    Raises:
        DataError: splits come from several sources, or there is a list of `train` that lacks images.
    """
    if sum([lists is not None, val_fraction > 0, stated is not None]) > 1:
        raise DataError(
            "splits are given in several ways; use one of --split, --val-fraction and the splits that "
            f"{stated_by or 'the table'} states"
        )
    named = stated if lists is None else lists
    if named is None:
        return {key: drawn_split(key, val_fraction, seed) for key in keys}
    missing = [key for key in keys if key not in named]
    if missing and lists is not None and "train" in lists.values():
        raise DataError(
            f"{len(missing)} image(s) are in no list of --split: {listed(missing)}; add them to one, or give no list "
            "of train: then the rest is train"
        )
    if missing and lists is None:
        say(f"{stated_by} states no split of {len(missing)} image(s), which go to train: {listed(missing)}")
    return {key: named.get(key, "train") for key in keys}
