"""Runs the fast tests of the numeric folders as other processors would run them: `make test-processors`.

PyTorch, oneDNN, MKL and the C compiler choose their code by what the processor can do, and the choices round
differently. Each combination restricts them by environment variables to what another processor offers, with one and
with two threads. All combinations run; the summary at the end lists each one with the tests that failed in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = tuple(
    f"tests/slrnet/{room}"
    for room in (
        "calibration",
        "cpu",
        "data",
        "evaluation",
        "inference",
        "losses",
        "models",
        "ops",
        "training",
        "views",
    )
)
LEVELS = ("DEFAULT", "AVX2", "AVX512")
"""What `torch.backends.cpu.get_cpu_capability` answers on x86-64, from the least to the most."""
COMPILER = "SLRNET_CC"
MOST_WORKERS = 4

RunTests = Callable[[Sequence[str], dict[str, str]], list[str]]
"""Runs pytest with these arguments and variables; returns the tests that failed."""


@dataclass(frozen=True)
class Combination:
    """One set of variables to test under.

    Attributes:
        name: what `--only` chooses it by.
        sets: environment variables.
        threads: of PyTorch, in each test process.
        needs: the level of `LEVELS` without which the machine cannot run it.
        machine: the compiler's `-march` for the C kernels instead of `native`.
    """

    name: str
    sets: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    needs: str = "DEFAULT"
    machine: str = ""

    def __str__(self) -> str:
        values = {**self.sets, "OMP_NUM_THREADS": str(self.threads)}
        words = [f"{name}={value}" for name, value in values.items()]
        return f"{self.name}: {' '.join([*words, *([f'kernels for -march={self.machine}'] if self.machine else [])])}"


def combinations() -> list[Combination]:
    """Every restriction with one and two threads."""
    kinds = [
        Combination("native"),
        Combination("torch-default", {"ATEN_CPU_CAPABILITY": "default"}),
        Combination("torch-avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, needs="AVX2"),
        Combination("torch-avx512", {"ATEN_CPU_CAPABILITY": "avx512"}, needs="AVX512"),
        Combination("onednn-sse41", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
        Combination("onednn-avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, needs="AVX2"),
        Combination("no-compiler", {COMPILER: "/nonexistent"}),
        # Whole processors: everything restricted at once.
        Combination(
            "sse41",
            {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
            machine="x86-64-v2",
        ),
        Combination(
            "avx2",
            {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
            needs="AVX2",
            machine="x86-64-v3",
        ),
    ]
    return [
        Combination(f"{kind.name}-{threads}", kind.sets, threads, kind.needs, kind.machine)
        for kind in kinds
        for threads in (1, 2)
    ]


def main(words: Sequence[str] | None = None, *, level: str = "", run_tests: RunTests | None = None) -> int:
    """Runs the chosen combinations one after the other.

    Args:
        words: the command line; None takes the process's.
        level: what the processor can do, one of `LEVELS`; without it PyTorch is asked.
        run_tests: runs pytest; replaced in tests.

    Returns:
        The exit status: 1 where a test failed in any combination.
    """
    known = {each.name: each for each in combinations()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="*", default=FOLDERS, help="test folders or files; without any the numeric ones"
    )
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"from {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="print the combinations and stop")
    arguments = parser.parse_args(words)
    chosen = [known[name] for name in arguments.only or known]
    if arguments.list:
        print(*chosen, sep="\n")
        return 0
    level = level or _level()
    results: list[tuple[Combination, str, list[str]]] = []
    for combination in chosen:
        if LEVELS.index(combination.needs) > LEVELS.index(level):
            results.append((combination, f"skipped: this processor has {level} at most", []))
            continue
        print(f"\n=== {combination}", flush=True)
        started = time.monotonic()
        failed = _run(combination, arguments.folders, run_tests or _pytest)
        seconds = f"{time.monotonic() - started:.0f} s"
        results.append((combination, f"{len(failed)} FAILED, {seconds}" if failed else f"passed, {seconds}", failed))
    print("\n=== summary")
    for combination, outcome, failed in results:
        print(f"{outcome:24}  {combination}", *(f"    {test}" for test in failed), sep="\n")
    return int(any(failed for _, _, failed in results))


def _level() -> str:
    """What PyTorch finds in this processor; a variable of the caller's must not hide it."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if answer not in LEVELS:
        raise ValueError(f"PyTorch calls this processor {answer!r}; the combinations are for {', '.join(LEVELS)}")
    return answer


def _run(combination: Combination, folders: Sequence[str], run_tests: RunTests) -> list[str]:
    sets = {**combination.sets, "OMP_NUM_THREADS": str(combination.threads)}
    with tempfile.TemporaryDirectory() as folder:
        if combination.machine:
            sets[COMPILER] = _compiler_for(combination.machine, Path(folder) / "cc")
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // combination.threads))
        parallel = ["--numprocesses", str(workers), "--dist", "loadfile"] if workers > 1 else []
        return run_tests(["-m", "not slow", "--durations=3", *parallel, *folders], sets)


def _compiler_for(machine: str, path: Path) -> str:
    """A C compiler that makes code for another machine: of two `-march` the last one counts."""
    real = shutil.which(os.environ.get(COMPILER) or "cc")
    if real is None:
        return "/nonexistent"
    path.write_text(f'#!/bin/sh\nexec "{real}" "$@" -march={machine}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def _pytest(arguments: Sequence[str], sets: dict[str, str]) -> list[str]:
    failed: list[str] = []
    command = [sys.executable, "-m", "pytest", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **sets}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(("FAILED ", "ERROR ")):
                failed.append(line.split(" - ")[0].strip())
    # Without a failing test pytest itself failed: nothing collected, a usage error, a crash.
    return failed or ([f"pytest exited with {process.returncode}"] if process.returncode else [])


if __name__ == "__main__":
    sys.exit(main())
