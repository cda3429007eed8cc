from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_job(script: str, *arguments: str, storage: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SLRNET_STORAGE": str(storage)}
    return subprocess.run(
        [sys.executable, str(ROOT / "ray_jobs" / script), *arguments],
        env=environment,
        cwd=storage,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ("--recipe", "voc_wss", "--num-workers", "0"), "'voc_wsss'"),
        ("train.py", ("--recipe", "demo", "--data", "x", "--set", "optim.lrr=1"), "nearest one is 'optim.lr'"),
        ("train.py", ("--recipe", "demo", "--data", "x", "--num-workers", "0"), "data_prep"),
        ("train.py", ("--storage", "s3://bucket/runs"), "mount the storage"),
        ("train.py", ("--resume", "nothing"), "'nothing' has no checkpoint"),
        ("evaluate.py", ("--checkpoint", "nowhere"), "holds no checkpoint"),
        ("pseudo_label.py", ("--checkpoint", "nowhere", "--out", "x"), "holds no checkpoint"),
        ("distill.py", ("--data", "x"), "holds no pseudo masks; make some with `python ray_jobs/pseudo_label.py"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    script: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run_job(script, *arguments, storage=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
