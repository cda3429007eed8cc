"""Metric names, and the tracker that records nothing."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrnet.tracking.mlflow import MlflowTracker
from slrnet.tracking.protocol import NullTracker, RunHandle, metric_key


class TestKeys:
    @pytest.mark.slow
    def test_keys_that_collide_are_refused(self, handle: RunHandle) -> None:
        with pytest.raises(ValueError, match="'a\\?' becomes 'a_', which another metric"):
            MlflowTracker(handle).log_metrics({"a!": 1.0, "a?": 2.0}, step=0)

    @pytest.mark.parametrize("part", ["", " ", "..", "."])
    def test_empty_keys_are_refused(self, part: str) -> None:
        with pytest.raises(ValueError, match="is no key"):
            metric_key("iou", part)

    @given(st.lists(st.text(alphabet=string.printable + "éß猫", max_size=300), min_size=1, max_size=3))
    def test_every_key_is_one_that_mlflow_takes(self, parts: list[str]) -> None:
        from mlflow.utils.validation import _validate_metric_name

        key = metric_key(*("x" + part for part in parts))
        assert key.count("/") == len(parts) - 1
        _validate_metric_name(key)


class TestNullTracker:
    def test_same_interface_without_a_run(self) -> None:
        tracker = NullTracker()
        tracker.log_metrics({"a": 1.0}, step=1)
        tracker.log_image("k", np.zeros((2, 2, 3), np.uint8), step=1)
        tracker.set_tags({"a": "b"})
        assert tracker.undelivered_points() == []
        assert tracker.drain() == 0
        assert not isinstance(tracker, MlflowTracker)

    def test_it_still_refuses_what_a_tracker_refuses(self) -> None:
        with pytest.raises(ValueError, match="which another metric of this step already has"):
            NullTracker().log_metrics({"a!": 1.0, "a?": 2.0}, step=0)
        with pytest.raises(ValueError, match="is no key"):
            NullTracker().log_image("..", np.zeros((2, 2, 3), np.uint8), step=0)


def test_how_to_open_hides_credentials() -> None:
    handle = RunHandle(uri="https://me:secret@host:5000", run_id="r", experiment_id="7")
    assert handle.how_to_open() == "https://host:5000/#/experiments/7/runs/r"


def test_how_to_open_a_file() -> None:
    handle = RunHandle(uri="sqlite:////data/my runs/mlflow.db", run_id="r", experiment_id="7")
    place, command = handle.how_to_open().split(" after ")
    assert place.startswith("http://127.0.0.1:5000/#/experiments/7/runs/r")
    assert command == "`slrnet dashboard --storage '/data/my runs'`"
