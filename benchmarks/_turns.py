"""Timing of two or more ways to do one thing, in turn, so that a busy machine slows all of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch


def parse_turns(description: str | None, *, repeats: int) -> argparse.Namespace:
    """`repeats` and `threads` from the command line; PyTorch gets that many threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def times_in_turn(forms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each form; the caller has run each once before, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return times
