"""Data sets in object stores: `s3://BUCKET/FOLDER` (any endpoint) and `gs://BUCKET/FOLDER`, by path alone.

Description and manifest are copied to this machine when the data set is opened, a shard when its first sample is asked
for. Copies lie in `SLRNET_CACHE` (default: ~/.cache/slrnet), shared by all processes of the machine; where they take
more than `SLRNET_CACHE_GB` (default: 100) the shards that were not used for longest go. A shard is compared with the
manifest, sample by sample, before it is used; a copy that differs is made again once. What the store refuses for a
while is tried again.

Credentials come from the environment or the machine's role, as the cloud's own tools take them; an endpoint other than
Amazon's from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from slrnet.storage.files import written_whole

__all__ = ["RemoteError", "cached", "copy_from", "filesystem_of", "is_remote", "locked", "open_cached", "patiently"]

ATTEMPTS = 6
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; doubled each time."""
SCHEMES = ("s3://", "gs://")

Value = TypeVar("Value")

_log = logging.getLogger(__name__)


class RemoteError(ValueError):
    """A file of an object store cannot be had; the message names it and the remedy."""


def is_remote(location: str) -> bool:
    """Whether a data set's location is one in an object store.

    Raises:
        RemoteError: it has a scheme that is not supported.
    """
    if "://" not in location:
        return False
    if not location.startswith(SCHEMES):
        raise RemoteError(f"{location} is of a kind that is not read; allowed are folders, s3:// and gs://")
    return True


def cached(location: str) -> Path:
    """The folder on this machine that holds the copies of a location's files."""
    root = Path(os.environ.get("SLRNET_CACHE") or "~/.cache/slrnet").expanduser()
    return root / hashlib.sha256(location.rstrip("/").encode()).hexdigest()[:16]


def open_cached(
    location: str, name: str, *, again: bool = False, check: Callable[[Path], None] = lambda path: None
) -> Path:
    """The copy of a file on this machine, made now where it is missing.

    Args:
        location: of the folder.
        name: of the file in it.
        again: make it anew where it exists.
        check: raises ValueError for a copy that is not as it must be; it is then made once more.

    Raises:
        RemoteError: the store does not have the file, or refuses it.
        ValueError: the check refuses the second copy too.
    """
    path = cached(location) / name
    with locked(path):
        if again or not path.exists():
            source = f"{location.rstrip('/')}/{name}"
            try:
                _copy(source, path, check)
            except RemoteError:
                raise
            except ValueError as error:
                _log.warning("the copy of %s is damaged (%s); making it again", source, error)
                _copy(source, path, check)
            _make_room(path)
        os.utime(path)  # the last use
    return path


def copy_from(source: str, target: Path) -> None:
    """Copies a file of an object store, whole or not at all, into a folder that is made if missing.

    Raises:
        RemoteError: the store does not have the file, or refuses it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _copy(source, target, lambda path: None)


def _copy(source: str, target: Path, check: Callable[[Path], None]) -> None:
    with written_whole(target) as incoming:
        _download(source, incoming)
        check(incoming)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time has a path, which need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(source: str, target: Path) -> None:
    def copy() -> None:
        system, path = filesystem_of(source)
        with system.open_input_stream(path) as incoming, target.open("wb") as file:
            shutil.copyfileobj(incoming, file, 2**22)

    patiently(source, copy)


def patiently(source: str, act: Callable[[], Value]) -> Value:
    """What `act` gives, which asks an object store for `source` and is tried again where that fails for a while.

    Raises:
        RemoteError: the store does not have it, refuses it, or does not answer.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        except FileNotFoundError:
            raise RemoteError(f"{source} does not exist; check the path, or upload the data set whole") from None
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            if attempt == ATTEMPTS or "ACCESS_DENIED" in reason:
                break
            _log.warning("%s cannot be read (%s); trying again in %.0f s", source, reason, pause)
            time.sleep(pause)
            pause *= 2
    raise RemoteError(
        f"{source} cannot be read: {reason}; check credentials (environment or role), region and endpoint"
    )


def filesystem_of(source: str) -> tuple[Any, str]:
    """Arrow's file system for a location, and the path in it."""
    scheme, _, path = source.partition("://")
    return _open_filesystem(scheme, os.getpid()), path


@cache
def _open_filesystem(scheme: str, process: int) -> Any:
    """One per process: the connections of a parent are no use to its children."""
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(endpoint_override=endpoint, region=region)


def _make_room(keep: Path) -> None:
    """Removes the shards that were not used for longest until the rest fits; who reads one goes on doing so."""
    limit = float(os.environ.get("SLRNET_CACHE_GB") or 100) * 1e9
    root = keep.parent.parent
    copies = []
    for path in root.glob("*/[!.]*.tar"):  # not those on their way
        try:
            status = path.stat()
        except FileNotFoundError:  # another process made room
            continue
        copies.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size
