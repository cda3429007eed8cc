"""The epoch plan: exact numbers of draws, the ratio of the pools everywhere, locality, and nothing of the cluster."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrnet.data.epoch_plan import Draws, EpochPlan, Pool
from slrnet.data.sample_set import SampleSet


def _set_of(numbers: Iterable[int]) -> SampleSet:
    chosen = np.fromiter(numbers, dtype=np.int64)
    member = np.zeros(int(chosen.max(initial=-1)) + 1, dtype=np.bool_)
    member[chosen] = True
    return SampleSet.of(member)


def pool(samples: list[int] | range, draws: float | list[float] = 1.0) -> Pool:
    return Pool(_set_of(samples), draws if isinstance(draws, float | int) else np.array(draws))


def firsts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def plan(pools: list[Pool], counts: list[int], *, seed: int = 1, epoch: int = 0, window: int = 1) -> Draws:
    found = EpochPlan(pools, firsts(counts), seed=seed, epoch=epoch, window=window)
    return found.draws(0, len(found))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    times=st.integers(1, 4),
    every=st.integers(2, 5),
    window=st.sampled_from([1, 3, 1000]),
    epoch=st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_each_sample_is_drawn_as_often_as_asked(
    counts: list[int], times: int, every: int, window: int, epoch: int
) -> None:
    total = sum(counts)
    labeled = list(range(0, total, every))
    others = sorted(set(range(total)) - set(labeled))
    pools = [pool(labeled, times), *([pool(others)] if others else [])]
    found = plan(pools, counts, epoch=epoch, window=window)
    drawn = Counter(zip(found.samples.tolist(), found.repeats.tolist(), strict=True))
    expected = {(sample, repeat) for sample in labeled for repeat in range(times)} | {(i, 0) for i in others}
    assert drawn == dict.fromkeys(expected, 1)


@given(first=st.integers(1, 40), second=st.integers(1, 40), batch=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_every_batch_has_both_pools_in_their_ratio(first: int, second: int, batch: int) -> None:
    found = plan([pool(range(first)), pool(range(first, first + second))], [first + second])
    share = first / (first + second)
    for start in range(first + second - batch + 1):  # ranks and accumulation steps start anywhere
        number = int((found.samples[start : start + batch] < first).sum())
        assert abs(number - share * batch) <= 1 + 1e-9


def test_fractions_even_out_over_the_epochs_and_the_length_stays() -> None:
    draws = [0.25, 0.25, 1.5, 2.0, 0.3, 1.7]
    totals = np.zeros(6)
    for epoch in range(20):
        found = plan([pool(range(6), draws)], [6], epoch=epoch)
        counts = np.bincount(found.samples, minlength=6)
        assert len(found.samples) == 6
        assert (np.abs(counts - draws) < 1 + 1e-9).all()
        totals += counts
    assert np.abs(totals - 20 * np.array(draws)).max() <= 2.0


def test_a_window_of_one_keeps_the_shards_together_and_a_wide_one_mixes() -> None:
    counts = [5] * 20
    shards = plan([pool(range(100))], counts).samples // 5
    assert len(shards[np.flatnonzero(np.diff(shards, prepend=-1))]) == 20, "each shard is read once, in one go"
    assert shards[::5].tolist() != sorted(shards[::5].tolist())
    local = plan([pool(range(100))], counts, window=10).samples
    order = {shard: place for place, shard in enumerate(shards[::5].tolist())}
    distances = np.abs(np.array([5 * order[sample // 5] for sample in local.tolist()]) - np.arange(100))
    assert 5 < np.minimum(distances, 100 - distances).max() <= 20, "moved, but not far (the epoch is a circle)"


def test_repeated_draws_lie_evenly_apart() -> None:
    found = plan([pool(range(50), 5.0)], [50])
    for sample in range(50):
        places = np.flatnonzero(found.samples == sample)
        assert np.abs(np.diff(places) - 50).max() <= 4, "samples of one time change places"


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(plan([pool(range(60))], [3] * 20, seed=seed, epoch=epoch).samples.tolist())

    assert order(1, 2) == order(1, 2)
    assert len({order(*of) for of in ((1, 2), (2, 1), (1, 3), (2, 2))}) == 4


def test_two_pools_over_many_shards() -> None:
    counts = [100] * 1000
    labeled = _set_of(np.arange(0, 100_000, 10))
    found = plan([Pool(labeled, 5.0), Pool(SampleSet.all(100_000) - labeled, 1.0)], counts, window=1000)
    assert len(found.samples) == 140_000
    assert np.bincount(found.samples).tolist() == [5, *[1] * 9] * 10_000


@pytest.mark.parametrize("draws", [[0.5, 0.5, 1.0], [3.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
def test_totals_are_whole(draws: list[float]) -> None:
    wanted = pool(range(3), draws)
    for epoch in range(10):
        assert len(plan([wanted], [3], epoch=epoch).samples) == wanted.total == round(sum(draws))


# The twin: the whole order, by sorting all draws, in Python's whole numbers.


def twin(pools: list[Pool], counts: list[int], *, seed: int, epoch: int, window: int) -> list[tuple[int, int]]:
    """Samples and repeats of the whole epoch."""
    due = []
    for number, wanted in enumerate(pools):
        rng = np.random.Generator(np.random.PCG64([seed, epoch, number]))
        moves, phases = (int(key) for key in rng.integers(1 << 64, size=2, dtype=np.uint64))
        shift = (random.Random(f"shift {seed}").random() + epoch * 0.6180339887498949) % 1.0
        draws = passes_of(wanted, counts, rng=rng, phases=phases, shift=shift)
        total = len(draws)
        reach = min(window, total) << 16
        times = [(place << 16) + int(split_mix(moves, place) * 2.0**-53 * reach) for place in range(total)]
        # The epochs before and after this one, all alike, make a circle of it.
        around = sorted((time + (turn * total << 16), turn, k) for k, time in enumerate(times) for turn in (-1, 0, 1))
        order = [draws[k] for _, _, k in around[total : 2 * total]]
        due += [(Fraction(2 * k + 1, 2 * total), number, draw) for k, draw in enumerate(order)]
    return [draw for _, _, draw in sorted(due)]


def passes_of(
    wanted: Pool, counts: list[int], *, rng: np.random.Generator, phases: int, shift: float
) -> list[tuple[int, int]]:
    """A pool's draws as one pass over the shards after the other."""
    ids = wanted.samples.array.tolist()
    shards = [[i for i, sample in enumerate(ids) if a <= sample < b] for a, b in pairwise(firsts(counts).tolist())]
    shards = [shard for shard in shards if shard]
    shards = [shards[k] for k in rng.permutation(len(shards))]
    ends = np.cumsum(np.broadcast_to(wanted.draws, len(ids))).tolist()
    ends = [min(wanted.total, math.floor(end + shift)) for end in ends[:-1]] + [wanted.total]
    own = [end - before for before, end in pairwise([0, *ends])]
    found = []
    for turn in range(max(own)):
        for i in chain.from_iterable(shards):
            phase = split_mix(phases, i) >> 37
            turns = [((repeat << 16) + phase) * max(own) // (own[i] << 16) for repeat in range(own[i])]
            found += [(ids[i], repeat) for repeat, of in enumerate(turns) if of == turn]
    return found


def split_mix(key: int, number: int) -> int:
    """53 bits of SplitMix64 at a place."""
    whole = (1 << 64) - 1
    bits = ((number + 1) * 0x9E3779B97F4A7C15 + key) & whole
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & whole
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & whole
    return (bits ^ bits >> 31) >> 11


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    weights=st.sampled_from([[1.0], [2.0], [1.5], [0.3, 1.7], [0.0, 2.5, 0.5, 1.0]]),
    every=st.integers(1, 4),
    window=st.sampled_from([1, 3, 7, 1000]),
    epoch=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_slices_joined_are_the_order_sorted_as_a_whole(
    counts: list[int], weights: list[float], every: int, window: int, epoch: int, cuts: list[int]
) -> None:
    number = sum(counts)
    first, others = list(range(0, number, every)), [i for i in range(number) if i % every]
    draws = np.resize(weights, len(first))
    draws[-1] += max(1, np.ceil(draws.sum())) - draws.sum()
    pools = [Pool(_set_of(first), draws), *([pool(others, 3)] if others else [])]
    if len(weights) == 1 and weights[0] % 1 == 0:
        pools[0] = pool(first, weights[0])
    expected = twin(pools, counts, seed=5, epoch=epoch, window=window)
    found = EpochPlan(pools, firsts(counts), seed=5, epoch=epoch, window=window)
    assert len(found) == len(expected)
    joined = []
    for start, stop in pairwise(sorted({0, len(found), *(cut % len(found) for cut in cuts)})):
        part = found.draws(start, stop)
        joined += list(zip(part.samples.tolist(), part.repeats.tolist(), strict=True))
    assert joined == expected


def test_an_equal_fraction_for_all_needs_no_weights() -> None:
    """120 draws of 80 samples: each once or twice, another half of them twice in other epochs."""
    twice = []
    for epoch in range(2):
        found = plan([pool(range(80), 1.5)], [20] * 4, epoch=epoch, window=5)
        drawn = np.bincount(found.samples, minlength=80)
        assert drawn.sum() == 120
        assert set(drawn.tolist()) == {1, 2}
        assert (np.bincount(drawn.reshape(4, 20).sum(axis=1)) > 0).nonzero()[0].tolist() == [30]
        twice.append(frozenset(np.flatnonzero(drawn == 2).tolist()))
    assert twice[0] != twice[1]


def test_repeats_do_not_spread_the_reading_over_the_shards() -> None:
    """Weights differ, but at any time the draws are of the few shards that the pass has reached."""
    weights = np.resize([0.5, 1.0, 4.5], 3000)
    found = plan([Pool(SampleSet.all(3000), weights)], [30] * 100, window=60)
    for start in range(0, len(found.samples) - 120, 60):
        assert len(set((found.samples[start : start + 60] // 30).tolist())) <= 12
    often = [np.flatnonzero(found.samples == sample) for sample in range(2, 300, 3)]
    gaps = np.concatenate([np.diff(places) for places in often])
    assert gaps.min() > 500, "a pass has about 1200 draws"


def test_a_slice_of_a_hundred_million_draws() -> None:
    """Nothing of the length of the epoch is made: this would take minutes and gigabytes."""
    counts = np.full(100_000, 1000)
    found = EpochPlan([Pool(SampleSet.all(10**8), 2.0)], firsts(counts), seed=0, epoch=7, window=1000)
    assert len(found) == 2 * 10**8
    part, again = found.draws(123_456_000, 123_460_000), found.draws(123_458_000, 123_462_000)
    assert np.array_equal(part.samples[2000:], again.samples[:2000])
    assert len(set((part.samples // 1000).tolist())) <= 8
    assert set(part.repeats.tolist()) == {1}
