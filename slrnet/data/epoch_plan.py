"""Which samples an epoch draws, and in which order: pure functions of seeds and counts, the same on any cluster.

Samples lie in pools, one for each kind of label. Every sample of a pool has an expected number of draws per epoch. An
epoch rounds it down or up, and other epochs make up for the difference. So all epochs have the same length.

A pool's draws are passes over its shards, in an order that is a pure function of (seed, epoch), each shard's samples in
the order of the tar; repeated draws of a sample lie evenly apart, in different passes. Each draw then moves by a random
distance within a window, so that reading stays local to a few shards. The pools' draws alternate in the ratio of their
numbers: every batch, and every rank's part of it, has both kinds in that ratio, up to rounding.

Step s of global batch B takes draws s B to (s + 1) B - 1, whatever the number of ranks and readers; the rest of less
than a batch at the end is left out, other draws every epoch.

Any part of the order is computed without the rest. A place in the passes is arithmetic on the shards' numbers of
samples; how far a draw moves is a hash of its place; draw i of the order comes from less than a window around place i,
so sorting that neighborhood finds it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slrnet.data.counter_random import uniform
from slrnet.data.manifest import SplitView
from slrnet.data.sample_set import Places, SampleSet

__all__ = ["Draws", "EpochPlan", "Pool", "choose_subset"]

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill the unit interval most evenly."""
_FINE = 16
"""Bits of a draw's time after the point: draws of equal times keep their order."""
_PHASE = 16
"""Bits of a sample's phase among the passes."""
_AT_ONCE = 1 << 20
"""Samples whose draws are counted at a time."""


@dataclass(frozen=True)
class Pool:
    """Samples of one kind and how often an epoch draws each of them."""

    samples: SampleSet
    """Places in the split, at least one."""
    draws: float | npt.NDArray[np.float64]
    """Expected draws per epoch, 0 or more: one number for all samples, or (n,) float64 for each; their sum is a whole
    number up to rounding."""

    @property
    def expected(self) -> float:
        """The sum of the expected draws."""
        return float(self.draws.sum() if isinstance(self.draws, np.ndarray) else self.draws * len(self.samples))

    @property
    def total(self) -> int:
        """Draws per epoch, the same in all epochs."""
        return round(self.expected)

    def part(self, samples: SampleSet) -> Pool:
        """Some of the samples, drawn as often as here."""
        each = self.draws
        return Pool(samples, each[self.samples.below(samples.array)] if isinstance(each, np.ndarray) else each)


class Draws(NamedTuple):
    """Some draws of an epoch in order."""

    samples: Places
    """(n,) int64 places in the split."""
    repeats: Places
    """(n,) int64 counts the draws of each sample in the epoch from 0."""


