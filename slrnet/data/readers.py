"""The processes that read samples for a loader, and what they report.

Reader processes come from a fork server: they start without the training process's threads and CUDA context. They live
as long as the loader and learn the epoch through shared memory.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slrnet.data.batch import Batch, EvalSample
from slrnet.data.manifest import DataError
from slrnet.data.processes import end_with, helper_context
from slrnet.data.samples import SampleIndex, SkippedSample

__all__ = ["Delivery", "Loader", "Reader", "check_at_least_one", "check_place", "prepare_reader"]

Payload = TypeVar("Payload", bound=Batch | EvalSample)

_logger = logging.getLogger(__name__)

_PRELOAD = ["torch", "torchvision", "webdataset", "pyarrow", "slrnet.data.train_loader", "slrnet.data.eval_loader"]
"""Modules that the fork server imports once, so that readers start with them."""


@dataclass(frozen=True)
class Delivery(Generic[Payload]):
    """What a reader sends: a batch or a sample, if any, and what it could not read since its last delivery."""

    payload: Payload | None
    skipped: tuple[SkippedSample, ...] = ()
    failure: str | None = None
    """Message of the error that ends the epoch."""

    def pin_memory(self) -> Delivery[Payload]:
        """The delivery in page-locked memory. torch's loader calls this."""
        pinned = self.payload.pin_memory() if isinstance(self.payload, Batch) else self.payload
        return replace(self, payload=pinned)  # type: ignore[arg-type]


class Reader(Protocol[Payload]):
    """Makes what a loader delivers. Picklable; nothing in it changes."""

    @property
    def index(self) -> SampleIndex:
        """The split that it reads."""

    def deliver(self, worker: int, epoch: int, start_step: int) -> Iterator[Delivery[Payload]]:
        """What one of the reader processes makes in an epoch; it may raise `DataError`."""


class _Deliveries(IterableDataset[Delivery[Payload]]):
    """Runs a reader. A `DataError` travels as a message, because torch wraps exceptions into tracebacks."""

    def __init__(self, reader: Reader[Payload], epoch_and_start: Tensor) -> None:
        self.reader = reader
        self.epoch_and_start = epoch_and_start

    def __iter__(self) -> Iterator[Delivery[Payload]]:
        worker = get_worker_info()
        epoch, start_step = self.epoch_and_start.tolist()
        try:
            yield from self.reader.deliver(worker.id if worker else 0, epoch, start_step)
        except DataError as error:
            yield Delivery(None, failure=str(error))


class Loader(Generic[Payload]):
    """What all loaders share: their readers, in this process (no workers) or in processes that stay.

    With `pin_memory` batches come in page-locked memory.
    """

    def __init__(self, reader: Reader[Payload], *, workers: int, pin_memory: bool = False) -> None:
        self.reader = reader
        self._skipped: list[SkippedSample] = []
        self._workers = workers
        self._pin_memory = pin_memory
        self._epoch_and_start = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._deliveries = _Deliveries(reader, self._epoch_and_start)
        self._loader: DataLoader[Delivery[Payload]] | None = None
        self._reported_shards: set[str] = set()

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Samples of the current (or last) epoch that this rank could not read so far."""
        return tuple(self._skipped)

    def close(self) -> None:
        """Ends the reader processes; the next epoch starts new ones."""
        self._loader = None

    def _deliver(self, epoch: int = 0, start_step: int = 0) -> Iterator[Payload]:
        """Yields what the readers send in turn, and collects the samples that they skip."""
        self._skipped = []
        self._epoch_and_start.copy_(torch.tensor([epoch, start_step]))
        for delivery in self._run():
            for skipped in delivery.skipped:
                self._report(skipped)
            if delivery.failure is not None:
                self.close()  # now: readers that are left to the garbage collector take seconds to end
                raise DataError(delivery.failure)
            if delivery.payload is not None:
                yield delivery.payload

    def _run(self) -> Iterator[Delivery[Payload]]:
        if not self._workers:  # torch's loader would take a hundredth of the time and add nothing
            made = iter(self._deliveries)
            return map(Delivery.pin_memory, made) if self._pin_memory else made
        if self._loader is None:
            self._loader = DataLoader(
                self._deliveries,
                batch_size=None,
                num_workers=self._workers,
                multiprocessing_context=helper_context(_PRELOAD),
                persistent_workers=True,
                pin_memory=self._pin_memory,
                worker_init_fn=partial(_begin_reader, os.getpid()),
                # Its own generator: torch would else draw its workers' base seed from the global one.
                generator=torch.Generator(),
            )
        return iter(self._loader)

    def _report(self, skipped: SkippedSample) -> None:
        self._skipped.append(skipped)
        if skipped.shard not in self._reported_shards:
            self._reported_shards.add(skipped.shard)
            text = "shard %s: sample %r is skipped: %s; further samples of this shard are counted without a message; %s"
            _logger.warning(text, skipped.shard, skipped.key, skipped.reason, self.reader.index.advice)


def check_place(*, rank: int, world_size: int, workers: int) -> None:
    """Raises ValueError if a number of a loader's place among the processes is out of range."""
    check_at_least_one(world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size {world_size} allowed are 0 to {world_size - 1}")
    if workers < 0:
        raise ValueError(f"workers is {workers}; allowed are 0 (read in this process) and more")


def check_at_least_one(**values: int) -> None:
    """Raises ValueError if one of the named values is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def prepare_reader() -> None:
    """Keeps the garbage collector from looking through imported modules; reader processes call it themselves."""
    gc.freeze()


def _begin_reader(parent: int, worker: int) -> None:
    """Starts a reader that ends once the training process is gone: torch watches its parent, the fork server."""
    prepare_reader()
    end_with(parent)
