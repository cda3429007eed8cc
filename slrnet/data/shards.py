"""The loaders: batches of crops for training, whole images for evaluation, from tar shards in reader processes.

Which samples a step draws is planned by `slrnet.data.epoch_plan`; single samples are read by `slrnet.data.samples`.
WebDataset supplies the pipeline between the two. Its own shard order repeats every epoch and depends on the number of
readers, and its shuffle buffer holds decoded samples; the plan replaces both by arithmetic on the manifest.

Reader processes come from a fork server: they start without the training process's threads and CUDA context, live as
long as the loader, and are told the epoch through shared memory.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slrnet.data.batch import Batch, EvalSample
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.counter_random import Bits, key_of, random_bits
from slrnet.data.epoch_plan import Draws, choose_subset, plan_epoch
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.processes import end_with, helper_context
from slrnet.data.samples import FoundSample, OnError, SampleIndex, ShardFiles, SkippedSample, index_split
from slrnet.data.supervision import Supervision, image_labels_only
from slrnet.data.transforms import Crop, crop_into, crop_mask, draw_crops

__all__ = [
    "EvalLoader",
    "OnError",
    "SkippedSample",
    "TrainLoader",
    "choose_subset",
    "prepare_reader",
]

Payload = TypeVar("Payload", bound=Batch | EvalSample)

_logger = logging.getLogger(__name__)

_RECENT = 32
"""Good samples that a reader keeps as stand-ins for damaged ones."""

_PRELOAD = ["torch", "torchvision", "webdataset", "pyarrow", "slrnet.data.shards"]
"""What the fork server imports once, so that readers start with it."""


class TrainLoader:
    """Batches of random crops of a split, for one rank.

    The draws of a step are a pure function of (seed, epoch, step) and the data, whatever the number of ranks and
    readers: the ranks share each global batch in order, as evenly as it goes. A draw's crop is one of (seed, epoch,
    sample, repeat) alone.
    Labels stay unread unless `supervision` grants them.

    Args:
        shard_set: the data set.
        split: name of the split.
        batch_size: images of a step over all ranks, at least one for each.
        crop_size: side of the crops, pixels.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        flip: probability that a crop is mirrored.
        seed: of the run.
        supervision: which samples are drawn how often, and which labels they grant; None: all of them, with their image
            labels.
        rank: of this process among `world_size`.
        world_size: number of processes that train together, each with a loader of the same arguments.
        workers: reader processes of this rank; 0 reads in this process.
        shuffle_buffer: draws over which the order of the shards is shuffled; 1 keeps it.
        on_error: "stop" raises at the first damaged sample, "skip" puts a recent sample of the same reader in its
            place (the next one at the very beginning) and lists it in `skipped`.
        pin_memory: batches come in page-locked memory (needs an accelerator).

    Attributes:
        global_batch: images of a step over all ranks.
        share: those of this rank.
        steps_per_epoch: whole global batches of an epoch.
        draws: of an epoch.

    Raises:
        ValueError: an argument is out of range, or an epoch has fewer draws than one global batch.
        DataError: there is no such split.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        split: str,
        batch_size: int,
        crop_size: int,
        crop_scale: tuple[float, float],
        flip: float,
        seed: int,
        supervision: Supervision | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        shuffle_buffer: int = 1000,
        on_error: OnError = "stop",
        pin_memory: bool = False,
    ) -> None:
        _check_readers(rank=rank, world_size=world_size, workers=workers, on_error=on_error)
        _check_at_least_one(batch_size=batch_size, crop_size=crop_size, shuffle_buffer=shuffle_buffer)
        view = shard_set.split(split)
        supervision = supervision or image_labels_only(view)
        self.draws = supervision.draws
        self.global_batch = batch_size
        self.steps_per_epoch = self.draws // batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"an epoch of split {split!r} has {self.draws} samples, fewer than the global batch of {batch_size}; "
                f"use a global batch of {self.draws} or less"
            )
        if batch_size < world_size:
            raise ValueError(
                f"a global batch of {batch_size} cannot be shared by {world_size} ranks; use {world_size} or more"
            )
        reader = _TrainReader(
            index=index_split(shard_set, view, on_error=on_error),
            supervision=supervision,
            steps=self.steps_per_epoch,
            batch_size=batch_size,
            share=range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size),
            readers=max(1, workers),
            crop=_CropSettings(crop_size, crop_scale, flip),
            seed=seed,
            shuffle_buffer=shuffle_buffer,
        )
        self.share = len(reader.share)
        self._pool: _ReaderPool[Batch] = _ReaderPool(reader, workers=workers, pin_memory=pin_memory)

    @property
    def left_over(self) -> int:
        """Draws, 0 to global_batch - 1, that an epoch leaves out; other ones every epoch."""
        return self.draws - self.steps_per_epoch * self.global_batch

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Samples of the current (or last) epoch that this rank could not read so far."""
        return tuple(self._pool.skipped)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps start_step, ..., steps_per_epoch - 1; one epoch at a time.

        Starting late gives the same batches as skipping the first ones (but stand-ins for damaged samples may differ),
        without reading what went into them.

        Raises:
            ValueError: `start_step` is negative or above `steps_per_epoch`.
            DataError: a sample is damaged or missing and `on_error` is "stop", a reader finds no readable sample, or
                the number of samples read is not the planned one.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}; an epoch has the steps 0 to {self.steps_per_epoch}")
        return self._batches(epoch, start_step)

    def close(self) -> None:
        """Ends the reader processes; the next epoch starts new ones."""
        self._pool.close()

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        steps = self.steps_per_epoch - start_step
        count = 0
        for batch in self._pool.deliver(epoch, start_step):
            count += 1
            yield batch
        if count != steps or self._pool.samples != steps * self.share:
            raise DataError(
                f"epoch {epoch} gave this rank {count} batches of {self._pool.samples} samples in all, planned were "
                f"{steps} batches of {steps * self.share}; {self._pool.reader.index.advice}"
            )


class EvalLoader:
    """Whole images of a split, each exactly once over all ranks, in the manifest's order; contiguous by rank.

    With `pixel_labels` all files of a sample are read and compared with the manifest's sha256.

    Args:
        shard_set: the data set.
        split: name of the split.
        indices: samples within the split, for instance from `choose_subset`; None for all.
        pixel_labels: read the masks, where there are any.
        rank: of this process among `world_size`.
        world_size: number of processes that evaluate together.
        workers: reader processes of this rank; 0 reads in this process.
        on_error: "stop" raises at the first damaged sample, "skip" leaves it out and lists it in `skipped`.

    Raises:
        ValueError: an argument is out of range.
        DataError: there is no such split.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        split: str,
        indices: Sequence[int] | None = None,
        pixel_labels: bool = True,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        on_error: OnError = "stop",
    ) -> None:
        _check_readers(rank=rank, world_size=world_size, workers=workers, on_error=on_error)
        view = shard_set.split(split)
        wanted = None if indices is None else np.asarray(indices, dtype=np.int64)
        if wanted is not None and len(wanted) and (wanted.min() < 0 or wanted.max() >= view.num_samples):
            raise ValueError(
                f"indices run from {wanted.min()} to {wanted.max()}; split {split!r} has the samples 0 to "
                f"{view.num_samples - 1}"
            )
        self.total = view.num_samples if wanted is None else len(wanted)
        first, stop = self.total * rank // world_size, self.total * (rank + 1) // world_size
        mine = np.arange(first, stop) if wanted is None else wanted[first:stop]
        self.num_samples = len(mine)
        index = index_split(shard_set, view, on_error=on_error, checksums=pixel_labels)
        reader = _EvalReader(index=index, indices=mine, readers=max(1, workers), pixel_labels=pixel_labels)
        self._pool: _ReaderPool[EvalSample] = _ReaderPool(reader, workers=workers, pin_memory=False)

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Samples of the current (or last) pass that this rank could not read so far."""
        return tuple(self._pool.skipped)

    def __len__(self) -> int:
        """Samples of this rank."""
        return self.num_samples

    def __iter__(self) -> Iterator[EvalSample]:
        """Yields this rank's samples; one pass at a time.

        Raises:
            DataError: a sample is damaged or missing and `on_error` is "stop", or not all samples came.
        """
        count = 0
        for sample in self._pool.deliver(0, 0):
            count += 1
            yield sample
        if count + len(self._pool.skipped) != self.num_samples:
            raise DataError(
                f"{count} samples came and {len(self._pool.skipped)} were skipped, planned were {self.num_samples}; "
                f"{self._pool.reader.index.advice}"
            )

    def close(self) -> None:
        """Ends the reader processes; the next pass starts new ones."""
        self._pool.close()


# Reader processes.


@dataclass(frozen=True)
class _Delivery(Generic[Payload]):
    """What a reader sends: a payload, or (None) what happened since the last one."""

    payload: Payload | None
    samples: int = 0
    skipped: tuple[SkippedSample, ...] = ()
    failure: str | None = None

    def pin_memory(self) -> _Delivery[Payload]:
        """Called by torch's loader on what it hands on."""
        if not isinstance(self.payload, Batch):
            return self
        return _Delivery(self.payload.pin_memory(), self.samples, self.skipped)  # type: ignore[arg-type]


