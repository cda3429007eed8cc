"""The training loop: repeatable, resumable to the bit, with the curves, pictures and errors that it promises."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from slrnet.checkpoints.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from slrnet.config import Config, apply_overrides
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import evaluate_masks
from slrnet.inference.forward import Inference
from slrnet.training.listener import Listener
from slrnet.training.requests import Requests, Wish
from slrnet.training.step import find_pseudo_rows, step_generator, step_losses
from slrnet.training.trainer import NonFiniteLossError, Trainer, check_batch
from tests.fixtures.recording_tracker import RecordingTracker
from tests.fixtures.shards import shards_of
from tests.fixtures.training import make_trainer

Digest = Callable[[nn.Module | Mapping[str, Tensor]], str]
StartTrainer = Callable[..., Trainer]

PERFORMANCE = ("speed/images_per_second", "speed/data_wait_fraction")


def fit(trainer: Trainer) -> list[dict[str, float]]:
    """Trains and returns the figures of each epoch, but for those that depend on the clock."""
    reports: list[dict[str, float]] = []
    trainer.fit(report=lambda metrics: reports.append(dict(metrics)))
    return [{name: value for name, value in report.items() if name not in PERFORMANCE} for report in reports]


def same(first: Any, second: Any) -> bool:
    """Equality to the bit, through dictionaries and lists; NaN equals NaN."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second or (first != first and second != second))


@pytest.fixture
def quiet(tiny_config: Config) -> Config:
    """The tiny configuration measured as little as possible: at the end, without pseudo masks."""
    return apply_overrides(tiny_config, ["evaluation.every=9", "evaluation.pseudo_mask_images=0"])


@pytest.fixture
def measured(tiny_config: Config) -> Config:
    """The tiny configuration without panels, which take longer to draw than the epochs to train."""
    return apply_overrides(tiny_config, ["evaluation.panel_images=0"])


@dataclass(frozen=True)
class Trained:
    """What a finished training leaves, for reading alone."""

    trainer: Trainer
    first: str
    """Digest of the weights before the first step."""
    reports: list[dict[str, float]]
    tracker: RecordingTracker


@pytest.fixture(scope="module")
def trained(
    tiny_data: ShardSet, digest: Digest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Config], Trained]:
    """Trains a configuration to its end, each configuration once."""
    known: dict[Config, Trained] = {}

    def train(config: Config) -> Trained:
        if config not in known:
            tracker = RecordingTracker()
            trainer = make_trainer(config, tiny_data, tmp_path_factory.mktemp("trained"), tracker)
            known[config] = Trained(trainer, digest(trainer.model), fit(trainer), tracker)
        return known[config]

    return train


Train = Callable[[Config], Trained]


class TestDeterminism:
    def test_a_training_in_two_parts_is_the_same_to_the_bit(
        self, quiet: Config, trained: Train, start_trainer: StartTrainer, digest: Digest, tmp_path: Path
    ) -> None:
        whole = trained(quiet).trainer
        first = start_trainer(quiet, folder=tmp_path / "parts")
        assert first.fit(report=lambda metrics: None, until=1).epoch == 1
        second = start_trainer(quiet, folder=tmp_path / "parts")
        assert second.resume()
        assert second.fit(report=lambda metrics: None, until=99).epoch == quiet.train.epochs
        assert digest(second.model) == digest(whole.model)

    def test_the_same_seed_gives_the_same_weights_and_figures_to_the_bit(
        self, tiny_config: Config, trained: Train, start_trainer: StartTrainer, digest: Digest
    ) -> None:
        first, second = trained(tiny_config), start_trainer(tiny_config)
        torch.rand(7)  # what others draw from the global generator is of no influence
        assert same(first.reports, fit(second))
        assert digest(first.trainer.model) == digest(second.model)

    def test_another_seed_gives_other_weights(self, quiet: Config, trained: Train, digest: Digest) -> None:
        first, second = trained(quiet), trained(apply_overrides(quiet, ["train.seed=1"]))
        assert second.first != first.first
        assert digest(first.trainer.model) not in (first.first, digest(second.trainer.model))

    def test_measuring_does_not_influence_training(
        self, tiny_config: Config, quiet: Config, trained: Train, digest: Digest
    ) -> None:
        assert digest(trained(tiny_config).trainer.model) == digest(trained(quiet).trainer.model)

    def test_an_average_changes_what_is_measured_and_saved_but_not_the_training(
        self, quiet: Config, trained: Train, start_trainer: StartTrainer, digest: Digest
    ) -> None:
        plain, averaged = trained(quiet).trainer, start_trainer(apply_overrides(quiet, ["train.ema=0.9"]))
        figures = trained(quiet).reports[-1], fit(averaged)[-1]
        assert digest(plain.model) == digest(averaged.model)
        assert digest(load_checkpoint(averaged.folder).model) == digest(averaged.evaluated) != digest(plain.model)
        samples = EvalLoader(averaged.shards, split="val")
        quality = evaluate_masks(Inference(averaged.evaluated, averaged.config), samples, process=Process())
        assert figures[1]["val/miou_ss"] == quality.matrix.miou()


