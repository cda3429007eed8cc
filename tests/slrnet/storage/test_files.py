"""Files that appear whole or not at all, in a folder that is made if missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from slrnet.storage.files import written_whole


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
