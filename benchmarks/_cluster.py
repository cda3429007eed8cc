"""Helpers for the benchmarks that train on a private Ray cluster and kill processes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from slrnet.tracking.run_log import read_log

NETWORK = (
    "model.encoder=timm:test_efficientnet", "model.encoder_weights=none", "model.frozen_stages=0", "data.workers=0",
    "train.batch_size=8",
)  # fmt: skip
"""Settings of a network small enough that a step takes milliseconds."""


def words_of(settings: tuple[str, ...]) -> list[str]:
    """Converts settings to a job's command-line arguments."""
    return [word for setting in settings for word in ("--set", setting)]


def submission(address: str) -> list[str]:
    """Returns the command that submits a script to a cluster; append the script and its arguments."""
    return ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", "python"]


def events_of(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Returns the events that a rank has logged so far; empty if its log does not exist yet."""
    path = run / "logs" / f"rank-{rank}.jsonl"
    return list(read_log(path)) if path.is_file() else []


def kill_driver(script: str, *words: str) -> None:
    """Kills (SIGKILL) the driver process that runs a script with these words among its arguments."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if script in line and "submit" not in line and all(word in line for word in words):
            process.kill()
