"""Data sets in object stores: `s3://BUCKET/FOLDER` (any endpoint) and `gs://BUCKET/FOLDER`, by path alone.

A file is copied to this machine when it is asked for. Copies lie in `SLRNET_CACHE` (default: ~/.cache/slrnet), shared
by all processes of the machine. When they take more than `SLRNET_CACHE_GB` (default: 100), the shards that were used
least recently are removed. A request that the store refuses for a while is tried again. Credentials come from the
environment or the machine's role, as the cloud's own tools take them; an endpoint other than Amazon's comes from
AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slrnet.storage.files import written_whole
from slrnet.storage.shown import logger_of, without_secrets

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = [
    "RemoteError",
    "cached",
    "copy_from",
    "copy_to",
    "files_in",
    "filesystem_of",
    "is_remote",
    "locked",
    "open_cached",
    "patiently",
    "require_path",
]

ATTEMPTS, FIRST_PAUSE = 6, 1.0
"""Attempts, and seconds before the second one, doubled before each further one."""
SCHEMES = ("s3://", "gs://")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
"""How a location begins, as the first part of a path; a drive's name has one letter."""

Value = TypeVar("Value")

_log = logger_of(__name__)


class RemoteError(ValueError):
    """A file of an object store cannot be read; the message names it and the remedy."""


def is_remote(location: str) -> bool:
    """Whether a location is in an object store; raises a `RemoteError` for a scheme that is not supported."""
    if "://" not in location:
        return False
    if (shown := without_secrets(location)) != location:
        raise RemoteError(f"{shown} is given with a key or options, which would get into files; use the environment")
    if not location.startswith(SCHEMES):
        raise RemoteError(f"{location} is of a kind that is not known; allowed are folders, s3:// and gs://")
    return True


def require_path(path: Path, name: str) -> Path:
    """Returns a path of this machine; raises a `RemoteError` for a location, which would become a folder named `s3:`.

    `name` says where it was given.
    """
    if path.parts and _SCHEME.fullmatch(path.parts[0]):
        raise RemoteError(
            f"{name}: {path.parts[0]}//{'/'.join(path.parts[1:])} is a location, and only the path of a file or folder "
            "is taken there; copy with the store's own program, before or after"
        )
    return path


def cached(location: str) -> Path:
    """The folder on this machine that holds the copies of a location's files."""
    root = Path(os.environ.get("SLRNET_CACHE") or "~/.cache/slrnet").expanduser()
    return root / hashlib.sha256(location.rstrip("/").encode()).hexdigest()[:16]


def open_cached(
    location: str, name: str, *, again: bool = False, check: Callable[[Path], None] = lambda path: None
) -> Path:
    """The copy on this machine of a file in the folder `location`, made now if it is missing, or if `again` is true.

    `check` raises a ValueError for a damaged copy, given its path; the copy is then made once more.

    Raises:
        RemoteError: the store does not have the file, or refuses it.
        ValueError: the check refuses the second copy too.
    """
    path = cached(location) / name
    with locked(path):
        if again or not path.exists():
            source = f"{location.rstrip('/')}/{name}"
            try:
                copy_from(source, path, check)
            except RemoteError:
                raise
            except ValueError as error:
                _log.warning("the copy of %s is damaged (%s); making it again", source, error)
                copy_from(source, path, check)
            _make_room(path)
        os.utime(path)  # the last use
    return path


def copy_from(source: str, target: Path, check: Callable[[Path], None] = lambda path: None) -> None:
    """Copies a file of an object store, whole or not at all, into a folder that is made if missing.

    `check` raises an error for a damaged copy, given its path before it takes its name.
    """
    with written_whole(target) as incoming:
        _download(source, incoming)
        check(incoming)


def copy_to(source: Path, target: str) -> None:
    """Copies a file, or all files of a folder, to an object store, where each appears whole or not at all.

    Raises:
        OSError: the store refuses it.
    """
    from pyarrow import fs

    system, place = filesystem_of(target)
    fs.copy_files(str(source), place, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system)


def files_in(location: str, *, recursive: bool = False) -> dict[str, int]:
    """Files in a folder of an object store: bytes by path within it; none if it is missing.

    Raises:
        OSError: the store refuses it.
    """
    from pyarrow import fs

    system, path = filesystem_of(location.rstrip("/"))
    listed = system.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return {info.path.removeprefix(path).lstrip("/"): info.size for info in listed if info.type == fs.FileType.File}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time work on a path, which need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(source: str, target: Path) -> None:
    from pyarrow import fs

    def copy() -> None:
        system, path = filesystem_of(source)
        fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())

    patiently(source, copy)


def patiently(source: str, act: Callable[[], Value]) -> Value:
    """Runs a request to an object store about `source`, several times if it fails for a while.

    Raises:
        RemoteError: the store does not have the file, refuses it, or does not answer.
    """

    def may_pass(error: BaseException) -> bool:
        lasting = isinstance(error, FileNotFoundError) or "ACCESS_DENIED" in str(error)
        return isinstance(error, OSError) and not lasting

    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    def warn(state: RetryCallState) -> None:
        reason = _reason_of(state.outcome.exception())  # type: ignore[union-attr]
        _log.warning("%s cannot be read (%s); trying again in %.0f s", source, reason, state.upcoming_sleep)

    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=FIRST_PAUSE),
        retry=retry_if_exception(may_pass),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(act)
    except FileNotFoundError:
        raise RemoteError(f"{source} does not exist; check the path, or upload the data set whole") from None
    except OSError as error:
        raise RemoteError(
            f"{source} cannot be read: {_reason_of(error)}; check credentials (environment or role), region and "
            "endpoint"
        ) from None


def _reason_of(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]


def filesystem_of(source: str) -> tuple[Any, str]:
    """Arrow's file system for a location, and the path in it."""
    scheme, _, path = source.partition("://")
    return _open_filesystem(scheme, os.getpid()), path


@cache
def _open_filesystem(scheme: str, process: int) -> Any:
    """One file system per process: a child cannot use its parent's connections."""
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(endpoint_override=endpoint, region=region)


def _make_room(keep: Path) -> None:
    """Removes the least recently used shards until the rest fits; a process that has one open can read on."""
    limit = float(os.environ.get("SLRNET_CACHE_GB") or 100) * 1e9
    root = keep.parent.parent
    copies = []
    for path in root.glob("[0-9a-f]" * 16 + "/[!.]*.tar"):  # in folders of `cached`, and not incomplete ones
        with suppress(FileNotFoundError):  # another process made room
            status = path.stat()
            copies.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size
