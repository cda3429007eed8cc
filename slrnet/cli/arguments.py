"""Options that several subcommands share, and the form of every subcommand's help."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "add_checkpoint",
    "add_device",
    "add_protocol",
    "add_settings",
    "add_storage",
    "add_workers",
    "data_location",
    "describe",
    "positive",
    "run_argument",
]


_EXIT_STATUS = (
    "Exit status: 0 when all went well, 1 when the work failed or found damage, 2 for a mistake in what you gave,\n"
    "130 after Ctrl-C, 143 after SIGTERM."
)
"""What the help of every command says about its exit status."""


def describe(
    parser: argparse.ArgumentParser,
    text: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int | None] | None,
) -> None:
    """Give a subcommand's parser its arguments, a docstring as its help, and its function.

    `run` returns the exit status, or None for 0; it is None for a command that has subcommands of its own.
    """
    parser.description, parser.epilog = textwrap.dedent(f"    {text}").strip(), _EXIT_STATUS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run, interrupted="interrupted")
    add_arguments(parser)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that names a checkpoint or a run."""
    parser.add_argument("checkpoint", type=run_argument, help="checkpoint, or a run's folder for its best one")


def add_protocol(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add --protocol."""
    from slrnet.config import PROTOCOLS

    stated = default or "what the checkpoint's configuration says"
    parser.add_argument("--protocol", choices=PROTOCOLS, default=default, help=f"default: {stated}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")


def add_settings(parser: argparse.ArgumentParser, *, meaning: str = "change one setting; repeatable") -> None:
    """Add --set, which overrides settings of the configuration."""
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=meaning)


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
    try:
        counts = [int(part) for part in text.split(":")]
    except ValueError:
        counts = []
    if len(counts) == 1 and counts[0] >= 0:
        return counts[0]
    if len(counts) == 2 and 1 <= counts[0] <= counts[1]:
        return counts[0], counts[1]
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
