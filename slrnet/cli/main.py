# PYTHON_ARGCOMPLETE_OK
"""The `slrnet` command: finds the subcommand, builds its parser alone, and runs it.

`slrnet --help` imports nothing beyond the standard library. Each group of subcommands is a module of this package
in which `command` has made every subcommand from the function of its name.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType

from slrnet.storage.ray_job import unset_variables
from slrnet.storage.remote import require_path
from slrnet.storage.shown import say
from slrnet.version import __version__

__all__ = ["COMMANDS", "build_parser", "exit_code", "main"]

COMMANDS = {
    "data": {
        "prepare": "make shards of VOC, COCO, L2ID, your own images or the demo",
        "browse": "check a data set: contact sheets, classes, warnings",
        "class-balance": "show how often training draws each class",
    },
    "training": {
        "train": "train one run",
        "tune": "search settings, or run one of the paper's ablations",
        "evaluate": "measure a checkpoint",
        "pseudo-label": "make pseudo masks for a data set",
        "distill": "train DeepLabV3+ on pseudo masks",
        "profile": "show where a training step spends its time",
        "demo": "try everything on this machine: cluster, training, scores, a picture",
    },
    "looking": {
        "predict": "make masks of your images",
        "report": "write an HTML page about one run or several",
        "figures": "draw the paper's figures and tables from your runs",
        "review": "correct the masks of which a run is least sure, and train on them",
        "codes": "draw what the dictionary's atoms stand for",
        "watch": "open a page of pictures and curves of a run in motion",
        "app": "open a page that shows what a checkpoint sees in an image",
        "dashboard": "open MLflow's page over your runs",
    },
    "sharing": {
        "export": "write a network as torch.export and ONNX files",
        "convert-weights": "turn a published checkpoint into one of ours",
        "voc-archive": "make the archive that VOC's evaluation server takes",
    },
}
"""A line of help for each subcommand, by group, which is the module that has it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name, those of the process by default; returns `exit_code`.

    Raises:
        SystemExit: after `--help`, and for arguments that do not parse (status 2).
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete(arguments or ())
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser(words).parse_args(words)
    if note := unset_variables():
        say(note)

    def run() -> int | None:
        _require_paths(options)
        return options.run(options)  # type: ignore[no-any-return]

    return exit_code(run, interrupted=options.interrupted)


def exit_code(run: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Run a command, turn errors and signals into an exit status, and say in a line what happened.

    Args:
        run: the command's work; returns None, or a status: 1 when the work failed or found damage.
        interrupted: the line to print after Ctrl-C or SIGTERM.

    Returns:
        What `run` returns, None as 0; 1 after a failed training, 2 after a mistake of the user (ValueError, OSError),
        130 or 143 after a signal.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run() or 0
    except KeyboardInterrupt as interruption:
        say(interrupted, error=True)
        return 128 + int(*(interruption.args or (signal.SIGINT,)))
    except (ValueError, OSError) as error:
        say(f"error: {error}", error=True)
        return 2
    except RuntimeError as error:
        from slrnet.launch.train import TrainingError  # imports PyTorch, which takes seconds

        if not isinstance(error, TrainingError):
            raise
        say(f"error: {error}", error=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser of the command, of all subcommands only the one that the first argument names."""
    parser = argparse.ArgumentParser(
        "slrnet", usage="slrnet COMMAND ...", description=_page(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    commands = parser.add_subparsers(prog="slrnet", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for group, name in ((group, name) for group, names in COMMANDS.items() for name in names):
        command = commands.add_parser(name)
        if words[:1] == [name]:
            getattr(import_module(f"slrnet.cli.{group}"), name.replace("-", "_"))(command)
    return parser


def _page() -> str:
    lines = ["Weakly supervised semantic segmentation with low-rank networks (SLRNet), trained on Ray."]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:16}{line}" for name, line in commands.items())]
    return "\n".join([*lines, "", "`slrnet COMMAND --help` explains a command and its options."])


def _require_paths(options: argparse.Namespace) -> None:
    """Raises a ValueError for a location where only a path is taken."""
    for name, given in vars(options).items():
        for value in given if isinstance(given, list) else [given]:
            path = value[-1] if isinstance(value, tuple) and value else value
            if isinstance(path, Path):
                require_path(path, name.replace("_", "-"))


def _complete(command: Sequence[str]) -> None:
    """Answer a shell that asks for completions, and end the process; a script's words follow its subcommand's."""
    import argcomplete

    start = int(os.environ["_ARGCOMPLETE"])
    typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ", start)[start:]
    line = " ".join(["slrnet", *command, *typed])
    os.environ.update({"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))})
    argcomplete.autocomplete(build_parser(line.split()[1:]))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM (`ray job stop`, `kill`) end a command as Ctrl-C does."""
    raise KeyboardInterrupt(number)