class _Asks(Requests):
    """Asks once, when it was looked at some times."""

    def __init__(self, wish: Wish, after: int) -> None:
        self.wish, self.after, self.answers = wish, after, list[int]()

    def asked(self) -> Wish:
        self.after -= 1
        return self.wish if self.after < 0 and not self.answers else ""

    def saved(self, step: int) -> None:
        self.answers.append(step)


ADAMW = ("optim.name=adamw", "optim.clip_norm=1", "optim.warmup_steps=5", "optim.layer_decay=0.7")


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", [(), ADAMW])
    def test_two_epochs_and_a_resumed_third_equal_three_to_the_bit(
        self,
        measured: Config,
        trained: Train,
        start_trainer: StartTrainer,
        tmp_path: Path,
        optimizer: tuple[str, ...],
    ) -> None:
        config = apply_overrides(measured, ["train.epochs=3", *optimizer])
        whole, expected = trained(config).trainer, trained(config).reports

        interrupted = start_trainer(config, folder=tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit(report=_interrupt_after(2))
        resumed = start_trainer(config, folder=tmp_path / "run")
        assert resumed.resume()
        assert resumed.state.epoch == 2
        assert same(fit(resumed), expected[2:])

        assert same(resumed.model.state_dict(), whole.model.state_dict())
        assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
        first, second = (load_checkpoint(trainer.folder) for trainer in (whole, resumed))
        assert same(_without_clock(first.state.metrics), _without_clock(second.state.metrics))
        assert (first.state.step, first.state.best_score) == (second.state.step, second.state.best_score)

    def test_float16_skips_steps_that_overflow_and_resumes_its_loss_scale_to_the_bit(
        self, quiet: Config, start_trainer: StartTrainer, tmp_path: Path
    ) -> None:
        config = apply_overrides(quiet, ["train.precision=fp16"])

        def start(name: str) -> Trainer:
            trainer = start_trainer(config, folder=tmp_path / name)
            options = {"init_scale": 2.0**40, "backoff_factor": 2.0**-12, "growth_interval": 2}
            trainer.scaler = torch.amp.GradScaler("cpu", **options)
            return trainer

        once = start("once")
        first = {name: tensor.detach().clone() for name, tensor in once.model.named_parameters()}
        scale = once._step(next(once.loader.epoch(0)), 0, pretraining=True)["loss_scale"]
        assert (scale, once.scaler.get_scale()) == (2.0**40, 2.0**28)
        assert same(dict(once.model.named_parameters()), first)

        whole, interrupted = start("whole"), start("run")
        expected = fit(whole)
        assert not same(dict(whole.model.named_parameters()), first)
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit(report=_interrupt_after(1))
        resumed = start_trainer(config, folder=tmp_path / "run")
        assert resumed.resume()
        assert same(fit(resumed), expected[1:])
        assert same(resumed.model.state_dict(), whole.model.state_dict())
        assert resumed.scaler.state_dict() == whole.scaler.state_dict()

    def test_float16_stops_where_no_scale_helps(self, quiet: Config, start_trainer: StartTrainer) -> None:
        trainer = start_trainer(apply_overrides(quiet, ["train.precision=fp16"]))
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
        with pytest.raises(NonFiniteLossError, match="not finite in float16 even at a loss scale below 1; the last"):
            trainer._step(next(trainer.loader.epoch(0)), 0, pretraining=True)

    def test_a_training_killed_within_an_epoch_goes_on_to_the_bit(
        self, measured: Config, trained: Train, start_trainer: StartTrainer, tmp_path: Path
    ) -> None:
        config = apply_overrides(measured, ["train.batch_size=2", "train.checkpoint_every=3"])  # 4 steps an epoch
        whole, expected, tracker = trained(config).trainer, trained(config).reports, trained(config).tracker

        interrupted = start_trainer(config, folder=tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit(report=lambda metrics: None, notice=_notices([""] * 6 + [KeyboardInterrupt]))
        continued = RecordingTracker()
        resumed = start_trainer(config, folder=tmp_path / "run", tracker=continued)
        assert resumed.resume()
        assert (resumed.state.epoch, resumed.state.step) == (1, 6)
        assert same(fit(resumed), expected[1:])  # the epoch's mean losses too

        assert same(resumed.model.state_dict(), whole.model.state_dict())
        assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
        assert continued.curve("train/loss") == tracker.curve("train/loss")[6:]

    @pytest.mark.slow
    def test_average_and_weights_both_go_on_to_the_bit(
        self, quiet: Config, start_trainer: StartTrainer, digest: Digest, tmp_path: Path
    ) -> None:
        """Batch norms train, so that labels from the average depend on its buffers too."""
        changes = ["train.ema=0.5", "calibration.source=ema", "model.freeze_batch_norm=false", "train.batch_size=2"]
        config = apply_overrides(quiet, [*changes, "train.checkpoint_every=3"])
        whole = start_trainer(config)
        expected = fit(whole)
        assert whole.average is not None
        assert digest(whole.average.model) != digest(whole.model)

        interrupted = start_trainer(config, folder=tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit(report=lambda metrics: None, notice=_notices([""] * 6 + [KeyboardInterrupt]))
        resumed = start_trainer(config, folder=tmp_path / "run")
        assert resumed.resume()
        assert resumed.state.step == 6
        assert same(fit(resumed), expected[1:])
        assert digest(resumed.model) == digest(whole.model)
        checkpoint = load_checkpoint(resumed.folder)
        assert checkpoint.trained is not None
        assert same(checkpoint.model, whole.average.model.state_dict())
        assert same(checkpoint.trained, whole.model.state_dict())

        for change, network in (("train.ema=0.9", "average"), ("train.ema=0", "model")):  # it may change, or end
            other = start_trainer(
                apply_overrides(config, ["calibration.source=training", change]), folder=resumed.folder
            )
            other.resume()
            assert digest(other.model) == digest(whole.model)
            assert digest(other.evaluated) == digest(whole.average.model if network == "average" else whole.model)

    def test_an_average_may_begin_with_a_resumption(
        self, quiet: Config, start_trainer: StartTrainer, digest: Digest, tmp_path: Path
    ) -> None:
        start_trainer(quiet, folder=tmp_path / "run").fit(report=lambda metrics: None, until=1)
        resumed = start_trainer(apply_overrides(quiet, ["train.ema=0.9"]), folder=tmp_path / "run")
        resumed.resume()
        assert digest(resumed.evaluated) == digest(resumed.model)

    def test_before_its_node_is_taken_away_it_saves(
        self, quiet: Config, start_trainer: StartTrainer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = apply_overrides(quiet, ["train.batch_size=1", "train.checkpoint_every=0", "train.epochs=2"])
        trainer = start_trainer(config)
        told = ["", "", "the node of rank 0 will be taken away in 30 s", KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(report=lambda metrics: None, notice=_notices(told))
        assert [path.name for path in (trainer.folder / "checkpoints").iterdir()] == ["checkpoint-0000-00000003"]
        assert "the node of rank 0 will be taken away in 30 s: saved after step 3" in capsys.readouterr().out

    @pytest.mark.parametrize("after", [1, 3, 4])
    @pytest.mark.slow
    def test_asked_to_stop_it_saves_and_returns_and_goes_on_to_the_bit(
        self, measured: Config, trained: Train, start_trainer: StartTrainer, tmp_path: Path, after: int
    ) -> None:
        """Within an epoch, in the last step of one (4), and while measuring."""
        config = apply_overrides(measured, ["train.batch_size=2"])  # 4 steps an epoch
        whole, expected = trained(config).trainer, trained(config).reports
        stopped = start_trainer(config, folder=tmp_path / "run")
        requests = _Asks("stop", after)
        assert stopped.fit(report=lambda metrics: None, requests=requests).step == min(after + 1, 4)
        assert requests.answers == [min(after + 1, 4)]
        resumed = start_trainer(config, folder=tmp_path / "run")
        assert resumed.resume()
        assert same([_without_clock(figures) for figures in fit(resumed)], [_without_clock(one) for one in expected])
        assert same(resumed.model.state_dict(), whole.model.state_dict())

    @pytest.mark.parametrize("after", [1, 4])
    def test_asked_to_save_it_saves_once_and_continues(
        self, quiet: Config, start_trainer: StartTrainer, after: int
    ) -> None:
        """Within an epoch, and while measuring."""
        config = apply_overrides(quiet, ["train.batch_size=2", "evaluation.every=1"])
        trainer, requests = start_trainer(config), _Asks("save", after)
        assert trainer.fit(report=lambda metrics: None, requests=requests).epoch == 2
        assert requests.answers == [min(after + 1, 4)]

    def test_what_the_store_had_not_taken_is_logged_again(
        self, quiet: Config, start_trainer: StartTrainer, tmp_path: Path, tracker: Any
    ) -> None:
        """MLflow is away all the time until the process is killed; the checkpoint knows what was not delivered."""
        tracker.undelivered_points = lambda: list(tracker.points)
        config = apply_overrides(quiet, ["train.batch_size=2", "train.checkpoint_every=3"])
        killed = start_trainer(config, folder=tmp_path / "run", tracker=tracker)
        with pytest.raises(KeyboardInterrupt):
            killed.fit(report=lambda metrics: None, notice=_notices([""] * 6 + [KeyboardInterrupt]))
        continued = type(tracker)()
        resumed = start_trainer(config, folder=tmp_path / "run", tracker=continued)
        resumed.resume()
        fit(resumed)
        assert continued.curve("train/loss")[:6] == tracker.curve("train/loss")[:6]
        assert [step for step, _ in continued.curve("train/loss")] == list(range(1, 9))
        assert [step for step, _ in continued.curve("epoch")] == [4, 8]

    def test_without_a_checkpoint_there_is_nothing_to_resume(self, quiet: Config, start_trainer: StartTrainer) -> None:
        assert start_trainer(quiet).resume() is False

    def test_state_and_optimizer_of_the_checkpoint(self, tiny_config: Config, trained: Train) -> None:
        trainer, figures = trained(tiny_config).trainer, trained(tiny_config).reports
        folder = find_checkpoint(trainer.folder / "checkpoints")
        assert folder is not None
        state = json.loads((folder / "state.json").read_text())
        assert {name: state[name] for name in ("schema_version", "epoch", "step", "world_size", "run_id")} == {
            "schema_version": 1,
            "epoch": 2,
            "step": 4,
            "world_size": 1,
            "run_id": "",
        }
        assert state["classes"] == ["background", "ant", "bee", "cat"]
        assert state["data_fingerprint"] == trainer.shards.info.fingerprint
        assert state["best_score"] == max(epoch["val/miou_ss"] for epoch in figures)
        assert state["metrics"]["val/miou_ss"] == figures[-1]["val/miou_ss"]
        optimizer = torch.load(folder / "trainer.pt", weights_only=True)
        trained = sum(parameter.requires_grad for parameter in trainer.model.parameters())
        assert len(optimizer["state"]) == trained > 0

    def test_settings_of_the_optimizer_may_change(
        self, quiet: Config, trained: Train, start_trainer: StartTrainer
    ) -> None:
        changes = ["train.epochs=3", "optim.lr=0.002", "optim.momentum=0.5", "optim.weight_decay=0.25"]
        resumed = start_trainer(apply_overrides(quiet, changes), folder=trained(quiet).trainer.folder)
        resumed.resume()
        group = resumed.optimizer.param_groups[0]
        # A global batch of 4 where the rate is meant for 16.
        assert (group["base_lr"], group["momentum"], group["weight_decay"]) == (0.0005, 0.5, 0.25)
        assert resumed.optimizer.state  # the momentum buffers came along

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("optim.name=adamw", r"with optim.name=sgd, whose state adamw cannot continue"),
            *[
                (change, r"does not fit the network .* resume without --set of model")
                for change in ("model.decoder_dim=9", "model.frozen_stages=0", "cvlr.enabled=false")
            ],
        ],
    )
    def test_another_optimizer_or_network_is_refused(
        self, quiet: Config, trained: Train, start_trainer: StartTrainer, change: str, message: str
    ) -> None:
        with pytest.raises(CheckpointError, match=message):
            start_trainer(apply_overrides(quiet, [change]), folder=trained(quiet).trainer.folder).resume()

    def test_other_classes_or_other_data_are_refused(
        self,
        quiet: Config,
        trained: Train,
        start_trainer: StartTrainer,
        write_tiny: Callable[..., ShardSet],
        tmp_path: Path,
    ) -> None:
        folder = trained(quiet).trainer.folder
        renamed = write_tiny(tmp_path / "renamed", classes=("background", "ant", "bee", "dog"))
        with pytest.raises(CheckpointError, match=r"\(background, ant, bee, cat\).*\(background, ant, bee, dog\)"):
            start_trainer(quiet, shards=renamed, folder=folder).resume()
        smaller = write_tiny(tmp_path / "smaller", num_train=8)
        with pytest.raises(CheckpointError, match="was trained on other data"):
            start_trainer(quiet, shards=smaller, folder=folder).resume()


class TestWhatIsLogged:
    def test_curves(self, measured: Config, start_trainer: StartTrainer, tracker: Any) -> None:
        config = apply_overrides(measured, ["evaluation.pseudo_mask_images=9"])
        trainer = start_trainer(config, tracker=tracker)
        nn.init.constant_(trainer.model.mask_head.classify.bias, 3.0)  # else all is background: without discoveries
        fit(trainer)
        assert [step for step, _ in tracker.curve("train/loss")] == [1, 2, 3, 4]
        for part in ("classification", "mask_consistency", "code_consistency"):
            assert [step for step, _ in tracker.curve(f"train/loss_{part}")] == [1, 2, 3, 4]
        # The first epoch is pretraining: there is no segmentation loss then.
        assert [step for step, _ in tracker.curve("train/loss_segmentation")] == [3, 4]
        assert all(value > 0 for _, value in tracker.curve("train/loss_segmentation"))
        for key in ("miou", "mfdr", "mfnr", "coverage", "iou/ant", "iou/background"):
            curve = tracker.curve(f"pseudo_mask/{key}")
            assert [step for step, _ in curve] == [2, 4]
            assert all(0 <= value <= 1 for _, value in curve)
        for key in ("val/miou_ss", "speed/images_per_second", "speed/data_wait_fraction", "train/epoch_loss", "epoch"):
            assert [step for step, _ in tracker.curve(key)] == [2, 4]
        # What is no curve is in the checkpoint.
        for key, value in (("val/images", 5), ("pseudo_mask/images", 9)):
            assert trainer.state.metrics[key] == value
            assert not tracker.curve(key)
        assert "val/fnr/ant" in trainer.state.metrics
        assert not tracker.curve("val/fnr/ant")
        assert [step for key, step, _ in tracker.pictures if key == "quality/val"] == [0, 1]

    def test_total_is_the_weighted_sum_of_the_parts_and_the_epoch_their_mean(
        self, tiny_config: Config, trained: Train
    ) -> None:
        tracker = trained(tiny_config).tracker
        by_step = [values for _, values in tracker.points if "train/loss" in values]
        for values in by_step:
            assert values["train/loss"] == pytest.approx(
                values["train/loss_classification"]
                + 4 * values["train/loss_mask_consistency"]
                + 4 * values["train/loss_code_consistency"]
                + values.get("train/loss_segmentation", 0.0),
                rel=1e-5,
            )
        means = [sum(values["train/loss"] for values in by_step[i : i + 2]) / 2 for i in (0, 2)]
        assert [value for _, value in tracker.curve("train/epoch_loss")] == pytest.approx(means)

    def test_the_rate_is_constant_and_then_half_a_cosine(
        self, quiet: Config, start_trainer: StartTrainer, tracker: Any
    ) -> None:
        fit(start_trainer(apply_overrides(quiet, ["train.epochs=3"]), tracker=tracker))
        full = 0.01 * 4 / 16
        rates = [value for _, value in tracker.curve("train/learning_rate")]
        cosine = [full * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
        assert rates == pytest.approx([full, full, *cosine])

    def test_panels_are_written_and_logged(self, tiny_config: Config, trained: Train) -> None:
        trainer, tracker = trained(tiny_config).trainer, trained(tiny_config).tracker
        files = sorted(path.name for path in (trainer.folder / "panels").iterdir())
        keys = sorted({name.split("-epoch-")[0] for name in files})
        assert len(keys) == 2
        assert all(re.fullmatch(r"train_\d", key) for key in keys)
        assert files == sorted(f"{key}-epoch-{epoch:03d}.png" for key in keys for epoch in (1, 2))
        assert sorted(path.name for path in (trainer.folder / "history").iterdir()) == files
        # Steps count measurements from 0, at which MLflow's sliders stand.
        logged = [(key, step) for key, step, _ in tracker.pictures if key.startswith("samples/")]
        assert sorted(logged) == sorted((f"samples/{key}", step) for key in keys for step in (0, 1))

    def test_a_picture_that_cannot_be_written_ends_nothing(
        self, tiny_config: Config, start_trainer: StartTrainer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = start_trainer(apply_overrides(tiny_config, ["train.epochs=1", "train.pretrain_epochs=0"]))
        trainer.folder.mkdir(parents=True, exist_ok=True)
        (trainer.folder / "panels").write_text("in the way")
        assert len(fit(trainer)) == 1
        assert capsys.readouterr().out.count("cannot be written, and is left out") == 2

    def test_no_panels_and_no_pseudo_masks_where_they_are_off(self, quiet: Config, trained: Train) -> None:
        trainer, tracker = trained(quiet).trainer, trained(quiet).tracker
        assert {key for key, _, _ in tracker.pictures} <= {"quality/val"}
        assert not (trainer.folder / "panels").exists()
        assert not [key for _, values in tracker.points for key in values if key.startswith("pseudo_mask")]
        assert [step for step, _ in tracker.curve("val/miou_ss")] == [4]  # the last epoch alone

    def test_a_gated_validation_has_its_protocol_in_the_curve_and_chooses_the_best(
        self, quiet: Config, start_trainer: StartTrainer, tracker: Any
    ) -> None:
        trainer = start_trainer(apply_overrides(quiet, ["evaluation.gating=image_labels"]), tracker=tracker)
        fit(trainer)
        ((_, score),) = tracker.curve("val/miou_ss_gated_by_image_labels")
        assert not tracker.curve("val/miou_ss")
        assert trainer.state.best_score == score

    def test_an_unmeasurable_validation_is_no_score(
        self, quiet: Config, start_trainer: StartTrainer, write_tiny: Callable[..., ShardSet], tmp_path: Path
    ) -> None:
        void = write_tiny(tmp_path / "void", mask_bytes=lambda sample, png: _void_png(sample.width, sample.height))
        trainer = start_trainer(apply_overrides(quiet, ["evaluation.every=1"]), shards=void)
        fit(trainer)
        assert trainer.state.best_score is None
        assert "NaN" not in (trainer.folder / "checkpoints" / "checkpoint-0002" / "state.json").read_text()


class Recorder(Listener):
    """Keeps the names of what it hears, and the places."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name in vars(Listener) and not name.startswith("_"):
            return lambda *arguments, **named: self._hear(name, method, *arguments, **named)
        return method

    def _hear(self, name: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.heard.append(arguments[0] if name == "at" else name)
        return method(*arguments, **named)


def test_a_listener_hears_everything_in_order(quiet: Config, tiny_data: ShardSet, tmp_path: Path) -> None:
    config = apply_overrides(quiet, ["train.epochs=1", "train.pretrain_epochs=0", "train.checkpoint_every=1"])
    listener = Recorder()
    fit(Trainer(config, tiny_data, process=Process(), folder=tmp_path, listener=listener))
    saved = ["saving", "checkpoint"]
    step = ["waiting for data", "going forward", "going backward", "comparing losses", "step"]
    measured = ["notice", "measuring", *["measuring"] * 5, "adding up what was measured"]
    steps = [*step, *saved, *step]  # the second one is the last of the epoch, which saves itself
    assert listener.heard == [
        *("start", "begin", *steps, "summing up the epoch", "end"),
        *(*measured, "epoch", *saved, "close"),
    ]


class TestStep:
    def test_accumulated_gradients_are_the_mean_over_the_parts(
        self, quiet: Config, start_trainer: StartTrainer
    ) -> None:
        still = ["views.flip=false", "model.gate_rate=0"]
        still += [f"views.{name}=0" for name in ("brightness", "contrast", "saturation", "hue")]
        config = apply_overrides(
            quiet, [*still, "train.accumulation=3", "train.batch_size=8", "train.epochs=1", "train.pretrain_epochs=0"]
        )
        trainer, reference = start_trainer(config), start_trainer(config)
        for model in (trainer.model, reference.model):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        (batch,) = reference.loader.epoch(0)
        reference.model.train()
        for part, weight in ((slice(0, 2), 2 / 8), (slice(2, 5), 3 / 8), (slice(5, 8), 3 / 8)):
            result = step_losses(
                reference.model,
                batch.part(part),
                config=config,
                encoder=reference.model.encoder,
                generator=step_generator(1),
                pseudo_rows=find_pseudo_rows(batch.part(part)),
            )
            (result.total * weight).backward()
        fit(trainer)
        expected = {name: parameter.grad for name, parameter in reference.model.named_parameters()}
        trained = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert len(trained) > 50
        for name, parameter in trained:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    def test_a_loss_that_is_not_finite_stops_before_the_step(
        self, quiet: Config, start_trainer: StartTrainer, digest: Digest
    ) -> None:
        trainer = start_trainer(quiet)
        with torch.no_grad():
            trainer.model.mask_head.classify.weight.fill_(math.inf)
        before = digest(dict(trainer.model.named_parameters()))
        with pytest.raises(NonFiniteLossError, match=r"step 0: .* on rank 0 \(rank 0 has loss .*classification nan"):
            fit(trainer)
        assert digest(dict(trainer.model.named_parameters())) == before
        assert not (trainer.folder / "checkpoints").exists()

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            (1, r"step 0 left values .* in mask_head\.classify\.weight; .*--resume"),
            (3, r"step 1: .*; mask_head\.classify\.weight is not finite since step 0"),
        ],
    )
    def test_weights_that_a_step_spoiled_are_named_and_not_saved(
        self,
        quiet: Config,
        start_trainer: StartTrainer,
        tiny_data: ShardSet,
        monkeypatch: pytest.MonkeyPatch,
        steps: int,
        message: str,
    ) -> None:
        batch = tiny_data.split("train").num_samples // steps
        trainer = start_trainer(apply_overrides(quiet, [f"train.batch_size={batch}"]))
        weight = trainer.model.mask_head.classify.weight
        monkeypatch.setattr(trainer.optimizer, "step", lambda: nn.init.constant_(weight, math.inf))
        with pytest.raises(NonFiniteLossError, match=message):
            fit(trainer)
        assert not (trainer.folder / "checkpoints").exists()

    def test_a_gradient_that_is_not_finite_stops_before_the_step(
        self, quiet: Config, start_trainer: StartTrainer, digest: Digest
    ) -> None:
        trainer = start_trainer(quiet)
        trainer.model.mask_head.classify.weight.register_hook(lambda gradient: gradient * math.inf)
        before = digest(dict(trainer.model.named_parameters()))
        with pytest.raises(
            NonFiniteLossError, match=r"step 0: the gradient .*of mask_head\.classify\.weight is not fin"
        ):
            fit(trainer)
        assert digest(dict(trainer.model.named_parameters())) == before


class TestDamage:
    @pytest.fixture
    def damaged(self, tiny_data: ShardSet, tmp_path: Path) -> ShardSet:
        """The image of one sample in the first shard of each split is overwritten."""
        shutil.copytree(tiny_data.folder, tmp_path / "damaged")
        for split in ("train", "val"):
            entry = shards_of(tiny_data.split(split))[0]
            with (tmp_path / "damaged" / entry.name).open("r+b") as file:
                file.seek(int(entry.offsets[0]) + 512)
                file.write(b"\0" * 600)
        return load_dataset(tmp_path / "damaged")

    def test_stops(self, quiet: Config, start_trainer: StartTrainer, damaged: ShardSet) -> None:
        with pytest.raises(DataError, match=r"train-000000\.tar: sample 'train_\d'.*--verify"):
            fit(start_trainer(apply_overrides(quiet, ["train.batch_size=9"]), shards=damaged))

    def test_or_is_skipped_and_reported(
        self,
        quiet: Config,
        start_trainer: StartTrainer,
        damaged: ShardSet,
        tracker: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        config = apply_overrides(quiet, ["train.batch_size=9", "data.on_error=skip"])
        trainer = start_trainer(config, shards=damaged, tracker=tracker)
        fit(trainer)
        assert [value for _, value in tracker.curve("speed/skipped_samples")] == [1.0, 1.0]
        assert trainer.state.metrics["val/images"] == 4
        printed = capsys.readouterr().out
        assert re.search(r"epoch 1: skipped train_\d of train-000000\.tar: .*JPEG", printed)
        assert re.search(r"epoch 2: skipped val_\d of val-000000\.tar: ", printed)


@pytest.mark.parametrize(("accumulation", "world", "least"), [(1, 1, 1), (1, 4, 4), (3, 4, 12), (2, 3, 6)])
def test_a_batch_that_leaves_a_rank_without_images_is_refused(
    tiny_config: Config, accumulation: int, world: int, least: int
) -> None:
    def sized(batch: int) -> Config:
        changes = {"batch_size": batch, "accumulation": accumulation}
        return tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update=changes)})

    for batch in (least, least + 1):  # it need not be a multiple
        check_batch(sized(batch), world)
    message = rf"batch_size {least - 1} is too small for {world} workers times {accumulation} .*; use {least} or more"
    with pytest.raises(ValueError, match=message):
        check_batch(sized(least - 1), world)


def _notices(told: list[Any]) -> Callable[[], str]:
    """Says one thing after the other; raises what is an exception."""
    rest = iter(told)

    def notice() -> str:
        answer = next(rest, "")
        if not isinstance(answer, str):
            raise answer
        return answer

    return notice


def _interrupt_after(epochs: int) -> Callable[[Mapping[str, float]], None]:
    seen: list[None] = []

    def report(_: Mapping[str, float]) -> None:
        seen.append(None)
        if len(seen) == epochs:
            raise KeyboardInterrupt

    return report


def _without_clock(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in PERFORMANCE}


def _void_png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 255).save(file, "PNG")
    return file.getvalue()


class TestMixtures:
    """Images with masks and labels, with labels, with a mask that is not granted, and with nothing at all."""

    @pytest.fixture(scope="class")
    def mixed(self, write_tiny: Callable[..., ShardSet], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
        unlabeled = {"train_3", "train_5", "train_8"}
        return write_tiny(
            tmp_path_factory.mktemp("mixed") / "shards",
            mask_bytes=lambda sample, png: None if sample.key in {"train_6", "train_8"} else png,
            image_labels=lambda key, classes: None if key in unlabeled else classes,
        )

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ((), {"classification", "segmentation"}),
            (("setting=sss_image_labels",), {"classification", "segmentation", "pixel_segmentation"}),
            (("setting=sss",), {"segmentation", "pixel_segmentation"}),
            (("setting=sss", "data.train_subset=pixels"), {"segmentation", "pixel_segmentation"}),
        ],
    )
    def test_any_mixture_trains_and_is_measured(
        self, mixed: ShardSet, quiet: Config, start_trainer: StartTrainer, changes: tuple[str, ...], parts: set[str]
    ) -> None:
        common = ["data.pixel_oversampling=2", "evaluation.pseudo_mask_images=9"]
        common += ["train.epochs=1", "train.pretrain_epochs=0"]
        common += ["data.pixel_labeled_subset=pixels"] if changes else []
        config = apply_overrides(quiet, [*common, *changes])
        trainer = start_trainer(config, shards=mixed)
        figures = fit(trainer)[-1]
        named = {name.removeprefix("train/epoch_loss_") for name in figures if name.startswith("train/epoch_loss_")}
        assert named - {"mask_consistency", "code_consistency"} == parts
        assert all(math.isfinite(figures[f"train/epoch_loss_{part}"]) for part in named)
        assert figures["val/images"] == 5
        # Of nine images two have no mask; granted masks are not measured, nor are images that are left out.
        assert figures.get("pseudo_mask/images", 0) == {0: 7, 1: 3, 2: 0}[len(changes)]
        assert len(trainer.model.mask_head.classify.bias) == (4 if "setting=sss" in changes else 3)  # type: ignore[arg-type]
