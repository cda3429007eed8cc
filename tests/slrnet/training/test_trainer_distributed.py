"""Two gloo processes against one: gradients, counts, errors, and whole trainings.

This file is also the program that the two processes run; all that they do is done in one go, as starting them is what
takes the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.config import Config, apply_overrides, load_config
from slrnet.data.batch import Batch
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.distributed.process import (
    Process,
    configure_process,
    current_process,
    gather_over_ranks,
    share_buffers,
    sum_over_ranks,
)
from slrnet.evaluation.masks import Quality, evaluate_masks, quality_metrics
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.inference.forward import Inference
from slrnet.launch.rank import HANG_EXIT_CODE, Report, train_rank
from slrnet.tracking.mlflow import client_of, create_run
from slrnet.tracking.protocol import NullTracker, RunHandle
from slrnet.tracking.run_log import find_failure
from slrnet.training import trainer as trainer_module
from slrnet.training.listener import Listener, RunListener
from slrnet.training.step import find_pseudo_rows, step_generator, step_losses
from slrnet.training.trainer import NonFiniteLossError, Trainer

pytestmark = pytest.mark.slow  # the two processes train

WORLD = 2
ROOT = Path(__file__).resolve().parents[3]
SETTINGS = ("wsss", "sss_image_labels", "sss")
SEMI = ["data.pixel_labeled_subset=pixels", "weights.pixel_labels=1.5"]
STILL = ["model.dropout=0", "model.gate_rate=0"]
"""Without the draws that belong to ranks."""


# --- what each of the two processes does ------------------------------------------------------------------------------


class _Log(NullTracker):
    """Names of the pictures that are logged."""

    def __init__(self) -> None:
        self.pictures: list[str] = []

    def log_image(self, key: str, image: Any, step: int) -> None:
        self.pictures.append(key)


def _process(folder: Path, rank: int) -> None:
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=5))
    config = load_config(folder / "config.json")
    shards = load_dataset(config.data.path)
    process = current_process(torch.device("cpu"))
    results = {
        "ranks": (process.rank, process.world_size, process.is_main),
        "sums": _sums(process),
        "gradients": {setting: _gradients(_semi(config, setting), shards, process) for setting in SETTINGS},
        "same": {
            name: _same_training(_exact(config, name), shards, process, folder / name, until=1) for name in SETTINGS
        },
        "error": _error(config, shards, process, folder),
        "within": _resumed_within_an_epoch(config, shards, process, folder),
        "training": _training(config, shards, process, folder),
    }
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _hanging_process(folder: Path, rank: int) -> None:
    """A training as Ray's workers run it; rank 1 never comes back from its third step."""
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=5))
    real = trainer_module.step_losses
    steps = iter(range(9))

    def hang(*arguments: Any, **named: Any) -> Any:
        if next(steps) == 2 and rank == 1:  # in its second step torch compares buckets on the way forward
            time.sleep(600)
        return real(*arguments, **named)

    trainer_module.step_losses = hang
    values = json.loads((folder / "values.json").read_text())
    handle = RunHandle(**values["handle"])
    if rank == 0:  # importing MLflow and opening the store take seconds, in which the watchdog must not count
        client_of(handle.uri).get_run(handle.run_id)
    train_rank(values | {"handle": handle}, current_process(torch.device("cpu")), Report())


def _sums(process: Process) -> dict[str, Any]:
    own = torch.tensor([1.0 + process.rank, 10.0])
    matrix = _matrix(process.rank)
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean = torch.full((2,), 1.0 + process.rank)
    share_buffers(norm, process)
    return {
        "sum": sum_over_ranks(own, process),
        "own": own,
        "counts": Quality.over_ranks(matrix, "ss", 0, process).matrix.counts,
        "own counts": matrix.counts,
        "mean": norm.running_mean,
        "gathered": gather_over_ranks({"rank": process.rank}, process),
    }


