"""Times alternating runs of two or more implementations, so that a busy machine slows all of them equally."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch


def parse_turns(description: str | None, *, repeats: int) -> argparse.Namespace:
    """Parses `--repeats` and `--threads`, and sets PyTorch's number of threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def times_in_turn(forms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each run of each implementation. Run each one once before, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return times
