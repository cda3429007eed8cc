"""The training loop: the same on one process and on many, with Ray or without.

A `Trainer` owns the model, the optimiser and the loaders of one rank. Randomness is a pure function of (seed, step,
rank), so that a training that is resumed, within an epoch too, continues to the bit. Losses are checked for finite
values over all ranks before the optimiser steps. Curves, pictures and checkpoints are written by rank 0.
"""

from __future__ import annotations

import inspect
import math
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from slrnet.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    TrainState,
    check_classes,
    find_checkpoint,
    load_checkpoint,
)
from slrnet.checkpoints.writer import CheckpointWriter
from slrnet.config import Config
from slrnet.data.batch import Batch, EvalSample
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import ShardSet
from slrnet.data.samples import SkippedSample
from slrnet.data.supervision import Supervision, supervision_of
from slrnet.data.train_loader import TrainLoader, TrainLoaderSettings
from slrnet.distributed.process import Process, share_buffers, sum_over_ranks
from slrnet.distributed.watchdog import Watchdog
from slrnet.evaluation.masks import (
    PseudoMask,
    evaluate_masks,
    measure_pseudo_masks,
    pseudo_mask_subset,
    quality_metrics,
)
from slrnet.models.network import Network, Normalize, mixed_precision
from slrnet.models.slrnet import network_of
from slrnet.storage.files import written_whole
from slrnet.tracking.gpu_monitor import GpuWatch
from slrnet.tracking.mlflow import Tracker, metric_key
from slrnet.tracking.progress import Progress
from slrnet.tracking.run_log import RunLog
from slrnet.tracking.summary import PICTURES, class_quality, curves
from slrnet.training.optim import build_optimizer, rate_factor, set_rate
from slrnet.training.step import find_pseudo_rows, step_generator, step_losses
from slrnet.viz.panels import draw_class_scores, draw_panel

__all__ = ["NonFiniteLossError", "Trainer", "check_batch"]


class NonFiniteLossError(ArithmeticError):
    """A loss became infinite or NaN."""


@dataclass
class _Tally:
    """What the steps of an epoch add up to."""

    parts: dict[str, float]
    steps: int = 0
    """Taken by this process."""
    waited: float = 0.0
    """Seconds it spent waiting for batches."""

    def add(self, parts: Mapping[str, float], waited: float) -> None:
        for name, value in parts.items():
            self.parts[name] += value
        self.steps += 1
        self.waited += waited


