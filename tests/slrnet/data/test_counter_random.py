"""Random numbers without a state: the published generator, and what makes its numbers useful."""

from __future__ import annotations

import numpy as np

from slrnet.data.counter_random import key_of, random_bits, uniform


def test_the_published_generator() -> None:
    """First numbers of SplitMix64 from the seed 0."""
    numbers = random_bits(np.uint64(0), np.arange(3))
    assert numbers.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_any_number_is_had_alone() -> None:
    keys = np.array([1, 2], dtype=np.uint64)
    whole = uniform(keys[:, None], np.arange(5))
    assert whole.shape == (2, 5)
    assert whole[1, 3] == uniform(keys[1], np.array([3]))[0]
    assert len(np.unique(whole)) == 10


def test_numbers_fill_the_interval_evenly() -> None:
    numbers = uniform(key_of(3), np.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert abs(counts - 5000).max() < 350, "five standard deviations"


def test_keys_follow_from_all_their_numbers_in_order() -> None:
    keys = [key_of(*numbers) for numbers in ((0,), (1,), (0, 1), (1, 0), (0, 0, 1), (2**32,), (2**32, 0), (2**80,))]
    assert len(set(keys)) == len(keys)
    assert key_of(0, 1) == key_of(0, 1)
