"""One real Ray cluster, with token authentication, and what is asked of it through `ray job submit`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.demo import local_cluster
from slrnet.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from slrnet.config import apply_overrides, load_config
from slrnet.launch.checks import resume_config
from slrnet.launch.train import LaunchOptions, launch
from slrnet.tracking.mlflow import client_of

ROOT = Path(__file__).resolve().parents[2]
Submit = Callable[..., subprocess.CompletedProcess[str]]
TINY = (
    "model.encoder=timm:test_efficientnet",
    "model.encoder_weights=none",
    "model.decoder_dim=8",
    "model.frozen_stages=0",
    "data.crop_size=64",
    "data.workers=0",
    "train.epochs=1",
    "train.pretrain_epochs=0",
    "train.batch_size=8",
    "evaluation.pseudo_mask_images=0",
    "evaluation.panel_images=0",
)
EVERY_STEP = ("train.log_every=1", "train.checkpoint_every=1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    with local_cluster() as address:
        yield address


@pytest.fixture(scope="module")
def submit(cluster: tuple[str, dict[str, str]]) -> Submit:
    address, environment = cluster

    def run(*arguments: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        options = ["--address", address, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        command = ["ray", "job", "submit", *options, "--", "python", *arguments]
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
        )

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_prep.demo import build_demo

    folder = tmp_path_factory.mktemp("demo") / "shards"
    build_demo(folder, num_train=24, num_val=6, image_size=64, samples_per_shard=6)
    return folder


def test_the_cluster_turns_strangers_away(cluster: tuple[str, dict[str, str]]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{cluster[0]}/api/jobs/", timeout=10)
    assert refusal.value.code in (401, 403)


def test_a_job_refuses_what_lies_in_rays_copy_of_the_project(
    submit: Submit, cluster: tuple[str, dict[str, str]], data: Path
) -> None:
    arguments = ("ray_jobs/train.py", "--recipe", "voc_wsss", "--data", str(data), "--storage")
    refused = submit(*arguments, "lost_runs")
    assert "lost_runs would be in Ray's copy of the project" in refused.stdout
    assert "exit code 2" in refused.stdout + refused.stderr
    assert not (ROOT / "lost_runs").exists()
    cluster[1]["SLRNET_WEIGHTS"] = "/weights"  # of the terminal alone
    try:
        missing = submit(*arguments, str(data.parent / "runs"))
    finally:
        del cluster[1]["SLRNET_WEIGHTS"]
    assert "the ImageNet weights of wide_resnet38 did not reach this job" in missing.stdout
    assert "this job does not have the variables" in missing.stdout


def test_a_killed_worker_is_named_and_the_run_goes_on(submit: Submit, data: Path, storage: Path) -> None:
    """Two workers, one of which is killed in the middle of an epoch; then the same run, resumed by one process."""
    settings = [word for setting in (*TINY, *EVERY_STEP, "train.epochs=40") for word in ("--set", setting)]
    log = storage / "two" / "logs" / "rank-1.jsonl"
    with killed_when(lambda: len(events(log, "step")) >= 4, lambda: events(log, "step")[-1]["pid"]):
        failed = submit(
            "ray_jobs/train.py", "--recipe", "demo", "--data", str(data), "--storage", str(storage),
            "--name", "two", "--num-workers", "2", *settings,
        )  # fmt: skip
    assert failed.returncode != 0
    printed = failed.stdout + failed.stderr
    said = printed[-3000:] + "".join(path.read_text()[-1500:] for path in sorted(log.parent.glob("*.jsonl")))
    assert "error: died: its process ended without an error" in printed, said
    assert re.search(r"\(rank 1 on \S+, step \d+\)", printed), said
    client = client_of(f"sqlite:///{storage / 'mlflow.db'}")
    (run,) = search(client)
    assert run.info.status == "FAILED"
    assert (run.data.tags["failure.rank"], run.data.tags["failure.exception"]) == ("1", "died")
    reached = int(run.data.tags["failure.step"])

    epochs = reached // 3 + 1
    config = apply_overrides(resume_config(storage, "two"), [f"train.epochs={epochs}"])
    launch(config, LaunchOptions(name="two", storage=storage, resume=True, num_workers=0), say=lambda line: None)
    first, second = (event["step"] for event in events(storage / "two" / "logs" / "rank-0.jsonl", "start"))
    assert first == 0 < second
    assert reached - 2 <= second <= reached + 1  # a checkpoint every step, which may have been half written
    last = find_checkpoint(storage / "two" / "checkpoints")
    assert last is not None
    state = load_checkpoint(last).state
    assert (state.world_size, state.step) == (1, 3 * epochs)
    (run,) = search(client)
    assert run.info.status == "FINISHED"
    assert run.data.tags["slrnet.world_size"] == "1"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 3 * epochs + 1))  # each once


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@contextmanager
def killed_when(ready: Callable[[], bool], victim: Callable[[], int]) -> Iterator[None]:
    """Meanwhile, kills a process once something has come."""

    def shoot() -> None:
        wait_until(ready)
        os.kill(victim(), signal.SIGKILL)

    thread = threading.Thread(target=shoot)
    thread.start()
    yield
    thread.join()


def search(client: Any) -> list[Any]:
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def test_a_sweep_goes_on_after_its_driver_was_stopped(
    cluster: tuple[str, dict[str, str]], submit: Submit, data: Path, storage: Path
) -> None:
    """Two trials one after the other, the second of which cannot work; the job is stopped during it."""
    settings = [word for setting in (*TINY, "data.workers=0") for word in ("--set", setting)]
    fixed = ["weights.consistency", "cvlr.num_iters", "cvlr.dim", "calibration.confidence_threshold"]
    space = ["optim.lr=choice:0.01,1e30", *(f"{key}=fixed" for key in fixed)]
    started = submit(
        "ray_jobs/tune.py", "--recipe", "demo", "--data", str(data), "--storage", str(storage), "--name", "sweep",
        "--searcher", "grid", "--scheduler", "none", "--max-concurrent", "1", "--max-failures", "0",
        *(word for text in space for word in ("--search", text)), *settings, wait=False,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    trials = storage / "sweep" / "trials"
    (job,) = re.findall(r"'(raysubmit_\w+)' submitted", started.stdout)
    wait_until(lambda: len(list(trials.glob("*"))) == 2)
    subprocess.run(
        ["ray", "job", "stop", "--address", cluster[0], job],
        env=cluster[1],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    finished = next(trials.glob("*/checkpoints/checkpoint-0001/state.json")).stat().st_mtime_ns
    resumed = submit("ray_jobs/tune.py", "--storage", str(storage), "--resume", "sweep")
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert "| failed: " in resumed.stdout
    recorded = json.loads((storage / "sweep" / "results" / "trials.json").read_text())["trials"]
    assert sorted((trial["values"]["optim.lr"], trial["status"]) for trial in recorded) == [
        (0.01, "finished"), (1e30, "failed"),
    ]  # fmt: skip
    assert "not finite" in next(trial["error"] for trial in recorded if trial["status"] == "failed")
    assert finished in [path.stat().st_mtime_ns for path in trials.glob("*/checkpoints/checkpoint-0001/state.json")]
    assert load_config(storage / "sweep" / "results" / "best_config.json").optim.lr == 0.01
    client = client_of(f"sqlite:///{storage / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = [run for run in runs if run.info.run_name == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 3
    assert sorted((float(run.data.params["optim.lr"]), run.info.status) for run in children) == [
        (0.01, "FINISHED"), (1e30, "FAILED"),
    ]  # fmt: skip
    assert parent.info.status == "FINISHED"


def wait_until(ready: Callable[[], bool], *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.5)