class Trainer:
    """Trains one run on one rank.

    Args:
        config: of the run.
        shards: the data set.
        process: this process among all.
        folder: of the run; checkpoints go to `checkpoints`, pictures to `panels`.
        tracker: receives curves and pictures; a `NullTracker` on ranks other than 0.
        run_id: MLflow run, for the checkpoint's record.
        log: of this rank; None for none.
        watchdog: is told where this rank is; None for none.
        upload: copies what lies in the folder to where it shall stay, after each checkpoint; None where that is there.
    """

    def __init__(
        self,
        config: Config,
        shards: ShardSet,
        *,
        process: Process,
        folder: Path,
        tracker: Tracker,
        run_id: str = "",
        log: RunLog | None = None,
        watchdog: Watchdog | None = None,
        upload: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.shards = shards
        self.process = process
        self.folder = folder
        self.tracker = tracker
        self.log = log or RunLog(None, rank=process.rank)
        self.watchdog = watchdog or Watchdog(process, limit=0, store=None, on_hang=lambda hang: None)
        self.writer = CheckpointWriter(folder / "checkpoints", config, upload=upload)
        torch.manual_seed(config.train.seed)
        self.model = network_of(config, num_classes=shards.info.num_classes)
        if process.device.type == "cpu":
            from slrnet.cpu import speed_up
            from slrnet.cpu.allocator import spare_memory

            spare_memory(speed_up(self.model))
        self.model.to(device=process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.normalize = Normalize.of(self.model.encoder)
        self.optimizer = build_optimizer(self.model, config.optim, batch_size=config.train.batch_size)
        self.supervision = supervision_of(config, shards)
        self.loader = _train_loader(config, shards, process, self.supervision)
        self.state = TrainState(
            epoch=0,
            step=0,
            classes=shards.info.classes,
            data_fingerprint=shards.info.fingerprint,
            world_size=process.world_size,
            run_id=run_id,
        )
        self.wrapped = _distribute(self.model, process)
        self.gpus = GpuWatch(process, interval=config.tracking.gpu_interval)

    def resume(self) -> bool:
        """Continues from the run's last whole checkpoint, if it has one.

        Rates, momentum and decay are those of this trainer's configuration. The number of ranks may be another one;
        the training then goes on correctly, but not to the bit as it would have.

        Raises:
            CheckpointError: it is of other classes, other data, or another network.
        """
        path = find_checkpoint(self.folder / "checkpoints")
        if path is None:
            return False
        checkpoint = load_checkpoint(path)
        _check_resumable(checkpoint, self.state, self.shards)
        _restore(self.model, self.optimizer, checkpoint)
        self.state = replace(
            checkpoint.state,
            run_id=self.state.run_id or checkpoint.state.run_id,
            world_size=self.process.world_size,
            untracked=(),
        )
        for step, values in checkpoint.state.untracked:
            self.tracker.log_metrics(values, step)
        return True

    def fit(
        self,
        *,
        report: Callable[[Mapping[str, float]], None],
        notice: Callable[[], str] = lambda: "",
        until: int | None = None,
    ) -> TrainState:
        """Trains to the last epoch.

        Args:
            report: called on every rank after each epoch, with its figures and, as `epoch`, its number from 1 on.
            notice: called on every rank with each logged step; says why the training may be stopped soon, the same on
                all ranks, and "" otherwise. While it does, each such step ends with a checkpoint.
            until: stop when so many epochs are finished; the schedule remains that of all of them.

        Returns:
            The final state.

        Raises:
            NonFiniteLossError: naming step, rank and loss parts.
            DataError: a shard is damaged and `data.on_error` is "stop".
            CheckpointError: a checkpoint could not be written.
        """
        total = self.config.train.epochs * self.loader.steps_per_epoch
        progress = Progress(total, done=self.state.step, show=self.process.is_main)
        try:
            self.tracker.set_tags(self.gpus.start())
            end = self.config.train.epochs if until is None else min(until, self.config.train.epochs)
            for epoch in range(self.state.epoch, end):
                metrics = self._train_epoch(epoch, progress, notice)
                if (epoch + 1) % self.config.evaluation.every == 0 or epoch + 1 == self.config.train.epochs:
                    metrics |= self._measure(epoch, progress)
                self._finish_epoch(epoch, metrics, progress)
                report(metrics | {"epoch": epoch + 1})
            self.writer.wait()
        finally:
            self.writer.close()
            progress.close()
            self.gpus.close()
            self.loader.close()
        return self.state

    def time_step(self, *, steps: int = 3) -> float:
        """Median seconds of an optimiser step with pseudo labels, after one to warm up; the weights change.

        Args:
            steps: how many are timed.
        """
        times = list(self.try_steps(steps + 1))
        return statistics.median(times[1:] or times)

    def try_steps(self, steps: int) -> Iterator[float]:
        """Takes optimiser steps with pseudo labels, for their own sake: nothing is logged or saved.

        Args:
            steps: how many at most; the epoch may have fewer.

        Yields:
            Seconds of each step, without those of its batch.
        """
        self.wrapped.train()
        try:
            for step, batch in zip(range(steps), self.loader.epoch(0), strict=False):
                begun = time.perf_counter()
                self._set_rate(step)
                self._step(batch, step, pretraining=False)
                yield time.perf_counter() - begun
        finally:
            self.loader.close()

    def _train_epoch(self, epoch: int, progress: Progress, notice: Callable[[], str]) -> dict[str, float]:
        self.wrapped.train()
        tally = _Tally(defaultdict(float, self.state.unfinished))
        self.gpus.begin()
        started = time.perf_counter()
        first, end = self.state.step, (epoch + 1) * self.loader.steps_per_epoch
        batches = self.loader.epoch(epoch, first - epoch * self.loader.steps_per_epoch)
        for step in range(first, end):
            begun = time.perf_counter()
            self.watchdog.at("waiting for data", step)
            batch = next(batches)
            waited = time.perf_counter() - begun
            factor = self._set_rate(step)
            parts = self._step(batch, step, pretraining=epoch < self.config.train.pretrain_epochs)
            tally.add(parts, waited)
            progress.advance(self.config.train.batch_size, loss=parts["loss"])
            if progress.steps == 1:
                progress.note(_first_step_line(time.perf_counter() - begun, self.process))
            logged = (step + 1) % self.config.train.log_every == 0
            if logged:
                self._log_step(parts, step + 1, factor, waited)
            self._save_within_epoch(step + 1, end, tally, notice() if logged else "", progress)
        self._check_epoch_end(batches, epoch, progress)
        metrics = self._summarise(tally, seconds=time.perf_counter() - started)
        self._log_gpus(tally.steps, epoch, progress)
        return metrics

    def _save_within_epoch(self, done: int, end: int, tally: _Tally, notice: str, progress: Progress) -> None:
        """Saves after `done` steps in all, where that is due and the epoch, which saves at its end, goes on."""
        every = self.config.train.checkpoint_every
        if done == end or not (notice or (every and done % every == 0)):
            return
        self.state = replace(self.state, step=done, metrics={}, unfinished=dict(tally.parts))
        self._save()
        if notice:
            self.writer.wait()
            progress.note(f"{notice}: saved after step {done}")
            self.log.write("notice", step=done, message=notice)

    def _save(self) -> None:
        if self.process.is_main:
            self.watchdog.alive()
            state = replace(self.state, untracked=self.tracker.undelivered_points())
            self.writer.save(state, model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
            self.log.write("checkpoint", step=self.state.step, name=self.state.name)

    def _summarise(self, tally: _Tally, *, seconds: float) -> dict[str, float]:
        """An epoch's mean losses, which are those of all ranks already, and its speed over all ranks."""
        self.watchdog.at("summing up the epoch", self.state.step)
        own = torch.tensor([tally.waited, seconds, len(self.loader.skipped)], dtype=torch.float64)
        waited, total, skipped = sum_over_ranks(own, self.process).tolist()
        steps = self.loader.steps_per_epoch  # the sums are of the whole epoch, the clock only of what was done here
        means = {_loss_key(name, "epoch_"): value / steps for name, value in tally.parts.items()}
        return means | {
            "speed/images_per_second": self.config.train.batch_size * tally.steps * self.process.world_size / total,
            "speed/data_wait_fraction": waited / total,
            "speed/skipped_samples": skipped,
        }

    def _log_gpus(self, steps: int, epoch: int, progress: Progress) -> None:
        """What the GPUs of all ranks did in an epoch's steps; the figures go to the tracker alone."""
        metrics, warnings = self.gpus.end(steps * self.loader.share)
        self.tracker.log_metrics(metrics, (epoch + 1) * self.loader.steps_per_epoch)
        self.tracker.set_tags(warnings)
        for text in warnings.values():
            progress.note(text)

    def _step(self, batch: Batch, step: int, *, pretraining: bool) -> dict[str, float]:
        """One optimiser step; returns the loss and its parts, averaged over accumulation steps and ranks."""
        count = self.config.train.accumulation
        # Parts of ranks and steps count by their images: the gradient is that of the global batch's mean.
        scale = self.process.world_size / self.config.train.batch_size
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for index, part in enumerate(_split(batch, count)):
            weight = len(part.keys) * scale
            generator = step_generator(self.config.train.seed, step, self.process.rank, index)
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # dropout and gates
            with self._no_sync(index + 1 < count):
                self.watchdog.at("going forward", step)
                losses = self._losses(part, generator, pretraining=pretraining)
                self.watchdog.at("going backward", step)
                with record_function("slrnet: backward"):
                    (losses["loss"] * weight).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach() * weight
        self.watchdog.at("comparing losses", step)
        with record_function("slrnet: agreement"):
            values = self._agree(totals, step)
        with record_function("slrnet: optimiser"):
            self.optimizer.step()
        return values

    def _losses(self, batch: Batch, generator: torch.Generator, *, pretraining: bool) -> dict[str, Tensor]:
        rows = find_pseudo_rows(batch)
        moved = batch.to(self.process.device, non_blocking=True)
        with mixed_precision(self.config.train.precision, self.process.device):
            result = step_losses(
                self.wrapped,
                moved,
                config=self.config,
                normalize=self.normalize,
                generator=generator,
                pseudo_rows=rows,
                pretraining=pretraining,
            )
        return {"loss": result.total, **result.parts}

    def _agree(self, totals: dict[str, Tensor], step: int) -> dict[str, float]:
        """Averages loss parts over the ranks in one all-reduce, and stops all of them if any is not finite."""
        own = torch.stack(list(totals.values())).double()
        bad = (~own.isfinite()).any().double() * (self.process.rank + 1)
        flags = torch.zeros(self.process.world_size, dtype=torch.float64, device=own.device)
        flags[self.process.rank] = bad
        shared = sum_over_ranks(torch.cat([own.nan_to_num(0.0, 0.0, 0.0), flags]), self.process).tolist()
        wrong = [rank for rank, flag in enumerate(shared[len(own) :]) if flag]
        if wrong:
            listed = ", ".join(f"{name} {float(value):g}" for name, value in totals.items())
            raise NonFiniteLossError(
                f"step {step}: the loss is not finite on rank {wrong[0]} (rank {self.process.rank} has {listed}); "
                "no weight was changed by this step. Lower optim.lr, or train with train.precision=fp32"
            )
        return {name: value / self.process.world_size for name, value in zip(totals, shared, strict=False)}

    def _measure(self, epoch: int, progress: Progress) -> dict[str, float]:
        """Pseudo-mask quality and validation after an epoch; every rank takes part."""
        self.model.eval()
        share_buffers(self.model, self.process)
        common: dict[str, Any] = {"config": self.config, "normalize": self.normalize, "process": self.process}
        metrics = self._measure_pseudo_masks(epoch, progress, common)
        progress.note(f"epoch {epoch + 1}: validating")
        samples = self._loader(self.config.data.val_split)
        quality = evaluate_masks(self.model, self._watched(samples), **common)
        self._note_skipped(samples.skipped, epoch, progress)
        values = quality_metrics("val", quality, self.shards.info.classes)
        metrics |= {name: value for name, value in values.items() if name != "val/miou"}
        metrics[metric_key("val", f"miou_{quality.protocol}")] = values.get("val/miou", math.nan)
        metrics["val/images"] = quality.images
        return metrics

    def _measure_pseudo_masks(self, epoch: int, progress: Progress, common: dict[str, Any]) -> dict[str, float]:
        samples, shown = self._pseudo_mask_samples()
        if not samples.total:
            return {}
        progress.note(f"epoch {epoch + 1}: measuring pseudo masks")
        dense, kept = measure_pseudo_masks(
            self.model, self._watched(samples), show=lambda masks: self._draw(masks, shown, epoch), **common
        )
        self._note_skipped(samples.skipped, epoch, progress)
        self._log_panels(shown, epoch)
        return quality_metrics("pseudo_mask", dense, self.shards.info.classes) | {
            "pseudo_mask/coverage": kept.matrix.coverage(),
            "pseudo_mask/kept_fdr": kept.matrix.mfdr(),
            "pseudo_mask/images": dense.images,
        }

    def _finish_epoch(self, epoch: int, metrics: dict[str, float], progress: Progress) -> None:
        scores = [value for name, value in metrics.items() if name.startswith("val/miou_") and math.isfinite(value)]
        best = max([*scores, *([] if self.state.best_score is None else [self.state.best_score])], default=None)
        self.state = replace(
            self.state,
            epoch=epoch + 1,
            step=(epoch + 1) * self.loader.steps_per_epoch,
            best_score=best,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            unfinished={},
        )
        self.log.write("epoch", step=self.state.step, epoch=epoch + 1, **self.state.metrics)
        shown = curves(metrics, self.shards.info.classes)
        self.tracker.log_metrics(shown | {"epoch": float(epoch + 1)}, self.state.step)
        if self.process.is_main:
            self._log_class_scores(metrics, epoch)
        self._save()
        progress.note(_epoch_line(epoch + 1, self.config.train.epochs, metrics))

    def _pseudo_mask_samples(self) -> tuple[EvalLoader, tuple[str, ...]]:
        """This rank's share of the fixed subset of training images, and the keys that are drawn."""
        split = self.shards.split(self.config.data.train_split)
        chosen = pseudo_mask_subset(split, self.supervision, self.config)
        shown = tuple(split.key(index) for index in chosen[: self.config.evaluation.panel_images])
        return self._loader(self.config.data.train_split, indices=chosen), shown

    def _loader(self, split: str, indices: tuple[int, ...] | None = None) -> EvalLoader:
        return EvalLoader(
            self.shards,
            split=split,
            indices=indices,
            rank=self.process.rank,
            world_size=self.process.world_size,
            on_error=self.config.data.on_error,
        )

    def _watched(self, samples: EvalLoader) -> Iterator[EvalSample]:
        """The samples; the watchdog hears of each."""
        self.watchdog.at("measuring", self.state.step)
        for sample in samples:
            yield sample
            self.watchdog.alive()
        self.watchdog.at("adding up what was measured", self.state.step)

    def _draw(self, masks: PseudoMask, shown: tuple[str, ...], epoch: int) -> None:
        """Draws an image into the run's folder, on whichever rank has it."""
        if masks.sample.key not in shown:
            return
        panel = draw_panel(
            masks.sample.image.permute(1, 2, 0).numpy(),
            raw_mask=masks.raw.numpy(),
            refined_mask=masks.refined.numpy(),
            pseudo_labels=masks.pseudo_labels.numpy(),
            ground_truth=None if masks.sample.pixel_labels is None else masks.sample.pixel_labels.numpy(),
            palette=self.shards.info.palette_array(),
            class_names=self.shards.info.classes,
            title=f"{masks.sample.key}, after epoch {epoch + 1}",
        )
        path = self._panel_path(masks.sample.key, epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as incoming:
            panel.save(incoming, format="PNG")

    def _log_panels(self, shown: tuple[str, ...], epoch: int) -> None:
        """Hands the pictures of all ranks to the tracker; measuring has ended everywhere, so that they all exist."""
        for key in shown if self.process.is_main else ():
            path = self._panel_path(key, epoch)
            if path.is_file():  # not so where the sample is damaged and skipped
                with Image.open(path) as panel:
                    self.tracker.log_image(f"{PICTURES}/{key}", panel.copy(), self._picture_step(epoch))

    def _picture_step(self, epoch: int) -> int:
        """Counts measurements from 0, where the sliders of MLflow's page stand at first."""
        return epoch // self.config.evaluation.every

    def _log_class_scores(self, metrics: Mapping[str, float], epoch: int) -> None:
        """One picture of all classes, however many, for each kind of masks that was measured."""
        classes = self.shards.info.classes
        for group in ("pseudo_mask", "val"):
            scores = class_quality(metrics, group, classes)
            if any(value == value for value in scores["iou"]):
                picture = draw_class_scores(
                    **scores,
                    palette=self.shards.info.palette_array(),
                    class_names=classes,
                    title=f"{group} after epoch {epoch + 1}",
                )
                self.tracker.log_image(f"quality/{group}", picture, self._picture_step(epoch))

    def _panel_path(self, key: str, epoch: int) -> Path:
        return self.folder / "panels" / f"{key}-epoch-{epoch + 1:03d}.png"

    def _log_step(self, parts: Mapping[str, float], step: int, factor: float, waited: float) -> None:
        self.log.write("step", step=step, waited=round(waited, 6), **parts)
        values = {_loss_key(name, ""): value for name, value in parts.items()}
        rate = self.optimizer.param_groups[0]["base_lr"] * factor
        self.tracker.log_metrics(values | {"train/learning_rate": rate}, step)

    def _set_rate(self, step: int) -> float:
        steps = self.loader.steps_per_epoch
        factor = rate_factor(
            step,
            pretrain_steps=self.config.train.pretrain_epochs * steps,
            total_steps=self.config.train.epochs * steps,
        )
        set_rate(self.optimizer, factor)
        return factor

    def _check_epoch_end(self, batches: Iterator[Batch], epoch: int, progress: Progress) -> None:
        """Lets the loader compare what it read with its plan, and reports what was skipped."""
        if next(batches, None) is not None:
            raise AssertionError("the loader gave more batches than it planned")
        self._note_skipped(self.loader.skipped, epoch, progress)

    def _note_skipped(self, skipped: tuple[SkippedSample, ...], epoch: int, progress: Progress) -> None:
        for sample in skipped[:5]:
            progress.note(f"epoch {epoch + 1}: skipped {sample.key} of {sample.shard}: {sample.reason}")
        if len(skipped) > 5:
            progress.note(f"epoch {epoch + 1}: skipped {len(skipped) - 5} more")

    def _no_sync(self, wanted: bool) -> Any:
        wrapped = self.wrapped
        return wrapped.no_sync() if wanted and isinstance(wrapped, DistributedDataParallel) else nullcontext()


def check_batch(config: Config, world_size: int) -> None:
    """Refuses a global batch that leaves a rank without an image in some backward pass.

    Raises:
        ValueError: it is smaller than ranks times accumulation steps.
    """
    batch, accumulation = config.train.batch_size, config.train.accumulation
    if batch // world_size < accumulation:
        raise ValueError(
            f"train.batch_size {batch} is too small for {world_size} workers times {accumulation} accumulation "
            f"steps; use {world_size * accumulation} or more, or fewer workers"
        )


def _train_loader(config: Config, shards: ShardSet, process: Process, supervision: Supervision) -> TrainLoader:
    settings = TrainLoaderSettings(
        split=config.data.train_split,
        batch_size=config.train.batch_size,
        crop_size=config.data.crop_size,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        seed=config.train.seed,
        shuffle_buffer=config.data.shuffle_buffer,
        on_error=config.data.on_error,
    )
    return TrainLoader(
        shards,
        settings,
        supervision=supervision,
        rank=process.rank,
        world_size=process.world_size,
        workers=config.data.workers,
        pin_memory=process.device.type == "cuda",
    )


def _distribute(model: Network, process: Process) -> torch.nn.Module:
    if process.world_size == 1:
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    # Every parameter takes part in every step: mask consistency and classification or true masks reach all of them,
    # and a kind of label that a rank's batch lacks leaves zeros with a graph. Buffers are read by no step, and shared
    # before the network is measured.
    known = inspect.signature(DistributedDataParallel).parameters
    sync: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **sync)


def _split(batch: Batch, count: int) -> Iterator[Batch]:
    size = len(batch.keys)
    for index in range(count):
        yield batch.part(slice(size * index // count, size * (index + 1) // count))


def _check_resumable(checkpoint: Checkpoint, state: TrainState, shards: ShardSet) -> None:
    check_classes(checkpoint.state, state.classes, data=shards.location)
    if checkpoint.state.data_fingerprint != state.data_fingerprint:
        raise CheckpointError(
            f"{checkpoint.path} was trained on other data (fingerprint {checkpoint.state.data_fingerprint[:12]}) than "
            f"is in {shards.location} ({state.data_fingerprint[:12]}); resume with the same shards, or start a new run"
        )


def _restore(model: Network, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Loads weights and momentum; rates and decay stay as the configuration says, which a resumed run may change."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        model.load_state_dict(checkpoint.model)
        optimizer.load_state_dict(checkpoint.optimizer)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{checkpoint.path} does not fit the network that the settings describe ({reason}); resume without --set "
            "of model.* and cvlr.* fields, or start a new run"
        ) from None
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _loss_key(name: str, prefix: str) -> str:
    return f"train/{prefix}loss" if name == "loss" else f"train/{prefix}loss_{name}"


def _first_step_line(seconds: float, process: Process) -> str:
    if process.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(process.device) / 2**30:.2f} GiB of GPU memory at most"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory at most"
    return f"first step: {seconds:.2f} s, {memory}, on {process.device}"


def _epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    shown = [f"loss {metrics['train/epoch_loss']:.3f}", f"{metrics['speed/images_per_second']:.2f} images/s"]
    shown.append(f"waiting for data {100 * metrics['speed/data_wait_fraction']:.1f} %")
    for name in ("pseudo_mask/miou", "pseudo_mask/coverage", "val/mfdr", "val/mfnr"):
        if name in metrics:
            shown.append(f"{name} {100 * metrics[name]:.1f} %")
    shown += [f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name.startswith("val/miou_")]
    return f"epoch {epoch}/{epochs}: " + ", ".join(shown)
