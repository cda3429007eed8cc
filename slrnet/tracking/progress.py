"""Progress of a training for people: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Never, TextIO

from tqdm import tqdm

__all__ = ["Progress"]

LINE_EVERY = 15.0
"""Seconds between two lines if the output is no terminal."""


class Progress:
    """Shows how far a training is, how fast it goes and when it ends.

    Args:
        total: optimizer steps of the whole training.
        done: steps that are finished already, in a resumed training.
        show: whether to write anything; False on ranks other than 0.
        stream: where to write; None for standard output.
    """

    def __init__(self, total: int, *, done: int = 0, show: bool = True, stream: TextIO | None = None) -> None:
        self.total = total
        self.done = done
        self.show = show
        self.stream = stream or sys.stdout
        self._images = 0
        self.steps = 0
        self._busy = 0.0
        self._last_step = self._last_line = time.perf_counter()
        self._bar: tqdm[Never] | None = None
        if show and self.stream.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", file=self.stream, dynamic_ncols=True)

    def advance(self, images: int, *, loss: float) -> None:
        """Counts a step that took `images` images over all ranks."""
        now = time.perf_counter()
        self._busy += now - self._last_step
        self._last_step = now
        self._images += images
        self.steps += 1
        self.done += 1
        if not self.show:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.rate():.2f} images/s, loss {loss:.3f}", refresh=False)
            self._bar.update()
        elif now - self._last_line >= LINE_EVERY or self.done == self.total:
            self._last_line = now
            self._write(f"step {self.done}/{self.total}, loss {loss:.3f}, {self.rate():.2f} images/s, ETA {self.eta()}")

    def note(self, text: str) -> None:
        """Writes a line; the time until the next step does not count as training."""
        if self.show:
            self._write(text)
        self._last_step = time.perf_counter()

    def rate(self) -> float:
        """Images per second so far, without the time for measuring and saving."""
        return self._images / self._busy if self._busy else 0.0

    def eta(self) -> str:
        """Remaining time as h:mm:ss, without the time for measuring and saving."""
        seconds = int((self.total - self.done) * self._busy / max(1, self.steps))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
