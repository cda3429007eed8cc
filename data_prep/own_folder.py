"""A folder of images as the data of a training: one that says what its images show becomes shards beside the runs."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import replace
from itertools import chain
from pathlib import Path

from data_prep.conversion import Output
from data_prep.folder import FolderInput, convert
from data_prep.label_table import read_label_table
from data_prep.splits import meant_split
from slrnet.data.images import IMAGE_SUFFIXES
from slrnet.data.manifest import DATASET_FILE
from slrnet.storage.shown import say

__all__ = ["shards_of", "understood"]

TABLES = ("labels.csv", "labels.tsv", "labels.xlsx")
"""Names of a table of image labels in the folder."""
VAL_FRACTION = 0.1
"""Share of the images that validates where nothing states splits."""
NO_CLASSES = {"images", "img", "photos", "masks", "labels", "annotations", "jpegimages", "imagesets"}
NO_CLASSES |= {"segmentationclass", "segmentationobject"}
"""Names, in lower case, of folders that other layouts have; where one of them is, folders are no classes."""


def understood(folder: Path) -> FolderInput | None:
    """How a folder of images is meant that says itself what they show; None for any other folder.

    It has a table of image labels, named as in `TABLES`, beside its images or beside their folder `images`; or two or
    more folders by class and nothing else, in folders of splits or not. A folder by class holds images and no folders,
    so the folders of runs or of data sets are none.
    """
    if not folder.is_dir() or (folder / DATASET_FILE).exists():
        return None
    entries = _entries(folder)
    for table in (entry for entry in entries if entry.name.lower() in TABLES):
        images = folder / "images"
        share = 0.0 if read_label_table(table, None).has_splits else VAL_FRACTION
        return FolderInput(images=images if images.is_dir() else folder, labels=table, val_fraction=share)
    split = all(entry.is_dir() and meant_split(entry.name) for entry in entries)
    classes = [inner for entry in entries for inner in _entries(entry)] if split else entries
    if len(classes) < 2 or not all(map(_is_class, classes)):
        return None
    return FolderInput(images=folder, labels_from_folders=True, val_fraction=0.0 if split else VAL_FRACTION)


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "@")))


def _is_class(folder: Path) -> bool:
    if not folder.is_dir() or folder.name.lower() in NO_CLASSES:
        return False
    entries = _entries(folder)
    holds_images = any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries)
    return holds_images and not any(entry.is_dir() for entry in entries)


def shards_of(folder: Path, given: FolderInput, storage: Path, *, processes: int | None = None) -> Path:
    """Shards of a folder in a folder of runs; those of an earlier call are used again while no file has changed.

    Args:
        folder: What the user gave as data.
        given: What `understood` says of it.
        storage: The folder of runs.
        processes: Worker processes of the conversion; None for one per core.

    Raises:
        DataError: something in the folder is refused; nothing is written then.
    """
    given = replace(given, images=given.images.absolute(), labels=given.labels and given.labels.absolute())
    out = storage / "shards" / f"{folder.absolute().name}-{_state(folder)[:12]}"
    words = [[name] if value is True else [name, str(value)] for name, value in given.words().items()]
    command = shlex.join(["slrnet", "prepare", "folder", *chain.from_iterable(words), "--out", str(out)])
    say(f"{folder} is a folder of images; its shards are those of: {command}")
    if not (out / DATASET_FILE).is_file():
        convert(given, Output(out, name=folder.absolute().name, processes=processes or os.cpu_count() or 1))
    return out


def _state(folder: Path) -> str:
    """A digest of the names, sizes and times of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = ((path.relative_to(folder).as_posix(), path.stat()) for path in files)
    lines = "\n".join(f"{name}\0{state.st_size}\0{state.st_mtime_ns}" for name, state in states)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
