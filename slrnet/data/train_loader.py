"""The training loader: batches of random crops from tar shards, the same on any number of processes.

`slrnet.data.epoch_plan` plans which samples a step draws; `slrnet.data.samples` reads single samples. WebDataset
supplies the pipeline between the two. Its own shard order repeats every epoch and depends on the number of readers, and
its shuffle buffer holds decoded samples; the plan replaces both by arithmetic on the manifest.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from slrnet.config import DataConfig
from slrnet.data.batch import Batch
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.counter_random import Bits, key_of, random_bits
from slrnet.data.epoch_plan import Draws, EpochPlan
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.readers import Deliveries, Delivery, Loader, reader_processes, share_of
from slrnet.data.samples import LocatedSample, SampleIndex, ShardFiles, SkippedSample
from slrnet.data.supervision import Supervision
from slrnet.data.transforms import Crop, crop_into, crop_mask, draw_crops

__all__ = ["TrainLoader"]

_RECENT = 32
"""Good samples that a reader keeps as stand-ins for damaged ones."""
_SHARDS_NAMED = 5


class TrainLoader(Loader):
    """Batches of random crops of the training split, for one rank.

    The draws of a step are a pure function of (seed, epoch, step) and the data, for any number of ranks and readers.
    The ranks share each global batch in order, as evenly as possible. A draw's crop is a function of (seed, epoch,
    sample, repeat) alone. Labels stay unread unless `supervision` grants them. With `on_error` "skip", a recent sample
    of the same reader takes a damaged one's place (at the very beginning the next one); `skipped` lists the damaged.

    Args:
        shard_set: the data set.
        config: the data settings: split, crops, shuffling, reader processes, and what to do about damage.
        supervision: which samples are drawn how often, and which of their labels the training may see.
        batch_size: images of a step over all ranks, at least one for each rank.
        seed: seed of the draws and the crops.
        rank: place of this process among `world_size`.
        world_size: number of processes that train together, each with a loader of the same settings.
        pin_memory: whether batches come in page-locked memory (needs an accelerator).

    Raises:
        ValueError: an argument is out of range, or an epoch has fewer draws than one global batch.
        DataError: there is no such split.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        config: DataConfig,
        supervision: Supervision,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        split, draws = shard_set.split(config.train_split), supervision.draws
        self.steps_per_epoch = draws // batch_size
        """Global batches of an epoch; the draws beyond the last one are left out, other ones every epoch."""
        if not self.steps_per_epoch:
            raise ValueError(
                f"an epoch of split {split.name!r} has {draws} samples, fewer than the global batch of {batch_size}; "
                f"use a global batch of {draws} or less"
            )
        if batch_size < world_size:
            raise ValueError(
                f"a global batch of {batch_size} cannot be shared by {world_size} ranks; use {world_size} or more"
            )
        self.reader = _TrainReader(
            index=SampleIndex(shard_set=shard_set, split=split, on_error=config.on_error),
            config=config,
            supervision=supervision,
            batch_size=batch_size,
            seed=seed,
            steps=self.steps_per_epoch,
            share=share_of(batch_size, rank=rank, world_size=world_size),
        )
        self.share = len(self.reader.share)
        """Images of a step of this rank."""
        super().__init__(self.reader.index)
        self._deliveries, self._pin_memory = Deliveries(self.reader.deliver), pin_memory
        self._processes: Iterable[Delivery] | None = None

    def close(self) -> None:
        """Ends the reader processes; the next epoch starts new ones."""
        self._processes = None

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

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        steps = self.steps_per_epoch - start_step
        batches = samples = 0
        self._skipped = []
        self._deliveries.epoch_and_start.copy_(torch.tensor([epoch, start_step]))
        for delivery in self._deliver():
            for skipped in delivery.skipped:
                self._report(skipped)
            if delivery.failure is not None:
                self.close()  # now: readers that are left to the garbage collector take seconds to end
                raise DataError(delivery.failure)
            if delivery.batch is not None:
                batches, samples = batches + 1, samples + len(delivery.batch.keys)
                yield delivery.batch
        if batches != steps or samples != steps * self.share:
            raise DataError(
                f"epoch {epoch} gave this rank {batches} batches of {samples} samples in all, planned were "
                f"{steps} batches of {steps * self.share}; {self.index.advice}"
            )

    def _deliver(self) -> Iterator[Delivery]:
        workers = self.reader.config.workers
        if not workers:  # torch's loader would take a hundredth of the time and add nothing
            made = iter(self._deliveries)
            return map(Delivery.pin_memory, made) if self._pin_memory else made
        if self._processes is None:
            # Images and masks; labels are small.
            bytes_of_a_batch = self.share * 4 * self.reader.config.crop_size**2
            self._processes = reader_processes(
                self._deliveries, workers=workers, pin_memory=self._pin_memory, batch_bytes=bytes_of_a_batch
            )
        return iter(self._processes)


