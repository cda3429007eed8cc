"""How commands end: one function turns errors and signals into exit statuses, with a line that says what happened."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

__all__ = ["EXIT_STATUS", "exit_code"]

EXIT_STATUS = (
    "Exit status: 0 when all went well, 1 when the work failed or found damage, 2 for a mistake in what you gave,\n"
    "130 after Ctrl-C, 143 after SIGTERM."
)
"""What the help of every command says about its exit status."""


def exit_code(run: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Run a command and return its exit status.

    Args:
        run: the command's work; returns 0, or 1 when the work failed or found damage.
        interrupted: the line to print after Ctrl-C or SIGTERM.

    Returns:
        What `run` returns; 1 after a failed training, 2 after a mistake of the user (ValueError, OSError), 130 or 143
        after a signal.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run()
    except KeyboardInterrupt as interruption:
        print(interrupted, file=sys.stderr)
        return 128 + int(*(interruption.args or (signal.SIGINT,)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from slrnet.launch.train import TrainingError  # imports PyTorch, which takes seconds

        if not isinstance(error, TrainingError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM (`ray job stop`, `kill`) end a command as Ctrl-C does."""
    raise KeyboardInterrupt(number)
