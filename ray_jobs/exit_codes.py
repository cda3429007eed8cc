"""How jobs end: 0 when all went well, 2 for a mistake of the user's (one line says which), 1 for a failed training."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code(run: Callable[[], None]) -> int:
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from slrnet.training.ray_loop import TrainingError  # takes seconds: not before there is something to look at

        if not isinstance(error, TrainingError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
