"""The benchmarks that train through jobs: what they ask for is accepted, which a job would say only on a cluster."""

from __future__ import annotations

import importlib

import pytest

from slrnet.config import apply_overrides
from slrnet.recipes import demo


@pytest.mark.parametrize("name", ["chaos", "nodes", "ray_overhead", "sweep_faults"])
def test_settings_are_accepted(name: str) -> None:
    settings = importlib.import_module(f"benchmarks.{name}").SETTINGS
    enough = [] if any(text.startswith("train.epochs=") for text in settings) else ["train.epochs=12"]
    assert apply_overrides(demo(), [*settings, *enough]) != demo()
