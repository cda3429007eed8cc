"""What makes a function a subcommand, and the arguments that several subcommands share."""

from __future__ import annotations

import argparse
import functools
import os
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "DEVICE",
    "Argument",
    "add_protocol",
    "add_storage",
    "add_workers",
    "checkpoint",
    "command",
    "data_location",
    "describe",
    "one_of",
    "option",
    "positive",
    "run_argument",
    "settings",
]

Argument = Callable[[Any], object]
"""Adds an argument, or several that belong together, to a parser or to a group of one."""
Run = Callable[[argparse.Namespace], int | None]
"""Does a subcommand's work; returns the exit status, or None for 0."""
_EXIT_STATUS = (
    "Exit status: 0 when all went well, 1 when the work failed or found damage, 2 for a mistake in what you gave,\n"
    "130 after Ctrl-C, 143 after SIGTERM."
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


DEVICE = option("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")
"""--device."""


def checkpoint(name: str = "checkpoint", **properties: Any) -> Argument:
    """A checkpoint or run, or several."""
    return option(name, **{"type": run_argument, "help": "checkpoint, or a run's folder for its best one"} | properties)


def add_protocol(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add --protocol."""
    from slrnet.config import PROTOCOLS

    stated = default or "what the checkpoint's configuration says"
    parser.add_argument("--protocol", choices=PROTOCOLS, default=default, help=f"default: {stated}")


def settings(meaning: str = "change one setting; repeatable") -> Argument:
    """--set, which overrides settings of the configuration."""
    return option("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=meaning)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training's worker processes."""
    add = parser.add_argument_group("workers").add_argument
    count = "training processes (default: one per GPU, else 1), or fewest:most to follow the cluster's size; 0: no Ray"
    add("--num-workers", type=_worker_count, metavar="N[:MOST]", help=count)
    add("--cpus-per-worker", type=int, metavar="N", help="CPU cores each (default: an equal share)")
    add("--cpu-only", action="store_true", help="use no GPUs")
    wait = "time that a cluster which grows on demand has to get the nodes (default: 0, takes it as it is)"
    add("--wait-for-nodes", dest="wait_minutes", type=float, default=0.0, metavar="MINUTES", help=wait)
    add("--max-failures", type=int, default=0, metavar="N", help="restarts of failed workers (default: 0)")
    hang = "time that a worker may stand still before the attempt fails (default: 600; 0: no limit)"
    add("--hang-limit", type=float, default=600.0, metavar="SECONDS", help=hang)


def add_storage(parser: argparse.ArgumentParser, *, remote: bool = False) -> None:
    """Add the options that say where results go; `remote` allows an object store."""
    add = parser.add_argument_group("results").add_argument
    where = "folder for runs, seen by all nodes" + (", or its s3:// or gs:// location" if remote else "")
    where += " (default: $SLRNET_STORAGE, else ~/slrnet_runs)"
    usual = os.environ.get("SLRNET_STORAGE", "~/slrnet_runs")
    add("--storage", type=_storage if remote else _folder, default=usual, metavar="DIR", help=where)
    add("--tracking-uri", metavar="URI", help="MLflow (default: $MLFLOW_TRACKING_URI, else SQLite in --storage)")


def data_location(text: str) -> str:
    """A data set's location; a folder's as an absolute path, which means the same on all nodes."""
    return text if "://" in text else str(Path(text).expanduser().resolve())


def positive(text: str) -> int:
    """A whole number from 1, as an argument's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def run_argument(text: str) -> Path:
    """A run or a checkpoint; one in an object store is copied to this machine."""
    from slrnet.checkpoints.run_store import local_run

    try:
        return local_run(text) if "://" in text else Path(text).expanduser()
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _worker_count(text: str) -> int | tuple[int, int]:
    fewest, _, most = text.partition(":")
    if text.isdecimal():
        return int(text)
    if fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most):
        return int(fewest), int(most)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers; give one, as 4, or fewest:most, as 2:8")


def _folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder; mount the storage on all nodes and give its path")
    return Path(text).expanduser().resolve()


def _storage(text: str) -> str:
    """A place for runs: a folder's absolute path, or a location in an object store."""
    if "://" not in text:
        return str(_folder(text))
    if not text.startswith(("s3://", "gs://")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a place for runs; allowed are folders, s3:// and gs://")
    return text.rstrip("/")
