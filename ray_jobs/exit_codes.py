"""How jobs end.

0: all went well. 1: a training failed. 2: a mistake of the user's. 130 and 143: interrupted by SIGINT (Ctrl-C) or
SIGTERM (`ray job stop`). A line says what happened.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def exit_code(run: Callable[[], None]) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run()
    except KeyboardInterrupt as interruption:
        print("interrupted; a training goes on from its last checkpoint with --resume NAME", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from slrnet.launch.train import TrainingError  # takes seconds: not before there is something to look at

        if not isinstance(error, TrainingError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
