"""Folders that slrnet makes and removes: it removes what it made, beneath a given folder, and nothing else."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slrnet.storage.files import ABANDONED, UNFINISHED, flush
from slrnet.storage.names import short_name

__all__ = ["MARK", "alone_in", "flush_folder", "mark_folder", "remove_folder", "whole_folder"]

MARK = ".slrnet"
"""Empty file in a folder that slrnet made for itself and may remove."""
_EARLIER = f"{MARK}.earlier"
"""What takes the place of another folder is beside it under this name, where the two cannot be swapped."""
_HERE, _SWAP = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


def mark_folder(folder: Path) -> None:
    """Makes a folder of slrnet's own, if it is missing or empty; one with files of others stays unmarked."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / MARK).touch()


def remove_folder(folder: Path, *, within: Path, own: Collection[str] = ()) -> None:
    """Removes a folder that slrnet made, if it is there.

    Args:
        folder: the folder.
        within: a folder above it, which stays.
        own: names of files; a folder that holds such ones alone is slrnet's even if it is not marked.

    Raises:
        ValueError: it is not beneath `within`, is a link, or holds what slrnet did not make.
        OSError: the file system refuses.
    """
    _check_own(folder, within, own)
    if folder.exists():
        shutil.rmtree(folder)


def _check_own(folder: Path, within: Path, own: Collection[str]) -> None:
    if folder.is_symlink() or within.resolve() not in folder.resolve().parents:
        raise ValueError(f"{folder} is not removed: it is a link, or not beneath {within}")
    if folder.exists() and not (folder / MARK).is_file():
        strangers = [
            path.name for path in folder.rglob("*") if not (path.name in own or path.name.startswith(UNFINISHED))
        ]
        if strangers:
            raise ValueError(f"{folder} is not removed: it holds {strangers[0]!r}, which slrnet did not write; move it")


def flush_folder(folder: Path) -> None:
    """Waits until all in a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            flush(path)


@contextmanager
def whole_folder(target: Path, *, own: Collection[str] | None = None) -> Iterator[Path]:
    """Gives a new folder beside `target`, of a name of its own, that takes the place of `target` when all went well.

    All in it is on the disk before. An error removes it, and the next call for `target` what a killed process left.
    With `own`, an earlier `target` is removed as `remove_folder` does, whole until the new one is ready; else it must
    be missing or empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".{glob.escape(short_name(target.name))}.*.partial"):
        _remove_abandoned(abandoned, target)
    with _unfinished(target) as aside:
        folder = aside / target.name
        folder.mkdir()
        yield folder
        flush_folder(folder)
        if own is None or not target.exists():
            folder.replace(target)
        else:
            _check_own(target, target.parent, own)
            if not _exchange(folder, target):
                target.replace(aside / _EARLIER)
                folder.replace(target)
    flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders at once, so that both names always exist; False if the system or file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _SWAP) == 0)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lets one process of this machine at a time work in a folder, and leaves nothing there.

    All enter together where there is no such folder, or its file system has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A marked folder beside a target, removed at the end; its lock, which ends with the process, shows it in use."""
    name = short_name(target.name)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=target.parent))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks; there, nobody removes it
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        (folder / MARK).touch()
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path, target: Path) -> None:
    """Removes a marked folder unless a process has it locked; gives back a target that was not replaced to the end.

    An empty one, whose maker was killed before it could mark it, goes after `ABANDONED` seconds.
    """
    if folder.is_symlink():
        return
    with suppress(OSError):
        if not (folder / MARK).is_file():
            if time.time() - folder.stat().st_mtime > ABANDONED:
                folder.rmdir()
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / _EARLIER).exists() and not target.exists():
                (folder / _EARLIER).replace(target)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)
