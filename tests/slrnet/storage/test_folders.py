"""slrnet removes what it made, beneath a folder that it was given, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from slrnet.storage import folders
from slrnet.storage.folders import MARK, mark_folder, remove_folder, whole_folder


def test_a_marked_folder_goes_whole(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    mark_folder(folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "x").write_text("1")
    remove_folder(folder, within=tmp_path)
    remove_folder(folder, within=tmp_path)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_of_known_files_goes_too(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-0001"
    folder.mkdir()
    (folder / "state.json").write_text("1")
    (folder / ".incoming.model").write_text("half")
    remove_folder(folder, within=tmp_path, own={"state.json"})
    assert not folder.exists()


@pytest.mark.parametrize("name", ["unmarked", "marked/..", "marked/../..", ".", "link"])
def test_what_slrnet_did_not_make_stays(name: str, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    for folder in (tmp_path, storage, storage / "marked"):
        folder.mkdir(exist_ok=True)
        (folder / MARK).touch()
    (storage / "unmarked").mkdir()
    (storage / "unmarked" / "thesis.tex").write_text("years")
    (storage / "link").symlink_to(storage / "marked")
    before = sorted(tmp_path.rglob("*"))
    mark_folder(storage / "unmarked")
    with pytest.raises(ValueError, match="is not removed: it"):
        remove_folder(storage / name, within=storage, own={"state.json"})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_appears_whole_and_replaces_only_its_like(tmp_path: Path) -> None:
    target = tmp_path / "data"

    def write(text: str, own: set[str] | None) -> None:
        with whole_folder(target, own=own) as folder:
            (folder / "a").write_text(text)
            if text == "bad":
                raise RuntimeError("stopped")

    write("1", None)
    for text, own, error in (("2", None, OSError), ("2", {"b"}, ValueError), ("bad", {"a"}, RuntimeError)):
        with pytest.raises(error):
            write(text, own)
        assert (target / "a").read_text() == "1"
    write("2", {"a"})
    assert (target / "a").read_text() == "2"
    assert list(tmp_path.iterdir()) == [target]


def test_an_earlier_folder_is_whole_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flushed = tmp_path / "data", []

    def fsync(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (target / "a").read_text()))

    for text in "12":
        with whole_folder(target, own={"a"}) as folder:
            (folder / "a").write_text(text)
            monkeypatch.setattr(os, "fsync", fsync if text == "2" else os.fsync)
    inodes = [path.stat().st_ino for path in (target / "a", target, tmp_path)]
    assert flushed == list(zip(inodes, "112", strict=True))


def test_what_a_killed_process_left_goes_but_nothing_in_use(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from slrnet.storage.folders import whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1])) as folder: (folder / 'half').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], check=False)
    (killed,) = tmp_path.iterdir()
    (mine := tmp_path / ".data.mine.partial").mkdir()
    for name in (".data.new.partial", ".data.old.partial"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".data.old.partial", (0, 0))
    with whole_folder(tmp_path / "data") as first:
        assert not killed.exists()
        with whole_folder(tmp_path / "data"):
            assert first.exists()
        assert mine.exists()
        assert (tmp_path / ".data.new.partial").exists()
        assert not (tmp_path / ".data.old.partial").exists()
        (tmp_path / "data").rmdir()  # was empty


def test_a_folder_that_was_not_replaced_to_the_end_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two folders cannot be swapped, there is a moment in which neither has the name."""
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    target, killed = tmp_path / "data", tmp_path / ".data.x.partial"
    for text in "12":
        with whole_folder(target, own={"a"}) as folder:
            (folder / "a").write_text(text)
    assert (target / "a").read_text() == "2"
    mark_folder(killed)
    target.rename(killed / folders._EARLIER)
    with suppress(RuntimeError), whole_folder(target, own={"a"}):
        assert (target / "a").read_text() == "2"
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == [target]
