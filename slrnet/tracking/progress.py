"""Progress of a training for people: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from dataclasses import KW_ONLY, dataclass, field
from typing import Never, TextIO

from tqdm import tqdm

from slrnet.storage.shown import say

__all__ = ["Progress"]

LINE_EVERY = 15.0
"""Seconds between two lines if the output is no terminal."""


@dataclass(eq=False)
class Progress:
    """Shows how far a training is, how fast it goes and when it ends."""

    total: int
    """Optimizer steps of the whole training."""
    _: KW_ONLY
    done: int = 0
    """Finished steps, those before a training was resumed included."""
    epochs: int = 1
    """Epochs of the whole training, of equally many steps."""
    show: bool = True
    """Whether to write anything; False on ranks other than 0."""
    score: str = ""
    """The last score, for the bar."""
    stream: TextIO = field(default_factory=lambda: sys.stdout)

    def __post_init__(self) -> None:
        self.steps, self._images, self._busy = 0, 0, 0.0
        self._last_step = self._last_line = time.perf_counter()
        bar = self.show and self.stream.isatty()
        self._bar: tqdm[Never] = tqdm(
            total=self.total, initial=self.done, unit="step", file=self.stream, dynamic_ncols=True, disable=not bar
        )

    def advance(self, images: int, *, loss: float) -> None:
        """Counts a step that took `images` images over all ranks."""
        now = time.perf_counter()
        self._busy += now - self._last_step
        self._last_step = now
        self._images += images
        self.steps += 1
        self.done += 1
        self._bar.set_description_str(f"epoch {-(-self.done * self.epochs // self.total)}/{self.epochs}", refresh=False)
        shown = [f"loss {loss:.3f}", *filter(None, [self.score]), f"{self.rate():.2f} images/s"]
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()
        if self._bar.disable and (now - self._last_line >= LINE_EVERY or self.done == self.total):
            self._last_line = now
            self.note(f"step {self.done}/{self.total}, loss {loss:.3f}, {self.rate():.2f} images/s, ETA {self.eta()}")

    def note(self, text: str = "") -> None:
        """Writes a line, if there is one; the time since the last step does not count as training."""
        if self.show and text:
            with tqdm.external_write_mode(self.stream):
                say(text, stream=self.stream)
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
        self._bar.close()
