"""Files that appear whole or not at all, in a folder that is made if missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from slrnet.storage.files import check_writable, written_whole


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
