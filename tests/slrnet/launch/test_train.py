from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import slrnet
from slrnet.checkpoints.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from slrnet.config import Config, apply_overrides
from slrnet.data.manifest import ShardSet
from slrnet.launch import train as ray_loop
from slrnet.launch.checks import resume_config
from slrnet.launch.cluster import WorkerPlan
from slrnet.launch.train import POINTER, LaunchOptions, RunResult, TrainingError, launch, train_trial
from slrnet.storage.files import read_json
from slrnet.tracking.mlflow import client_of
from slrnet.tracking.reader import metric_history
from slrnet.tracking.run_log import RunLog
from tests.fixtures.stores import Stock


def start(config: Config, storage: Path, *changes: str, name: str = "run", **options: Any) -> RunResult:
    """Trains in this process; the store is a SQLite file in `storage`."""
    chosen = LaunchOptions(name=name, storage=storage, **({"num_workers": 0} | options))
    return launch(apply_overrides(config, changes), chosen, say=lambda line: None)


def runs(storage: Path) -> list[Any]:
    client = client_of(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("slrnet")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def finished(tiny_config: Config, stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A finished run of one of two epochs, in a storage folder of its own; not to be changed."""
    storage = stock(tmp_path_factory.mktemp("storage"))
    return storage, start(tiny_config, storage)


def test_a_run_leaves_checkpoints_and_one_finished_mlflow_run(
    finished: tuple[Path, RunResult], tiny_data: ShardSet
) -> None:
    storage, result = finished
    assert load_checkpoint(result.last).state.epoch == 2
    assert result.state.run_id == result.run.run_id
    (run,) = runs(storage)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == "4"
    assert run.data.tags["slrnet.data_fingerprint"] == tiny_data.info.fingerprint
    assert run.data.tags["slrnet.world_size"] == "1"
    assert run.data.tags["slrnet.global_batch"] == "4"
    assert [step for step, _ in metric_history(result.run, "val/miou_ss")] == [2, 4]


def test_the_best_checkpoint_is_an_artifact(finished: tuple[Path, RunResult]) -> None:
    storage, result = finished
    client = client_of(f"sqlite:///{storage / 'mlflow.db'}")
    names = {Path(item.path).name for item in client.list_artifacts(result.run.run_id, "checkpoint")}
    assert names == {"model.safetensors", "trainer.pt", "state.json", "config.json"}


def test_python_hears_of_epochs_and_starts_from_an_earlier_run(
    finished: tuple[Path, RunResult], tiny_config: Config, storage: Path
) -> None:
    _, earlier = finished
    heard: list[float] = []

    def stop(figures: Mapping[str, float]) -> bool:
        heard.append(figures["epoch"])
        return True

    # At a rate of (almost) 0, the weights stay those that it starts from.
    settings = {"optim.lr": 1e-30, "train.epochs": 3, "optim.weight_decay": 0.0}
    run = slrnet.train(tiny_config, settings=settings, storage=storage, name="next", init=earlier.best, on_epoch=stop)
    assert heard == [1]
    last, first = load_checkpoint(run.last), load_checkpoint(earlier.best)
    assert (last.state.step, last.config.train.init) == (3, str(first.path))  # it ends after the step under way
    name = "mask_head.classify.weight"
    assert torch.equal(last.model[name], first.model[name])


def test_a_start_from_another_network_is_refused(
    finished: tuple[Path, RunResult], tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"another network .*: \d+ tensors differ, such as aspp"):
        start(tiny_config, tmp_path, f"train.init={finished[1].best}", "model.decoder_dim=9")
    assert not (tmp_path / "run").exists()


def test_a_name_is_used_once(finished: tuple[Path, RunResult], tiny_config: Config) -> None:
    storage, _ = finished
    with pytest.raises(ValueError, match="--resume run"):
        start(tiny_config, storage)


def test_resuming_continues_the_same_mlflow_run(
    finished: tuple[Path, RunResult], tiny_config: Config, tmp_path: Path
) -> None:
    storage, result = finished
    copy = tmp_path / "storage"
    shutil.copytree(storage, copy)
    again = start(resume_config(copy, "run"), copy, "train.epochs=3", resume=True)
    assert again.run.run_id == result.run.run_id
    assert len(runs(copy)) == 1
    assert load_checkpoint(again.last).state.epoch == 3
    assert [step for step, _ in metric_history(again.run, "val/miou_ss")] == [2, 4, 6]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    storage, result = finished
    copy = tmp_path / "storage"
    shutil.copytree(storage, copy)
    shutil.rmtree(copy / "run" / "checkpoints")
    again = start(resume_config(copy, "run"), copy, resume=True)
    assert again.run.run_id == result.run.run_id
    assert [step for step, _ in metric_history(again.run, "val/miou_ss")] == [2, 4]  # each step once


def test_resuming_needs_a_run_and_names_those_that_there_are(
    finished: tuple[Path, RunResult], tiny_config: Config
) -> None:
    storage, _ = finished
    with pytest.raises(ValueError, match=r"no run 'other' in .* runs there: run; start it with --name"):
        start(tiny_config, storage, name="other", resume=True)
    with pytest.raises(ValueError, match="no run 'other'"):
        resume_config(storage, "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.val_split=test", "'test', which a training is measured on; it has: .*data.val_split=NAME.*--val-frac"),
        (
            "data.train_split=trian",
            "'trian', which a training trains on; .*nearest one is 'train'.*data.train_split=NAME",
        ),
        ("data.path=/nowhere/at/all", "slrnet prepare"),
        ("data.train_subset=half", "no subset 'half'; it has: few, pixels"),
        ("setting=sss", "name the subset whose masks it may see in data.pixel_labeled_subset"),
        ("train.batch_size=64", "batch"),
        ("model.encoder_weights=/nowhere/weights.pth", "/nowhere/weights.pth"),
        ("tracking.uri=http://127.0.0.1:9", "does not answer"),
        ("tracking.uri=./mlruns", "sqlite"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny_config: Config, tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(tiny_config, tmp_path, change)
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert not (tmp_path / "mlflow.db").exists()


def test_no_space_for_checkpoints_is_refused(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"0 MiB free.*--storage"):
        start(tiny_config, tmp_path)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_killed_worker_that_ray_alone_has_noticed_is_named(
    tiny_config: Config, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray stops rank 0 before that notices that its peer is gone; the peer's end is two layers deep in Ray's error."""
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    def lose_worker(*arguments: Any, folder: Path, **options: Any) -> None:
        for rank in (0, 1):
            RunLog(folder, rank=rank).write("step", step=7)
        lost = WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())
        raise WorkerGroupError("[Rank 1 Error Snippet]", {1: lost})

    monkeypatch.setattr(ray_loop, "run_job", lose_worker)
    with pytest.raises(TrainingError, match=r"^died: its process ended without an error.*\(rank 1 on \S+, step 7\)$"):
        start(tiny_config, storage)
    (run,) = runs(storage)
    assert (run.data.tags["failure.rank"], run.data.tags["failure.exception"]) == ("1", "died")


def test_a_failed_training_is_marked_in_mlflow_with_its_cause(
    tiny_config: Config, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ArithmeticError("the loss is not finite")

    monkeypatch.setattr(ray_loop, "train_rank", fail)
    with pytest.raises(TrainingError, match="ArithmeticError: the loss is not finite"):
        start(tiny_config, storage)
    (run,) = runs(storage)
    assert run.info.status == "FAILED"
    assert "the loss is not finite" in run.data.tags["reason"]


def test_a_training_that_leaves_no_checkpoint_is_marked_as_failed(
    tiny_config: Config, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the folder of rank 0 is not the driver's."""
    monkeypatch.setattr(ray_loop, "train_rank", lambda values, process, report: None)
    with pytest.raises(TrainingError, match="is the folder shared by all nodes"):
        start(tiny_config, storage)
    (run,) = runs(storage)
    assert run.info.status == "FAILED"
    assert "without a checkpoint" in run.data.tags["reason"]


def test_a_start_says_what_is_trained_on_and_how_classes_are_balanced(
    tiny_config: Config, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_loop, "run_job", lambda *arguments, **options: None)
    said: list[str] = []
    changes = ["setting=sss_image_labels", "data.pixel_labeled_subset=pixels", "data.class_balance=1.0"]
    with pytest.raises(TrainingError, match="without a checkpoint"):
        launch(
            apply_overrides(tiny_config, changes),
            LaunchOptions(name="run", storage=storage, num_workers=0),
            say=said.append,
        )
    assert "setting sss_image_labels, training images: 4 with pixel labels, 5 with image labels; 25 draws" in said[0]
    assert said[1].splitlines()[0].split() == ["class", "images", "natural", "%", "target", "%", "expected", "%"]
    assert len(said[1].splitlines()) == 5


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token",
    "RAY_AUTH_TOKEN": "planted-ray-token",
}


def test_secrets_of_the_environment_reach_no_file_and_no_line(
    tiny_config: Config, storage: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="is given with a user"):
        start(tiny_config, storage, "tracking.uri=http://me:planted-password@127.0.0.1:5000")
    start(tiny_config, storage)
    written = {path: path.read_bytes() for path in storage.rglob("*") if path.is_file()}
    assert len(written) > 10
    assert any(path.name == "mlflow.db" for path in written)
    captured = capfd.readouterr()
    written[Path("printed")] = (captured.out + captured.err).encode()
    for secret in (*SECRETS.values(), "planted-password"):
        assert not [path for path, content in written.items() if secret.encode() in content]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_reports_to_ray_where_the_checkpoint_is(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own result keeps metrics only with a checkpoint; nothing of ours is copied into it."""
    told: list[Any] = []

    def report(metrics: dict[str, float], checkpoint: Any = None) -> None:
        told.append((metrics, checkpoint and read_json(Path(checkpoint.path) / POINTER)))

    monkeypatch.setattr("ray.train.report", report)
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: rank))
    mailbox, metrics = SimpleNamespace(tell=SimpleNamespace(remote=lambda metrics: None)), {"val/miou_ss": 0.5}
    place = "s3://runs/mine/checkpoints/checkpoint-0001"
    ray_loop._RayReport(None, mailbox)(metrics, checkpoint=place)
    assert told == [(metrics, None if rank else {"checkpoint": place, "metrics": metrics})]


def test_a_trial_with_nothing_left_to_train_gives_its_last_figures(tiny_config: Config, storage: Path) -> None:
    """As when its sweep was killed after its last epoch, and before Tune noted it; else the workers have reported."""
    config = apply_overrides(tiny_config, ["train.epochs=2", "train.pretrain_epochs=0"])
    parent = start(config, storage, "train.epochs=1", name="sweep").run
    options = LaunchOptions(name="trial", storage=storage, num_workers=0)
    rest: dict[str, Any] = {"parent": parent, "workers": WorkerPlan(least=0, most=0, cpus=1, gpu=False)}
    rest |= {"callbacks": [], "notes": {}, "tags": {}}
    assert train_trial(config, options, until=1, **rest) == {}
    assert train_trial(config, options, **rest) == {}
    figures = train_trial(config, options, **rest)
    last = find_checkpoint(storage / "trial" / "checkpoints")
    assert last is not None
    assert figures == {**load_checkpoint(last).state.metrics, "epoch": 2}
    assert "val/miou_ss" in figures
