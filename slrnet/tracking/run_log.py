"""What each rank did and why it failed, as lines of JSON in the run's folder: `logs/rank-R.jsonl`.

Every line has `time` (UTC), `rank`, `node` (host name), `pid`, `event` and the event's fields: `start` (world size,
step), `step` (step, loss parts, seconds waited for data), `epoch` (figures), `checkpoint`, `notice`, `failure` (step,
place, exception, message) and `hang` (the same fields; `rank` names the rank that hangs). A resumed run appends to its
files. The driver reads them to say what failed first.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

__all__ = ["Failure", "RunLog", "find_failure", "read_log"]

FOLDER = "logs"
LOST_PEER = re.compile(r"(closed|reset) by peer|gloo.*(Broken pipe|not connected)|remote process exited|NCCL error")
"""Messages of gloo and NCCL when another rank is gone; gloo's depends on the operation."""
_COMMON: dict[str, type] = {"time": str, "event": str, "rank": int, "node": str, "pid": int}
_OF_FAILURES: dict[str, type] = {"step": int, "exception": str, "message": str}
DIED = "its process ended without an error: it was killed, ran out of memory, or its node was lost"


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt."""

    rank: int
    node: str
    step: int
    """Optimizer step, from 0, in which the rank was."""
    exception: str
    """Name of the exception's class; "hang" for a rank that did not move, "died" for a rank whose process is gone."""
    message: str

    def __str__(self) -> str:
        """One line: cause, rank, node and step."""
        return f"{self.exception}: {self.message} (rank {self.rank} on {self.node}, step {self.step})"

    def tags(self) -> dict[str, str]:
        """The failure as tags of the run."""
        return {f"failure.{name}": str(getattr(self, name)) for name in ("rank", "node", "step", "exception")}


class RunLog:
    """The log of one rank in the run's folder (None: nowhere); may be used by several threads."""

    def __init__(self, folder: Path | None, *, rank: int) -> None:
        self._common = {"rank": rank, "node": socket.gethostname(), "pid": os.getpid()}
        self._path = None if folder is None else folder / FOLDER / f"rank-{rank}.jsonl"

    def write(self, event: str, **fields: Any) -> None:
        """Adds a line; a storage that refuses it does not stop the training."""
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **self._common, "event": event, **fields}, default=str)
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                cut = b"" if _ends_a_line(file) else b"\n"
                file.write(cut + line.encode() + b"\n")


def _ends_a_line(file: IO[bytes]) -> bool:
    """Whether a file, open at its end, does not end within a line, as a full disk or a killed process leaves it."""
    if not file.tell():
        return True
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def find_failure(folder: Path, *, since: float, dead: Sequence[int] = ()) -> Failure | None:
    """Why the last attempt failed: a hang, else a rank whose process died, else the first error.

    Records before `since`, seconds since the epoch, belong to another start of the run. The process of the ranks `dead`
    ended without an error.
    """
    after = datetime.fromtimestamp(since, UTC).isoformat(timespec="milliseconds")
    paths = sorted((folder / FOLDER).glob("rank-*.jsonl"))
    records = sorted((record for path in paths for record in _of_last_process(path, after)), key=itemgetter("time"))
    for record in records:
        if record["event"] == "hang":
            return _failure(record)
    failures = [record for record in records if record["event"] == "failure"]
    if not dead and failures and LOST_PEER.search(failures[0]["message"]):
        # Ray may report the errors of the ranks that lost their peer before it notices that the peer died.
        dead = [record["rank"] for record in records]
    failed = {record["rank"] for record in failures}  # they ended because of the error that they wrote
    for rank in sorted(set(dead) - failed):
        last: dict[str, Any] = next((record for record in reversed(records) if record["rank"] == rank), {})
        died = {"rank": rank, "exception": "died", "message": DIED}
        return _failure({"node": "an unknown node", "step": 0} | last | died)
    return _failure(failures[0]) if failures else None


def _of_last_process(path: Path, after: str) -> list[dict[str, Any]]:
    """What the last process of a rank wrote, since a time. The rank of a hang may be another one."""
    records = [record for record in read_log(path) if _is_whole(record) and record["time"] >= after]
    return [record for record in records if record["pid"] == records[-1]["pid"]]


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record, which a damaged file may hold, has the fields that are read here."""
    kinds = _COMMON | (_OF_FAILURES if record["event"] in ("hang", "failure") else {})
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _failure(record: Mapping[str, Any]) -> Failure:
    return Failure(**{field.name: record[field.name] for field in fields(Failure)})


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a rank's log; incomplete lines are skipped."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a process that was killed
        if isinstance(record, dict) and "event" in record and "time" in record:
            yield record
