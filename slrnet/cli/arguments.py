"""What makes a function a subcommand, and the arguments that several subcommands share."""

from __future__ import annotations

import argparse
import functools
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from slrnet.storage.files import check_writable
from slrnet.storage.ray_job import lasting, uploaded
from slrnet.storage.remote import is_remote

__all__ = [
    "ANNOTATION_FORMATS",
    "DEVICE",
    "SKIP_DAMAGED",
    "TOLERANCE",
    "Argument",
    "add_protocol",
    "annotation_folder",
    "checked",
    "checkpoint",
    "command",
    "data_location",
    "describe",
    "input_file",
    "one_of",
    "option",
    "output_file",
    "output_folder",
    "output_location",
    "place",
    "positive",
    "sole",
]

Argument = Callable[[Any], object]
"""Adds an argument, or several that belong together, to a parser or to a group of one."""
Value = TypeVar("Value")
Run = Callable[[argparse.Namespace], int | None]
"""Does a subcommand's work; returns the exit status, or None for 0."""
_EXIT_STATUS = (
    "Exit status: 0 when all went well, 1 when the work failed or found damage, 2 for a mistake in what you gave,\n"
    "3 when damaged images were left out and the others are done, 129 after a closed terminal, 130 after Ctrl-C,\n"
    "143 after SIGTERM."
)
"""What the help of every command says about its exit status."""


def command(*arguments: Argument, **defaults: Any) -> Callable[[Run], Argument]:
    """Make a function a subcommand, which describes itself to the parser that it is given.

    Args:
        arguments: what the subcommand takes, in the order of its help.
        defaults: more attributes of its options; `interrupted` is the line to print after Ctrl-C or SIGTERM.
    """

    def decorate(run: Run) -> Argument:
        return functools.partial(describe, text=run.__doc__, arguments=arguments, run=run, **defaults)

    return decorate


def sole(run: Run) -> Run:
    """Let one process at a time run a subcommand for an `--out`; another start says who works there and since when."""

    @functools.wraps(run)
    def run_alone(options: argparse.Namespace) -> int | None:
        from slrnet.storage.lease import beside, owned

        with owned(beside(options.out), f"output {options.out}"):
            return run(options)

    return run_alone


def describe(parser: argparse.ArgumentParser, text: str | None, arguments: Iterable[Argument], **defaults: Any) -> None:
    """Give a subcommand's parser a docstring as its help, arguments, and defaults such as the function to `run`."""
    parser.description, parser.epilog = textwrap.dedent(f"    {text}").strip(), _EXIT_STATUS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(**{"interrupted": "interrupted"} | defaults)
    for add in arguments:
        add(parser)


def option(*names: str, **properties: Any) -> Argument:
    """An option or a positional argument, described as for `ArgumentParser.add_argument`."""
    return lambda parser: parser.add_argument(*names, **properties)


def one_of(*options: Argument) -> Argument:
    """Options of which a command takes one at most."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for add_option in options:
            add_option(group)

    return add


def checkpoint(name: str = "checkpoint", **properties: Any) -> Argument:
    """A checkpoint or run, or several."""
    return option(name, **{"type": run_argument, "help": "checkpoint, or a run's folder for its best one"} | properties)


SKIP_DAMAGED = option(
    "--skip-damaged", action="store_true", help="exit with 0, not 3, when damaged images were left out"
)
"""--skip-damaged."""
ANNOTATION_FORMATS = ("coco", "coco-polygons", "labelme")
"""Forms of `slrnet.data.annotation_files`, which takes long to import."""


def annotation_folder(text: str) -> tuple[str, Path]:
    """A form of annotations and the folder to write, of FORM=DIR."""
    form, equals, folder = text.partition("=")
    if form not in ANNOTATION_FORMATS or not equals or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not FORM=DIR with a FORM of {', '.join(ANNOTATION_FORMATS)}")
    return form, output_folder(folder)


TOLERANCE = option(
    "--tolerance", type=float, default=1.0, metavar="PX", help="how far polygons may be off; 0: exact (default: 1)"
)
"""--tolerance."""


def add_protocol(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add --protocol."""
    from slrnet.config import PROTOCOLS

    stated = default or "what the checkpoint's configuration says"
    parser.add_argument("--protocol", choices=PROTOCOLS, default=default, help=f"default: {stated}")


def positive(text: str) -> int:
    """A whole number from 1, as an argument's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def checked(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """Make a function an argument's `type` that keeps the messages of its errors, which argparse would replace."""

    def convert(text: str) -> Value:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except RuntimeError:  # of expanduser
            raise argparse.ArgumentTypeError(f"{text!r}: no home folder is known; set HOME, or give a path") from None

    return convert


@checked
def place(text: str) -> Path:
    """A folder or file of results or data, which Ray's copy of the project cannot hold."""
    return lasting(Path(text).expanduser())


@checked
def output_folder(text: str) -> Path:
    """A `place` where a folder can be written."""
    return check_writable(lasting(Path(text).expanduser()), folder=True)


@checked
def output_location(text: str) -> Path | str:
    """An `output_folder`, or a location in an object store."""
    return text.rstrip("/") if is_remote(text) else output_folder(text)


@checked
def output_file(text: str) -> Path:
    """A `place` where a file can be written."""
    return check_writable(lasting(Path(text).expanduser()), folder=False)


@checked
def data_location(text: str) -> str:
    """A data set's location; a folder's as an absolute path, which means the same on all nodes."""
    return text if "://" in text else str(lasting(Path(text).expanduser().resolve()))


@checked
def input_file(text: str) -> Path:
    """A file to read at once; a missing one that Ray's copy of the project lacks is refused with the reason."""
    return uploaded(Path(text).expanduser())


@checked
def device(text: str) -> str:
    """A device of PyTorch that computes here; others are refused."""
    import torch

    try:
        torch.ones(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ValueError(f"there is no device {text!r} here; there are {', '.join(['cpu', *gpus])}") from None
    return text


DEVICE = option("--device", type=device, metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")
"""--device."""


@checked
def run_argument(text: str) -> Path:
    """A run or a checkpoint; one in an object store is copied to this machine."""
    from slrnet.checkpoints.run_store import local_run

    return local_run(text) if "://" in text else lasting(Path(text).expanduser())
