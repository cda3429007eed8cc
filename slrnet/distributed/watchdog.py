"""Finds a rank that hangs, and says which one and where.

A rank that hangs leaves all others waiting in a collective operation, for half an hour by torch's default, and the
error that ends it names none. Here every rank says where it is (`at`) and that it still works there (`alive`); a thread
publishes that in a store that all ranks see. When this rank has not moved for longer than allowed, the rank that is
furthest behind is the one that the others wait for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from slrnet.distributed.process import Process

__all__ = ["Hang", "Position", "Watchdog", "dump_stacks", "find_hang", "shared_store"]

LOOKS = 10
"""Looks at the other ranks within the time that a rank may stand still."""


class Store(Protocol):
    """What is used of torch's key-value stores."""

    def set(self, key: str, value: str) -> None:
        """Writes a value."""

    def get(self, key: str) -> bytes:
        """Reads a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""


@dataclass(frozen=True)
class Position:
    """Where a rank is."""

    count: int
    """Places that it has come to; all ranks come to the same places in the same order."""
    step: int
    """Optimiser step, from 0."""
    place: str
    """What it does there."""
    node: str
    """Host name."""


@dataclass(frozen=True)
class Hang:
    """A rank that does not move."""

    rank: int
    """The one that the others wait for; the one that found it, where all stand in the same place."""
    node: str
    step: int
    message: str


class Watchdog:
    """Watches this rank and looks at the others.

    Args:
        process: this process among all.
        limit: seconds that a rank may stand still; 0 turns it off.
        store: that all ranks see (`shared_store`); None for a single process.
        on_hang: called once, in the watchdog's thread, when this rank has stood still for too long.
    """

    def __init__(self, process: Process, *, limit: float, store: Store | None, on_hang: Callable[[Hang], None]) -> None:
        self._process = process
        self._limit = limit
        self._store = store
        self._on_hang = on_hang
        self._position = Position(0, 0, "starting", socket.gethostname())
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit > 0:
            self._thread.start()

    @property
    def position(self) -> Position:
        """Where this rank is."""
        return self._position

    def at(self, place: str, step: int) -> None:
        """This rank comes to a place; all ranks must come to the same places in the same order."""
        self._position = replace(self._position, count=self._position.count + 1, step=step, place=place)
        self._moved = time.monotonic()

    def alive(self) -> None:
        """This rank works on where it is."""
        self._moved = time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._limit / LOOKS):
            self._publish()
            stood = time.monotonic() - self._moved
            if stood > self._limit:
                self._on_hang(find_hang(self._positions(), own=self._process.rank, stood=stood))
                return

    def _publish(self) -> None:
        if self._store is not None:
            self._store.set(f"position/{self._process.rank}", json.dumps(asdict(self._position)))

    def _positions(self) -> dict[int, Position]:
        """Of all ranks whose position is known."""
        found = {self._process.rank: self._position}
        if self._store is None:
            return found
        for rank in range(self._process.world_size):
            key = f"position/{rank}"
            try:
                if rank != self._process.rank and self._store.check([key]):
                    found[rank] = Position(**json.loads(self._store.get(key)))
            except RuntimeError:  # rank 0, which holds the store, is gone
                break
        return found


def find_hang(positions: Mapping[int, Position], *, own: int, stood: float) -> Hang:
    """Which rank the others wait for.

    Args:
        positions: by rank, where known.
        own: rank that has stood still.
        stood: seconds for which it has.
    """
    behind = min(positions, key=lambda rank: (positions[rank].count, rank))
    last, waiting = positions[behind], positions[own]
    if len(positions) > 1 and all(position.count == last.count for position in positions.values()):
        message = f"no rank moved for {stood:.0f} s; all are {waiting.place} in step {waiting.step}"
        return Hang(own, waiting.node, waiting.step, message)
    waited = "" if behind == own else f"; rank {own}, {waiting.place}, waited for it"
    message = f"rank {behind} on {last.node} hangs while {last.place} in step {last.step}{waited} for {stood:.0f} s"
    return Hang(behind, last.node, last.step, message)


def shared_store(process: Process) -> Store | None:
    """A store that all ranks see, held by rank 0; None for a single process. All ranks must call it."""
    if process.world_size == 1:
        return None
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = torch.zeros((), dtype=torch.int64, device=process.device)
    own = _tcp_store(host, 0, is_master=True) if process.is_main else None
    port.fill_(own.port if own else 0)
    dist.broadcast(port, src=0)
    store: Store = own or _tcp_store(host, int(port.item()), is_master=False)
    return store


def dump_stacks() -> None:
    """Writes what all threads of this process are doing to its standard error."""
    try:
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    except (OSError, ValueError, RuntimeError):
        return


def _tcp_store(host: str, port: int, *, is_master: bool) -> Any:
    timeout = timedelta(seconds=60)
    return dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
