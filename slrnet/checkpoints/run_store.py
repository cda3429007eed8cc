"""Runs in an object store: `--storage s3://BUCKET/FOLDER` (any endpoint) or gs://, by path alone.

Each node writes to its own folder, in the cache of `slrnet.storage.remote`. Rank 0 copies the checkpoints to the store,
in the thread that writes them; every rank copies its log and pictures. An object appears whole or not at all, but a
folder does not: `state.json` is therefore uploaded last and removed first. Without it there is no checkpoint. A resumed
run takes its checkpoints from the store, so that all ranks use the same one.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slrnet.storage.files import read_json, write_text
from slrnet.storage.folders import mark_folder, remove_folder, whole_folder
from slrnet.storage.lease import LEASE
from slrnet.storage.names import check_run_name
from slrnet.storage.remote import (
    RemoteError,
    cached,
    copy_from,
    copy_to,
    files_in,
    filesystem_of,
    is_remote,
    locked,
    patiently,
)
from slrnet.storage.shown import logger_of

__all__ = [
    "CONFIG",
    "FILES",
    "STATE",
    "TRAINER",
    "WEIGHTS",
    "Kept",
    "RunStore",
    "local_run",
    "location_of",
    "on_this_machine",
    "rank",
    "run_folder",
    "validation_scores",
]

WEIGHTS = "model.safetensors"
"""A checkpoint's weights."""
TRAINER = "trainer.pt"
"""A checkpoint's optimizer state."""
STATE = "state.json"
"""A checkpoint's progress and checksums; its presence says that the checkpoint is whole."""
CONFIG = "config.json"
"""The configuration, of a run and of each of its checkpoints."""
FILES = frozenset((WEIGHTS, TRAINER, STATE, CONFIG))
"""The files of a checkpoint."""
ORIGIN = "origin"
"""File in the cache that says in which folder of the object store the original is."""
_PAYLOAD = (WEIGHTS, TRAINER, CONFIG)
_CHECKPOINT = re.compile(r"checkpoint-\d{4,9}(-\d{8,12})?")
_LOG = re.compile(r"rank-\d{1,6}\.jsonl")

_log = logger_of(__name__)


