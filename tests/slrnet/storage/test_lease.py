"""One owner of a folder at a time, in folders and in an object store."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrnet.storage import lease
from slrnet.storage.lease import LAPSE, HeldError, beside, owned, require_free

WHAT = "run folder /runs/first"


def hold(place: Path, **changes: Any) -> None:
    """Leaves the lease of a live process on another host, with some changes."""
    now = time.time()
    record = {"id": "other", "host": "node7", "pid": 4711, "started": now - 99, "user": "eva", "since": now - 50}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(record | {"beat": now - 5} | changes))


def test_it_is_there_meanwhile_and_nothing_stays(tmp_path: Path) -> None:
    place = tmp_path / "run" / "lease.json"
    with owned(place, WHAT):
        record = json.loads(place.read_text())
        assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_results_stays(tmp_path: Path) -> None:
    with owned(tmp_path / "run" / "lease.json", WHAT):
        (tmp_path / "run" / "result").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_the_lease_of_an_output_lies_beside_it(tmp_path: Path) -> None:
    assert beside(tmp_path / "out") == tmp_path / ".out.lease.json"
    assert len(beside(tmp_path / ("x" * 255)).name) < 255


def test_the_lease_of_a_folder_in_one_that_takes_no_files_lies_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    (tmp_path / "out").mkdir()
    assert beside(tmp_path / "out") == tmp_path / "out" / ".lease.json"
    assert beside(tmp_path / "new") == tmp_path / ".new.lease.json"


@pytest.mark.parametrize(
    "enter", [lambda place: owned(place, WHAT).__enter__(), lambda place: require_free(place, WHAT)]
)
def test_another_start_is_told_who_works_there_and_since_when(enter: Callable[[Path], None], tmp_path: Path) -> None:
    place = tmp_path / "lease.json"
    hold(place, since=0.0)
    before = place.read_bytes()
    with pytest.raises(
        HeldError,
        match=r"^run folder /runs/first is in use: process 4711 of eva on node7 works there since 1970-01-01 00:00:00 "
        r"UTC, its last sign of life is 5 s old; wait until it ends, or stop it\. If it is gone, a start in 115 s ",
    ):
        enter(place)
    assert place.read_bytes() == before


@pytest.mark.parametrize("what", ["half a file", "{", "[1]", '{"id": "x"}'])
def test_a_lease_that_is_just_being_written_holds(what: str, tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text(what)
    with pytest.raises(HeldError, match="is in use"), owned(tmp_path / "lease.json", WHAT):
        pass


@pytest.mark.parametrize(
    "gone",
    [
        {"beat": time.time() - LAPSE - 5},
        {"host": socket.gethostname(), "pid": 2**22 + 1},
        {"host": socket.gethostname(), "pid": os.getpid(), "started": 1.0},  # another process had this number
    ],
    ids=["lapsed", "pid gone", "pid used again"],
)
def test_it_is_taken_over_from_an_owner_that_is_gone(gone: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "lease.json"
    hold(place, **gone)
    require_free(place, WHAT)
    with owned(place, WHAT):
        assert json.loads(place.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_at_once_one_gets_it(tmp_path: Path) -> None:
    """They all find a lapsed one."""
    place, entered, refused = tmp_path / "lease.json", [], []
    hold(place, beat=0.0)
    ready = threading.Barrier(8)

    def start() -> None:
        ready.wait()
        try:
            with owned(place, WHAT):
                entered.append(1)
                ended.wait(60)
        except HeldError:
            refused.append(1)
        ended.set() if len(refused) == 7 else None

    ended = threading.Event()
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 7)


def test_patience_waits_for_a_silent_owner_but_not_for_one_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "lease.json"
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: hold(place, beat=time.time()))
    hold(place)
    with pytest.raises(HeldError), owned(place, WHAT, patience=99):  # its beat changed
        pass
    monkeypatch.setattr(lease, "LAPSE", -1e12)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: monkeypatch.setattr(lease, "LAPSE", 1.0))
    hold(place, beat=time.time() - 9)
    with owned(place, WHAT, patience=99):
        pass


def test_it_beats_and_an_owner_that_lost_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    place, told, lost = tmp_path / "lease.json", [], threading.Event()
    with owned(place, WHAT, lost=lambda message: (told.append(message), lost.set())):  # type: ignore[func-returns-value]
        first = json.loads(place.read_text())["beat"]
        while json.loads(place.read_text())["beat"] == first:
            time.sleep(0.005)
        hold(place)
        assert lost.wait(60)
    assert told == [
        "run folder /runs/first was taken over by process 4711 of eva on node7, because this process gave no sign of "
        "life"
    ]
    assert json.loads(place.read_text())["id"] == "other"


def test_by_default_it_ends_like_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        lease._stop("taken")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]
    assert capsys.readouterr().err == "taken; stopping\n"


@pytest.mark.slow
def test_in_an_object_store(s3: Any) -> None:
    s3.create_dir("runs")
    place = "s3://runs/first/lease.json"
    with owned(place, WHAT):
        with pytest.raises(HeldError, match=rf"process {os.getpid()} of .* works there"), owned(place, WHAT):
            pass
        with s3.open_input_stream("runs/first/lease.json") as stream:
            record = json.loads(stream.read())
        with s3.open_output_stream("runs/first/lease.json") as stream:
            stream.write(json.dumps(record | {"id": "other", "beat": 0.0}).encode())
        require_free(place, WHAT)
        with owned(place, WHAT):
            pass
    require_free(place, WHAT)
