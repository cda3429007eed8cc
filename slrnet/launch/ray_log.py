"""What Ray's processes print: the lines of a training's workers on the terminal, Ray's own in a file of the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["RAY_LOG", "ray_lines_in"]

RAY_LOG = "ray.log"
"""File in a run's `logs`."""
TELLING = ("RayTrainWorker", "autoscaler", "raylet")
"""Ray's names of the processes that train, and of what says that nodes or memory lack; others have nothing to tell."""
_PRINTER = "ray_print_logs"
"""Ray's name of what prints the lines on the driver's terminal."""
_OF_RAY = re.compile(
    r"Setting up process group for:|Checkpoint successfully created at:|Reporting training result|"
    r"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] "  # C++
)


@contextmanager
def ray_lines_in(log: Path, dispatcher: Any = None) -> Iterator[None]:
    """Within, Ray's own lines go to the end of the file `log`; those of the workers reach the terminal, as always.

    Args:
        log: the file; its folder is made if missing. What it does not take is left out.
        dispatcher: hands the lines of all processes to functions by name; None: Ray's, whose releases may differ: one
            that has no such thing prints everything.
    """
    dispatcher = dispatcher or _dispatcher()
    printers = [act for name, act in getattr(dispatcher, "handlers", ()) if name == _PRINTER]
    if not printers:
        yield
        return

    def sort(lines: Mapping[str, Any]) -> None:
        _sort(lines, printers[0], log)

    _replace(dispatcher, sort)
    try:
        yield
    finally:
        _replace(dispatcher, printers[0])


def _replace(dispatcher: Any, act: Callable[[Mapping[str, Any]], None]) -> None:
    dispatcher.remove_handler(_PRINTER)
    dispatcher.add_handler(_PRINTER, act)


def _dispatcher() -> Any:
    with suppress(ImportError, AttributeError):
        from ray._private import ray_logging

        return ray_logging.global_worker_stdstream_dispatcher
    return None


def _sort(batch: Mapping[str, Any], show: Callable[[Mapping[str, Any]], None], log: Path) -> None:
    """Shows the lines of a process that are a training's, and writes the others to the log."""
    name, lines = str(batch.get("actor_name") or batch.get("pid")), list(batch["lines"])
    own = [line for line in lines if name in TELLING and not _OF_RAY.match(line)]
    others = [line for line in lines if name not in TELLING or _OF_RAY.match(line)]
    if own:
        show({**batch, "lines": own})
    with suppress(OSError):
        if others:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8", errors="replace") as file:
                file.writelines(f"{name}: {line}\n" for line in others)
