"""The evaluation loader: whole images with their masks, each exactly once over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from slrnet.data.batch import EvalSample
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.readers import Loader, share_of
from slrnet.data.samples import OnError, SampleIndex, ShardFiles

__all__ = ["EvalLoader"]


class EvalLoader(Loader):
    """Whole images of a split, each exactly once over all ranks, in the manifest's order; contiguous by rank.

    All files of a sample are read, in this process, and compared with the manifest's sha256.

    Args:
        shard_set: the data set.
        split: name of the split.
        indices: samples within the split, for instance from `choose_subset`; None for all.
        rank: place of this process among `world_size`.
        world_size: number of processes that evaluate together.
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
        rank: int = 0,
        world_size: int = 1,
        on_error: OnError = "stop",
    ) -> None:
        view = shard_set.split(split)
        wanted = np.arange(view.num_samples) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= view.num_samples):
            raise ValueError(
                f"indices run from {wanted.min()} to {wanted.max()}; split {split!r} has the samples 0 to "
                f"{view.num_samples - 1}"
            )
        self._indices = wanted[share_of(len(wanted), rank=rank, world_size=world_size)]
        super().__init__(SampleIndex(shard_set=shard_set, split=view, on_error=on_error))

    def __len__(self) -> int:
        """Number of samples of this rank."""
        return len(self._indices)

    def __iter__(self) -> Iterator[EvalSample]:
        """Yields this rank's samples; raises a `DataError` at a damaged one if `on_error` is "stop"."""
        self._skipped = []
        with ShardFiles(self.index) as files:
            for sample in self._indices.tolist():
                try:
                    loaded = self._load(sample, files)
                except DataError as error:
                    self._report(self.index.damage(sample, error))
                else:
                    yield loaded

    def _load(self, sample: int, files: ShardFiles) -> EvalSample:
        contents, row = files.read(sample), self.index.split.row(sample)
        return EvalSample(
            key=row.key,
            image=self.index.decode(row, contents),
            pixel_labels=self.index.decode_mask(row, contents),
            image_labels=self.index.image_labels([row])[0],
            has_image_labels=row.has_image_labels,
            jpeg=contents["jpg"],
        )
