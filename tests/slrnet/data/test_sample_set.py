"""Sets of samples against Python's sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrnet.data.sample_set import SampleSet

NUMBERS = st.sets(st.integers(0, 12))


@given(one=NUMBERS, two=NUMBERS)
def test_they_behave_as_sets(one: set[int], two: set[int]) -> None:
    first, second = (SampleSet.of(np.isin(np.arange(13), list(numbers))) for numbers in (one, two))
    assert first.array.tolist() == sorted(one)
    assert second.array.tolist() == sorted(two)
    assert (len(first), len(second)) == (len(one), len(two))
    assert (first & second).array.tolist() == sorted(one & two)
    assert (first | second).array.tolist() == sorted(one | two)
    assert (first - second).array.tolist() == sorted(one - two)
    assert (first == second) == (one == two)
    assert (first | second) - second == first - second, "in the same runs, whatever made them"
    everything = np.arange(-1, 15)
    assert first.has(everything).tolist() == [i in one for i in everything.tolist()]
    assert first.below(everything).tolist() == [sum(i < n for i in one) for n in everything.tolist()]
    assert first.at(range(len(one))).tolist() == sorted(one)


def test_all_samples_are_one_run() -> None:
    assert len(SampleSet.all(10**12)) == 10**12
    assert SampleSet.all(3) == SampleSet.of(np.ones(3, dtype=bool)) == SampleSet([0], [3])
    assert SampleSet.all(0) == SampleSet([], []) == SampleSet.of(np.zeros(4, dtype=bool))
    with pytest.raises(IndexError):
        SampleSet.all(3).at(3)
