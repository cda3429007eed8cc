"""What a training tells about itself, and what a run does with it: curves, pictures, logs, progress, watchdog."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from slrnet.checkpoints.checkpoint import TrainState
from slrnet.config import Config
from slrnet.data.manifest import DatasetInfo
from slrnet.distributed.process import Process
from slrnet.distributed.watchdog import Watchdog
from slrnet.evaluation.masks import PseudoMask
from slrnet.storage.files import written_whole
from slrnet.tracking.gpu_monitor import GpuWatch
from slrnet.tracking.page import picture_step, quality_series, sample_series
from slrnet.tracking.progress import Progress
from slrnet.tracking.protocol import Tracker
from slrnet.tracking.run_log import RunLog
from slrnet.tracking.summary import class_quality, curves
from slrnet.viz.panels import draw_class_scores, draw_panel

__all__ = ["Listener", "RunListener", "StepReport", "loss_key"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step."""

    done: int
    """Optimizer steps that are finished, this one included."""
    parts: Mapping[str, float]
    """`loss` and its parts, averaged over accumulation steps and ranks."""
    rate: float
    """Learning rate of the pretrained weights."""
    waited: float
    """Seconds that this rank waited for the batch."""
    seconds: float
    """Seconds of the whole step, waiting included."""


class Listener:
    """Hears what a training does; its methods do nothing. Every rank calls them, in the same order on all ranks."""

    def start(self, state: TrainState, *, total: int) -> None:
        """The training starts or continues at `state`; it has `total` optimizer steps."""

    def begin(self) -> None:
        """The steps of an epoch begin."""

    def at(self, place: str, step: int) -> None:
        """This rank comes to a place, such as "going forward", in optimizer step `step`, from 0."""

    def alive(self) -> None:
        """This rank still works at that place. Ranks may call it at any time."""

    def step(self, report: StepReport) -> None:
        """An optimizer step is finished."""

    def end(self, *, step: int, images: int) -> None:
        """The steps of an epoch end, `step` of them in all; this rank took `images` images since they began."""

    def notice(self, text: str, *, step: int | None = None) -> None:
        """Something that people should know; with `step`, why the training may stop soon, and the step it saved."""

    def sample(self, masks: PseudoMask, epoch: int) -> None:
        """This rank measured an image of which there is a picture, after epoch `epoch`, from 0."""

    def measured(self, keys: Sequence[str], epoch: int) -> None:
        """All ranks have measured their pseudo masks; `keys` name the images of which there are pictures."""

    def epoch(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """An epoch is finished and measured; its figures by their MLflow names, NaN included."""

    def remember(self, state: TrainState) -> TrainState:
        """The state with what this listener needs to continue from a checkpoint; called by rank 0 alone."""
        return state

    def checkpoint(self, state: TrainState) -> None:
        """A checkpoint is on its way to the disk; called by rank 0 alone."""

    def close(self) -> None:
        """The training ends or failed."""


class RunListener(Listener):
    """Tells the tracker, the log, the people at the terminal and the watchdog of a run.

    Args:
        config: the run's settings.
        info: the data set's description, for class names and colors.
        process: this process among all.
        folder: the run's folder; pictures go to `panels`.
        tracker: receives curves and pictures; a `NullTracker` on ranks other than 0.
        log: this rank's log; None for none.
        watchdog: is told where this rank is; None for none.
    """

    def __init__(
        self,
        config: Config,
        info: DatasetInfo,
        *,
        process: Process,
        folder: Path,
        tracker: Tracker,
        log: RunLog | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._config = config
        self._info = info
        self._process = process
        self._panels = folder / "panels"
        self._tracker = tracker
        self._log = log or RunLog(None, rank=process.rank)
        self._watchdog = watchdog or Watchdog(process, limit=0, store=None, on_hang=lambda hang: None)
        self._progress = Progress(0, show=False)
        self._gpus = GpuWatch(process, interval=config.tracking.gpu_interval)
        self._epoch_line = ""

    def start(self, state: TrainState, *, total: int) -> None:
        """Logs again what an earlier process could not deliver, and starts the progress bar and the GPU monitors."""
        for step, values in state.untracked:
            self._tracker.log_metrics(values, step)
        self._progress = Progress(total, done=state.step, show=self._process.is_main)
        self._tracker.set_tags(self._gpus.start())

    def at(self, place: str, step: int) -> None:
        """Tells the watchdog."""
        self._watchdog.at(place, step)

    def alive(self) -> None:
        """Tells the watchdog."""
        self._watchdog.alive()

    def begin(self) -> None:
        """Starts an interval of the GPU monitors."""
        self._gpus.begin()

    def step(self, report: StepReport) -> None:
        """Moves the bar; every `train.log_every` steps adds points to the curves and a line to the log."""
        self._progress.advance(self._config.train.batch_size, loss=report.parts["loss"])
        if self._progress.steps == 1:
            self._progress.note(_first_step_line(report.seconds, self._process))
        if report.done % self._config.train.log_every == 0:
            self._log.write("step", step=report.done, waited=round(report.waited, 6), **report.parts)
            values = {loss_key(name): value for name, value in report.parts.items()}
            self._tracker.log_metrics(values | {"train/learning_rate": report.rate}, report.done)

    def end(self, *, step: int, images: int) -> None:
        """Gives the GPUs' figures to the tracker alone, and their warnings to people too."""
        metrics, warnings = self._gpus.end(images)
        self._tracker.log_metrics(metrics, step)
        self._tracker.set_tags(warnings)
        for text in warnings.values():
            self._progress.note(text)

    def notice(self, text: str, *, step: int | None = None) -> None:
        """Writes a line; the log has only what comes with a step."""
        self._progress.note(text if step is None else f"{text}: saved after step {step}")
        if step is not None:
            self._log.write("notice", step=step, message=text)

    def sample(self, masks: PseudoMask, epoch: int) -> None:
        """Draws the image into the run's folder, on whichever rank has it."""
        sample = masks.sample
        panel = draw_panel(
            sample.image.permute(1, 2, 0).numpy(),
            raw_mask=masks.raw.numpy(),
            refined_mask=masks.refined.numpy(),
            pseudo_labels=masks.pseudo_labels.numpy(),
            ground_truth=None if sample.pixel_labels is None else sample.pixel_labels.numpy(),
            palette=self._info.palette_array(),
            class_names=self._info.classes,
            title=f"{sample.key}, after epoch {epoch + 1}",
        )
        path = self._panel_path(sample.key, epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as incoming:
            panel.save(incoming, format="PNG")

    def measured(self, keys: Sequence[str], epoch: int) -> None:
        """Gives the pictures of all ranks to the tracker."""
        for key in keys if self._process.is_main else ():
            path = self._panel_path(key, epoch)
            if path.is_file():  # a damaged sample is skipped and has no picture
                with Image.open(path) as panel:
                    self._tracker.log_image(sample_series(key), panel.copy(), self._picture_step(epoch))

    def epoch(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Adds the epoch's figures to curves and log, and a picture of all classes per kind of mask."""
        self._log.write("epoch", step=state.step, epoch=state.epoch, **state.metrics)
        shown = curves(metrics, self._info.classes)
        self._tracker.log_metrics(shown | {"epoch": float(state.epoch)}, state.step)
        for group in ("pseudo_mask", "val") if self._process.is_main else ():
            scores = class_quality(metrics, group, self._info.classes)
            if any(value == value for value in scores["iou"]):
                picture = draw_class_scores(
                    **scores,
                    palette=self._info.palette_array(),
                    class_names=self._info.classes,
                    title=f"{group} after epoch {state.epoch}",
                )
                self._tracker.log_image(quality_series(group), picture, self._picture_step(state.epoch - 1))
        self._epoch_line = _epoch_line(state.epoch, self._config.train.epochs, metrics)

    def remember(self, state: TrainState) -> TrainState:
        """Adds the tracker's run and the points that it has not delivered."""
        run_id = self._tracker.run_id or state.run_id
        return replace(state, run_id=run_id, untracked=tuple(self._tracker.undelivered_points()))

    def checkpoint(self, state: TrainState) -> None:
        """Logs the checkpoint. The line about an epoch follows it, so that saving does not count as training time."""
        self._log.write("checkpoint", step=state.step, name=state.name)
        if self._epoch_line:
            self._progress.note(self._epoch_line)
            self._epoch_line = ""

    def close(self) -> None:
        """Ends the bar and the GPU monitor; the log, the tracker and the watchdog stay open."""
        self._progress.close()
        self._gpus.close()

    def _panel_path(self, key: str, epoch: int) -> Path:
        return self._panels / f"{key}-epoch-{epoch + 1:03d}.png"

    def _picture_step(self, epoch: int) -> int:
        return picture_step(epoch, every=self._config.evaluation.every)


def loss_key(name: str, prefix: str = "") -> str:
    """MLflow's name of a loss part; `loss` is the total."""
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
