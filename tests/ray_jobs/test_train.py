from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_job(script: str, *arguments: str) -> int:
    """Runs a script as `python ray_jobs/SCRIPT` does, but in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "ray_jobs" / script), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ("--recipe", "voc_wss", "--num-workers", "0"), "'voc_wsss'"),
        ("train.py", ("--recipe", "demo", "--data", "x", "--set", "optim.lrr=1"), "nearest one is 'optim.lr'"),
        ("train.py", ("--recipe", "demo", "--data", "x", "--num-workers", "0"), "data_prep"),
        ("train.py", ("--storage", "s3://bucket/runs"), "mount the storage"),
        ("train.py", ("--resume", "nothing"), "no run 'nothing' in"),
        ("evaluate.py", ("--checkpoint", "nowhere"), "holds no checkpoint"),
        ("pseudo_label.py", ("--checkpoint", "nowhere", "--out", "x"), "holds no checkpoint"),
        ("distill.py", ("--data", "x"), "holds no pseudo masks; make some with `python ray_jobs/pseudo_label.py"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    script: str,
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLRNET_STORAGE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run_job(script, *arguments) == 2
    assert message in capsys.readouterr().err