class _Reader(Protocol[Payload]):
    @property
    def index(self) -> SampleIndex: ...

    def deliver(self, worker: int, epoch: int, start_step: int) -> Iterator[_Delivery[Payload]]: ...


class _ReaderDataset(IterableDataset[_Delivery[Payload]]):
    """Runs a reader; an expected error travels as a message, as torch wraps what it raises itself into tracebacks."""

    def __init__(self, reader: _Reader[Payload], control: Tensor) -> None:
        self.reader = reader
        self.control = control

    def __iter__(self) -> Iterator[_Delivery[Payload]]:
        worker = get_worker_info()
        epoch, start_step = self.control.tolist()
        try:
            yield from self.reader.deliver(worker.id if worker else 0, epoch, start_step)
        except DataError as error:
            yield _Delivery(None, failure=str(error))


class _ReaderPool(Generic[Payload]):
    """The readers of a loader, in this process or in others that stay, and what they report."""

    def __init__(self, reader: _Reader[Payload], *, workers: int, pin_memory: bool) -> None:
        self.reader = reader
        self.skipped: list[SkippedSample] = []
        self.samples = 0
        self._workers = workers
        self._pin_memory = pin_memory
        self._control = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._dataset = _ReaderDataset(reader, self._control)
        self._loader: DataLoader[_Delivery[Payload]] | None = None
        self._named: set[str] = set()

    def deliver(self, epoch: int, start_step: int) -> Iterator[Payload]:
        """Yields what the readers send in turn; counts samples and skipped ones."""
        self.skipped, self.samples = [], 0
        self._control.copy_(torch.tensor([epoch, start_step]))
        for delivery in self._deliveries():
            self._note(delivery)
            if delivery.failure is not None:
                self.close()  # now: readers that are left to the garbage collector take seconds to end
                raise DataError(delivery.failure)
            if delivery.payload is not None:
                yield delivery.payload

    def close(self) -> None:
        self._loader = None

    def _deliveries(self) -> Iterator[_Delivery[Payload]]:
        if not self._workers:  # torch's loader would do nothing but add a hundredth of the time
            made = iter(self._dataset)
            return map(_Delivery.pin_memory, made) if self._pin_memory else made
        if self._loader is None:
            self._loader = self._start()
        return iter(self._loader)

    def _start(self) -> DataLoader[_Delivery[Payload]]:
        return DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self._workers,
            multiprocessing_context=helper_context(_PRELOAD),
            persistent_workers=True,
            pin_memory=self._pin_memory,
            worker_init_fn=partial(_begin_reader, os.getpid()),
            # Its own generator: torch would else draw its workers' base seed from the global one.
            generator=torch.Generator(),
        )

    def _note(self, delivery: _Delivery[Payload]) -> None:
        self.samples += delivery.samples
        for skipped in delivery.skipped:
            self.skipped.append(skipped)
            if skipped.shard not in self._named:
                self._named.add(skipped.shard)
                _logger.warning(
                    "shard %s: sample %r is skipped: %s; further ones of this shard are counted in silence; %s",
                    skipped.shard,
                    skipped.key,
                    skipped.reason,
                    self.reader.index.advice,
                )


