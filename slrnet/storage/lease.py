"""One owner of a folder at a time: a lease with a heartbeat, in folders and object stores.

A command that fills a folder holds its lease meanwhile: a small JSON file that says which process works there and since
when, and that is written again every `BEAT` seconds. Another start is refused with that information. It takes over when
the process on the same host is gone, or when the file is `LAPSE` seconds old: the owner's machine is lost. Clocks of
machines must agree to well under that. An owner that finds its lease taken, because it was suspended, ends.

In a folder, creating the file is atomic. An object store has no such operation through Arrow: there, the last of two
writers wins, and both look again after `SETTLE` seconds.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from slrnet.storage.files import UNFINISHED, write_json
from slrnet.storage.names import printable, short_name
from slrnet.storage.remote import filesystem_of, is_remote, patiently
from slrnet.storage.shown import say

__all__ = ["LEASE", "HeldError", "beside", "owned", "require_free"]

LEASE = "lease.json"
"""Name of a run's lease in its folder."""
BEAT, LAPSE = 20.0, 120.0
"""Seconds between two heartbeats, and without one until others may take the lease over."""
SETTLE = 2.0
"""Seconds after which two writers of an object see the same one."""

_Record = dict[str, Any]


class HeldError(ValueError):
    """Another process works in the folder; the message says which one, since when, and the remedy."""


def beside(output: Path) -> Path:
    """The lease of a file, or of a folder that must hold nothing else than results: a hidden file beside it.

    A folder in one that takes no files has it inside.
    """
    output = output.expanduser().resolve()
    if output.is_dir() and not os.access(output.parent, os.W_OK):
        return output / f".{LEASE}"
    return output.with_name(f".{short_name(output.name)}.{LEASE}")


