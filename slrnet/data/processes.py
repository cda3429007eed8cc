"""Helper processes that must not outlive the process they work for."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.context import BaseContext

__all__ = ["end_with", "helper_context"]

_WATCH_EVERY = 5.0
"""Seconds after which a helper checks again that the process it works for is alive."""


def helper_context(preload: list[str]) -> BaseContext:
    """How to start helpers without this process's threads and CUDA context: a fork server.

    It imports the modules in `preload` once, so that helpers start with them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    return context


def end_with(parent: int) -> None:
    """Ends this process once `parent` is gone. A helper's own parent is the fork server, so nothing else tells it."""

    def watch() -> None:
        while True:
            time.sleep(_WATCH_EVERY)
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
