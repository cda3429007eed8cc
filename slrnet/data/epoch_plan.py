"""Which samples an epoch consists of, in which order, and who takes them: pure functions of seeds and counts.

An epoch is one sequence of samples: the shards in an order that is a pure function of (seed, epoch), each shard's
samples in the order of the tar. Its first steps * global_batch samples are cut into equal contiguous ranges by rank,
and a rank's range into contiguous blocks of whole batches by reader, so every rank takes the same number of steps. The
samples left over at the end differ from epoch to epoch. Everything is array arithmetic on the shards that a reader
touches, so 100,000 shards cost no more than their permutation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slrnet.data.manifest import SplitView

__all__ = ["EpochPlan", "ShardRange", "choose_subset", "plan_epoch", "reader_batches"]


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Samples start, ..., stop - 1 of a shard, counted from its first one.

    Attributes:
        shard: place of the shard in `SplitView.shards`.
        start: first sample.
        stop: one past the last sample.
    """

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class EpochPlan:
    """The order of an epoch; positions count the samples of the whole sequence from 0.

    Attributes:
        order: (S,) int64 shards in reading order.
        starts: (S + 1,) int64 position at which each of them begins; the last entry is the number of samples.
    """

    order: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    def ranges(self, first: int, stop: int) -> list[ShardRange]:
        """The pieces of shards that positions first, ..., stop - 1 consist of, in order."""
        if first >= stop:
            return []
        begin = int(np.searchsorted(self.starts, first, side="right")) - 1
        end = int(np.searchsorted(self.starts, stop, side="left"))
        lows = np.maximum(self.starts[begin:end], first) - self.starts[begin:end]
        highs = np.minimum(self.starts[begin + 1 : end + 1], stop) - self.starts[begin:end]
        return [
            ShardRange(int(shard), int(low), int(high))
            for shard, low, high in zip(self.order[begin:end], lows, highs, strict=True)
        ]


def plan_epoch(counts: npt.ArrayLike, *, seed: int, epoch: int) -> EpochPlan:
    """Permutes the shards of a split for one epoch.

    Args:
        counts: (S,) samples of each shard, each at least 1.
        seed: of the run.
        epoch: from 0.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(sizes)).astype(np.int64)
    return EpochPlan(order, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes[order])]))


def reader_batches(steps: int, *, reader: int, readers: int) -> int:
    """Batches of a rank's `steps` that one of its readers makes: those of steps reader, reader + readers, ..."""
    return max(0, (steps - reader + readers - 1) // readers)


def choose_subset(
    split: SplitView, n: int, *, seed: int, among: npt.NDArray[np.bool_] | None = None
) -> tuple[int, ...]:
    """Chooses a fixed subset of a split's samples.

    Args:
        split: to choose from.
        n: how many; all of them where there are fewer.
        seed: the same seed gives the same subset.
        among: (num_samples,) bool, which samples may be chosen, for instance `split.has_masks`; None for all.

    Returns:
        Indices within the split, ascending.
    """
    allowed = range(split.num_samples) if among is None else np.flatnonzero(among).tolist()
    return tuple(sorted(random.Random(f"subset {seed}").sample(allowed, min(n, len(allowed)))))
