"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

from slrnet.storage.names import short_name

__all__ = [
    "check_writable",
    "flush",
    "open_regular",
    "read_json",
    "sha256_of",
    "write_json",
    "write_text",
    "written_whole",
]

MOST_BYTES = 2**28
"""Of a file of JSON; a larger one would take gigabytes."""
UNFINISHED = ".incoming."
"""How the names of files begin that are being written."""
ABANDONED = 3600.0
"""Seconds since the last change after which a file that was being written belongs to a process that is gone."""
_KINDS = {True: "folder", False: "file"}


def check_writable(path: Path, *, folder: bool) -> Path:
    """Returns the path of a file or folder to write; tries to write there, and leaves nothing behind.

    Args:
        path: where to write; it and the folders above it need not exist.
        folder: whether a folder is to be written, not a file.

    Raises:
        ValueError: nothing can be written there, or a file is where a folder should be, or the other way round.
    """
    place = path.absolute()
    if os.path.lexists(place) and place.is_dir() is not folder:
        raise ValueError(f"{path} is {'a folder' if place.is_dir() else 'no folder'}; name a {_KINDS[folder]} to write")
    place = place if folder else place.parent
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=place):
            return path
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {place} takes no files ({error.strerror}); name a {_KINDS[folder]} in a place "
            "that you may write to"
        ) from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a new path beside `path`, of the same suffix, to write to; it takes the place of `path` when all went well.

    Its bytes are on the disk before. An error removes it; what a killed process left in the folder goes after
    `ABANDONED` seconds. Creates the folder if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent.absolute())
    incoming = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex[:8]}.{short_name(path.stem)}{path.suffix}")
    try:
        yield incoming
        flush(incoming)
        incoming.replace(path)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    flush(path.parent)


@lru_cache(maxsize=128)
def _remove_abandoned(folder: Path) -> None:
    """Looks for unfinished files once a process, because a folder may hold very many."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > ABANDONED:
                path.unlink()


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk and survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        unknown = error.errno in (errno.EINVAL, errno.ENOTSUP)  # some file systems cannot do that for folders
        if not (unknown and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def open_regular(path: Path, *, most: int | None = None) -> FileIO:
    """Opens a file for reading, unbuffered.

    Raises:
        OSError: it is missing, a folder, a pipe (which would wait), a device (which may never end), or has more than
            `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        reason = "it is no regular file but a folder, pipe or device"
    elif most is not None and status.st_size > most:
        reason = f"it has {status.st_size:,} bytes; at most {most:,} are read"
    else:
        return FileIO(descriptor)
    os.close(descriptor)
    raise OSError(errno.EINVAL, reason, str(path))


def read_json(path: Path) -> Any:
    """Reads a file of JSON.

    Raises:
        OSError: as `open_regular`, for more than `MOST_BYTES` too.
        ValueError: it is no JSON, or nested too deep.
    """
    with open_regular(path, most=MOST_BYTES) as file:
        try:
            return json.loads(file.read())
        except RecursionError:
            raise ValueError("it is nested too deep") from None


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as indented JSON; see `write_text`."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `written_whole` does."""
    with written_whole(path) as incoming:
        incoming.write_text(text, encoding="utf-8")
