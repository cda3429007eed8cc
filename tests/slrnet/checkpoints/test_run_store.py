"""Runs in an object store, against a real S3 server on loopback: whole checkpoints, in order, or none."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

import slrnet
from slrnet.checkpoints.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    load_whole,
    prune_checkpoints,
    save_checkpoint,
)
from slrnet.checkpoints.run_store import STATE, RunStore, local_run, run_folder
from slrnet.cli.arguments import run_argument
from slrnet.config import Config, apply_overrides
from slrnet.launch import train as ray_loop
from slrnet.launch.checks import resume_config
from slrnet.launch.train import LaunchOptions, RunResult, TrainingError, launch
from slrnet.storage.folders import MARK
from slrnet.storage.remote import RemoteError, cached

PLACE = "s3://runs/all/mine"
CHECKPOINTS = "runs/all/mine/checkpoints"


def save(folder: Path, epoch: int, score: float | None = None) -> Path:
    state = TrainState(
        epoch=epoch,
        step=10 * epoch,
        classes=("background",),
        data_fingerprint="",
        world_size=1,
        metrics={} if score is None else {"val/miou_ss": score},
    )
    model = {"a": torch.full((4,), float(epoch))}
    return save_checkpoint(folder / "checkpoints", config=Config(), state=state, model=model, optimizer={})


def stored(system: Any, place: str = CHECKPOINTS) -> set[str]:
    selector = fs.FileSelector(place, recursive=True, allow_not_found=True)
    listed = system.get_file_info(selector)
    return {info.path.removeprefix(f"{place}/") for info in listed if info.type == fs.FileType.File}


@pytest.fixture
def run(s3: Any, tmp_path: Path) -> RunStore:
    """A run's place in an empty bucket, its folder still missing."""
    s3.create_dir("runs")
    return RunStore(PLACE, tmp_path / "node" / "mine", rank=0)


FILES = ("model.safetensors", "trainer.pt", "config.json", STATE)


def test_what_is_written_arrives_and_comes_back_elsewhere(run: RunStore, s3: Any, tmp_path: Path) -> None:
    for epoch in (1, 2):
        save(run.folder, epoch)
    (run.folder / "logs").mkdir()
    (run.folder / "logs" / "rank-0.jsonl").write_text("mine\n")
    (run.folder / "logs" / "rank-1.jsonl").write_text("another rank's\n")
    (run.folder / "config.json").write_text("{}")
    run.upload()
    assert stored(s3) == {f"checkpoint-000{epoch}/{name}" for epoch in (1, 2) for name in FILES}
    assert stored(s3, "runs/all/mine/logs") == {"rank-0.jsonl"}
    other = RunStore(PLACE, tmp_path / "other" / "mine")
    other.fetch()
    for name in ("checkpoints/checkpoint-0002/model.safetensors", "logs/rank-0.jsonl", "config.json"):
        assert (other.folder / name).read_bytes() == (run.folder / name).read_bytes()
    assert load_checkpoint(other.folder / "checkpoints" / "checkpoint-0002").state.step == 20


def test_a_half_uploaded_checkpoint_is_none(run: RunStore, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run.folder, 1)
    run.upload()
    save(run.folder, 2)
    real = RunStore._put

    def lose(store: RunStore, path: Path) -> None:
        if path.name == STATE:
            raise OSError("connection lost")
        real(store, path)

    monkeypatch.setattr(RunStore, "_put", lose)
    with pytest.raises(OSError, match="connection lost"):
        run.upload()
    assert {f"checkpoint-0002/{name}" for name in FILES[:3]} < stored(s3)
    assert run.checkpoints() == ["checkpoint-0001"]
    monkeypatch.undo()


def test_a_checkpoint_written_again_is_none_until_it_is_whole(
    run: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(run.folder, 1)
    run.upload()
    save(run.folder, 1, score=0.5)
    real, refused = RunStore._put, ["trainer.pt"]

    def lose(store: RunStore, path: Path) -> None:
        if path.name in refused:
            raise OSError("connection lost")
        real(store, path)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "_put", lose)
        with pytest.raises(OSError, match="connection lost"):
            run.upload()
        assert run.checkpoints() == []
        refused.clear()
        run.upload()
    assert run.checkpoints() == ["checkpoint-0001"]
    other = RunStore(PLACE, tmp_path / "other" / "mine")
    other.fetch()
    assert load_checkpoint(other.folder).state.metrics == {"val/miou_ss": 0.5}


def test_what_was_pruned_goes_from_the_store_and_the_best_stays(run: RunStore, s3: Any) -> None:
    for epoch, score in enumerate((0.9, 0.1, 0.2, 0.3), start=1):
        save(run.folder, epoch, score)
        prune_checkpoints(run.folder / "checkpoints")
        run.upload()
    assert run.checkpoints() == ["checkpoint-0001", "checkpoint-0003", "checkpoint-0004"]
    assert {place.partition("/")[0] for place in stored(s3)} == set(run.checkpoints())


