"""Compares implementations in separate processes: time of alternating runs, and each process's peak memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from benchmarks._memory import peak_memory


@dataclass(frozen=True)
class SideResult:
    """Measurements of one side.

    Attributes:
        seconds: duration of each run.
        peak: peak resident memory of the process in MiB, including everything it has loaded.
    """

    seconds: list[float]
    peak: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        spread = f"{min(self.seconds):.3f} to {max(self.seconds):.3f}"
        return f"median {self.median:.3f} s ({spread}), peak {self.peak:.0f} MiB"


class Side:
    """A process that runs one action on request."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def run(self) -> tuple[float, float]:
        """Runs the action once; returns its seconds and the peak memory so far in MiB."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["peak"]

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise SystemExit(f"error: {' '.join(map(str, self._process.args))} ended; its output is above")  # type: ignore[arg-type]


def serve_side(action: Callable[[], object]) -> None:
    """Main loop of a `Side`'s process: runs the action once to warm up, then once per line on stdin."""
    action()
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        action()
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "peak": peak_memory()}), flush=True)


def run_in_turn(commands: Mapping[str, Sequence[str]], *, repeats: int) -> dict[str, SideResult]:
    """Starts and warms up one side after the other, then alternates their runs; the waiting sides use no CPU."""
    sides = {name: Side(command) for name, command in commands.items()}
    try:
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                runs[name].append(side.run())
    finally:
        for side in sides.values():
            side.__exit__(None, None, None)
    return {
        name: SideResult([seconds for seconds, _ in taken], max(peak for _, peak in taken))
        for name, taken in runs.items()
    }
