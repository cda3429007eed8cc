"""Addresses of MLflow's page."""

from __future__ import annotations

from slrnet.tracking.protocol import RunHandle


def test_how_to_open_hides_credentials() -> None:
    handle = RunHandle(uri="https://me:secret@host:5000", run_id="r", experiment_id="7")
    assert handle.how_to_open() == "https://host:5000/#/experiments/7/runs/r"


def test_how_to_open_a_file() -> None:
    handle = RunHandle(uri="sqlite:////data/my runs/mlflow.db", run_id="r", experiment_id="7")
    place, command = handle.how_to_open().split(" after ")
    assert place.startswith("http://127.0.0.1:5000/#/experiments/7/runs/r")
    assert command == "`slrnet dashboard --storage '/data/my runs'`"
