"""The benchmarks that train through jobs: what they ask for is accepted, which a job would say only on a cluster."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import results
from slrnet.config import apply_overrides
from slrnet.recipes import demo

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["chaos", "nodes", "ray_overhead", "sweep_faults"])
def test_settings_are_accepted(name: str) -> None:
    settings = importlib.import_module(f"benchmarks.{name}").SETTINGS
    enough = [] if any(text.startswith("train.epochs=") for text in settings) else ["train.epochs=12"]
    assert apply_overrides(demo(), [*settings, *enough]) != demo()


def test_results_know_every_benchmark() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")} - {"results"}
    assert scripts == {*results.NAMES, *results.LONGER}
    for name in scripts:
        text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        assert ("--peer-dir" in text) == (name in results.WITH_PEER), name


def test_sections_that_are_not_measured_again_stay() -> None:
    text = results.document({"refine": "one\n\n```\n## not a section\n```", "loader": "measured once"})
    kept = results.read_sections(text)
    assert kept["loader"] == "measured once"
    assert results.document(kept | {"loader": "again"}) == text.replace("measured once", "again")
