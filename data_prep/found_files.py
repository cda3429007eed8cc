"""Images and masks in folders: what is there, the keys of its files, which mask belongs to which image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from data_prep.source_files import read_lines
from slrnet.data.manifest import DataError

__all__ = ["find_images", "key_of", "mask_of", "read_keys", "read_splits"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def find_images(folder: Path) -> dict[str, Path]:
    """Images of a folder and the folders in it, by key; raises `DataError` if there are none."""
    if not folder.is_dir():
        raise DataError(f"--images {folder} is no folder")
    names = (os.path.join(place, name) for place, _, files in os.walk(folder) for name in files)
    paths = sorted(Path(name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES)
    if not paths:
        raise DataError(f"--images {folder} holds no images; known are {', '.join(sorted(SUFFIXES))}")
    by_key: dict[str, Path] = {}
    for path in paths:
        key = key_of(path.relative_to(folder))
        if key in by_key:
            raise DataError(f"{path} and {by_key[key]} would both be {key!r}; rename one of them")
        by_key[key] = path
    return by_key


def mask_of(image: Path, images: Path, masks: Path) -> Path | None:
    """Path of the mask of an image below the folder `images`; None if the folder `masks` has none of it."""
    path = (masks / image.relative_to(images)).with_suffix(".png")
    return path if path.is_file() else None


def read_splits(splits: Mapping[str, Path], known: Mapping[str, Path]) -> dict[str, str]:
    """Splits by key, from list files by split; raises `DataError` for images that are not `known` or in two lists."""
    split_of: dict[str, str] = {}
    for name, path in splits.items():
        for key in read_keys(path):
            if key not in known:
                raise DataError(f"{path} lists {key!r}, which is not among the images; remove it from the list")
            if key in split_of:
                raise DataError(f"image {key!r} is in the splits {split_of[key]!r} and {name!r}; keep one")
            split_of[key] = name
    return split_of


def read_keys(path: Path) -> list[str]:
    """Keys of the images in a list file, one a line."""
    return [key_of(Path(line.strip())) for line in read_lines(path, "list file") if line.strip()]


def key_of(path: Path) -> str:
    """`a/b.c.jpg` as `a_b_c`: tar readers cut names at the first dot."""
    stem = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    return "_".join(stem.parts).replace(".", "_").replace(" ", "_")
