"""The evaluation loader: whole images with their masks, each exactly once over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slrnet.data.batch import EvalSample
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.readers import Delivery, Loader, check_place
from slrnet.data.samples import OnError, SampleIndex, ShardFiles

__all__ = ["EvalLoader"]


class EvalLoader(Loader[EvalSample]):
    """Whole images of a split, each exactly once over all ranks, in the manifest's order; contiguous by rank.

    With `pixel_labels` all files of a sample are read and compared with the manifest's sha256.

    Args:
        shard_set: the data set.
        split: name of the split.
        indices: samples within the split, for instance from `choose_subset`; None for all.
        pixel_labels: whether to read the masks, where there are any.
        rank: place of this process among `world_size`.
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
        check_place(rank=rank, world_size=world_size, workers=workers)
        view = shard_set.split(split)
        wanted = np.arange(view.num_samples) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= view.num_samples):
            raise ValueError(
                f"indices run from {wanted.min()} to {wanted.max()}; split {split!r} has the samples 0 to "
                f"{view.num_samples - 1}"
            )
        self.total = len(wanted)
        """Number of samples over all ranks."""
        self._indices = wanted[self.total * rank // world_size : self.total * (rank + 1) // world_size]
        index = SampleIndex(shard_set=shard_set, split=view, on_error=on_error, compare=pixel_labels)
        super().__init__(_EvalReader(index, self._indices, max(1, workers)), workers=workers)

    def __len__(self) -> int:
        """Number of samples of this rank."""
        return len(self._indices)

    def __iter__(self) -> Iterator[EvalSample]:
        """Yields this rank's samples; one pass at a time.

        Raises:
            DataError: a sample is damaged or missing and `on_error` is "stop", or not all samples came.
        """
        count = 0
        for sample in self._deliver():
            count += 1
            yield sample
        if count + len(self.skipped) != len(self):
            raise DataError(
                f"{count} samples came and {len(self.skipped)} were skipped, planned were {len(self)}; "
                f"{self.reader.index.advice}"
            )


@dataclass(frozen=True)
class _EvalReader:
    """Reads whole images; each of a rank's readers takes every n-th sample, so that taking turns keeps the order."""

    index: SampleIndex
    indices: npt.NDArray[np.int64]
    readers: int

    def deliver(self, worker: int, epoch: int, start_step: int) -> Iterator[Delivery[EvalSample]]:
        with ShardFiles(self.index) as files:
            for sample in self.indices[worker :: self.readers].tolist():
                try:
                    yield Delivery(self._load(sample, files))
                except DataError as error:
                    yield Delivery(None, skipped=(self.index.damage(sample, error),))

    def _load(self, sample: int, files: ShardFiles) -> EvalSample:
        contents = files.read(sample, masks=self.index.compare)
        row = self.index.split.row(sample)
        return EvalSample(
            key=row.key,
            image=self.index.decode(row, contents),
            pixel_labels=self.index.decode_mask(row, contents),
            image_labels=self.index.image_labels([row])[0],
            has_image_labels=row.has_image_labels,
        )
