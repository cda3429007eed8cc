"""Where annotation files of COCO's form and their images lie: as COCO, CVAT and Roboflow lay them out."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from slrnet.data.images import IMAGE_SUFFIXES
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["YEARS", "Part", "find_parts", "unlisted_images"]

YEARS = (2014, 2017)
SPLIT_OF = {
    **dict.fromkeys(("train", "training", "default"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Splits by the names that exports give them; CVAT calls its only one `default`."""
ROBOFLOW = "_annotations.coco.json"


@dataclass(frozen=True)
class Part:
    """An annotation file, and the folders in which its images may lie, the preferred one first."""

    split: str
    path: Path
    folders: tuple[Path, ...]

    def image_path(self, file_name: str) -> Path:
        """Path of an image; if there is no such file, where it should be.

        Names that are equal once their accents are composed match: Macs store `é` as two characters.

        Raises:
            DataError: the name is no path below a folder.
        """
        name = self.relative(file_name)
        paths = [folder / name for folder in self.folders]
        for path in paths:
            if os.path.isfile(path):  # false also for a name that no file can have
                return path
        composed = unicodedata.normalize("NFC", str(name))
        return next((files[composed] for files in self._composed if composed in files), paths[0])

    def relative(self, file_name: str) -> PurePosixPath:
        """An image's name as a path below the folders, without the `\\` of Windows.

        Raises:
            DataError: the name is no path below a folder.
        """
        name = PurePosixPath(file_name.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or not name.name or re.match("[A-Za-z]:", file_name):
            raise DataError(
                f"{self.path} has the image name {file_name!r}; paths of files in {self.folders[0]} are allowed"
            )
        return name

    def is_last_resort(self, folder: Path) -> bool:
        """Whether a folder is one of several, and holds the others: images there may well be none of the data set's."""
        return len(self.folders) > 1 and folder == self.folders[-1]

    @cached_property
    def _composed(self) -> list[dict[str, Path]]:
        """Files of each folder by their composed names."""
        return [
            {unicodedata.normalize("NFC", path.relative_to(folder).as_posix()): path for path in _files(folder)}
            for folder in self.folders
        ]


def find_parts(root: Path, year: int | None) -> tuple[list[Part], int | None]:
    """The annotation files below a folder with their splits, and the year of COCO in their names, if there is one.

    Raises:
        DataError: there is none, two are of one split, or the year leaves a choice.
    """
    found = {path.stem.removeprefix("instances_"): path for path in sorted(root.glob("annotations/instances_*.json"))}
    found |= {path.parent.name: path for path in sorted(root.glob(f"*/{ROBOFLOW}"))}
    if not found and (root / ROBOFLOW).is_file():
        found["default"] = root / ROBOFLOW
    if not found:
        raise DataError(
            f"--root {root} has no annotations/instances_train2017.json or the like (COCO, CVAT), and no "
            f"train/{ROBOFLOW} (Roboflow); give the folder that holds them, or one file with --images DIR --json FILE"
        )
    years = [each for each in YEARS if any(name.endswith(str(each)) for name in found)]
    if year is None and len(years) > 1:
        raise DataError(f"--root {root} has annotations of both years; choose with --year")
    if year is not None and year not in years:
        raise DataError(f"--root {root} has no annotations of {year}, only {', '.join(map(str, found.values()))}")
    chosen = year or next(iter(years), None)
    return _parts(root, found, chosen), chosen


def _parts(root: Path, found: dict[str, Path], year: int | None) -> list[Part]:
    parts: dict[str, Part] = {}
    for name, path in found.items():
        if any(each != year and name.endswith(str(each)) for each in YEARS):
            continue
        split = SPLIT_OF.get(name.lower().removesuffix(str(year)).rstrip("-_"))
        if split is None:
            say(f"left out {path}: {name!r} is none of {', '.join(SPLIT_OF)}")
        elif split in parts:
            raise DataError(f"{parts[split].path} and {path} are both the split {split!r}; move one of them away")
        else:
            parts[split] = Part(split, path, _folders(root, name, path))
    if not parts:
        raise DataError(f"none of the annotation files of --root {root} is of train, val or test; rename them so")
    return list(parts.values())


def _folders(root: Path, name: str, path: Path) -> tuple[Path, ...]:
    if path.name == ROBOFLOW:
        return (path.parent,)
    folders = [folder for folder in (root / name, root / "images" / name, root / "images") if folder.is_dir()]
    if not folders and not any(map(_is_image, root.iterdir())):
        raise DataError(
            f"--root {root} has no folder {name} with images, nor images/{name}, nor images; unpack them there"
        )
    return (*folders, root)


def unlisted_images(parts: Sequence[Part], listed: Iterable[Path]) -> list[Path]:
    """Images in the folders of listed ones that no annotation file lists, sorted."""
    known = set(listed)
    parents = {str(path.parent) + os.sep for path in known}
    folders = {folder for part in parts for folder in part.folders if not part.is_last_resort(folder)}
    used = [folder for folder in folders if any(parent.startswith(f"{folder}{os.sep}") for parent in parents)]
    return sorted({path for folder in used for path in _files(folder) if _is_image(path)} - known)


def _files(folder: Path) -> Iterator[Path]:
    """All files of a folder and the folders in it."""
    return (Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES
