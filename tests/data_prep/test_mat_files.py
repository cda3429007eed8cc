"""SBD's masks: read in a process of its own, whose end costs one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

import data_prep.mat_files
from data_prep.mat_files import _Helper, read_mat_mask

CRASHING_READER = """
import os, sys, time
for line in sys.stdin:
    if "crash" in line:
        os.abort()
    if "slow" in line:
        time.sleep(60)
    sys.stdout.buffer.write(b"[1, 2]\\n" + bytes([3, 4]))
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Helper]:
    """A helper whose process dies and hangs as told."""
    (tmp_path / "reader.py").write_text(CRASHING_READER)
    monkeypatch.setattr(data_prep.mat_files, "SCRIPT", tmp_path / "reader.py")
    monkeypatch.setattr(data_prep.mat_files, "MAX_SECONDS", 2.0)
    helper = _Helper()
    yield helper
    helper.end()


def write(path: Path, segmentation: Any) -> Path:
    content = {"Segmentation": segmentation, "Boundaries": np.zeros((20, 1)), "CategoriesPresent": [[1]]}
    savemat(path, {"GTcls": content}, do_compression=True)
    return path


def test_masks_are_read(tmp_path: Path) -> None:
    ids = np.arange(240).reshape(12, 20)
    for dtype in (np.uint8, np.float64, np.int32):
        mask = read_mat_mask(write(tmp_path / "größe 1.mat", ids.astype(dtype)))
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, ids)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (np.full((3, 4), 256), r"it holds an array of shape \(3, 4\) and type .*, no mask with ids 0 to 255"),
        (np.full((3, 4), -1), "no mask with ids"),
        (np.full((3, 4), 0.5), "no mask with ids"),
        (np.full((3, 4), np.nan), "no mask with ids"),
        (np.zeros((3, 4, 2)), r"shape \(3, 4, 2\)"),
        (np.zeros((0, 4)), "no mask with ids"),
        ("text", "no mask with ids"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mat_mask(write(tmp_path / "a.mat", segmentation))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mat", np.ones((12, 20), dtype=np.uint8))
    data = path.read_bytes()
    (tmp_path / "b.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(500))
    for damaged in (tmp_path / "b.mat", tmp_path / "none.mat", tmp_path):
        with pytest.raises(ValueError, match=r"^\w+(Error|Exception): "):
            read_mat_mask(damaged)
    for length in range(0, len(data), len(data) // 20):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^\w+: "):
            read_mat_mask(path)


def test_a_crash_costs_one_file(helper: _Helper) -> None:
    assert helper.ask(Path("crash.mat")) == "reading it ended the process that did (status -6)"
    np.testing.assert_array_equal(helper.ask(Path("good.mat")), [[3, 4]])
    assert helper.ask(Path("slow.mat")) == "reading it takes more than 2 seconds"
    np.testing.assert_array_equal(helper.ask(Path("good.mat")), [[3, 4]])
    assert helper._process is not None
    os.kill(helper._process.pid, 9)
    assert helper.ask(Path("good.mat")) == "reading it ended the process that did (status -9)"
    np.testing.assert_array_equal(helper.ask(Path("good.mat")), [[3, 4]])
