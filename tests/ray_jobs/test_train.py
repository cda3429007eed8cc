from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slrnet.storage.lease import LEASE, HeldError, require_free
from tests.fixtures.jobs import run_job

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ("--recipe", "voc_wss", "--num-workers", "0"), "'voc_wsss'"),
        ("train.py", ("--recipe", "demo", "--data", "x", "--set", "optim.lrr=1"), "nearest one is 'optim.lr'"),
        ("train.py", ("--recipe", "demo", "--data", "x", "--num-workers", "0"), "slrnet prepare"),
        ("train.py", ("--storage", "ftp://host/runs"), "allowed are folders, s3:// and gs://"),
        ("tune.py", ("--storage", "ftp://host/runs"), "allowed are folders, s3:// and gs://"),
        ("train.py", ("--resume", "nothing"), "no run 'nothing' in"),
        ("evaluate.py", ("--checkpoint", "nowhere"), "holds no checkpoint"),
        ("pseudo_label.py", ("--checkpoint", "nowhere", "--out", "x"), "holds no checkpoint"),
        ("evaluate.py", ("--checkpoint", "."), "holds no checkpoint"),
        ("tune.py", (), "give --data DIR, a folder with shards; `slrnet prepare demo --out DIR` makes one"),
        ("distill.py", (), "give --data PSEUDO, the folder that `slrnet pseudo-label` made"),
        ("distill.py", ("--data", "x"), "no shards in"),
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


@pytest.mark.slow
def test_a_job_that_is_stopped_saves_says_so_and_marks_its_run(storage: Path) -> None:
    """`ray job stop` sends SIGTERM. While it runs, another start is refused."""
    from mlflow import MlflowClient

    settings = ("model.encoder=timm:test_efficientnet", "model.encoder_weights=none", "train.epochs=900")
    process = subprocess.Popen(
        [sys.executable, "ray_jobs/train.py", "--storage", str(storage), "--name", "run", "--num-workers", "0"]
        + [word for setting in settings for word in ("--set", setting)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    log = storage / "run" / "logs" / "rank-0.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and '"step"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    with pytest.raises(HeldError, match=f"process {process.pid} of "):
        require_free(storage / "run" / LEASE, "the run")
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert f"continue with: slrnet train --resume run --storage {storage}" in printed
    assert len(list((storage / "run" / "checkpoints").glob("checkpoint-0000-*"))) == 1
    assert not (storage / "run" / LEASE).exists()
    assert errors.splitlines()[-1] == "interrupted; continue the training with --resume NAME"
    assert "Traceback" not in errors
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "KILLED"