class RunStore:
    """One run's place in an object store. Its methods raise a `RemoteError` if the store refuses, or an `OSError`.

    Args:
        location: the run's location, such as s3://BUCKET/RUNS/NAME.
        folder: the run's folder on this machine.
        rank: this process's rank, whose log is uploaded; None for the driver, which has no log.
    """

    def __init__(self, location: str, folder: Path, *, rank: int | None = None) -> None:
        self.location, self.folder, self._rank = location.rstrip("/"), folder, rank
        self._sent: dict[Path, tuple[int, int]] = {}

    def checkpoints(self) -> list[str]:
        """Names of the whole checkpoints in the store, in the order of their steps."""
        stored = patiently(self.location, self._stored)
        return sorted(name for name, whole in stored.items() if whole)

    def exists(self, file: str = CONFIG) -> bool:
        """Whether a run was started there, with or without a checkpoint; or for a sweep, whether it has its `file`."""
        return file in patiently(self.location, lambda: self._files(""))

    def require_new(self, kind: str = "run") -> None:
        """Raises a `RemoteError` if there is a run, or what else `kind` says, of that name."""
        name = self.location.rpartition("/")[2]
        if set(patiently(self.location, lambda: self._files("", recursive=True))) - {LEASE}:
            raise RemoteError(
                f"{kind} {self.location} exists; continue that {kind} with --resume {name}, or choose another --name"
            )

    def start(self, kind: str = "run") -> None:
        """Makes room for a new run, or what else `kind` says, also on this machine.

        Raises:
            RemoteError: there is one of that name.
            ValueError: the folder on this machine holds something else.
        """
        self.require_new(kind)
        remove_folder(self.folder, within=self.folder.parent)
        mark_folder(self.folder)

    def fetch(self, names: Sequence[str] | None = None) -> None:
        """Makes this folder hold the named checkpoints (None: all whole ones) and no others, logs and configuration."""
        wanted = self.checkpoints() if names is None else names
        mark_folder(self.folder)
        with locked(self.folder / "run"):
            self._remove_except(wanted)
            for name in wanted:
                target = self.folder / "checkpoints" / name
                fetch_checkpoint(f"{self.location}/checkpoints/{name}", target)
                self._sent[target] = _stamp(target / STATE)
            if self.exists():
                copy_from(f"{self.location}/{CONFIG}", self.folder / CONFIG)
            self._fetch_logs()

    def fetch_one(self, name: str) -> None:
        """Copies a checkpoint to this machine, which may be rank 0's; others that are in the store may stay here."""
        stored = self.checkpoints()
        mark_folder(self.folder)
        with locked(self.folder / "run"):
            self._remove_except(stored)
            fetch_checkpoint(f"{self.location}/checkpoints/{name}", self.folder / "checkpoints" / name)

    def fetch_best(self) -> None:
        """Copies the run's best checkpoint, its logs and its configuration to this machine.

        Raises:
            RemoteError: the run has no checkpoint.
        """
        if not (names := self.checkpoints()):
            raise RemoteError(f"{self.location} holds no checkpoint; give a run's location, or a checkpoint's")
        self.fetch_one(self._best(names))
        with locked(self.folder / "run"):
            if self.exists():
                copy_from(f"{self.location}/{CONFIG}", self.folder / CONFIG)
            self._fetch_logs()

    def remove(self, folder: str) -> None:
        """Removes one of the folders of a run, or of a sweep, from the store, if it is there."""
        system, place = filesystem_of(f"{self.location}/{check_run_name(folder)}")
        patiently(self.location, lambda: system.delete_dir_contents(place, missing_dir_ok=True))

    def keep(self, *, best: bool) -> None:
        """Removes the run's checkpoints, here and in the store, but for the best one if `best` says so."""
        stored = patiently(self.location, self._stored)
        names = sorted(name for name, whole in stored.items() if whole)
        kept = [self._best(names)] if best and names else []
        for name in sorted(stored.keys() - set(kept)):
            self._delete(name, whole=stored[name])
        self._remove_except(kept)

    def checkpoint_bytes(self) -> int:
        """Bytes of the run's checkpoints in the store."""
        return sum(patiently(self.location, lambda: self._files("checkpoints", recursive=True)).values())

    def fetch_logs(self) -> None:
        """Copies the logs of ranks on other nodes to this machine; does not raise."""
        try:
            with locked(self.folder / "run"):
                self._fetch_logs()
        except (OSError, RemoteError) as error:
            _log.warning("the ranks' logs in %s cannot be read: %s", self.location, error)

    def upload(self, *, checkpoints: bool = True) -> None:
        """Copies what is new to the store; with `checkpoints`, also removes those that this machine no longer has."""
        if checkpoints:
            self._upload_checkpoints()
        own = [] if self._rank is None else [self.folder / "logs" / f"rank-{self._rank}.jsonl"]
        for path in (self.folder / CONFIG, *own, *sorted((self.folder / "panels").glob("[!.]*"))):
            if path.is_file() and self._sent.get(path) != (stamp := _stamp(path)):
                self._put(path)
                self._sent[path] = stamp

    def upload_rest(self) -> None:
        """Copies log and pictures when a rank ends; does not raise."""
        try:
            self.upload(checkpoints=False)
        except OSError as error:
            _log.warning("log and pictures cannot be copied to %s: %s", self.location, error)

    def _remove_except(self, names: Sequence[str]) -> None:
        for path in (self.folder / "checkpoints").glob("checkpoint-*"):
            if path.name not in names:
                remove_folder(path, within=self.folder, own=FILES)

    def _upload_checkpoints(self) -> None:
        ours = {path.parent for path in (self.folder / "checkpoints").glob(f"checkpoint-*/{STATE}")}
        stored = self._stored()
        for path in sorted(ours):
            if self._sent.get(path) != (stamp := _stamp(path / STATE)):
                if stored.get(path.name):  # it is written again
                    system, place = self._place(path / STATE)
                    system.delete_file(place)
                for name in (*_PAYLOAD, STATE):
                    self._put(path / name)
                self._sent[path] = stamp
        for name in set(stored) - {path.name for path in ours}:
            self._delete(name, whole=stored[name])

    def _delete(self, name: str, *, whole: bool) -> None:
        """Removes a checkpoint from the store, first what makes it whole."""
        system, place = self._place(self.folder / "checkpoints" / name)
        if whole:
            system.delete_file(f"{place}/{STATE}")
        system.delete_dir(place)

    def _best(self, names: Sequence[str]) -> str:
        """The best of some checkpoints in the store, one at least."""
        if len(names) == 1:
            return names[0]
        states = {name: self._state(name) for name in names}
        return max(names, key=lambda name: rank(states[name].get("metrics"), states[name].get("step"), name))

    def _state(self, name: str) -> dict[str, Any]:
        """What a checkpoint says of itself; empty if it is damaged, which whoever loads it says."""
        with tempfile.TemporaryDirectory() as folder:
            copy_from(f"{self.location}/checkpoints/{name}/{STATE}", Path(folder) / STATE)
            try:
                state = read_json(Path(folder) / STATE)
            except ValueError:
                return {}
        return state if isinstance(state, dict) else {}

    def _stored(self) -> dict[str, bool]:
        """Checkpoints in the store by name, and whether each is whole."""
        stored: dict[str, bool] = {}
        for place in self._files("checkpoints", recursive=True):
            name, _, file = place.partition("/")
            if _CHECKPOINT.fullmatch(name) and file:
                stored[name] = stored.get(name, False) or file == STATE
        return stored

    def _files(self, folder: str, *, recursive: bool = False) -> dict[str, int]:
        """Files in a folder of the run: bytes by path within it."""
        return files_in(f"{self.location}/{folder}", recursive=recursive)

    def _fetch_logs(self) -> None:
        """Copies logs that grew; lines are only ever added."""
        for name, size in patiently(self.location, lambda: self._files("logs")).items():
            target = self.folder / "logs" / name
            if _LOG.fullmatch(name) and (not target.exists() or target.stat().st_size < size):
                copy_from(f"{self.location}/logs/{name}", target)

    def _place(self, path: Path) -> tuple[Any, str]:
        return filesystem_of(self._address(path))

    def _put(self, path: Path) -> None:
        copy_to(path, self._address(path))

    def _address(self, path: Path) -> str:
        return f"{self.location}/{path.relative_to(self.folder).as_posix()}"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Where a run or a sweep is kept: in a folder that all nodes see, or in an object store."""

    name: str
    """Unique name; its folder is storage/name."""
    storage: Path
    """Absolute folder, visible to all nodes; with `remote` this machine's own, `cached` of it."""
    remote: str = ""
    """Location in an object store, such as s3://BUCKET/RUNS; nodes then share no folder. Empty: it is in `storage`."""

    @property
    def folder(self) -> Path:
        """Its folder, on this machine."""
        return self.storage / self.name

    @property
    def location(self) -> str:
        """Its location in the object store; empty where it is kept in a folder."""
        return self.remote and f"{self.remote.rstrip('/')}/{self.name}"

    @property
    def place(self) -> str | Path:
        """Where it is kept: its location in the object store, or its folder."""
        return self.location or self.folder

    @property
    def store(self) -> RunStore | None:
        """Its place in the object store; None where it is kept in a folder."""
        return RunStore(self.location, self.folder) if self.remote else None

    @property
    def lease(self) -> str | Path:
        """The lease of its folder, which one process at a time holds."""
        return f"{self.location}/{LEASE}" if self.remote else self.folder / LEASE


