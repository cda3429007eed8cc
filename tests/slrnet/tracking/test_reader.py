"""What is read back from MLflow."""

from __future__ import annotations

import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from slrnet.tracking.mlflow import MlflowTracker
from slrnet.tracking.protocol import RunHandle
from slrnet.tracking.reader import comparison, find_run, logged_pictures, run_tags


def test_runs_are_compared_by_their_ids() -> None:
    handles = [RunHandle(uri="", run_id=name, experiment_id="7") for name in ("a", "b")]
    page, _, query = comparison(handles).partition("?")
    assert page == "#/compare-runs"
    assert urllib.parse.parse_qs(query) == {"runs": ['["a","b"]'], "experiments": ['["7"]']}


def test_a_server_that_a_file_alone_names_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        assert find_run(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, "0123456789abcdef") is None
        with pytest.raises(BlockingIOError):
            server.accept()


def test_pictures_and_tags_are_read_back(handle: RunHandle) -> None:
    tracker = MlflowTracker(handle)
    for step, level in ((1, 10), (2, 20), (2, 200)):  # the second step twice, as after a restart
        tracker.log_image("samples/2008_000001", np.full((4, 5, 3), level, np.uint8), step)
        time.sleep(0.002)
    tracker.log_image("other/2008_000001", np.zeros((4, 5, 3), np.uint8), 1)
    tracker.set_tags({"git_commit": "abc"})
    pictures = logged_pictures(handle)
    assert {series: np.asarray(picture).max() for series, picture in pictures.items()} == {
        ("2008_000001", 1): 10,
        ("2008_000001", 2): 200,
    }
    assert run_tags(handle)["git_commit"] == "abc"
