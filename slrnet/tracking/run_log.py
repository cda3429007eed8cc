"""What each rank did and why it failed, as lines of JSON in the run's folder: `logs/rank-R.jsonl`.

Every line has `time` (UTC), `rank`, `node` (host name), `pid`, `event` and what belongs to the event: `start` (world
size, step), `step` (step, loss parts, seconds waited for data), `epoch` (figures), `checkpoint`, `notice`, `failure`
(step, place, exception, message) and `hang` (the same of the rank that hangs, which `rank` then names). A run that goes
on appends to its files. The driver reads them to say what failed first.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Failure", "RunLog", "find_failure", "read_log"]

FOLDER = "logs"
LOST_PEER = re.compile(r"(closed|reset) by peer|gloo.*(Broken pipe|not connected)|remote process exited|NCCL error")
"""In the messages of gloo and NCCL: another rank is gone. What gloo says depends on what was under way."""
DIED = {
    "exception": "died",
    "message": "its process ended without a word: it was killed, ran out of memory, or its node was lost",
}


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt."""

    rank: int
    node: str
    step: int
    """Optimiser step, from 0, in which the rank was."""
    exception: str
    """Name of the exception's class; "hang" for a rank that no longer moved, "died" for one that is gone."""
    message: str

    def __str__(self) -> str:
        """One line: cause, rank, node and step."""
        return f"{self.exception}: {self.message} (rank {self.rank} on {self.node}, step {self.step})"

    def tags(self) -> dict[str, str]:
        """The same as tags of the run."""
        values = {"rank": str(self.rank), "node": self.node, "step": str(self.step), "exception": self.exception}
        return {f"failure.{name}": value for name, value in values.items()}


class RunLog:
    """The log of one rank; may be used by several threads.

    Args:
        folder: of the run; None writes nothing.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, *, rank: int) -> None:
        self._common = {"rank": rank, "node": socket.gethostname(), "pid": os.getpid()}
        self._path = None if folder is None else folder / FOLDER / f"rank-{rank}.jsonl"

    def write(self, event: str, **fields: Any) -> None:
        """Adds a line; a storage that does not take it does not stop the training."""
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **self._common, "event": event, **fields}, default=str)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            return


def find_failure(folder: Path, *, since: float, dead: Sequence[int] = ()) -> Failure | None:
    """Why the last attempt failed: a hang, else a rank that died without a word, else the error that came first.

    Args:
        folder: of the run.
        since: seconds since the epoch; what was recorded earlier belongs to another start of the run.
        dead: ranks whose process ended by itself.
    """
    after = datetime.fromtimestamp(since, UTC).isoformat(timespec="milliseconds")
    records = [
        record
        for path in sorted((folder / FOLDER).glob("rank-*.jsonl"))
        for record in read_log(path)
        if record["time"] >= after
    ]
    records.sort(key=lambda record: record["time"])
    processes = {record["rank"]: record["pid"] for record in records}  # the last of each rank
    records = [record for record in records if record["pid"] == processes[record["rank"]]]
    hangs = [record for record in records if record["event"] == "hang"]
    if hangs:
        return _failure(hangs[0])
    failures = [record for record in records if record["event"] == "failure"]
    if not dead and failures and LOST_PEER.search(failures[0]["message"]):
        # Ray may see the errors of the ranks that lost their peer before it sees the peer's end.
        dead = list(processes)
    spoke = {record["rank"] for record in failures}  # and ended because of what they wrote
    for rank in sorted(set(dead) - spoke):
        last: dict[str, Any] = next((record for record in reversed(records) if record["rank"] == rank), {})
        return _failure({"node": "an unknown node", "step": 0} | last | {"rank": rank} | DIED)
    return _failure(failures[0]) if failures else None


def _failure(record: Mapping[str, Any]) -> Failure:
    names = ("rank", "node", "step", "exception", "message")
    return Failure(**{name: record[name] for name in names})


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a rank's log, without what is no whole line."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a process that was killed
        if isinstance(record, dict) and "event" in record and "time" in record:
            yield record
