"""The ranks' logs, and what the driver makes of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from slrnet.tracking.run_log import RunLog, find_failure, read_log


def read(folder: Path, rank: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "logs" / f"rank-{rank}.jsonl").read_text().splitlines()]


def fail(log: RunLog, step: int, message: str) -> None:
    log.write("failure", step=step, place="going forward", exception="DataError", message=message)
    time.sleep(0.005)  # another millisecond


def test_every_line_says_when_where_and_what(tmp_path: Path) -> None:
    for _ in range(2):  # a run that goes on appends
        log = RunLog(tmp_path, rank=3)
        log.write("step", step=7, loss=0.5)
    first, second = read(tmp_path, 3)
    assert first.keys() == {"time", "rank", "node", "pid", "event", "step", "loss"}
    assert (first["rank"], first["event"], first["step"], first["loss"]) == (3, "step", 7, 0.5)
    assert str(first["time"]).endswith("+00:00")
    assert str(second["time"]) >= str(first["time"])


@pytest.mark.parametrize("name", ["time", "event", "rank", "node", "pid", "step", "exception", "message"])
def test_damaged_records_say_nothing(name: str, tmp_path: Path) -> None:
    log = RunLog(tmp_path, rank=3)
    fail(log, 7, "sound")
    path = tmp_path / "logs" / "rank-3.jsonl"
    (record,) = read(tmp_path, 3)
    for damaged in (record | {name: []}, {key: value for key, value in record.items() if key != name}):
        path.write_text("".join(f"{line}\n" for line in (json.dumps(damaged), "[" * 100_000, json.dumps(record))))
        assert str(find_failure(tmp_path, since=0.0)).startswith("DataError: sound (rank 3")


def test_a_line_that_was_cut_costs_itself_alone(tmp_path: Path) -> None:
    log, path = RunLog(tmp_path, rank=0), tmp_path / "logs" / "rank-0.jsonl"
    log.write("step", step=1)
    path.write_text(path.read_text() + '{"time": "2030')
    for step in (2, 3):
        log.write("step", step=step)
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, rank=0)
    log.write("step", step=1)
    assert not list(tmp_path.iterdir())


def test_the_first_error_is_the_cause(tmp_path: Path) -> None:
    """The other ranks fail later, as the connection to the first one breaks."""
    for rank, message in ((1, "shard a.tar is damaged"), (0, "another error")):
        fail(RunLog(tmp_path, rank=rank), 12, message)
    failure = find_failure(tmp_path, since=0)
    assert failure is not None
    assert (failure.rank, failure.step, failure.exception) == (1, 12, "DataError")
    assert str(failure) == f"DataError: shard a.tar is damaged (rank 1 on {failure.node}, step 12)"
    assert failure.tags() == {
        "failure.rank": "1",
        "failure.node": failure.node,
        "failure.step": "12",
        "failure.exception": "DataError",
    }


def test_failures_of_earlier_attempts_do_not_count(tmp_path: Path) -> None:
    log = RunLog(tmp_path, rank=0)
    fail(log, 1, "old")
    begun = time.time()
    assert find_failure(tmp_path, since=begun) is None
    time.sleep(0.005)
    fail(log, 2, "new")
    failure = find_failure(tmp_path, since=begun)
    assert failure is not None
    assert failure.message == "new"


def test_of_several_attempts_the_last_one_counts(tmp_path: Path) -> None:
    """Ray starts failed workers again: other processes, within the same start of the run."""
    for pid in (100, 200):
        for rank in (0, 1):
            log = RunLog(tmp_path, rank=rank)
            log._common["pid"] = pid + rank
            fail(log, pid, f"attempt {pid}")
    failure = find_failure(tmp_path, since=0)
    assert failure is not None
    assert (failure.rank, failure.message) == (0, "attempt 200")


def test_a_rank_that_died_goes_before_the_errors_that_it_caused(tmp_path: Path) -> None:
    RunLog(tmp_path, rank=1).write("step", step=30)
    fail(RunLog(tmp_path, rank=0), 31, "connection closed by peer")
    failure = find_failure(tmp_path, since=0, dead=[1])
    assert failure is not None
    assert (failure.rank, failure.step, failure.exception) == (1, 30, "died")
    assert "killed, ran out of memory, or its node was lost" in str(failure)
    assert failure.node != "an unknown node"
    unknown = find_failure(tmp_path, since=0, dead=[2])
    assert unknown is not None
    assert (unknown.rank, unknown.node) == (2, "an unknown node")


@pytest.mark.parametrize(
    "message",
    [
        "gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:58053",
        "gloo/transport/tcp/pair.cc:547] writev [127.0.0.1]:9375: Broken pipe",
        "gloo/transport/tcp/pair.cc:320] Pair is not connected (127.0.0.1 <--> 127.0.0.1)",
    ],
)
def test_a_lost_peer_is_the_rank_that_says_nothing(tmp_path: Path, message: str) -> None:
    """Ray reports rank 0 alone, whose connection broke."""
    RunLog(tmp_path, rank=1).write("step", step=30)
    fail(RunLog(tmp_path, rank=0), 31, message)
    failure = find_failure(tmp_path, since=0)
    assert failure is not None
    assert (failure.rank, failure.exception) == (1, "died")
    fail(RunLog(tmp_path, rank=1), 30, "shard a.tar is damaged")
    failure = find_failure(tmp_path, since=0)
    assert failure is not None
    assert (failure.rank, failure.exception) == (0, "DataError")


def test_a_rank_that_said_why_it_ended_did_not_die_without_a_word(tmp_path: Path) -> None:
    fail(RunLog(tmp_path, rank=0), 4, "shard a.tar is damaged")
    RunLog(tmp_path, rank=1).write("step", step=4)
    failure = find_failure(tmp_path, since=0, dead=[0])
    assert failure is not None
    assert (failure.rank, failure.exception) == (0, "DataError")
    failure = find_failure(tmp_path, since=0, dead=[0, 1])
    assert failure is not None
    assert (failure.rank, failure.exception) == (1, "died")


def test_a_hang_goes_before_all(tmp_path: Path) -> None:
    log = RunLog(tmp_path, rank=0)
    fail(log, 4, "too late")
    log.write("hang", rank=1, node="there", step=4, exception="hang", message="rank 1 hangs")
    other = RunLog(tmp_path, rank=1)
    other._common["pid"] += 1
    fail(other, 4, "Connection closed by peer")  # the rank that hung wakes up, and writes later than the one before
    failure = find_failure(tmp_path, since=0, dead=[0, 1])
    assert failure is not None
    assert (failure.rank, failure.node, failure.exception) == (1, "there", "hang")


def test_the_half_line_of_a_killed_process_is_passed_over(tmp_path: Path) -> None:
    fail(RunLog(tmp_path, rank=0), 4, "whole")
    with (tmp_path / "logs" / "rank-0.jsonl").open("a") as file:
        file.write('{"time": "2026')
    failure = find_failure(tmp_path, since=0)
    assert failure is not None
    assert failure.message == "whole"


def test_no_log_no_failure(tmp_path: Path) -> None:
    assert find_failure(tmp_path, since=0) is None
