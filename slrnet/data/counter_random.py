"""Random numbers as a function of whole numbers, without state: any of them is computed without those before it.

The generator is SplitMix64 (Steele, Lea, Flood 2014) at a place of its sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Bits", "key_of", "random_bits", "uniform"]

Bits = npt.NDArray[np.uint64]
"""64 random bits each."""


def key_of(seed: int, *place: int) -> np.uint64:
    """A key from a seed, 0 to 2^128 - 1, and numbers, 0 to 2^32 - 1, that say what it is for."""
    key: np.uint64 = np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0]
    return key


def random_bits(keys: np.uint64 | Bits, numbers: npt.NDArray[np.int64]) -> Bits:
    """64 random bits for each key and number; the two are broadcast."""
    bits = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + keys
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def uniform(keys: np.uint64 | Bits, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A random number in [0, 1) for each key and number; the two are broadcast."""
    return (random_bits(keys, numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53
