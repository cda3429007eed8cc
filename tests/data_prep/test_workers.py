"""Worker processes: one set for all passes, in order, and gone when something fails."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest

from data_prep.workers import ConversionPool
from slrnet.data.manifest import DataError


def _place(number: int) -> tuple[int, int]:
    return number, os.getpid()


def _place_beside_another(meeting: Path, number: int) -> tuple[int, int]:
    """Waits until two processes have come to the folder, however long the second takes to start."""
    (meeting / str(os.getpid())).touch()
    deadline = time.monotonic() + 120
    while len(list(meeting.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return number, os.getpid()


def _die(number: int) -> int:
    os._exit(number)


def _refuse(number: int) -> int:
    if number == 2:
        raise DataError("2 is refused")
    return number


@pytest.mark.slow
def test_the_processes_of_one_pass_serve_the_next(tmp_path: Path) -> None:
    meetings = [tmp_path / name for name in ("first", "second")]
    for meeting in meetings:
        meeting.mkdir()
    with ConversionPool(2) as workers:
        first, second = (
            workers.map(partial(_place_beside_another, meeting), range(20), label="x") for meeting in meetings
        )
        assert [number for number, _ in first] == list(range(20))
        processes = {process for _, process in first}
        assert len(processes) == 2
        assert os.getpid() not in processes
        assert {process for _, process in second} == processes
    assert not {process.pid for process in multiprocessing.active_children()} & processes


def test_one_process_is_this_one() -> None:
    assert ConversionPool(1).map(_place, [3, 4], label="x") == [(3, os.getpid()), (4, os.getpid())]


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(DataError, match="--processes is 0"):
        ConversionPool(0)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    with (
        ConversionPool(2) as workers,
        pytest.raises(DataError, match="a worker process died, perhaps for lack of memory; try fewer --processes"),
    ):
        workers.map(_die, [1, 2, 3], label="dying")


@pytest.mark.slow
def test_after_a_failure_all_have_ended_and_new_ones_serve() -> None:
    with ConversionPool(2) as workers:
        before = {process for _, process in workers.map(_place, range(20), label="x")}
        with pytest.raises(DataError, match="2 is refused"):
            workers.map(_refuse, range(20), label="x")
        assert not {process.pid for process in multiprocessing.active_children()} & before
        assert not {process for _, process in workers.map(_place, range(20), label="x")} & before
