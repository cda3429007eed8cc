"""Images and masks in folders: what is there, what is left out and why, and the keys of the files.

Links are followed. Nothing is passed over without a word: hidden files, the files of tools and what is no image are
counted and named, a link that leads nowhere is an error.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from data_prep.shard_writer import listed
from slrnet.data.images import IMAGE_SUFFIXES
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["find_pictures", "key_of", "paths_by_key"]

HEIC = {".heic", ".heif", ".hif"}
TOOL_FILES = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
TOOL_FILES |= {"thumbs.db", "desktop.ini", "__pycache__", "icon\r"}
"""Names, in lower case, that systems and tools put into folders; hidden ones begin with a dot."""
UNFINISHED = (".tmp", ".part", ".crdownload", "~")
KEY_BYTES = 90
"""Bytes of the longest key that a tar's header holds."""

_TOOLS, _LOOP, _SPECIAL, _BROKEN = "hidden or of a tool", "links into themselves", "no regular files", "broken"


def find_pictures(folder: Path, option: str, *, apart: Path | None = None) -> list[str]:
    """Finds the images or masks in a folder and the folders in it; says what is left out.

    Args:
        folder: The folder, an absolute path.
        option: The option that names it, for messages.
        apart: A folder that may lie in it and does not belong to it.

    Returns:
        Their paths below the folder, with `/`, in order.

    Raises:
        DataError: the folder is none, or cannot be read; it has broken links, names that are not UTF-8, HEIC photos
            that cannot be read here, or no images.
    """
    if not folder.is_dir():
        raise DataError(f"{option} {folder} is no folder")
    found: dict[str, list[str]] = {}
    for path, reason in _entries(folder, "", apart, ()):
        kind = reason or ("" if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES else "no images by their suffix")
        found.setdefault(kind, []).append(path)
    if links := found.get(_BROKEN):
        raise DataError(
            f"{option} {folder} has {len(links)} broken link(s): {listed(links)}; restore what they point to, or "
            "take them elsewhere"
        )
    paths = found.pop("", [])
    for reason, names in found.items():
        say(f"{option}: left out {len(names)} file(s) or folder(s) that are {reason}: {listed(names)}")
    if not paths:
        raise DataError(f"{option} {folder} holds no images; known are {', '.join(sorted(IMAGE_SUFFIXES))}")
    photos = [path for path in paths if os.path.splitext(path)[1].lower() in HEIC]
    if photos and find_spec("pillow_heif") is None:
        raise DataError(
            f"{option} {folder} has {len(photos)} HEIC photo(s): {listed(photos)}; run `pip install 'slrnet[heic]'`, "
            "or convert them"
        )
    return sorted(paths)


def _entries(
    place: Path, below: str, apart: Path | None, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, str]]:
    """Paths below the first folder, and why each is left out: an empty text for files that are not."""
    try:
        status = os.stat(place)
        with os.scandir(place) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {place}: {error.strerror}") from None
    above = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        path = below + _text(entry.name, place)
        if entry.name.startswith(".") or entry.name.lower() in TOOL_FILES or entry.name.lower().endswith(UNFINISHED):
            yield path + ("/" if entry.is_dir() else ""), _TOOLS
        elif entry.is_dir():
            if apart is not None and os.path.samefile(entry.path, apart):
                continue
            target = os.stat(entry.path)
            if (target.st_dev, target.st_ino) in above:
                yield path + "/", _LOOP
            else:
                yield from _entries(Path(entry.path), path + "/", apart, above)
        elif entry.is_file():
            yield path, ""
        else:
            broken = entry.is_symlink()
            yield (f"{path} -> {os.readlink(entry.path)}", _BROKEN) if broken else (path, _SPECIAL)


def _text(name: str, place: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place} has a file name that is not UTF-8: {os.fsencode(name)!r}; rename it, as with `convmv -f cp1252 "
            "-t utf8`"
        ) from None
    return name


def paths_by_key(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """Paths of a folder's images by key.

    Raises:
        DataError: images would have one key.
    """
    by_key: dict[str, str] = {}
    same = [f"{by_key[key]} and {path}" for path in paths if by_key.setdefault(key := key_of(path), path) != path]
    if same:
        raise DataError(
            f"{len(same)} image(s) of {folder} would have the name of another one in the shards, where suffixes go and "
            f"`/`, `.` and spaces become `_`: {listed(same)}; rename one of each"
        )
    return by_key


def key_of(path: str | os.PathLike[str]) -> str:
    """`a/b.c.jpg` as `a_b_c`: tar readers cut names at the first dot. Long names end in a digest."""
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", os.fspath(path)))
    name = stem if suffix.lower() in IMAGE_SUFFIXES else stem + suffix
    key = re.sub(r"[\s/\\.\x00-\x1f]", "_", name)
    data = key.encode("utf-8", "replace")
    if len(data) <= KEY_BYTES:
        return key
    digest = hashlib.sha256(data).hexdigest()[:10]
    return data[: KEY_BYTES - 11].decode("utf-8", "ignore") + "_" + digest
