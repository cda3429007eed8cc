"""Sets of samples as runs of neighbors: all samples of a split are one run, however many there are."""

from __future__ import annotations

from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

__all__ = ["Places", "SampleSet"]

Places = npt.NDArray[np.int64]
"""Whole numbers, such as places of samples in a split."""


class SampleSet:
    """An ascending set of whole numbers.

    Args:
        starts: (R,) first number of each run, ascending.
        stops: (R,) the number after the last one of each run, below the next start.
    """

    def __init__(self, starts: npt.ArrayLike, stops: npt.ArrayLike) -> None:
        self.starts: Places = np.asarray(starts, dtype=np.int64)
        self.stops: Places = np.asarray(stops, dtype=np.int64)
        self._ends = np.cumsum(self.stops - self.starts)

    @classmethod
    def all(cls, number: int) -> Self:
        """The numbers from 0 to `number` - 1."""
        return cls([0], [number]) if number else cls([], [])

    @classmethod
    def of(cls, members: npt.NDArray[np.bool_]) -> Self:
        """The places at which a bool array is true."""
        edges = np.flatnonzero(np.diff(members.view(np.int8), prepend=0, append=0))
        return cls(edges[::2], edges[1::2])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleSet):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.stops, other.stops)

    def __and__(self, other: SampleSet) -> SampleSet:
        """Numbers that are in both."""
        return self._combine(other, np.logical_and)

    def __or__(self, other: SampleSet) -> SampleSet:
        """Numbers that are in one or both."""
        return self._combine(other, np.logical_or)

    def __sub__(self, other: SampleSet) -> SampleSet:
        """Numbers that are in this set alone."""
        return self._combine(other, np.greater)

    @cached_property
    def array(self) -> Places:
        """(n,) all of them, ascending."""
        return self.at(np.arange(len(self)))

    def at(self, places: npt.ArrayLike) -> Places:
        """The numbers at some places of the ascending order, each place from 0 to n - 1."""
        wanted = np.asarray(places, dtype=np.int64)
        runs = np.searchsorted(self._ends, wanted, side="right")
        return np.asarray(self.stops[runs] + (wanted - self._ends[runs]))

    def below(self, numbers: npt.ArrayLike) -> Places:
        """How many of the set are smaller than each of some numbers."""
        wanted = np.asarray(numbers, dtype=np.int64)
        runs = np.searchsorted(self.starts, wanted, side="left")
        begun = np.concatenate([[0], self._ends])[runs]
        # The last run that starts below a number may go on beyond it.
        beyond = np.maximum(0, np.concatenate([[0], self.stops])[runs] - np.maximum(wanted, 0))
        return np.asarray(begun - beyond)

    def has(self, numbers: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which of some numbers are in the set."""
        wanted = np.asarray(numbers, dtype=np.int64)
        return np.asarray(self.below(wanted + 1) > self.below(wanted))

    def _combine(self, other: SampleSet, operator: np.ufunc) -> SampleSet:
        """The numbers for which an operator holds, given whether each set has them."""
        edges = np.unique(np.concatenate([self.starts, self.stops, other.starts, other.stops]))
        inside = operator(self.has(edges), other.has(edges))
        # The same answer holds from each edge to the next one; after the last edge it is no.
        changes = np.flatnonzero(np.diff(inside.view(np.int8), prepend=0))
        return SampleSet(edges[changes[::2]], edges[changes[1::2]])
