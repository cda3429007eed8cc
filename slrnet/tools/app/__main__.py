# PYTHON_ARGCOMPLETE_OK
"""A page that shows what a checkpoint sees in an image: `python -m slrnet.tools.app [CHECKPOINT_OR_RUN]`.

Drop an image: mask, class scores, code maps per class, and what T, gamma and the refinement do to the pseudo label.
Serves on 127.0.0.1 only, until Ctrl-C, and sends nothing anywhere. Without an argument it takes the newest run of
$SLRNET_STORAGE, else of ~/slrnet_runs; where neither has one, that of `make demo` in the folder runs.

Exit status: 0, or 2 where there is no checkpoint, the extra `app` is missing or the port is taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from slrnet.checkpoints.checkpoint import CheckpointError, load_checkpoint, read_state
from slrnet.checkpoints.run_store import run_argument
from slrnet.completion import parse
from slrnet.tools.dashboard import check_port, default_storages

__all__ = ["main", "newest_run"]

PORT = 7860


def newest_run(storages: Sequence[Path]) -> Path:
    """The run with the newest checkpoint, of the first folder that has one.

    Raises:
        ValueError: there is none.
    """
    for storage in storages:
        found = sorted(storage.glob("*/checkpoints/checkpoint-*"), key=lambda path: path.stat().st_mtime)
        for path in reversed(found):
            with suppress(CheckpointError):
                read_state(path)  # the others are not looked into: they may be many and large
                return path.parents[1]
    raise ValueError(
        f"there is no run with a checkpoint in {' or '.join(map(str, storages))}; train one with `make demo`, or name "
        "one: python -m slrnet.tools.app CHECKPOINT_OR_RUN"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command until the page is closed down; returns the exit status."""
    options = parse(_parser(), arguments)
    try:
        if find_spec("nicegui") is None:
            raise ValueError("the app needs nicegui, which is not installed: pip install 'slrnet[app]'")
        path = options.checkpoint.expanduser() if options.checkpoint else newest_run(default_storages())
        checkpoint = load_checkpoint(path)
        check_port(options.port)
        from slrnet.tools.app.page import serve
        from slrnet.tools.app.studio import Studio

        studio = Studio(checkpoint, device=options.device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{checkpoint.path}: http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    folder = checkpoint.path.resolve()
    serve(studio, name=f"{folder.parents[1].name}, {folder.name}", port=options.port)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slrnet.tools.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=run_argument,
        nargs="?",
        metavar="CHECKPOINT_OR_RUN",
        help="default: the newest run, see above",
    )
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="on 127.0.0.1 (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