class _PlannedCrop(NamedTuple):
    """A crop that a batch needs of a sample, or of a stand-in for it if it is damaged."""

    sample: LocatedSample | SkippedSample
    crop: Crop
    labeled: bool
    """Whether its image labels are known and granted."""
    key: int
    """Random bits of this draw alone."""


@dataclass(frozen=True, kw_only=True)
class _TrainReader:
    """Makes the batches of a rank's readers. Picklable; nothing in it changes."""

    index: SampleIndex
    config: DataConfig
    supervision: Supervision
    batch_size: int
    """Images of a global batch."""
    seed: int
    steps: int
    """Steps of an epoch."""
    share: range
    """Places within a global batch that are this rank's."""

    def deliver(self, worker: int, epoch: int, start_step: int) -> Iterator[Delivery]:
        # torch asks its workers in turn, beginning with worker 0: that one has to make step start_step.
        steps = range(start_step + worker, self.steps, max(1, self.config.workers))
        with ShardFiles(self.index) as files:
            maker = _BatchMaker(self, files)
            for batch in wds.DataPipeline(partial(self._plan_batches, files, steps, epoch), maker.batches):
                yield Delivery(batch, skipped=tuple(maker.skipped))
                maker.skipped.clear()
            yield Delivery(None, skipped=tuple(maker.skipped))

    def draws(self, steps: range, epoch: int) -> Iterator[Draws]:
        """This rank's part of some global batches, in order."""
        batch, window, pools = self.batch_size, self.config.shuffle_buffer, self.supervision.pools_in(epoch)
        plan = EpochPlan(pools, self.index.split.firsts, seed=self.seed, epoch=epoch, window=window)
        at_once = max(1, window // (steps.step * batch))  # steps within the reach of the shuffling
        for first in range(0, len(steps), at_once):
            starts = np.array(steps[first : first + at_once], dtype=np.int64) * batch
            places = starts[:, None] + np.array(self.share)
            begin = int(places[0, 0])
            drawn = plan.draws(begin, int(places[-1, -1]) + 1)
            for own in places - begin:
                yield Draws(drawn.samples[own], drawn.repeats[own])

    def draw_crops(self, samples: Sequence[LocatedSample | SkippedSample], keys: Bits) -> list[Crop]:
        """Draws a crop for each sample, whose image has the size that the manifest says."""
        sizes = [(one.row.height, one.row.width) if isinstance(one, LocatedSample) else (1, 1) for one in samples]
        config = self.config
        return draw_crops(sizes, size=config.crop_size, scale=config.crop_scale, flip=config.flip, keys=keys)

    def _plan_batches(self, files: ShardFiles, steps: range, epoch: int) -> Iterator[list[_PlannedCrop]]:
        """The crops of one batch after another. Damaged samples keep their places, so that the others keep theirs.

        All that needs no pixels happens here: code that runs once between two images has left the processor's caches.
        """
        key = key_of(self.seed, epoch)
        for draws in self.draws(steps, epoch):
            masks = self.supervision.pixel_labels.has(draws.samples).tolist()
            labeled = self.supervision.image_labels.has(draws.samples).tolist()
            keys = random_bits(random_bits(key, draws.samples), draws.repeats)
            samples: list[LocatedSample | SkippedSample] = []
            for sample, mask in zip(draws.samples.tolist(), masks, strict=True):
                try:
                    samples.append(files.locate(sample, masks=mask))
                except DataError as error:
                    samples.append(self.index.damage(sample, error))
            yield list(map(_PlannedCrop, samples, self.draw_crops(samples, keys), labeled, keys.tolist()))


class _BatchMaker:
    """Makes batches from planned crops. Each crop is written to its place in the batch."""

    def __init__(self, reader: _TrainReader, files: ShardFiles) -> None:
        self.skipped: list[SkippedSample] = []
        """Samples that could not be read; the caller clears it."""
        self._reader = reader
        self._files = files
        self._recent: deque[_PlannedCrop] = deque(maxlen=_RECENT)

    def batches(self, planned: Iterator[list[_PlannedCrop]]) -> Iterator[Batch]:
        """Batches of crops in the order planned; recent good samples, cropped again, replace damaged ones.

        Raises:
            DataError: a sample is damaged and `on_error` is "stop", or all samples are damaged.
        """
        waiting = []
        for crops in planned:
            waiting.append((crops, *self._crop_all(crops)))
            if self._recent:
                yield from itertools.starmap(self._complete, waiting)
                waiting.clear()
        if waiting:
            shards = sorted({sample.shard for sample in self.skipped})
            more = f" and {len(shards) - _SHARDS_NAMED} more" if len(shards) > _SHARDS_NAMED else ""
            raise DataError(
                f"none of the {sum(len(crops) for crops, *_ in waiting)} samples of a reader "
                f"(shards {', '.join(shards[:_SHARDS_NAMED])}{more}) can be read; {self._reader.index.advice}"
            )

    def _crop_all(self, planned: list[_PlannedCrop]) -> tuple[Tensor, list[Tensor | None]]:
        """Images (N, 3, S, S) uint8 and masks (S, S) uint8 of the readable samples; notes the others in `planned`."""
        number, size = len(self._reader.share), self._reader.config.crop_size
        if len(planned) != number:
            raise DataError(f"a batch of {number} crops has {len(planned)} samples")
        images = torch.empty((number, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
        masks: list[Tensor | None] = [None] * number
        for place, (one, image) in enumerate(zip(planned, images, strict=True)):
            if isinstance(one.sample, LocatedSample):
                try:
                    masks[place] = self._crop(one.sample, one.crop, image)
                except DataError as error:
                    planned[place] = one._replace(sample=self._reader.index.damage(one.sample.sample, error))
        self._recent.extend(one for one in planned if isinstance(one.sample, LocatedSample))
        self.skipped.extend(one.sample for one in planned if isinstance(one.sample, SkippedSample))
        return images, masks

    def _crop(self, sample: LocatedSample, crop: Crop, out: Tensor) -> Tensor | None:
        """Writes the image's crop to `out`, (3, S, S); returns the mask's, (S, S), if there is one."""
        index, contents, config = self._reader.index, self._files.contents(sample), self._reader.config
        crop_into(out, index.decode(sample.row, contents, crop.reduction), crop, mode=config.crop_filter)
        mask = index.decode_mask(sample.row, contents)
        return None if mask is None else crop_mask(mask, crop, size=config.crop_size)

    def _complete(self, planned: list[_PlannedCrop], images: Tensor, masks: list[Tensor | None]) -> Batch:
        """The batch, with stand-ins for lost crops."""
        for place, one in enumerate(planned):
            if isinstance(one.sample, SkippedSample):
                planned[place], masks[place] = self._stand_in(one.key, images[place])
        rows = [one.sample.row for one in planned if isinstance(one.sample, LocatedSample)]
        labeled, masked = [one.labeled for one in planned], [mask is not None for mask in masks]
        granted = [row if known else None for row, known in zip(rows, labeled, strict=True)]
        void = torch.full(images.shape[-2:], IGNORE_INDEX, dtype=torch.uint8)
        return Batch(
            images=images,
            image_labels=self._reader.index.image_labels(granted),
            has_image_labels=torch.tensor(labeled),
            keys=tuple(row.key for row in rows),
            has_pixel_labels=torch.tensor(masked),
            pixel_labels=torch.stack([void if mask is None else mask for mask in masks]) if any(masked) else None,
        )

    def _stand_in(self, key: int, out: Tensor) -> tuple[_PlannedCrop, Tensor | None]:
        """A recent good sample, cropped again to `out`, and the mask's crop."""
        recent = self._recent[key % len(self._recent)]
        assert isinstance(recent.sample, LocatedSample)
        (crop,) = self._reader.draw_crops([recent.sample], np.array([key], dtype=np.uint64))
        with self._reader.index.naming(recent.sample.sample):
            return recent, self._crop(recent.sample, crop, out)
