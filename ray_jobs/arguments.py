"""Options that several jobs share: what they run on, and where their results go."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from slrnet.completion import parse

__all__ = ["add_storage", "add_workers", "data_location", "folder", "parse", "workers"]


def workers(text: str) -> int | tuple[int, int]:
    try:
        counts = [int(part) for part in text.split(":")]
    except ValueError:
        counts = []
    if len(counts) == 1 and counts[0] >= 0:
        return counts[0]
    if len(counts) == 2 and 1 <= counts[0] <= counts[1]:
        return counts[0], counts[1]
    raise argparse.ArgumentTypeError(f"{text!r} is no number of workers; give one, as 4, or fewest:most, as 2:8")


def add_workers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workers")
    count = "training processes (default: one per GPU, else 1), or fewest:most to follow the cluster's size; 0: no Ray"
    group.add_argument("--num-workers", type=workers, metavar="N[:MOST]", help=count)
    group.add_argument("--cpus-per-worker", type=int, metavar="N", help="CPU cores each (default: an equal share)")
    group.add_argument("--cpu-only", action="store_true", help="use no GPUs")
    wait = "time that a cluster which grows on demand has to get the nodes (default: 0, takes it as it is)"
    group.add_argument("--wait-for-nodes", type=float, default=0.0, metavar="MINUTES", help=wait)
    group.add_argument(
        "--max-failures", type=int, default=0, metavar="N", help="restarts of failed workers (default: 0)"
    )
    hang = "time that a worker may stand still before the attempt fails (default: 600; 0: no limit)"
    group.add_argument("--hang-limit", type=float, default=600.0, metavar="SECONDS", help=hang)


def folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no folder; mount the storage on all nodes and give its path")
    return Path(text).expanduser().resolve()


def data_location(text: str) -> str:
    """A data set's location; a folder's as an absolute path, which means the same on all nodes."""
    return text if "://" in text else str(Path(text).expanduser().resolve())


def storage(text: str) -> str:
    """A place for runs: a folder's absolute path, or a location in an object store."""
    if "://" not in text:
        return str(folder(text))
    if not text.startswith(("s3://", "gs://")):
        raise argparse.ArgumentTypeError(f"{text!r} is no place for runs; allowed are folders, s3:// and gs://")
    return text.rstrip("/")


def places_of(storage: str) -> tuple[Path, str]:
    """The folder of this machine for runs, and the location in an object store that it is copied to, or ""."""
    from slrnet.storage.remote import cached

    return (cached(storage), storage) if "://" in storage else (Path(storage), "")


def add_storage(parser: argparse.ArgumentParser, *, remote: bool = False) -> None:
    group = parser.add_argument_group("results")
    where = "folder for runs, seen by all nodes" + (", or its s3:// or gs:// location" if remote else "")
    default = os.environ.get("SLRNET_STORAGE", "~/slrnet_runs")
    group.add_argument(
        "--storage",
        type=storage if remote else folder,
        default=default,
        metavar="DIR",
        help=f"{where} (default: $SLRNET_STORAGE, else ~/slrnet_runs)",
    )
    group.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow (default: $MLFLOW_TRACKING_URI, else SQLite in --storage)"
    )
