"""Sets of samples as runs of neighbours: all samples of a split are one run, whatever their number."""

from __future__ import annotations

from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

__all__ = ["SampleSet"]

Places = npt.NDArray[np.int64]


class SampleSet:
    """An ascending set of whole numbers.

    Args:
        starts: (R,) first number of each run, ascending.
        stops: (R,) the number after its last one; below the next start.
    """

    def __init__(self, starts: npt.ArrayLike, stops: npt.ArrayLike) -> None:
        self.starts: Places = np.asarray(starts, dtype=np.int64)
        self.stops: Places = np.asarray(stops, dtype=np.int64)
        lengths = self.stops - self.starts
        self._ends = np.cumsum(lengths)
        self._begins = self._ends - lengths

    @classmethod
    def all(cls, number: int) -> Self:
        """The numbers from 0 to `number` - 1."""
        return cls([0], [number]) if number else cls([], [])

    @classmethod
    def of(cls, members: npt.ArrayLike) -> Self:
        """The places at which a bool array is true, or ascending numbers, each once."""
        given = np.asarray(members)
        if given.dtype == np.bool_:
            edges = np.flatnonzero(np.diff(given.view(np.int8), prepend=0, append=0))
            return cls(edges[::2], edges[1::2])
        numbers = given.astype(np.int64)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        first, last = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(numbers)]]) - 1
        return cls(numbers[first], numbers[last] + 1) if len(numbers) else cls([], [])

    def __len__(self) -> int:
        """How many there are."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __contains__(self, number: int) -> bool:
        """Whether a number is in it."""
        return bool(self.has(np.array([number]))[0])

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same numbers."""
        if not isinstance(other, SampleSet):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.stops, other.stops)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: SampleSet) -> SampleSet:
        """Numbers that are in both."""
        edges = self._edges(other)
        return _between(edges, self.has(edges) & other.has(edges))

    def __or__(self, other: SampleSet) -> SampleSet:
        """Numbers that are in one or both."""
        edges = self._edges(other)
        return _between(edges, self.has(edges) | other.has(edges))

    def __sub__(self, other: SampleSet) -> SampleSet:
        """Numbers that are in this one alone."""
        edges = self._edges(other)
        return _between(edges, self.has(edges) & ~other.has(edges))

    @cached_property
    def array(self) -> Places:
        """(n,) all of them, ascending."""
        return self.at(np.arange(len(self)))

    @property
    def first(self) -> int:
        """The smallest number, where there is one."""
        return int(self.starts[0])

    def at(self, places: npt.ArrayLike) -> Places:
        """The numbers at some places of the ascending order, each from 0 to n - 1."""
        wanted = np.asarray(places, dtype=np.int64)
        runs = np.searchsorted(self._ends, wanted, side="right")
        found: Places = self.starts[runs] + (wanted - self._begins[runs])
        return found

    def below(self, numbers: npt.ArrayLike) -> Places:
        """How many of the set are smaller than each of some numbers."""
        wanted = np.asarray(numbers, dtype=np.int64)
        if not len(self.starts):
            return np.zeros(wanted.shape, dtype=np.int64)
        runs = np.searchsorted(self.starts, wanted, side="left") - 1
        within = np.minimum(wanted, self.stops[runs]) - self.starts[runs]
        return np.where(runs >= 0, self._begins[runs] + within, 0)

    def has(self, numbers: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which of some numbers are in it."""
        wanted = np.asarray(numbers, dtype=np.int64)
        if not len(self.starts):
            return np.zeros(wanted.shape, dtype=np.bool_)
        runs = np.searchsorted(self.starts, wanted, side="right") - 1
        found: npt.NDArray[np.bool_] = (runs >= 0) & (wanted < self.stops[runs])
        return found

    def _edges(self, other: SampleSet) -> Places:
        return np.unique(np.concatenate([self.starts, self.stops, other.starts, other.stops]))


def _between(edges: Places, inside: npt.NDArray[np.bool_]) -> SampleSet:
    """What lies between each edge and the next one, where it is inside; nothing is after the last one."""
    changes = np.flatnonzero(np.diff(inside.view(np.int8), prepend=0))
    return SampleSet(edges[changes[::2]], edges[changes[1::2]])