def test_nothing_is_uploaded_twice(run: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(run.folder, 1)
    run.upload()
    other = RunStore(PLACE, tmp_path / "other" / "mine", rank=0)
    other.fetch()
    (other.folder / "logs").mkdir()
    (other.folder / "logs" / "rank-0.jsonl").write_text("new\n")
    put: list[str] = []
    monkeypatch.setattr(RunStore, "_put", lambda store, path: put.append(path.name))
    run.upload()
    other.upload()
    other.upload()
    assert put == ["rank-0.jsonl"]


def test_the_store_counts_not_what_a_node_has(run: RunStore, tmp_path: Path) -> None:
    """A node whose last checkpoint was not uploaded, or is of a deleted run, must not go on from it alone."""
    save(run.folder, 1)
    run.upload()
    node = RunStore(PLACE, tmp_path / "other" / "mine")
    save(node.folder, 1, score=0.7)
    save(node.folder, 5)
    node.fetch()
    last = find_checkpoint(node.folder / "checkpoints")
    assert last is not None
    assert (last.name, load_checkpoint(last).state.metrics) == ("checkpoint-0001", {})


def test_one_that_is_damaged_in_the_store_is_passed_over(run: RunStore, s3: Any, tmp_path: Path) -> None:
    for epoch in (1, 2):
        save(run.folder, epoch)
    run.upload()
    with s3.open_output_stream(f"{CHECKPOINTS}/checkpoint-0002/model.safetensors") as file:
        file.write(b"junk")
    other = RunStore(PLACE, tmp_path / "other" / "mine")
    other.fetch()
    last = load_whole(other.folder / "checkpoints")
    assert last is not None
    assert last.path.name == "checkpoint-0001"


def test_names_that_are_none_of_ours_stay_in_the_store(run: RunStore, s3: Any, tmp_path: Path) -> None:
    save(run.folder, 1)
    run.upload()
    for place in ("logs/..%2Fx", "logs/rank-0.jsonl.exe", "checkpoints/x/state.json", "checkpoints/checkpoint-0001/x"):
        with s3.open_output_stream(f"runs/all/mine/{place}") as file:
            file.write(b"x")
    other = RunStore(PLACE, tmp_path / "other" / "mine")
    other.fetch()
    files = {path.name for path in (tmp_path / "other").rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert files == {*FILES, MARK}


def test_the_longer_log_is_kept(run: RunStore, tmp_path: Path) -> None:
    log = run.folder / "logs" / "rank-0.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\n")
    run.upload()
    for own, expected in (("one\n", "one\ntwo\n"), ("one\ntwo\nthree\n", "one\ntwo\nthree\n")):
        log.write_text(own)
        run.fetch_logs()
        assert log.read_text() == expected


def test_the_writer_uploads_beside_the_training_and_tries_again(
    run: RunStore, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([True, True])
    real = RunStore._put

    def put(store: RunStore, path: Path) -> None:
        if next(failures, False):
            raise OSError("SLOW_DOWN")
        real(store, path)

    monkeypatch.setattr(RunStore, "_put", put)
    monkeypatch.setattr("slrnet.checkpoints.checkpoint.FIRST_PAUSE", 0.01)
    writer = CheckpointWriter(run.folder / "checkpoints", Config(), upload=run.upload)
    state = TrainState(epoch=1, step=2, classes=("background",), data_fingerprint="", world_size=1)
    writer.save(state, model={"a": torch.zeros(2)}, optimizer={})
    writer.wait()
    assert run.checkpoints() == ["checkpoint-0001"]
    monkeypatch.setattr(RunStore, "_put", lambda store, path: (_ for _ in ()).throw(OSError("gone")))
    impatient = CheckpointWriter(run.folder / "checkpoints", Config(), upload=run.upload, patience=0)
    impatient.save(state, model={"a": torch.ones(2)}, optimizer={})
    with pytest.raises(CheckpointError, match=r"the copy of .* could not be written to the run's storage for .* gone"):
        impatient.wait()
    for each in (writer, impatient):
        each.close()


@pytest.mark.parametrize(("best", "kept"), [(True, ["checkpoint-0001"]), (False, [])])
def test_only_the_best_checkpoint_is_kept_or_none(best: bool, kept: list[str], run: RunStore) -> None:
    for epoch, score in ((1, 0.9), (2, 0.1)):
        save(run.folder, epoch, score)
    run.upload()
    run.keep(best=best)
    assert run.checkpoints() == kept == [path.name for path in (run.folder / "checkpoints").iterdir()]
    sizes = [(run.folder / "checkpoints" / name / file).stat().st_size for name in kept for file in FILES]
    assert run.checkpoint_bytes() == sum(sizes)


def test_a_folder_of_the_run_is_removed_from_the_store_and_no_other(run: RunStore, s3: Any) -> None:
    for place in ("runs/all/mine/tune/a/b", "runs/all/mine/kept", "runs/all/other/tune"):
        with s3.open_output_stream(place) as file:
            file.write(b"x")
    run.remove("tune")
    run.remove("missing")
    assert stored(s3, "runs/all") == {"mine/kept", "other/tune"}
    with pytest.raises(ValueError, match="is no name"):
        run.remove("..")


class TestReading:
    def test_a_run_or_a_checkpoint_is_copied_to_the_cache(self, run: RunStore) -> None:
        save(run.folder, 1, 0.9)
        save(run.folder, 2, 0.1)
        run.upload()
        assert load_checkpoint(local_run(PLACE)).state.epoch == 1  # the best
        assert load_checkpoint(run_argument(f"{PLACE}/checkpoints/checkpoint-0002/")).state.epoch == 2
        assert cached(PLACE) in local_run(PLACE).parents
        assert run_argument("~/runs/x") == Path("~/runs/x").expanduser()

    def test_a_checkpoint_that_was_replaced_is_copied_again(self, run: RunStore) -> None:
        for score in (0.1, 0.2):
            save(run.folder, 1, score)
            run.upload()
            assert load_checkpoint(local_run(PLACE)).state.metrics == {"val/miou_ss": score}

    def test_what_is_not_there_is_said(self, run: RunStore) -> None:
        with pytest.raises(RemoteError, match="s3://runs/all/mine holds no checkpoint"):
            local_run(PLACE)
        with pytest.raises(RemoteError, match=r"checkpoint-0001/state\.json does not exist"):
            local_run(f"{PLACE}/checkpoints/checkpoint-0001")
        with pytest.raises(argparse.ArgumentTypeError, match="holds no checkpoint"):
            run_argument(PLACE)

    def test_a_store_that_refuses_is_said(self, run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(source: str) -> Any:
            raise OSError("AWS Error ACCESS_DENIED")

        monkeypatch.setattr("slrnet.storage.remote.filesystem_of", refuse)
        with pytest.raises(RemoteError, match="ACCESS_DENIED; check credentials"):
            local_run(PLACE)


def start(config: Config, storage: Path, *changes: str, resume: bool = False) -> RunResult:
    config = apply_overrides(config, [f"tracking.uri=sqlite:///{storage / 'mlflow.db'}", *changes])
    options = LaunchOptions(
        name="mine", storage=run_folder(PLACE).parent, remote="s3://runs/all", resume=resume, num_workers=0
    )
    return launch(config, options, say=lambda line: None)


@pytest.mark.slow
def test_a_run_stays_in_a_bucket_and_goes_on_where_nothing_is_left_of_it(
    run: RunStore, s3: Any, tiny_config: Config, tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tiny_config, storage, "train.epochs=1", "train.pretrain_epochs=0")
    assert run.checkpoints() == ["checkpoint-0001"]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RemoteError, match="run s3://runs/all/mine exists; continue that run with --resume mine"):
        start(tiny_config, storage)
    config = resume_config(run_folder(PLACE).parent, "mine", remote="s3://runs/all")
    assert config.train.epochs == 1
    shutil.rmtree(tmp_path / "cache")
    second = start(config, storage, "train.epochs=2", resume=True)
    assert (first.state.step, second.state.step, second.run.run_id) == (2, 4, first.run.run_id)
    assert run.checkpoints() == ["checkpoint-0001", "checkpoint-0002"]
    assert stored(s3, "runs/all/mine/logs") == {"rank-0.jsonl"}
    assert stored(s3, "runs/all/mine/panels")
    lines = [json.loads(line) for line in (run_folder(PLACE) / "logs" / "rank-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "start"] == [0, 2]
    shutil.rmtree(tmp_path / "cache")
    assert slrnet.load(PLACE).classes == second.state.classes

    def fail(*arguments: Any, **options: Any) -> None:
        shutil.rmtree(tmp_path / "cache")  # the workers' nodes are others
        raise RuntimeError("lost")

    monkeypatch.setattr(ray_loop, "run_job", fail)
    with pytest.raises(TrainingError, match="RuntimeError: lost"):
        start(config, storage, resume=True)
    assert (run_folder(PLACE) / "logs" / "rank-0.jsonl").is_file()


def test_without_a_tracking_server_the_run_is_refused(
    run: RunStore, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = LaunchOptions(name="mine", storage=run_folder(PLACE).parent, remote="s3://runs/all", num_workers=0)
    with pytest.raises(ValueError, match="start `mlflow server`"):
        launch(tiny_config, options, say=lambda line: None)
    assert run.checkpoints() == []