@contextmanager
def owned(
    place: Path | str, what: str, *, patience: float = 0.0, lost: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Holds the lease `place`, a file or an object's location, while the caller works; folders are made if missing.

    Args:
        place: the lease, such as RUN/lease.json or `beside(OUT)`.
        what: what it protects, for messages: "run folder /runs/first".
        patience: seconds to wait for an owner that gives no sign of life, instead of refusing at once.
        lost: called in a thread, with a message, when another process took the lease over; None: says so and sends this
            process SIGTERM.

    Raises:
        HeldError: another process holds it.
        RemoteError: the object store does not answer or refuses.
    """
    file = _Object(str(place)) if is_remote(str(place)) else _File(Path(place))
    own = _acquire(file, what, patience)
    ended = threading.Event()
    beating = threading.Thread(
        target=_keep, args=(file, own, ended, lost or _stop, what), name=f"lease of {what}", daemon=True
    )
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError, ValueError):  # it lapses by itself
            if (file.read() or {}).get("id") == own["id"]:
                file.remove()


def require_free(place: Path | str, what: str) -> None:
    """Raises a `HeldError` if another process holds the lease `place`; see `owned`."""
    held = (_Object(str(place)) if is_remote(str(place)) else _File(Path(place))).read()
    if held is not None and not _is_free(held):
        raise HeldError(_refusal(held, what))


def _acquire(file: _File | _Object, what: str, patience: float) -> _Record:
    begun, first_beat = time.monotonic(), None
    while True:
        own = _own_record()
        if file.create(own):
            return own
        held = file.read()
        if held is None:
            continue
        if _is_free(held):
            if file.take_over(held, own):
                return own
            time.sleep(0.1)  # another start is doing the same
            continue
        first_beat = first_beat or held["beat"]
        if held["beat"] != first_beat or time.monotonic() - begun > patience:
            raise HeldError(_refusal(held, what))
        time.sleep(min(1.0, patience))


def _keep(file: _File | _Object, own: _Record, ended: threading.Event, lost: Callable[[str], None], what: str) -> None:
    """Beats until the end; a beat that the storage refuses is left out."""
    while not ended.wait(BEAT):
        with suppress(OSError, ValueError):
            held = file.read()
            if held is not None and held["id"] not in (own["id"], ""):  # "": one that is just being written
                lost(f"{what} was taken over by {_owner(held)}, because this process gave no sign of life")
                return
            file.write(own | {"beat": time.time()})


def _stop(message: str) -> None:
    say(f"{message}; stopping", error=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _own_record() -> _Record:
    now = time.time()
    with suppress(Exception):  # a user without a name
        user = getpass.getuser()
        return _record(user, now)
    return _record(str(os.getuid()), now)


def _record(user: str, now: float) -> _Record:
    started = psutil.Process().create_time()
    about = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "user": user}
    return about | {"id": uuid.uuid4().hex, "since": now, "beat": now}


def _is_free(held: Mapping[str, Any]) -> bool:
    """Whether the owner is gone: its process on this host, or its heartbeat."""
    if time.time() - held["beat"] > LAPSE:
        return True
    if held["host"] != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(held["pid"]).create_time() - held["started"]) > 1)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _refusal(held: Mapping[str, Any], what: str) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(held["since"]))
    silent = max(0.0, time.time() - held["beat"])
    return (
        f"{what} is in use: {_owner(held)} works there since {since}, its last sign of life is {silent:.0f} s old; "
        f"wait until it ends, or stop it. If it is gone, a start in {max(0.0, LAPSE - silent):.0f} s takes over"
    )


def _owner(held: Mapping[str, Any]) -> str:
    return printable(f"process {held['pid']} of {held['user']} on {held['host']}")


def _parse(text: str, beat: float) -> _Record:
    """The record of a lease file; one that cannot be read, as if written half, belongs to somebody since `beat`."""
    unknown: _Record = {"id": "", "host": "?", "pid": 0, "started": 0.0, "user": "?", "since": beat, "beat": beat}
    try:
        record = json.loads(text)
        number = (int, float)
        kinds: dict[str, Any] = {
            "id": str,
            "host": str,
            "pid": int,
            "started": number,
            "user": str,
            "since": number,
            "beat": number,
        }
        return record if all(isinstance(record[name], kind) for name, kind in kinds.items()) else unknown
    except (ValueError, KeyError, TypeError, RecursionError):
        return unknown


class _File:
    """A lease in a folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._new_folder = path, False

    def create(self, record: _Record) -> bool:
        """Creates the file unless there is one, and then returns False."""
        self._new_folder |= not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_name(f"{UNFINISHED}{record['id'][:8]}.{self._path.name}")
        try:
            whole.write_text(json.dumps(record), encoding="utf-8")
            self._claim(whole)
        except FileExistsError:
            return False
        finally:
            whole.unlink(missing_ok=True)
        return True

    def _claim(self, whole: Path) -> None:
        """Gives a file the lease's name too; raises FileExistsError if there is a lease."""
        try:
            os.link(whole, self._path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with self._path.open("x", encoding="utf-8") as file:
                file.write(whole.read_text(encoding="utf-8"))

    def read(self) -> _Record | None:
        """The record; None if there is no lease."""
        try:
            return _parse(self._path.read_text(encoding="utf-8"), self._path.stat().st_mtime)
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            return _parse("", self._path.stat().st_mtime)

    def write(self, record: _Record) -> None:
        """Replaces the record, as its owner does with each heartbeat."""
        write_json(self._path, record)

    def take_over(self, stale: _Record, own: _Record) -> bool:
        """Replaces a lease whose owner is gone; returns False if another start does that, or did.

        Only who could create the claim on that lease replaces it, and only while it is still the same one.
        """
        claim = self._path.with_name(f".{self._path.name}.{hashlib.sha256(stale['id'].encode()).hexdigest()[:16]}")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            with suppress(FileNotFoundError):
                if time.time() - claim.stat().st_mtime > LAPSE:  # its maker was killed
                    claim.unlink()
            return False
        try:
            held = self.read()
            if held is None or held["id"] != stale["id"]:
                return False
            write_json(self._path, own)
            return True
        finally:
            claim.unlink(missing_ok=True)

    def remove(self) -> None:
        """Gives the lease back."""
        self._path.unlink(missing_ok=True)
        if self._new_folder:
            with suppress(OSError):  # something was written there
                self._path.parent.rmdir()


class _Object:
    """A lease in an object store."""

    def __init__(self, location: str) -> None:
        self._location = location

    def create(self, record: _Record) -> bool:
        """Writes a lease unless there is one; returns False if there is, or if another start wrote after this one."""
        if self.read() is not None:
            return False
        self.write(record)
        time.sleep(SETTLE)
        return bool((self.read() or {}).get("id") == record["id"])

    def read(self) -> _Record | None:
        """The record; None if there is no lease."""

        def read() -> _Record | None:
            system, path = filesystem_of(self._location)
            try:
                with system.open_input_stream(path) as stream:
                    text = stream.read().decode("utf-8", errors="replace")
            except FileNotFoundError:
                return None
            return _parse(text, time.time())

        return patiently(self._location, read)

    def write(self, record: _Record) -> None:
        """Replaces the record, as its owner does with each heartbeat."""

        def write() -> None:
            system, path = filesystem_of(self._location)
            with system.open_output_stream(path) as stream:
                stream.write(json.dumps(record).encode())

        patiently(self._location, write)

    def take_over(self, stale: _Record, own: _Record) -> bool:
        """Replaces a lease whose owner is gone; returns False if another start does that, or did."""
        if (self.read() or {}).get("id") != stale["id"]:
            return False
        self.write(own)
        time.sleep(SETTLE)
        return bool((self.read() or {}).get("id") == own["id"])

    def remove(self) -> None:
        """Gives the lease back."""
        system, path = filesystem_of(self._location)
        with suppress(FileNotFoundError):
            system.delete_file(path)
