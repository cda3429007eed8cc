"""Image labels from folders: each folder of images is a class, below folders of splits where there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_prep.class_names import class_by_label, normalized
from data_prep.label_table import ImageLabels
from data_prep.shard_writer import listed
from data_prep.splits import SPLITS, checked_splits, meant_split
from slrnet.data.manifest import DataError

__all__ = ["labels_of_folders"]

WHAT = "--labels-from-folders"


def labels_of_folders(paths: Mapping[str, str], classes: Sequence[str] | None) -> ImageLabels:
    """What the names of folders say about images: `cat/1.jpg` or `train/cat/1.jpg`; a folder `background` is no class.

    Args:
        paths: Paths of the images below their folder, by key.
        classes: Names of the foreground classes; None to take those of the folders.

    Raises:
        DataError: folders of splits have other names than those, a folder is no class, or there are no folders.
    """
    depth = int(_has_splits(list(paths.values())))
    folders = {key: path.split("/")[depth] for key, path in paths.items() if path.count("/") > depth}
    if not folders:
        raise DataError(f"{WHAT}: --images has no folders with images; each class needs one, as cat/1.jpg")
    labels = {folder: normalized(folder) for folder in sorted(set(folders.values()))}
    class_of = class_by_label({label: f"folder {folder}" for folder, label in labels.items()}, classes, WHAT)
    named = {key: class_of[labels[folder]] for key, folder in folders.items()}
    return ImageLabels(
        WHAT,
        {key: (name,) if name else () for key, name in named.items()},
        {key: path.split("/")[0] for key, path in paths.items()} if depth else None,
        tuple(sorted({name for name in class_of.values() if name})),
    )


def _has_splits(paths: Sequence[str]) -> bool:
    """Whether the first folders are splits: all are named so, and hold folders of images."""
    tops = {path.split("/")[0] for path in paths if "/" in path}
    deep = [path for path in paths if path.count("/") > 1]
    meant = {top for top in tops if meant_split(top)}
    if deep and meant and meant == tops:
        checked_splits(dict.fromkeys(sorted(tops), "a folder"), WHAT)
        return True
    if deep and len(tops & set(SPLITS)) > 1:
        raise DataError(
            f"{WHAT}: of the folders {listed(sorted(tops))} some are splits and some are not; put all images below "
            f"{', '.join(SPLITS)}, or none"
        )
    return False
