"""Finds a rank that hangs, and says which one and where.

A rank that hangs leaves all others waiting in a collective operation, for half an hour by torch's default, and the
error that ends the wait names no rank. Here every rank says where it is, and says it again while it works there. A
thread publishes that in a store that all ranks see. All wait for the rank that is furthest behind.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from slrnet.distributed.process import Process

__all__ = ["Hang", "Position", "Watchdog", "dump_stacks", "find_hang", "shared_store"]

CHECKS = 10
"""How often a rank publishes its position within the time that it may stand still."""


@dataclass(frozen=True)
class Position:
    """Where a rank is."""

    count: int
    """Places, and waits for other ranks within them, that the rank has reached; the same ones in the same order as all
    others."""
    step: int
    """Optimizer step, from 0."""
    place: str
    node: str


@dataclass(frozen=True)
class Hang:
    """A rank that does not move."""

    rank: int
    """The rank that the others wait for; if all stand in the same place, the rank that noticed."""
    node: str
    step: int
    message: str


class Watchdog:
    """Watches this rank and compares it with the others.

    Args:
        process: this process among all.
        limit: seconds that a rank may stand still; 0 turns the watchdog off.
        store: a key-value store of torch that all ranks see (`shared_store`); None for a single process.
        on_hang: called once, in the watchdog's thread, when this rank has stood still for too long.
    """

    def __init__(self, process: Process, *, limit: float, store: Any, on_hang: Callable[[Hang], None]) -> None:
        self._process, self._limit, self._store, self._on_hang = process, limit, store, on_hang
        self.position = Position(0, 0, "starting", socket.gethostname())
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit > 0:
            self._thread.start()

    def at(self, place: str, step: int) -> None:
        """This rank reaches a place, or still works there. All ranks must reach the same places in the same order."""
        if (place, step) != (self.position.place, self.position.step):
            self.position = replace(self.position, count=self.position.count + 1, step=step, place=place)
        self._moved = time.monotonic()

    def meet(self) -> None:
        """This rank comes to where it waits for the others, within a place; all ranks do so equally often."""
        self.position = replace(self.position, count=self.position.count + 1)
        self._moved = time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._limit / CHECKS):
            with suppress(RuntimeError):  # rank 0, which holds the store, is gone
                if self._store is not None:
                    self._store.set(f"position/{self._process.rank}", json.dumps(asdict(self.position)))
            stood = time.monotonic() - self._moved
            if stood > self._limit:
                self._on_hang(find_hang(self._positions(), own=self._process.rank, stood=stood))
                return

    def _positions(self) -> dict[int, Position]:
        """The positions of all ranks that published one."""
        positions = {self._process.rank: self.position}
        with suppress(RuntimeError):  # rank 0, which holds the store, is gone
            for rank in range(self._process.world_size if self._store is not None else 0):
                key = f"position/{rank}"
                if rank not in positions and self._store.check([key]):
                    positions[rank] = Position(**json.loads(self._store.get(key)))
        return positions


def find_hang(positions: Mapping[int, Position], *, own: int, stood: float) -> Hang:
    """Which rank the others wait for, if rank `own` has stood still for `stood` seconds, by the known positions."""
    behind = min(positions, key=lambda rank: (positions[rank].count, rank))
    last, waiting = positions[behind], positions[own]
    if len(positions) > 1 and all(position.count == last.count for position in positions.values()):
        message = f"no rank moved for {stood:.0f} s; all are {waiting.place} in step {waiting.step}"
        return Hang(own, waiting.node, waiting.step, message)
    waited = "" if behind == own else f"; rank {own}, {waiting.place}, waited for it"
    message = f"rank {behind} on {last.node} hangs while {last.place} in step {last.step}{waited} for {stood:.0f} s"
    return Hang(behind, last.node, last.step, message)


def shared_store(process: Process) -> Any:
    """A key-value store of torch that all ranks see, held by rank 0; None for a single process. All ranks call it."""
    if process.world_size == 1:
        return None
    host, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=60)
    connect = partial(dist.TCPStore, host, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
    own = connect(port=0, is_master=True) if process.is_main else None
    port = torch.tensor(own.port if own else 0, device=process.device)
    dist.broadcast(port, src=0)
    return own or connect(port=int(port.item()), is_master=False)


def dump_stacks() -> None:
    """Writes what all threads of this process are doing to its standard error."""
    with suppress(OSError, ValueError, RuntimeError):
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
