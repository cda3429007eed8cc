"""Folders that slrnet makes and removes: it removes what it made, beneath a given folder, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MARK", "mark_folder", "remove_folder", "whole_folder"]

MARK = ".slrnet"
"""Empty file in a folder that slrnet made for itself and may remove."""


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
    if folder.is_symlink() or within.resolve() not in folder.resolve().parents:
        raise ValueError(f"{folder} is not removed: it is a link, or not beneath {within}")
    if not folder.exists():
        return
    if not (folder / MARK).is_file():
        strangers = [path.name for path in folder.rglob("*") if path.name not in own and not _is_unfinished(path)]
        if strangers:
            raise ValueError(f"{folder} is not removed: it holds {strangers[0]!r}, which slrnet did not write; move it")
    shutil.rmtree(folder)


@contextmanager
def whole_folder(target: Path, *, own: Collection[str] | None = None) -> Iterator[Path]:
    """Gives a new folder beside `target`, of a name of its own, that takes the place of `target` when all went well.

    An error removes it. With `own`, an earlier `target` is removed as `remove_folder` does; else it must be missing or
    empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if own is not None:
            remove_folder(target, within=target.parent, own=own)
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith(".incoming.")
