"""slrnet removes what it made, beneath a folder that it was given, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

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
