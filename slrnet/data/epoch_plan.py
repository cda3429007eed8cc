"""Which samples an epoch draws, and in which order: pure functions of seeds and counts, blind to the cluster.

Samples lie in pools, one for each kind of label. Every sample of a pool has an expected number of draws per epoch;
an epoch draws it that often, up to the fraction, which other epochs make up for. So all epochs have the same length.

A pool's draws follow the shards in an order that is a pure function of (seed, epoch), each shard's samples in the
order of the tar; repeated draws of a sample lie evenly apart in the epoch. Each draw then moves by a random distance
within a window, so that reading stays local to a few shards. The pools' draws alternate in the ratio of their numbers:
every batch, and every rank's part of it, has both kinds in that ratio, up to rounding.

Step s of global batch B takes draws s B to (s + 1) B - 1, whatever the number of ranks and readers; the rest of less
than a batch at the end is left out, other draws every epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slrnet.data.manifest import SplitView

__all__ = ["EpochPlan", "Pool", "choose_subset", "plan_epoch"]

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill the unit interval most evenly."""


@dataclass(frozen=True)
class Pool:
    """Samples of one kind and how often an epoch draws each of them.

    Attributes:
        samples: (n,) int64 places in the split, ascending, n >= 1.
        draws: (n,) float64 expected draws per epoch, 0 or more; their sum is a whole number up to rounding.
    """

    samples: npt.NDArray[np.int64]
    draws: npt.NDArray[np.float64]

    @property
    def total(self) -> int:
        """Draws per epoch, the same in all epochs."""
        return round(float(self.draws.sum()))


@dataclass(frozen=True)
class EpochPlan:
    """The draws of an epoch in order.

    Attributes:
        samples: (T,) int64 places in the split.
        repeats: (T,) int64 counts the draws of each sample from 0, in no particular order.
    """

    samples: npt.NDArray[np.int64]
    repeats: npt.NDArray[np.int64]


def plan_epoch(
    pools: Sequence[Pool], firsts: npt.NDArray[np.int64], *, seed: int, epoch: int, window: int
) -> EpochPlan:
    """Puts the draws of an epoch in order.

    Args:
        pools: at least one; no sample is in two of them.
        firsts: (S + 1,) first sample of each shard; the last entry is the number of samples.
        seed: of the run.
        epoch: from 0.
        window: draws of its pool over which a draw's place is spread, >= 1; 1 keeps the order of the shards.
    """
    drawn = [
        _order_pool(pool, firsts, rng=_generator(seed, epoch, place), shift=_shift(seed, epoch), window=window)
        for place, pool in enumerate(pools)
    ]
    times = [(np.arange(len(samples)) + 0.5) / max(1, len(samples)) for samples, _ in drawn]
    order = np.argsort(np.concatenate(times), kind="stable")
    samples, repeats = (np.concatenate([part[i] for part in drawn])[order] for i in (0, 1))
    return EpochPlan(samples, repeats)


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


def _order_pool(
    pool: Pool, firsts: npt.NDArray[np.int64], *, rng: np.random.Generator, shift: float, window: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A pool's draws in order: samples and repeats."""
    rank_of_shard = rng.permutation(len(firsts) - 1)
    shards = np.searchsorted(firsts, pool.samples, side="right") - 1
    order = np.argsort(rank_of_shard[shards], kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    counts = _count_draws(pool, shift)
    rows = np.repeat(np.arange(len(counts)), counts)
    repeats = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Times in [0, 1): the place in the order of shards, plus equal steps for further draws of the same sample.
    times = place[rows] / len(place) + repeats / counts[rows] + rng.random(len(rows)) * (window / max(1, len(rows)))
    along = np.argsort(times % 1.0, kind="stable")
    return pool.samples[rows[along]], repeats[along]


def _count_draws(pool: Pool, shift: float) -> npt.NDArray[np.int64]:
    """(n,) draws of each sample: its expectation rounded down or up, so that the sum is exact (systematic sampling)."""
    ends = np.minimum(np.cumsum(pool.draws), pool.total)
    ends[-1] = pool.total
    whole = np.floor(ends + shift).astype(np.int64)
    counts: npt.NDArray[np.int64] = whole - np.concatenate([np.zeros(1, dtype=np.int64), whole[:-1]])
    return counts


def _generator(seed: int, epoch: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, epoch, place]))


def _shift(seed: int, epoch: int) -> float:
    """Evenly spread over the epochs: in any run of epochs a sample comes as often as expected, up to about one."""
    return (random.Random(f"shift {seed}").random() + epoch * _GOLDEN) % 1.0
