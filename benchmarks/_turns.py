"""Timing of two or more ways to do one thing, in turn, so that a busy machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def times_in_turn(forms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each form; the caller has run each once before, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return times
