"""Ends a training from outside without losing steps: signals of the driver, and how the workers hear of them.

`ray job stop`, `kill`, a closed terminal and Ctrl-C reach the driver alone. The first signal asks the training to write
a checkpoint after the step under way and to end. Workers learn it from a small actor on the driver's node that rank 0
asks every `POLL` seconds; an elastic change of the number of workers asks for a checkpoint the same way.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from slrnet.training.requests import Requests, Wish

__all__ = [
    "Interruption",
    "Mailbox",
    "MailboxRequests",
    "SignalRequests",
    "follow",
    "open_mailbox",
    "save_before_resize",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_SIGNAL = 2.0
"""Seconds within which signals count as one: terminals and process groups may deliver them twice."""
POLL = 0.5
"""Seconds between two looks of rank 0 into the mailbox."""
SILENT = 5.0
"""Seconds without a look after which nobody trains."""
RESIZE_PATIENCE = 60.0
"""Seconds that a resize waits for the checkpoint; then it takes place without."""


class Interruption:
    """Signals while a training runs: the first one asks it to stop, a later one raises KeyboardInterrupt at once.

    A context manager; in threads other than the main one, which cannot receive signals, it does nothing.
    """

    def __init__(self) -> None:
        self.number = 0
        """The first signal's number; 0 before."""
        self.wanted = False
        """Whether the caller wants the training to stop, without a signal."""
        self._begun = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether a signal or the caller asked the training to stop."""
        return bool(self.number) or self.wanted

    @property
    def can_be_asked(self) -> bool:
        """Whether signals come here."""
        return bool(self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self._begun > ONE_SIGNAL:
            raise KeyboardInterrupt(number)
        if not self.number:
            self.number, self._begun = number, time.monotonic()
            with suppress(OSError):  # not print, which the signal may have interrupted; the terminal may be closed
                os.write(2, b"\nstopping: writing a checkpoint after this step; a second signal ends at once\n")


class SignalRequests(Requests):
    """The requests of signals to this process, which trains itself."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption

    def asked(self) -> Wish:
        """Asks to stop after a signal, or when the caller wants it."""
        return "stop" if self._interruption.asked else ""


def follow(
    ended: Callable[[], bool],
    interruption: Interruption,
    *,
    hear: Callable[[], Sequence[Mapping[str, float]]],
    stop: Callable[[], None],
    on_epoch: Callable[[Mapping[str, float]], bool | None] | None,
) -> None:
    """Follows workers from the driver until they end, and asks them to stop once, when the driver is asked.

    Args:
        ended: waits a little, and says whether the workers have ended.
        interruption: what the driver is asked.
        hear: gives what the workers told of epochs since its last call.
        stop: asks the workers to stop.
        on_epoch: hears of each epoch, and may ask to stop; an error of it also does, and is raised at the end.
    """
    asked, problem = False, None
    while True:
        done = ended()
        for metrics in hear() if on_epoch and problem is None else ():
            try:
                interruption.wanted |= bool(on_epoch and on_epoch(metrics))
            except Exception as error:
                interruption.wanted, problem = True, error
                break
        if done:
            break
        if interruption.asked and not asked:
            asked = True
            stop()
    if problem is not None:
        raise problem


class Mailbox:
    """What is asked of a training on a cluster; an actor."""

    def __init__(self) -> None:
        self._wish: Wish = ""
        self._looked = 0.0
        self._told: list[dict[str, float]] = []

    def look(self) -> Wish:
        """What is asked now; rank 0 calls this."""
        self._looked = time.monotonic()
        return self._wish

    def tell(self, metrics: dict[str, float]) -> None:
        """Keeps the metrics of an epoch for the driver."""
        self._told.append(metrics)

    def hear(self) -> list[dict[str, float]]:
        """The metrics that were told since the last call; the driver calls this."""
        told, self._told = self._told, []
        return told

    def ask(self, wish: Wish) -> None:
        """Asks for something; a request to stop stays."""
        self._wish = self._wish if self._wish == "stop" else wish

    def saved(self) -> None:
        """The checkpoint that was asked for is written."""
        self._wish = self._wish if self._wish == "stop" else ""

    def waits(self) -> bool:
        """Whether a request is open and somebody trains who may answer it."""
        return bool(self._wish) and time.monotonic() - self._looked < SILENT


def open_mailbox() -> Any:
    """Starts a mailbox on the driver's node, which outlives nodes that are taken away; returns its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()


class MailboxRequests(Requests):
    """The requests in a mailbox, as rank 0 of a training sees them."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._wish: Wish = ""
        threading.Thread(target=self._look, name="mailbox", daemon=True).start()

    def asked(self) -> Wish:
        """What was in the mailbox at the last look."""
        return self._wish

    def saved(self, step: int) -> None:
        """Empties the mailbox; a request to stop stays."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self._mailbox.saved.remote())
        self._wish = "stop" if self._wish == "stop" else ""

    def _look(self) -> None:
        import ray

        with suppress(ray.exceptions.RayError):  # the driver is gone, and this process will be soon
            while True:
                self._wish = ray.get(self._mailbox.look.remote())
                time.sleep(POLL)


def save_before_resize(mailbox: Any) -> None:
    """Asks for a checkpoint and waits until it is written; returns at once if nobody trains."""
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(mailbox.ask.remote("save"))
        deadline = time.monotonic() + RESIZE_PATIENCE
        while time.monotonic() < deadline and ray.get(mailbox.waits.remote()):
            time.sleep(POLL)
        ray.get(mailbox.saved.remote())
