"""The benchmarks: every script starts, and the settings of those that train through jobs are accepted."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results, scale
from slrnet.config import apply_overrides
from slrnet.data.manifest import load_dataset
from slrnet.recipes import demo

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("[a-z]*.py"))
RUN_ALL = """
import runpy, sys
failed = []
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
        failed.append(f"{script}: did not exit")
    except SystemExit as end:
        if end.code:
            failed.append(f"{script}: exit status {end.code}")
    except Exception as error:
        failed.append(f"{script}: {error!r}")
sys.exit("\\n".join(failed) or 0)
"""
"""Asks all scripts for help in one process, which imports PyTorch once."""


@pytest.mark.parametrize("name", ["chaos", "nodes", "ray_overhead", "sweep_faults"])
def test_settings_are_accepted(name: str) -> None:
    settings = importlib.import_module(f"benchmarks.{name}").SETTINGS
    enough = [] if any(text.startswith("train.epochs=") for text in settings) else ["train.epochs=12"]
    assert apply_overrides(demo(), [*settings, *enough]) != demo()


@pytest.mark.slow
def test_every_script_answers_help() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS)


def test_what_scripts_import_exists() -> None:
    """Also within functions, which `--help` does not enter."""
    missing = []
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("slrnet", "benchmarks"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    if not hasattr(module, name.name) and not importlib.util.find_spec(f"{node.module}.{name.name}"):
                        missing.append(f"{script.name}: {node.module}.{name.name}")
    assert missing == []


def test_results_know_every_benchmark() -> None:
    scripts = {path.stem for path in SCRIPTS} - {"results"}
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
    shares = scale.division(shards=5, samples=9, ranks=3, readers=2, batch=7)
    assert shares == {"drawn": 42, "twice": 0, "left": 3, "least": 12, "most": 18, "steps": 6}
    whole = scale.plan(shards=50, samples=9, ranks=2, rank=1)
    assert whole["steps"] == 450 // (2 * scale.SHARE)
    assert scale.slices(shards=2) == {"missing": 0, "twice": 0, "seconds": pytest.approx(0, abs=60)}


def test_the_simulated_manifest_is_one(tmp_path: Path) -> None:
    scale.write(folder=str(tmp_path / "data"), rows=3000)
    split = load_dataset(tmp_path / "data", check=True).split("train")
    assert split.firsts.tolist() == [0, 1000, 2000, 3000]
    assert split.key(2001) == "000000002001"
    assert scale.open_manifest(folder=str(tmp_path / "data"))["labeled"] == 3000
