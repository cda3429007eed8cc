"""The loaders: batches of crops for training, whole images for evaluation, from tar shards in reader processes.

Which samples a step draws is planned by `slrnet.data.epoch_plan`; single samples are read by `slrnet.data.samples`.
WebDataset supplies the pipeline between the two. Its own shard order repeats every epoch and depends on the number of
readers, and its shuffle buffer holds decoded samples; the plan replaces both by arithmetic on the manifest.

Reader processes come from a fork server: they start without the training process's threads and CUDA context, live as
long as the loader, and are told the epoch through shared memory.
"""

from __future__ import annotations

import logging
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slrnet.data.batch import Batch, EvalSample, TrainSample, collate
from slrnet.data.epoch_plan import choose_subset, plan_epoch
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.processes import end_with, helper_context
from slrnet.data.samples import OnError, SampleIndex, ShardFiles, SkippedSample, index_split
from slrnet.data.supervision import Supervision, image_labels_only
from slrnet.data.transforms import Crop, crop_image, crop_mask, draw_crop

__all__ = [
    "EvalLoader",
    "OnError",
    "SkippedSample",
    "TrainLoader",
    "choose_subset",
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
        on_error: "stop" raises at the first damaged sample, "skip" puts an earlier sample of the same reader in its
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
        if self._loader is None:
            self._loader = self._start()
        for delivery in self._loader:
            self._note(delivery)
            if delivery.failure is not None:
                self.close()  # now: readers that are left to the garbage collector take seconds to end
                raise DataError(delivery.failure)
            if delivery.payload is not None:
                yield delivery.payload

    def close(self) -> None:
        self._loader = None

    def _start(self) -> DataLoader[_Delivery[Payload]]:
        context = helper_context(_PRELOAD) if self._workers else None
        return DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self._workers,
            multiprocessing_context=context,
            persistent_workers=self._workers > 0,
            pin_memory=self._pin_memory,
            worker_init_fn=partial(_end_with, os.getpid()),
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
        # torch asks its workers in turn, from worker 0 on: that one has to make step start_step.
        steps = range(start_step + worker, self.steps, self.readers)
        maker = _BatchMaker(self, epoch)
        pipeline = wds.DataPipeline(
            partial(self._read, self.draws(steps, epoch), epoch),
            partial(_ahead, count=len(self.share)),
            maker.batches,
        )
        for batch in pipeline:
            yield _Delivery(batch, samples=len(batch.keys), skipped=tuple(maker.skipped))
            maker.skipped.clear()
        yield _Delivery(None, skipped=tuple(maker.skipped))

    def draws(self, steps: range, epoch: int) -> Iterator[tuple[int, int]]:
        """Samples and repeats of this rank's part of some global batches, in order.

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
            places = (starts[:, None] + np.array(self.share)).ravel()
            found = plan.draws(int(places[0]), int(places[-1]) + 1)
            samples, repeats = (part[places - places[0]].tolist() for part in (found.samples, found.repeats))
            yield from zip(samples, repeats, strict=True)

    def box(self, sample: int, rng: random.Random) -> Crop:
        """Draws a crop of a sample whose image has the size that the manifest says."""
        row = self.index.split.row(sample)
        return draw_crop(row.height, row.width, scale=self.crop.scale, flip=self.crop.flip, rng=rng)

    def _read(self, draws: Iterable[tuple[int, int]], epoch: int) -> Iterator[_Item]:
        """One item per draw, come what may: damage does not shift the order of the others."""
        with ShardFiles(self.index) as files:
            for sample, repeat in draws:
                try:
                    found = files.read(sample, masks=sample in self.supervision.pixel_labels)
                    rng = random.Random(f"crop {self.seed} {epoch} {sample} {repeat}")
                    item = _Item(sample, repeat, found, self.box(sample, rng), self._image_labels(sample))
                except DataError as error:
                    item = _Item(sample, repeat, damage=self.index.damage(sample, error))
                yield item

    def _image_labels(self, sample: int) -> Tensor | None:
        """(K-1,) float32 of 0 and 1 where they are known and granted."""
        return self.index.image_labels(sample) if sample in self.supervision.image_labels else None


class _BatchMaker:
    """Makes the batches of one epoch from what a reader has read; each crop is made where it stays in its batch.

    Attributes:
        skipped: samples that could not be read, until somebody clears it.
    """

    def __init__(self, reader: _TrainReader, epoch: int) -> None:
        self.skipped: list[SkippedSample] = []
        self._reader = reader
        self._epoch = epoch
        self._recent: deque[_Item] = deque(maxlen=_RECENT)
        self._images = torch.empty(0)
        self._places: list[Tensor] = []
        """Places in `_images` that are free, from the last to the first."""

    def batches(self, items: Iterator[_Item]) -> Iterator[Batch]:
        """Whole batches of crops, in the items' order.

        Raises:
            DataError: an item is damaged, and that stops the run, or all of them are.
        """
        made: list[TrainSample] = []
        for sample in self._crops(items):
            made.append(sample)
            if not self._places:
                if len(made) != len(self._images):
                    raise DataError(f"a batch of {len(self._images)} crops has {len(made)} samples")
                yield collate(made, self._images)
                made.clear()

    def _crops(self, items: Iterator[_Item]) -> Iterator[TrainSample]:
        """Decodes and crops; a damaged sample's place is taken by a recent good one, cropped anew."""
        waiting: list[_Item] = []
        for item in items:
            made = self._crop_or_note(item)
            if made is not None:
                self._recent.append(item)
                yield made
            else:
                waiting.append(item)
            while self._recent and waiting:
                yield self._stand_in(waiting.pop(0))
        if waiting:
            raise DataError(
                f"none of the {len(waiting)} samples of a reader (shards {_listed(self.skipped)}) can be read; "
                f"{self._reader.index.advice}"
            )

    def _crop_or_note(self, item: _Item) -> TrainSample | None:
        damage = item.damage
        if damage is None:
            try:
                return self._crop(item)
            except DataError as error:
                damage = self._reader.index.damage(item.sample, error)
        self.skipped.append(damage)
        return None

    def _stand_in(self, lost: _Item) -> TrainSample:
        rng = random.Random(f"stand-in {self._reader.seed} {self._epoch} {lost.sample} {lost.repeat}")
        item = rng.choice(self._recent)
        return self._crop(replace(item, crop=self._reader.box(item.sample, rng)))

    def _crop(self, item: _Item) -> TrainSample:
        assert item.files is not None
        assert item.crop is not None
        index, size = self._reader.index, self._reader.crop.size
        image = index.decode(item.sample, item.files)
        mask = index.decode_mask(item.files, image)
        return TrainSample(
            key=index.key(item.sample),
            image=crop_image(image, item.crop, size=size, out=self._place(size)),
            image_labels=index.no_image_labels() if item.image_labels is None else item.image_labels,
            has_image_labels=item.image_labels is not None,
            pixel_labels=None if mask is None else crop_mask(mask, item.crop, size=size),
        )

    def _place(self, size: int) -> Tensor:
        """(3, S, S) uint8 for the next crop, channels last; that of a new batch where the last one is full."""
        if not self._places:
            shape = (len(self._reader.share), 3, size, size)
            self._images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            self._places = list(self._images)[::-1]
        return self._places.pop()


@dataclass(frozen=True, kw_only=True)
class _EvalReader:
    """Reads whole images; with W readers each takes every W-th sample, so that taking turns keeps the order."""

    index: SampleIndex
    indices: npt.NDArray[np.int64]
    readers: int
    pixel_labels: bool

    def deliver(self, worker: int, epoch: int, start_step: int) -> Iterator[_Delivery[EvalSample]]:
        with ShardFiles(self.index) as files:
            for sample in self.indices[worker :: self.readers].tolist():
                try:
                    yield _Delivery(self._load(sample, files), samples=1)
                except DataError as error:
                    yield _Delivery(None, skipped=(self.index.damage(sample, error),))

    def _load(self, sample: int, files: ShardFiles) -> EvalSample:
        found = files.read(sample, masks=self.pixel_labels)
        image = self.index.decode(sample, found)
        return EvalSample(
            key=self.index.key(sample),
            image=image,
            pixel_labels=self.index.decode_mask(found, image),
            image_labels=self.index.image_labels(sample),
            has_image_labels=self.index.has_image_labels(sample),
        )


@dataclass(frozen=True, slots=True)
class _Item:
    """A planned sample on its way: its files, the box to cut out and its image labels, or what is wrong with it."""

    sample: int
    repeat: int
    files: dict[str, bytes] | None = None
    crop: Crop | None = None
    image_labels: Tensor | None = None
    damage: SkippedSample | None = None


def _ahead(items: Iterator[_Item], count: int) -> Iterator[_Item]:
    """Asks for `count` items at a time: code that runs once between two images has left the processor's caches."""
    while some := list(islice(items, count)):
        yield from some


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


def _end_with(parent: int, worker: int) -> None:
    """Ends this reader once the training process is gone: torch looks at its parent only, which is the fork server."""
    end_with(parent)
