"""What the loaders share, and the processes that read for a training.

Reader processes come from a fork server: they start without the training process's threads and CUDA context. They live
as long as the loader and learn the epoch through shared memory.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, TypeAlias, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slrnet.data.batch import Batch
from slrnet.data.manifest import DataError
from slrnet.data.processes import end_with, helper_context
from slrnet.data.samples import SampleIndex, SkippedSample
from slrnet.storage.shown import logger_of

__all__ = ["Deliveries", "Delivery", "Loader", "read_ahead", "reader_processes", "share_of"]

Item = TypeVar("Item")

_logger = logger_of(__name__)

_SHARED_MEMORY = "/dev/shm"
_PREFETCHED = 2
"""Batches that each reader has ready."""
_LOCKS = 2**16
"""Bytes of shared memory that the locks of a reader may take."""
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
        self.packed = False
        """Whether deliveries come as bytes, which go through a pipe instead of shared memory."""
        self.epoch_and_start = torch.zeros(2, dtype=torch.int64)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        made = self.made(worker.id if worker else 0)
        return map(pickle.dumps, made) if self.packed else made

    def made(self, worker: int) -> Iterator[Delivery]:
        """What the reader of a number makes in an epoch; a `DataError` becomes the last delivery."""
        epoch, start_step = self.epoch_and_start.tolist()
        try:
            yield from self.deliver(worker, epoch, start_step)
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


def reader_processes(
    deliveries: Deliveries, *, workers: int, pin_memory: bool, batch_bytes: int, free: int | None = None
) -> Iterable[Delivery]:
    """Processes that stay, and whose deliveries come in turn; with `pin_memory` in page-locked memory.

    Deliveries come through shared memory, or through pipes if that has too little room: what does not fit would be
    lost, or wait for ever. If it has none for the readers' locks, this process reads. `batch_bytes` is the size of a
    batch; `free` the bytes of shared memory, by default those of now.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    held, locks = batch_bytes * (workers * _PREFETCHED + 1) * processes, workers * _LOCKS * processes
    free = _free_shared_memory() if free is None else free
    loader = _data_loader(deliveries, workers, pin_memory=pin_memory and held + locks <= free)
    if held + locks > free:
        _logger.warning(
            "%s has %d MiB free, the batches of %d readers may take %d MiB; %s, which is slower. "
            "Give it more: `docker run --shm-size=8g`, in Kubernetes an emptyDir of medium Memory at %s",
            *(_SHARED_MEMORY, free >> 20, workers, -(-held >> 20)),
            "they come through pipes" if locks <= free else "the training process reads by itself",
            _SHARED_MEMORY,
        )
    if locks > free:
        return _Here(deliveries, workers, pin_memory)
    deliveries.epoch_and_start.share_memory_()
    if held + locks <= free:
        return loader
    deliveries.packed = True  # before the readers start, with the first batch
    return _Unpacked(loader, pin_memory)


@dataclass(frozen=True)
class _Here:
    """Readers that are no processes: each makes a delivery in turn, as from torch's loader."""

    deliveries: Deliveries
    workers: int
    pin_memory: bool

    def __iter__(self) -> Iterator[Delivery]:
        for turn in zip_longest(*map(self.deliveries.made, range(self.workers))):
            for delivery in filter(None, turn):
                yield delivery.pin_memory() if self.pin_memory else delivery


@dataclass(frozen=True)
class _Unpacked:
    """Deliveries of readers that pack them."""

    loader: DataLoader[Any]
    pin_memory: bool

    def __iter__(self) -> Iterator[Delivery]:
        delivered = map(pickle.loads, self.loader)
        return map(Delivery.pin_memory, delivered) if self.pin_memory else delivered


def _free_shared_memory() -> int:
    """Bytes; very many on systems that do not show their shared memory."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return status.f_bavail * status.f_frsize


def _data_loader(deliveries: Deliveries, workers: int, pin_memory: bool) -> DataLoader[Any]:
    loader = DataLoader(
        deliveries,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCHED,
        multiprocessing_context=helper_context(_PRELOAD),
        persistent_workers=True,
        pin_memory=pin_memory,
        worker_init_fn=partial(_begin_reader, os.getpid()),
        # Its own generator: torch would else draw its workers' base seed from the global one.
        generator=torch.Generator(),
    )
    # It warns of more readers than cores here, and would again with the first batch, after what follows.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    return loader


def read_ahead(items: Iterable[Item], number: int = 16) -> Iterator[Item]:
    """Yields the items, of which a thread fetches up to `number` beforehand; an error comes in its item's place."""
    source, end = iter(items), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    try:
        waiting = deque(thread.submit(next, source, end) for _ in range(number))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, source, end))
            yield item  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)


def share_of(number: int, *, rank: int, world_size: int) -> range:
    """Which of `number` places in a row are a rank's, as evenly as possible; raises ValueError for no such rank."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size {world_size} allowed are 0 to {world_size - 1}")
    return range(number * rank // world_size, number * (rank + 1) // world_size)


def _begin_reader(parent: int, worker: int) -> None:
    """Starts a reader that ends once the training process is gone: torch watches its parent, the fork server."""
    gc.freeze()  # keeps the garbage collector from looking through imported modules
    end_with(parent)
