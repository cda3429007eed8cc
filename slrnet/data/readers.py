"""What the loaders share, and the processes that read for a training.

Reader processes come from a fork server: they start without the training process's threads and CUDA context. They live
as long as the loader and learn the epoch through shared memory.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slrnet.data.batch import Batch
from slrnet.data.manifest import DataError
from slrnet.data.processes import end_with, helper_context
from slrnet.data.samples import SampleIndex, SkippedSample
from slrnet.storage.shown import logger_of

__all__ = ["Deliveries", "Delivery", "Loader", "reader_processes", "share_of"]

_logger = logger_of(__name__)

_PRELOAD = ["torch", "torchvision", "webdataset", "pyarrow", "slrnet.data.train_loader"]
"""Modules that the fork server imports once, so that readers start with them."""


@dataclass(frozen=True)
class Delivery:
    """What a reader sends: a batch, if any, and what it could not read since its last delivery."""

    batch: Batch | None
    skipped: tuple[SkippedSample, ...] = ()
    failure: str | None = None
    """Message of the error that ends the epoch."""

    def pin_memory(self) -> Delivery:
        """The delivery in page-locked memory. torch's loader calls this."""
        return replace(self, batch=self.batch and self.batch.pin_memory())


Deliver: TypeAlias = Callable[[int, int, int], Iterator[Delivery]]
"""What a reader, given its place among them, makes in an epoch from a step on; picklable, may raise `DataError`."""


class Deliveries(IterableDataset[Delivery]):
    """Runs a reader. A `DataError` travels as a message, because torch wraps exceptions into tracebacks."""

    def __init__(self, deliver: Deliver) -> None:
        self.deliver = deliver
        self.epoch_and_start = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Delivery]:
        worker = get_worker_info()
        epoch, start_step = self.epoch_and_start.tolist()
        try:
            yield from self.deliver(worker.id if worker else 0, epoch, start_step)
        except DataError as error:
            yield Delivery(None, failure=str(error))


class Loader:
    """What all loaders share: the split that they read, and a list of the samples that they could not read."""

    def __init__(self, index: SampleIndex) -> None:
        self.index = index
        self._skipped: list[SkippedSample] = []
        self._reported_shards: set[str] = set()

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Samples of the current (or last) epoch that this rank could not read so far."""
        return tuple(self._skipped)

    def _report(self, skipped: SkippedSample) -> None:
        self._skipped.append(skipped)
        if skipped.shard not in self._reported_shards:
            self._reported_shards.add(skipped.shard)
            text = "shard %s: sample %r is skipped: %s; further samples of this shard are counted without a message; %s"
            _logger.warning(text, skipped.shard, skipped.key, skipped.reason, self.index.advice)


def reader_processes(deliveries: Deliveries, *, workers: int, pin_memory: bool) -> DataLoader[Delivery]:
    """Processes that stay, and whose deliveries come in turn; with `pin_memory` in page-locked memory."""
    return DataLoader(
        deliveries,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=helper_context(_PRELOAD),
        persistent_workers=True,
        pin_memory=pin_memory,
        worker_init_fn=partial(_begin_reader, os.getpid()),
        # Its own generator: torch would else draw its workers' base seed from the global one.
        generator=torch.Generator(),
    )


def share_of(number: int, *, rank: int, world_size: int) -> range:
    """Which of `number` places in a row are a rank's, as evenly as possible; raises ValueError for no such rank."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size {world_size} allowed are 0 to {world_size - 1}")
    return range(number * rank // world_size, number * (rank + 1) // world_size)


def _begin_reader(parent: int, worker: int) -> None:
    """Starts a reader that ends once the training process is gone: torch watches its parent, the fork server."""
    gc.freeze()  # keeps the garbage collector from looking through imported modules
    end_with(parent)