def _matrix(rank: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(2)
    # 2**53 + 1 is no float64: counts must be added as integers.
    matrix.counts = torch.tensor([[2**53, 1 + rank, 0], [rank, 0, 5]])
    return matrix


def _semi(config: Config, setting: str) -> Config:
    return apply_overrides(config, () if setting == "wsss" else [*SEMI, f"setting={setting}"])


def _gradients(config: Config, shards: ShardSet, process: Process) -> dict[str, Tensor]:
    """Gradients of this rank's half of eight images, through the trainer's own wrapping."""
    config = apply_overrides(config, [*STILL, "train.batch_size=8"])
    trainer = Trainer(config, shards, process=process, folder=Path("unused"))
    share = slice(4 * process.rank, 4 * process.rank + 4) if process.world_size > 1 else slice(0, 8)
    batch = _eight(shards, config.setting).part(share)
    trainer.wrapped.train()
    if config.setting == "sss":  # else one class claims all of an image
        generator = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(trainer.model.mask_head.classify.weight, generator=generator)
    result = step_losses(
        trainer.wrapped,
        batch,
        config=config,
        encoder=trainer.model.encoder,
        generator=step_generator(3),
        pseudo_rows=find_pseudo_rows(batch),
        first=share.start,
    )
    result.total.backward()
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    return gradients | {f"part {name}": part.detach() for name, part in result.parts.items()}


def _same_training(
    config: Config, shards: ShardSet, process: Process, run: Path, *, until: int | None = None
) -> dict[str, Any]:
    """Losses of each step, last weights and score of a training, or of the rest of one."""
    losses: list[float] = []

    class Losses(Listener):
        def step(self, done: int, parts: Mapping[str, float], **_: Any) -> None:
            losses.append(parts["loss"])

    trainer = Trainer(config, shards, process=process, folder=run, listener=Losses())
    trainer.resume()
    reports: list[Mapping[str, float]] = []
    trainer.fit(report=reports.append, until=until)
    return {"losses": losses, "weights": trainer.model.state_dict(), "miou": reports[-1].get("val/miou_ss")}


def _exact(config: Config, setting: str) -> Config:
    """Two epochs of three steps in float64, with three images a step: one on rank 0 of two and two on rank 1."""
    texts = [
        "train.pretrain_epochs=0",
        "train.batch_size=3",
        "train.precision=fp64",
        "data.pixel_oversampling=1",
        *STILL,
    ]
    texts += ["weights.pixel_mean=1.0", "evaluation.every=2", "evaluation.pseudo_mask_images=0"]
    return apply_overrides(_semi(config, setting), texts)


def _resumed_within_an_epoch(config: Config, shards: ShardSet, process: Process, folder: Path) -> dict[str, Any]:
    """Two epochs of two steps, and the same stopped after the third step and resumed; labels from the average."""
    average = ["train.ema=0.9", "calibration.source=ema", "model.freeze_batch_norm=false"]
    config = apply_overrides(config, ["train.checkpoint_every=3", "evaluation.pseudo_mask_images=0", *average])
    results: dict[str, Any] = {}
    for name, steps in (("whole", 9), ("stopped", 3), ("resumed", 9)):
        run = folder / ("whole" if name == "whole" else "within")
        trainer = Trainer(config, shards, process=process, folder=run)
        trainer.resume()
        told = iter([""] * steps)
        reports: list[dict[str, float]] = []
        with suppress(StopIteration):
            trainer.fit(report=lambda metrics: reports.append(dict(metrics)), notice=lambda: next(told))  # noqa: B023
        dist.barrier()
        state = {
            network: model.state_dict() for network, model in (("own", trainer.model), ("mean", trainer.evaluated))
        }
        weights = {f"{network}.{key}": value for network, of in state.items() for key, value in of.items()}
        results |= {name: weights, f"{name} steps": trainer.state.step, f"{name} epochs": reports}
    return results


def _eight(shards: ShardSet, setting: str) -> Batch:
    """Eight images; where masks are granted, to the second rank's four alone, so that each rank lacks a kind."""
    samples = list(EvalLoader(shards, split="train"))[:8]
    masks = [torch.full((64, 64), IGNORE_INDEX, dtype=torch.uint8)] * 4
    masks += [_sized(sample.pixel_labels[None])[0] for sample in samples[4:]]  # type: ignore[index]
    return Batch(
        images=torch.stack([_sized(sample.image) for sample in samples]),
        image_labels=torch.stack([sample.image_labels for sample in samples]) * (setting != "sss"),
        has_image_labels=torch.tensor([setting != "sss"] * 8),
        keys=tuple(sample.key for sample in samples),
        has_pixel_labels=torch.tensor([i >= 4 and setting != "wsss" for i in range(8)]),
        pixel_labels=None if setting == "wsss" else torch.stack(masks),
    )


def _sized(maps: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(maps[None].float(), size=(64, 64))[0].to(torch.uint8)


def _error(config: Config, shards: ShardSet, process: Process, folder: Path) -> dict[str, Any]:
    """Rank 1 alone gets a loss that is not finite, as batch norms of its own do not hand it on."""
    config = apply_overrides(config, ["model.sync_batch_norm=false"])
    trainer = Trainer(config, shards, process=process, folder=folder / "error")
    if process.rank == 1:
        trainer.model.encoder._std.zero_()
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    try:
        trainer.fit(report=lambda metrics: None)
        message = "none"
    except NonFiniteLossError as error:
        message = str(error)
    same = all(old.equal(new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    return {"message": message, "weights are as before": same}


def _training(config: Config, shards: ShardSet, process: Process, folder: Path) -> dict[str, Any]:
    """A training of two epochs, and its resumption for a third one."""
    log = _Log()
    reports: list[dict[str, float]] = []
    for epochs in (2, 3):
        longer = apply_overrides(config, [f"train.epochs={epochs}"])
        listener = RunListener(longer, shards.info, process=process, folder=folder / "run", tracker=log)
        trainer = Trainer(longer, shards, process=process, folder=folder / "run", listener=listener)
        torch.nn.init.constant_(trainer.model.mask_head.classify.bias, 1.2)  # else all is predicted as background
        resumed = trainer.resume()
        trainer.fit(report=lambda metrics: reports.append(dict(metrics)))
        dist.barrier()
    return {"reports": reports, "pictures": log.pictures, "weights": trainer.model.state_dict(), "resumed": resumed}


# --- what the test process compares -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    # Four pictures of four images: two of them are on rank 1.
    return apply_overrides(tiny_config, ["evaluation.pseudo_mask_images=4", "evaluation.panel_images=4"])


def run_both(folder: Path, mode: str) -> tuple[list[int], list[str]]:
    """Runs the two processes to their ends; returns their exit codes and what they printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, mode, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


@pytest.fixture(scope="module")
def folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the two processes; their results lie in the folder."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "config.json").write_text(config.to_json())
    codes, printed = run_both(folder, "all")
    assert codes == [0] * WORLD, "\n".join(printed)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_each_process_knows_its_place(results: list[dict[str, Any]]) -> None:
    assert [result["ranks"] for result in results] == [(0, 2, True), (1, 2, False)]


def test_sums_and_counts_are_those_of_all_and_the_own_ones_stay(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        sums = result["sums"]
        assert sums["sum"].tolist() == [3.0, 20.0]
        assert sums["own"].tolist() == [1.0 + rank, 10.0]
        assert sums["counts"].tolist() == [[2**54, 3, 0], [1, 0, 10]]
        assert sums["own counts"].equal(_matrix(rank).counts)
        assert sums["mean"].tolist() == [1.0, 1.0]
        assert sums["gathered"] == [{"rank": 0}, {"rank": 1}]


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_are_those_of_the_joined_batch(
    results: list[dict[str, Any]], config: Config, tiny_data: ShardSet, setting: str
) -> None:
    joined = _gradients(_semi(config, setting), tiny_data, Process())
    assert joined["part segmentation"] > 0
    assert ("part pixel_segmentation" in joined) == (setting != "wsss")
    assert ("part classification" in joined) == (setting != "sss")
    weights = [name for name in joined if not name.startswith("part ")]
    assert len(weights) > 50
    assert "cvlr.project_in.weight" in weights
    largest = max(float(joined[name].abs().max()) for name in weights)
    assert largest > 0.01
    first, second = (result["gradients"][setting] for result in results)
    if setting != "wsss":
        assert first["part pixel_segmentation"] == second["part segmentation"] == 0
    for name in weights:
        assert first[name].equal(second[name]), name
        torch.testing.assert_close(first[name], joined[name], rtol=1e-5, atol=1e-6 * max(1.0, largest), msg=name)
    for name in set(joined) - set(weights):
        torch.testing.assert_close((first[name] + second[name]) / 2, joined[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_number_of_workers_trains_the_same(
    results: list[dict[str, Any]], folder: Path, config: Config, tiny_data: ShardSet, setting: str
) -> None:
    """Two workers with uneven shares, then one, against one: in float64, where rounding moves no value over a kink."""
    exact = _exact(config, setting)
    alone = _same_training(exact, tiny_data, Process(), folder / f"{setting}-alone")
    continued = _same_training(exact, tiny_data, Process(), folder / setting)
    losses = results[0]["same"][setting]["losses"] + continued["losses"]
    assert len(losses) == 6
    assert losses == pytest.approx(alone["losses"], rel=1e-10)
    assert continued["miou"] == alone["miou"]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(continued["weights"][name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_a_training_stopped_within_an_epoch_goes_on_to_the_bit(results: list[dict[str, Any]]) -> None:
    for runs in (result["within"] for result in results):
        assert [runs[f"{name} steps"] for name in ("whole", "stopped", "resumed")] == [4, 3, 4]
        assert all(runs["whole"][name].equal(runs["resumed"][name]) for name in runs["whole"])
        whole, resumed = runs["whole epochs"][1:], runs["resumed epochs"]
        assert len(whole) == len(resumed) == 1
        losses = [name for name in whole[0] if name.startswith("train/epoch_loss")]
        assert losses
        assert [whole[0][name] for name in losses] == [resumed[0][name] for name in losses]
    first, second = (result["within"]["whole"] for result in results)
    assert all(first[name].equal(second[name]) for name in first)  # buffers too


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_names_it(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        message = result["error"]["message"]
        assert message.startswith(f"step 0: the loss is not finite on rank 1 (rank {rank} has loss ")
        assert ("loss nan" in message) == (rank == 1)
        assert result["error"]["weights are as before"]


def test_a_rank_that_hangs_ends_both_and_is_named(config: Config, tmp_path: Path) -> None:
    handle = create_run(f"sqlite:///{tmp_path / 'a.db'}", "e", "run", params={}, tags={}, resume=False)
    values = {"config": config.model_dump(mode="json"), "folder": str(tmp_path / "run"), "hang_limit": 10.0}
    values |= {"location": "", "until": None}
    (tmp_path / "values.json").write_text(json.dumps(values | {"handle": asdict(handle)}))
    (waiting, hanging), printed = run_both(tmp_path, "hang")
    assert hanging == HANG_EXIT_CODE, printed[1]
    assert waiting in (hanging, 1)  # 1: it noticed first that the other one is gone
    failure = find_failure(tmp_path / "run", since=0)
    assert failure is not None
    assert (failure.rank, failure.step, failure.exception) == (1, 2, "hang")
    assert "rank 1 on" in failure.message
    assert "hangs while going forward in step 2" in failure.message
    assert "time.sleep" in printed[1] or "in hang" in printed[1]  # the stack of the thread that hangs


class TestTraining:
    def test_both_end_with_the_same_weights_and_buffers(self, results: list[dict[str, Any]]) -> None:
        first, second = (result["training"]["weights"] for result in results)
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)
        assert [result["training"]["resumed"] for result in results] == [True, True]

    def test_both_report_the_same_figures(self, results: list[dict[str, Any]]) -> None:
        first, second = (result["training"]["reports"] for result in results)
        assert len(first) == 3
        assert str(first) == str(second)  # NaN equals NaN here
        assert [report["val/images"] for report in first] == [5, 5, 5]
        assert [report["pseudo_mask/images"] for report in first] == [4, 4, 4]

    def test_what_was_measured_is_what_the_checkpoint_gives_in_one_process(
        self, folder: Path, results: list[dict[str, Any]], config: Config, tiny_data: ShardSet, tmp_path: Path
    ) -> None:
        checkpoint = load_checkpoint(folder / "run" / "checkpoints" / "checkpoint-0003")
        assert checkpoint.state.world_size == 2
        trainer = Trainer(config, tiny_data, process=Process(), folder=tmp_path)
        trainer.model.load_state_dict(checkpoint.model)
        samples = EvalLoader(tiny_data, split="val")
        quality = evaluate_masks(Inference(trainer.model.eval(), config), samples, process=Process())
        figures = quality_metrics("val", quality, tiny_data.info.classes)
        assert len({value for name, value in figures.items() if name.startswith("val/iou/")}) > 1
        reported = results[0]["training"]["reports"][-1]
        # Rounding may turn a pixel where two classes are nearly equal: processes and threads share the work otherwise.
        assert reported["val/miou_ss"] == pytest.approx(figures.pop("val/miou"), abs=1e-3)
        assert {name: reported[name] for name in figures} == pytest.approx(figures, abs=1e-3)

    def test_pictures_of_both_are_logged_by_the_first(self, folder: Path, results: list[dict[str, Any]]) -> None:
        first, second = (result["training"]["pictures"] for result in results)
        assert second == []
        files = {path.name for path in (folder / "run" / "panels").iterdir()}
        shown = [key for key in first if key.startswith("samples/")]
        assert len(files) == len(shown) == 4 * 3
        assert {f"samples/{name.split('-epoch-')[0]}" for name in files} == set(shown)

    def test_only_the_first_writes_checkpoints(self, folder: Path) -> None:
        state = json.loads((folder / "run" / "checkpoints" / "checkpoint-0003" / "state.json").read_text())
        assert (state["epoch"], state["step"], state["world_size"]) == (3, 6, 2)


class TestAlone:
    def test_a_process_without_group_is_the_only_one(self) -> None:
        process = current_process(torch.device("cpu"))
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        values = torch.tensor([2.5])
        assert sum_over_ranks(values, process).tolist() == [2.5]
        assert gather_over_ranks("own", process) == ["own"]
        assert Quality.over_ranks(_matrix(0), "ss", 0, process).matrix.counts.equal(_matrix(0).counts)

    @pytest.mark.parametrize(
        ("variable", "threads", "expected"), [(None, 3, [3]), (None, 0, [1]), (None, None, []), ("2", 3, [])]
    )
    def test_threads_are_the_share_of_the_cores_unless_the_environment_says_otherwise(
        self, monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int | None, expected: list[int]
    ) -> None:
        called: list[int] = []
        flushed: list[bool] = []
        monkeypatch.setattr(torch, "set_num_threads", called.append)
        monkeypatch.setattr(torch, "set_flush_denormal", flushed.append)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        configure_process(threads)
        assert called == expected
        assert flushed == [True]


if __name__ == "__main__":
    try:
        {"all": _process, "hang": _hanging_process}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other process may be waiting in a collective: do not wait for it
