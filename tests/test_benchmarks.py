"""The benchmarks that train through jobs: what they ask for is accepted, which a job would say only on a cluster."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import results, scale
from slrnet.config import apply_overrides
from slrnet.data.manifest import load_dataset
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


def test_the_simulated_ranks_share_an_epoch_of_the_loaders_own_making() -> None:
    found = scale.division(shards=5, samples=9, process=3, readers=2, batch=7)
    assert found == {"drawn": 42, "twice": 0, "left": 3, "least": 12, "most": 18, "steps": 6}
    whole = scale.plan(shards=50, samples=9, process=2, rank=1)
    assert whole["steps"] == 450 // (2 * scale.SHARE)
    assert scale.slices(shards=2) == {"missing": 0, "twice": 0, "seconds": pytest.approx(0, abs=60)}


def test_the_simulated_manifest_is_one(tmp_path: Path) -> None:
    scale.write(folder=str(tmp_path / "data"), rows=3000)
    split = load_dataset(tmp_path / "data", check=True).split("train")
    assert [entry.num_samples for entry in split.shards] == [1000] * 3
    assert split.key(2001) == "000000002001"
    assert scale.open_manifest(folder=str(tmp_path / "data"))["labelled"] == 3000