class EpochPlan:
    """The draws of an epoch in order, computed piece by piece.

    Args:
        pools: at least one; no sample is in two of them.
        firsts: (S + 1,) first sample of each shard; the last entry is the number of samples.
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        window: draws of its pool over which a draw's place is spread, >= 1; 1 keeps the order of the shards.
    """

    def __init__(self, pools: Sequence[Pool], firsts: Places, *, seed: int, epoch: int, window: int) -> None:
        # Evenly spread over the epochs: in any run of epochs a sample comes as often as expected, up to about one.
        shift = (random.Random(f"shift {seed}").random() + epoch * _GOLDEN) % 1.0
        orders = [
            _PoolOrder(pool, firsts, seeds=[seed, epoch, place], shift=shift, window=window)
            for place, pool in enumerate(pools)
        ]
        self._orders = [order for order in orders if order.total]

    def __len__(self) -> int:
        """Draws of the epoch."""
        return sum(order.total for order in self._orders)

    def draws(self, start: int, stop: int) -> Draws:
        """Draws `start` to `stop` - 1, 0 <= start <= stop <= len(self); computes two windows of each pool more."""
        total, spare = len(self), len(self._orders) + 1
        samples, repeats = np.empty(stop - start, dtype=np.int64), np.empty(stop - start, dtype=np.int64)
        for place, order in enumerate(self._orders):
            first = max(0, start * order.total // total - spare)
            numbers = np.arange(first, min(order.total, stop * order.total // total + spare))
            places = self._merged(numbers, place) - start
            chosen = np.flatnonzero((places >= 0) & (places < stop - start))
            if len(chosen):
                drawn = order.draws(first + int(chosen[0]), first + int(chosen[-1]) + 1)
                samples[places[chosen]], repeats[places[chosen]] = drawn.samples, drawn.repeats
        return Draws(samples, repeats)

    def _merged(self, numbers: Places, place: int) -> Places:
        """Places in the epoch of some draws of one pool: draw k of T is due at the time (k + 1/2) / T.

        Of draws due at the same time that of the first pool comes first.
        """
        own = self._orders[place].total
        merged = numbers.copy()
        for other, order in enumerate(self._orders):
            if other != place:
                # Draws j of the other pool with (2 j + 1) own < (2 k + 1) theirs; also equal ones of an earlier pool.
                ahead = (2 * numbers + 1) * order.total - own
                merged += ahead // (2 * own) + 1 if other < place else -(-ahead // (2 * own))
        return merged


def choose_subset(split: SplitView, n: int, *, seed: int, among: SampleSet | None = None) -> tuple[int, ...]:
    """Chooses n of a split's samples, all if there are fewer; the same ones for the same seed.

    Args:
        split: the split to choose from.
        n: how many samples to choose.
        seed: the seed of the choice.
        among: which samples may be chosen, for instance `split.with_masks`; None for all.

    Returns:
        Indices within the split, ascending.
    """
    allowed = SampleSet.all(split.num_samples) if among is None else among
    places = random.Random(f"subset {seed}").sample(range(len(allowed)), min(n, len(allowed)))
    return tuple(allowed.at(sorted(places)).tolist())


class _PoolOrder:
    """The order of one pool's draws.

    Its passes are cut into cells, one for each shard in each pass; a cell holds the draws of that shard's samples whose
    turn comes in that pass. Where all samples are drawn equally often, each has its turn in every pass.
    """

    def __init__(self, pool: Pool, firsts: Places, *, seeds: list[int], shift: float, window: int) -> None:
        rng = np.random.Generator(np.random.PCG64(seeds))
        self.total = pool.total
        self._samples = pool.samples
        self._keys = rng.integers(1 << 64, size=2, dtype=np.uint64)
        self._window = min(window, self.total)
        # Samples of the pool, counted in its own order, that lie in each shard; shards without any are left out.
        bounds = pool.samples.below(firsts)
        shards = rng.permutation(np.flatnonzero(np.diff(bounds)))
        self._begins = bounds[shards]
        self._lengths = bounds[shards + 1] - self._begins
        self._counts = _count_draws(pool, shift)
        if self._counts is None:
            self._passes = self.total // len(pool.samples)
            cells = np.tile(self._lengths, self._passes)
        else:
            self._passes = int(self._counts.max())
            cells = self._count_cells(self._counts)
        self._cells = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(cells)])

    def draws(self, start: int, stop: int) -> Draws:
        """Draws `start` to `stop` - 1, ordered by place + u window, u in [0, 1), as if the epoch repeated forever."""
        # A draw at `start` or later has a place at most a window before it, and such places are as many as the window.
        places = np.arange(start - self._window, stop + self._window)
        moves = uniform(self._keys[0], places % self.total) * (self._window << _FINE)
        times = (np.arange(len(places)) << _FINE) + moves.astype(np.int64)
        order = np.argsort(times, kind="stable")[self._window : self._window + stop - start]
        return self._at(places[order] % self.total)

    def _at(self, places: Places) -> Draws:
        """The draws at some places of the passes, each from 0 to total - 1."""
        cells = np.searchsorted(self._cells, places, side="right") - 1
        within = places - self._cells[cells]
        if self._counts is None:
            repeats, shards = np.divmod(cells, len(self._begins))
            return Draws(self._samples.at(self._begins[shards] + within), repeats)
        touched, which = np.unique(cells, return_inverse=True)
        members, repeats = self._members(touched, self._counts)
        lengths = self._cells[touched + 1] - self._cells[touched]
        own = (np.cumsum(lengths) - lengths)[which] + within
        return Draws(self._samples.at(members[own]), repeats[own])

    def _members(self, cells: Places, counts: Places) -> tuple[Places, Places]:
        """All draws of some cells: samples, counted in the pool, and repeats."""
        passes, shards = np.divmod(cells, len(self._begins))
        lengths = self._lengths[shards]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        samples, turn = np.repeat(self._begins[shards], lengths) + within, np.repeat(passes, lengths)
        own, phase = counts[samples], self._phases(samples)
        # The first repeat that does not come before this pass (see _pass_of), if it comes in it.
        repeats = np.maximum(0, -((phase * self._passes - (turn * own << _PHASE)) // (self._passes << _PHASE)))
        here = (repeats < own) & (((repeats << _PHASE) + phase) * self._passes < ((turn + 1) * own << _PHASE))
        return samples[here], repeats[here]

    def _count_cells(self, counts: Places) -> Places:
        """Draws in each cell."""
        number = len(self._begins)
        cells = np.zeros(number * self._passes, dtype=np.int64)
        by_place = np.argsort(self._begins)
        for first in range(0, len(counts), _AT_ONCE):
            own = counts[first : first + _AT_ONCE]
            samples = np.repeat(np.arange(first, first + len(own)), own)
            repeats = np.arange(len(samples)) - np.repeat(np.cumsum(own) - own, own)
            # _pass_of: the repeats of a sample are spread evenly over the passes, from a phase of its own on.
            turns = ((repeats << _PHASE) + self._phases(samples)) * self._passes // (counts[samples] << _PHASE)
            shards = by_place[np.searchsorted(self._begins[by_place], samples, side="right") - 1]
            cells += np.bincount(turns * number + shards, minlength=len(cells))
        return cells

    def _phases(self, samples: Places) -> Places:
        return (uniform(self._keys[1], samples) * (1 << _PHASE)).astype(np.int64)


def _count_draws(pool: Pool, shift: float) -> Places | None:
    """(n,) draws of each sample: its expectation rounded down or up, so that the sum is exact (systematic sampling).

    None where all samples have the same whole number.
    """
    total, number = pool.total, len(pool.samples)
    if isinstance(pool.draws, np.ndarray):
        ends = np.minimum(np.floor(np.cumsum(pool.draws) + shift).astype(np.int64), total)
        ends[-1] = total
        return np.diff(ends, prepend=0)
    if total % number == 0:
        return None
    return np.diff((np.arange(number + 1) * total + int(shift * number)) // number)
