"""Files that appear whole or not at all, in a folder that is made if missing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from slrnet.storage.files import ABANDONED, check_writable, write_text, written_whole


def test_a_file_takes_its_name_when_all_went_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"

    def stop_halfway() -> None:
        with written_whole(path) as incoming:
            incoming.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop_halfway()
    assert list(path.parent.iterdir()) == []
    with written_whole(path) as incoming:
        incoming.write_text("whole")
        assert not path.exists()
    assert [file.read_text() for file in path.parent.iterdir()] == ["whole"]


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".txt")
    with written_whole(path) as first, written_whole(path) as second:
        first.write_text("1")
        second.write_text("2")
        assert first.suffix == second.suffix == ".txt"
    assert [file.read_text() for file in tmp_path.iterdir()] == ["1"]  # the last to end


def test_bytes_and_names_are_on_the_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "a").read_text()))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a", "new")
    assert flushed == [((tmp_path / "a").stat().st_ino, "old"), (tmp_path.stat().st_ino, "new")]


def test_what_a_killed_process_left_goes_but_nothing_in_use(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / f".incoming.0.{name}").touch()
    os.utime(tmp_path / ".incoming.0.dead", (0, time.time() - ABANDONED - 1))
    write_text(tmp_path / "a", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".incoming.0.alive", "a"]


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("new/below", True, None),
        ("new/file.txt", False, None),
        ("file", False, None),
        ("file", True, "file is no folder; name a folder to write"),
        ("file/below", True, r"file/below cannot be written: .*file takes no files \(Not a directory\)"),
        (".", False, "is a folder; name a file to write"),
        ("broken/below", True, "broken/below cannot be written"),
        ("/proc/below/x", True, "/proc/below/x cannot be written: /proc takes no files"),
    ],
)
def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path, name: str, folder: bool, message: str | None) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    if message is None:
        assert check_writable(tmp_path / name, folder=folder) == tmp_path / name
    else:
        with pytest.raises(ValueError, match=message):
            check_writable(tmp_path / name, folder=folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"
