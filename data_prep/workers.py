"""Processes that share the images of a conversion.

`tqdm.contrib.concurrent.process_map` is shorter, but it takes no start method, so it forks where arrow's threads may
hang a child; it waits for work under way when something fails; and it starts new processes for every pass.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from typing import TypeVar

from tqdm import tqdm

from slrnet.data.manifest import DataError

__all__ = ["ConversionPool"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 32
"""Greatest number of items that a process gets at a time."""
_SHARES = 32
"""Least number of parts that a pass has for each process, so that all end at about the same time."""


class ConversionPool(AbstractContextManager["ConversionPool"]):
    """Worker processes that start when there is work, and serve one pass over the images after the other.

    As a context it ends them on exit. After a failure they have ended before the caller cleans up.

    Args:
        processes: number of worker processes; 1 works in this process.

    Raises:
        DataError: `processes` is smaller than 1.
    """

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise DataError(f"--processes is {processes}; it must be at least 1")
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._started: set[BaseProcess] = set()

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        label: str,
        weights: Sequence[int] | None = None,
    ) -> list[Result]:
        """Applies a function to all items, with a progress bar; returns the results in the order of the items.

        Args:
            function: A function that can be pickled.
            items: What to apply it to.
            label: Word before the progress bar.
            weights: By how much each item moves the bar; 1 without.

        Raises:
            DataError: a process died.
        """
        steps = list(weights) if weights is not None else [1] * len(items)
        results = []
        with tqdm(total=sum(steps), desc=label, unit="sample", disable=None) as bar:
            try:
                for step, result in zip(steps, self._apply(function, items), strict=True):
                    results.append(result)
                    bar.update(step)
            except BaseException as error:  # work in progress is of no use anymore
                for process in self._started:
                    process.terminate()
                self.close()
                if not isinstance(error, BrokenProcessPool):
                    raise
                raise DataError("a worker process died, perhaps for lack of memory; try fewer --processes") from None
        return results

    def close(self) -> None:
        """Ends the processes; work after that starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._started = None, set()

    def _apply(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        if self.processes == 1 or len(items) < 2:
            return map(function, items)
        if self._pool is None:
            # spawn: arrow has threads, and a forked child of a threaded process may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                min(self.processes, len(items)), mp_context=context, initializer=_end_when_told
            )
        chunk = max(1, min(_CHUNK, len(items) // (_SHARES * self.processes)))
        others = set(multiprocessing.active_children()) - self._started
        with _interrupts_held():  # the first work starts all processes
            # Not by the pool's own `map`: it cancels what waits when something fails, and a pool whose processes end
            # then fails on the canceled work.
            parts = [
                self._pool.submit(_apply_to_all, function, items[start : start + chunk])
                for start in range(0, len(items), chunk)
            ]
        self._started = set(multiprocessing.active_children()) - others
        return (result for part in parts for result in part.result())


def _apply_to_all(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Blocks Ctrl-C while worker processes start; they inherit that and never react to it.

    Ctrl-C reaches the whole process group; the parent alone reacts, by ending the workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_told() -> None:
    """A worker ends at SIGTERM; it does not inherit the parent's handler."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