@dataclass(frozen=True)
class _CropSettings:
    size: int
    scale: tuple[float, float]
    flip: float


@dataclass(frozen=True, kw_only=True)
class _TrainReader:
    """Makes the batches of a rank's readers. Picklable; holds nothing that changes."""

    index: SampleIndex
    supervision: Supervision
    steps: int
    batch_size: int
    """Over all ranks."""
    share: range
    """Places in it that are this rank's."""
    readers: int
    crop: _CropSettings
    seed: int
    shuffle_buffer: int

    def deliver(self, worker: int, epoch: int, start_step: int) -> Iterator[_Delivery[Batch]]:
        """The batches of a reader's steps from `start_step` on."""
        # torch asks its workers in turn, from worker 0 on: that one has to make step start_step.
        steps = range(start_step + worker, self.steps, self.readers)
        with ShardFiles(self.index) as files:
            maker = _BatchMaker(self, files)
            for batch in wds.DataPipeline(partial(self._find, files, steps, epoch), maker.batches):
                yield _Delivery(batch, samples=len(batch.keys), skipped=tuple(maker.skipped))
                maker.skipped.clear()
            yield _Delivery(None, skipped=tuple(maker.skipped))

    def draws(self, steps: range, epoch: int) -> Iterator[Draws]:
        """This rank's part of some global batches, in order.

        The plan is asked for one step, or for several where they lie within the reach of the shuffling.
        """
        plan = plan_epoch(
            self.supervision.pools_in(epoch),
            self.index.firsts,
            seed=self.seed,
            epoch=epoch,
            window=self.shuffle_buffer,
        )
        at_once = max(1, self.shuffle_buffer // (steps.step * self.batch_size))
        for first in range(0, len(steps), at_once):
            starts = np.array(steps[first : first + at_once], dtype=np.int64) * self.batch_size
            places = starts[:, None] + np.array(self.share)
            begin = int(places[0, 0])
            found = plan.draws(begin, int(places[-1, -1]) + 1)
            for own in places - begin:
                yield Draws(found.samples[own], found.repeats[own])

    def boxes(self, found: Sequence[FoundSample | SkippedSample], keys: Bits) -> list[Crop]:
        """Draws a crop for each sample, whose image has the size that the manifest says."""
        sizes = [(one.row.height, one.row.width) if isinstance(one, FoundSample) else (1, 1) for one in found]
        return draw_crops(sizes, size=self.crop.size, scale=self.crop.scale, flip=self.crop.flip, keys=keys)

    def _find(self, files: ShardFiles, steps: range, epoch: int) -> Iterator[list[_Item]]:
        """What was drawn for one batch after another, come what may: damage does not shift the order of the others.

        All that needs no pixels is done here: code that runs once between two images has left the processor's caches.
        """
        key = key_of(self.seed, epoch)
        for draws in self.draws(steps, epoch):
            masks = self.supervision.pixel_labels.has(draws.samples).tolist()
            named = self.supervision.image_labels.has(draws.samples).tolist()
            keys = random_bits(random_bits(key, draws.samples), draws.repeats)
            samples = zip(draws.samples.tolist(), masks, strict=True)
            found = [self._find_one(files, sample, masks=mask) for sample, mask in samples]
            yield list(map(_Item, found, self.boxes(found, keys), named, keys.tolist()))

    def _find_one(self, files: ShardFiles, sample: int, *, masks: bool) -> FoundSample | SkippedSample:
        try:
            return files.find(sample, masks=masks)
        except DataError as error:
            return self.index.damage(sample, error)


class _Item(NamedTuple):
    """A planned sample on its way, or what is wrong with it."""

    found: FoundSample | SkippedSample
    crop: Crop
    named: bool
    """Whether its image labels are known and granted."""
    key: int
    """Of this draw, for its random numbers."""


@dataclass(frozen=True, slots=True)
class _Crops:
    """A batch's crops, of which some may be lost."""

    items: list[_Item]
    images: Tensor
    """(N, 3, S, S) uint8, channels last."""
    masks: list[Tensor | None]
    """(S, S) uint8 each, where granted."""


class _BatchMaker:
    """Makes batches from what a reader has found; each crop is made where it stays in its batch.

    Attributes:
        skipped: samples that could not be read, until somebody clears it.
    """

    def __init__(self, reader: _TrainReader, files: ShardFiles) -> None:
        self.skipped: list[SkippedSample] = []
        self._reader = reader
        self._files = files
        self._recent: deque[_Item] = deque(maxlen=_RECENT)

    def batches(self, planned: Iterator[list[_Item]]) -> Iterator[Batch]:
        """Batches of crops in the order planned; recent good samples, cropped anew, take the places of damaged ones.

        Raises:
            DataError: a sample is damaged, and that stops the run, or all of them are.
        """
        waiting: list[_Crops] = []
        for items in planned:
            waiting.append(self._crop_all(items))
            if self._recent:
                yield from map(self._finished, waiting)
                waiting.clear()
        if waiting:
            raise DataError(
                f"none of the {sum(len(crops.items) for crops in waiting)} samples of a reader "
                f"(shards {_listed(self.skipped)}) can be read; {self._reader.index.advice}"
            )

    def _crop_all(self, items: list[_Item]) -> _Crops:
        """Decodes and crops what can be, and notes what cannot."""
        number, size = len(self._reader.share), self._reader.crop.size
        if len(items) != number:
            raise DataError(f"a batch of {number} crops has {len(items)} samples")
        images = torch.empty((number, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
        masks: list[Tensor | None] = [None] * number
        for place, (item, image) in enumerate(zip(items, images, strict=True)):
            if isinstance(item.found, FoundSample):
                try:
                    masks[place] = self._crop(item.found, item.crop, image)
                except DataError as error:
                    items[place] = item._replace(found=self._reader.index.damage(item.found.sample, error))
        self._recent.extend(item for item in items if isinstance(item.found, FoundSample))
        self.skipped.extend(item.found for item in items if isinstance(item.found, SkippedSample))
        return _Crops(items, images, masks)

    def _crop(self, found: FoundSample, crop: Crop, out: Tensor) -> Tensor | None:
        """Writes the crop to `out`, (3, S, S); gives the mask's, (S, S), if there is one.

        Raises:
            DataError: the image or the mask is damaged.
        """
        index, files = self._reader.index, self._files.views(found)
        crop_into(out, index.decode(found.row, files, crop.reduction), crop)
        mask = index.decode_mask(found.row, files)
        return None if mask is None else crop_mask(mask, crop, size=self._reader.crop.size)

    def _finished(self, crops: _Crops) -> Batch:
        """The batch, with stand-ins for what is lost."""
        items, masks = crops.items, crops.masks
        for place, item in enumerate(items):
            if isinstance(item.found, SkippedSample):
                items[place], masks[place] = self._stand_in(item.key, crops.images[place])
        rows = [item.found.row for item in items if isinstance(item.found, FoundSample)]
        named = [item.named for item in items]
        granted = [row if known else None for row, known in zip(rows, named, strict=True)]
        return Batch(
            images=crops.images,
            image_labels=self._reader.index.image_labels(granted),
            has_image_labels=torch.from_numpy(np.array(named)),
            keys=tuple(row.key for row in rows),
            has_pixel_labels=torch.from_numpy(np.array([mask is not None for mask in masks])),
            pixel_labels=_stacked(masks, self._reader.crop.size),
        )

    def _stand_in(self, key: int, out: Tensor) -> tuple[_Item, Tensor | None]:
        """A recent good sample, cropped anew to `out`, and the mask's crop."""
        item = self._recent[key % len(self._recent)]
        assert isinstance(item.found, FoundSample)
        (crop,) = self._reader.boxes([item.found], np.array([key], dtype=np.uint64))
        with self._reader.index.naming(item.found.sample):
            return item, self._crop(item.found, crop, out)


def _stacked(masks: list[Tensor | None], size: int) -> Tensor | None:
    """(N, S, S) uint8, void where there is none; None where there are none at all."""
    if all(mask is None for mask in masks):
        return None
    void = torch.full((size, size), IGNORE_INDEX, dtype=torch.uint8)
    return torch.stack([void if mask is None else mask for mask in masks])


@dataclass(frozen=True, kw_only=True)
class _EvalReader:
    """Reads whole images; with W readers each takes every W-th sample, so that taking turns keeps the order."""

    index: SampleIndex
    indices: npt.NDArray[np.int64]
    readers: int
    pixel_labels: bool

    def deliver(self, worker: int, epoch: int, start_step: int) -> Iterator[_Delivery[EvalSample]]:
        """A reader's samples, whatever epoch and step."""
        with ShardFiles(self.index) as files:
            for sample in self.indices[worker :: self.readers].tolist():
                try:
                    yield _Delivery(self._load(sample, files), samples=1)
                except DataError as error:
                    yield _Delivery(None, skipped=(self.index.damage(sample, error),))

    def _load(self, sample: int, files: ShardFiles) -> EvalSample:
        found = files.read(sample, masks=self.pixel_labels)
        row = self.index.split.row(sample)
        return EvalSample(
            key=row.key,
            image=self.index.decode(row, found),
            pixel_labels=self.index.decode_mask(row, found),
            image_labels=self.index.image_labels([row])[0],
            has_image_labels=row.has_image_labels,
        )


def _listed(skipped: Iterable[SkippedSample], most: int = 5) -> str:
    names = sorted({sample.shard for sample in skipped})
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_readers(*, rank: int, world_size: int, workers: int, on_error: str) -> None:
    _check_at_least_one(world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size {world_size} allowed are 0 to {world_size - 1}")
    if workers < 0:
        raise ValueError(f"workers is {workers}; allowed are 0 (read in this process) and more")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is {on_error!r}; allowed are 'stop' and 'skip'")


def _check_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def prepare_reader() -> None:
    """Sets what a process needs that does nothing but read: reader processes do so themselves.

    What has been imported is taken from the garbage collector, which would look through it every few thousand images.
    """
    from slrnet.cpu.allocator import keep_small_pieces

    gc.freeze()
    keep_small_pieces()


def _begin_reader(parent: int, worker: int) -> None:
    """Ends this reader once the training process is gone: torch looks at its parent only, which is the fork server."""
    prepare_reader()
    end_with(parent)
