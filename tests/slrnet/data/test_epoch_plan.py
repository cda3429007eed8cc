"""The epoch plan: exact numbers of draws, the ratio of the pools everywhere, locality, and nothing of the cluster."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrnet.data.epoch_plan import EpochPlan, Pool, plan_epoch


def pool(samples: list[int] | range, draws: float | list[float] = 1.0) -> Pool:
    ids = np.array(samples, dtype=np.int64)
    return Pool(ids, np.broadcast_to(np.asarray(draws, dtype=np.float64), ids.shape))


def firsts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def plan(pools: list[Pool], counts: list[int], *, seed: int = 1, epoch: int = 0, window: int = 1) -> EpochPlan:
    return plan_epoch(pools, firsts(counts), seed=seed, epoch=epoch, window=window)


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
    labelled = list(range(0, total, every))
    others = sorted(set(range(total)) - set(labelled))
    pools = [pool(labelled, times), *([pool(others)] if others else [])]
    found = plan(pools, counts, epoch=epoch, window=window)
    drawn = Counter(zip(found.samples.tolist(), found.repeats.tolist(), strict=True))
    expected = {(sample, repeat) for sample in labelled for repeat in range(times)} | {(i, 0) for i in others}
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


def test_a_million_samples_in_ten_thousand_shards() -> None:
    counts = [100] * 10_000
    found = plan([pool(range(0, 1_000_000, 10), 5.0), pool(range(1, 1_000_000, 10))], counts, window=1000)
    assert len(found.samples) == 600_000
    assert (np.bincount(found.samples, minlength=1_000_000)[:20:10] == 5).all()


@pytest.mark.parametrize("draws", [[0.5, 0.5, 1.0], [3.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
def test_totals_are_whole(draws: list[float]) -> None:
    wanted = pool(range(3), draws)
    for epoch in range(10):
        assert len(plan([wanted], [3], epoch=epoch).samples) == wanted.total == round(sum(draws))