def run_folder(location: str) -> Path:
    """The folder of this machine for a run that is kept in an object store."""
    storage, _, name = location.rstrip("/").rpartition("/")
    return cached(storage) / name


def rank(metrics: Any, step: Any, name: str) -> tuple[float, int, str]:
    """Orders checkpoints: the best one, by its validation mIoU and then its step, is the largest."""
    scores = [score for score in validation_scores(metrics or {}) if math.isfinite(score)]
    return scores[0] if scores else -1.0, step or 0, name


def validation_scores(metrics: Mapping[str, Any]) -> list[Any]:
    """The validation mIoU among a run's metrics, under whatever protocol the run measures; none if it was not."""
    return [value for name, value in metrics.items() if name.startswith("val/miou_")]


def local_run(location: str) -> Path:
    """Copies a run's best checkpoint, or the one checkpoint that is named, to this machine; returns the folder.

    Raises:
        RemoteError: there is none, or the store refuses the request.
    """
    is_remote(location)
    location = location.rstrip("/")
    run, _, name = location.rpartition("/checkpoints/")
    one = bool(_CHECKPOINT.fullmatch(name))
    if not one and _CHECKPOINT.fullmatch(location.rpartition("/")[2]):  # a checkpoint outside of a run
        folder = _copy_of(location)
        with locked(folder):
            fetch_checkpoint(location, folder)
        return folder
    folder = _copy_of(run if one else location)
    store = RunStore(run if one else location, folder)
    store.fetch_one(name) if one else store.fetch_best()
    return folder / "checkpoints" / name if one else folder


def on_this_machine(place: str) -> Path:
    """A run or checkpoint by its path; one in an object store is copied to this machine."""
    return local_run(place) if is_remote(place) else Path(place).expanduser()


def location_of(path: Path) -> str:
    """Where in an object store the original of a run or checkpoint is, for a copy that `local_run` made; else the path.

    Processes on other machines can read it there.
    """
    path = path.resolve()
    for folder in path.parents:
        if folder.parent == cached("").resolve().parent and (folder / ORIGIN).is_file():
            return f"{(folder / ORIGIN).read_text(encoding='utf-8')}/{path.relative_to(folder).as_posix()}"
    return str(path)


def _copy_of(location: str) -> Path:
    """The folder on this machine for the copy of a location; a file beside it says where it is from."""
    parent, _, name = location.rpartition("/")
    write_text(cached(location) / ORIGIN, parent)
    return cached(location) / name


def fetch_checkpoint(location: str, target: Path) -> None:
    """Copies a checkpoint's four files, unless the same one is there."""
    if (target / STATE).is_file():
        with tempfile.TemporaryDirectory() as folder:
            copy_from(f"{location}/{STATE}", Path(folder) / STATE)
            if (target / STATE).read_bytes() == (Path(folder) / STATE).read_bytes():
                return
    with whole_folder(target, own=FILES) as incoming:
        for name in (STATE, *_PAYLOAD):
            copy_from(f"{location}/{name}", incoming / name)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
