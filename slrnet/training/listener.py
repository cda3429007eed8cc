"""What a training tells about itself, and what a run does with it: curves, pictures, logs, progress, watchdog."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import torch

from slrnet.checkpoints.checkpoint import TrainState
from slrnet.checkpoints.run_store import validation_scores
from slrnet.config import Config
from slrnet.data.images import open_image
from slrnet.data.manifest import DataError, DatasetInfo
from slrnet.distributed.process import Process
from slrnet.distributed.watchdog import Watchdog
from slrnet.evaluation.masks import PseudoMask
from slrnet.storage import shown
from slrnet.storage.files import written_whole
from slrnet.tracking.progress import Progress
from slrnet.tracking.protocol import SAMPLES, Tracker
from slrnet.tracking.run_log import RunLog
from slrnet.tracking.summary import class_quality, curves
from slrnet.viz.overlay import draw_overlay
from slrnet.viz.panels import draw_class_scores, draw_panel

__all__ = ["Listener", "RunListener", "loss_key"]

NO_PARTS = ("loss", "skip_share", "valid_share", "loss_scale")
"""What a step tells beside the parts of its loss."""


class Listener:
    """Hears what a training does; its methods do nothing. Every rank calls them, in the same order on all ranks."""

    def start(self, state: TrainState, *, total: int) -> None:
        """The training starts or continues at `state`; it has `total` optimizer steps."""

    def begin(self) -> None:
        """The steps of an epoch begin."""

    def at(self, place: str, step: int) -> None:
        """This rank comes to a place, such as "going forward", in step `step`, from 0; or still works there."""

    def meet(self) -> None:
        """This rank comes to where it waits for the others, within a place."""

    def step(self, done: int, parts: Mapping[str, float], *, rate: float, waited: float, seconds: float) -> None:
        """Optimizer step `done`, from 1, is finished.

        It had a `loss` and its parts, averaged over accumulation steps and ranks, and this learning rate of the
        pretrained weights. This rank took `seconds` seconds for it, of which it waited `waited` for the batch.
        """

    def end(self, *, step: int, images: int) -> None:
        """The steps of an epoch end, `step` of them in all; this rank took `images` images since they began."""

    def notice(self, text: str, *, step: int | None = None) -> None:
        """Something that people should know; with `step`, why the training may stop soon, and the step it saved."""

    def measured(self, masks: PseudoMask, epoch: int) -> None:
        """This rank measured an image that people should see, after epoch `epoch`, from 0."""

    def epoch(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """All ranks finished and measured an epoch; its figures by their MLflow names, NaN included."""

    def checkpoint(self, state: TrainState) -> TrainState:
        """A checkpoint will be written: of this state and what this listener needs to continue. Rank 0 alone calls."""
        return state

    def close(self) -> None:
        """The training ends or failed."""


@dataclass(eq=False)
class RunListener(Listener):
    """Tells the tracker, the log, the people at the terminal and the watchdog of a run."""

    config: Config
    info: DatasetInfo
    _: KW_ONLY
    process: Process
    folder: Path
    """The run's folder; pictures go to `panels` and `history`."""
    tracker: Tracker
    """Receives curves and pictures; a `NullTracker` on ranks other than 0."""
    log: RunLog = field(default_factory=lambda: RunLog(None, rank=0))
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(Process(), limit=0, store=None, on_hang=shown.say))

    def __post_init__(self) -> None:
        self._progress = Progress(0, show=False)
        from slrnet.tracking.gpu_monitor import GpuWatch  # only runs that tell people need nvidia-ml-py

        self._gpus = GpuWatch(self.process, interval=self.config.tracking.gpu_interval)

    def start(self, state: TrainState, *, total: int) -> None:
        """Logs again what an earlier process could not deliver, and starts the progress bar and the GPU monitors."""
        for step, values in state.untracked:
            self.tracker.log_metrics(values, step)
        epochs = self.config.train.epochs
        self._progress = Progress(total, done=state.step, epochs=epochs, show=self.process.is_main)
        self.tracker.set_tags(self._gpus.start())

    def at(self, place: str, step: int) -> None:
        """Tells the watchdog."""
        self.watchdog.at(place, step)

    def meet(self) -> None:
        """Tells the watchdog."""
        self.watchdog.meet()

    def begin(self) -> None:
        """Starts an interval of the GPU monitors; measuring and saving before it did not count as training."""
        self._progress.note()
        self._gpus.begin()

    def step(self, done: int, parts: Mapping[str, float], *, rate: float, waited: float, seconds: float) -> None:
        """Moves the bar; every `train.log_every` steps adds points to the curves and a line to the log."""
        self._progress.advance(self.config.train.batch_size, loss=parts["loss"])
        if self._progress.steps == 1:
            self._progress.note(_first_step_line(seconds, self.process))
        if done % self.config.train.log_every == 0:
            self.log.write("step", step=done, waited=round(waited, 6), **parts)
            values = {loss_key(name): value for name, value in parts.items()}
            self.tracker.log_metrics(values | {"train/learning_rate": rate}, done)

    def end(self, *, step: int, images: int) -> None:
        """Gives the GPUs' figures to the tracker alone, and their warnings to people too."""
        metrics, warnings = self._gpus.end(images)
        self.tracker.log_metrics(metrics, step)
        self.tracker.set_tags(warnings)
        for text in warnings.values():
            self._progress.note(text)

    def notice(self, text: str, *, step: int | None = None) -> None:
        """Writes a line; the log has only what comes with a step."""
        self._progress.note(text if step is None else f"{text}: saved after step {step}")
        if step is not None:
            self.log.write("notice", step=step, message=text)

    def measured(self, masks: PseudoMask, epoch: int) -> None:
        """Draws the image into the run's folder, on whichever rank has it: all stages, and the pseudo label alone."""
        sample = masks.sample
        stages = {"raw mask": masks.raw, "refined mask": masks.refined, "pseudo label": masks.pseudo_labels}
        if sample.pixel_labels is not None:
            stages["ground truth"] = sample.pixel_labels
        image = sample.image.permute(1, 2, 0).contiguous().numpy()
        panel = draw_panel(
            image,
            {caption: mask.numpy() for caption, mask in stages.items()},
            self.info,
            title=f"{sample.key}, after epoch {epoch + 1}",
        )
        small = draw_overlay(image, stages["pseudo label"].numpy(), self.info.palette_array())
        try:
            for kind, picture in (("panels", panel), ("history", small)):
                with written_whole(self.folder / kind / f"{sample.key}{_panel_ending(epoch)}") as incoming:
                    picture.save(incoming, format="PNG")
        except OSError as error:
            self.notice(f"the picture of {sample.key} cannot be written, and is left out: {error}")

    def epoch(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Adds the epoch's figures to curves and log; then the pictures of all ranks, and one per kind of mask."""
        self.log.write("epoch", step=state.step, epoch=state.epoch, **state.metrics)
        shown = curves(metrics, self.info.classes)
        self.tracker.log_metrics(shown | {"epoch": float(state.epoch)}, state.step)
        self._progress.note(_epoch_line(state.epoch, self.config.train.epochs, metrics))
        self._progress.score = _score(metrics) or self._progress.score
        if self.process.is_main:
            self._log_pictures(state.epoch - 1, metrics)

    def _log_pictures(self, epoch: int, metrics: Mapping[str, float]) -> None:
        step = epoch // self.config.evaluation.every  # counts measurements from 0, where the page's sliders start
        panels, ending = self.folder / "panels", _panel_ending(epoch)
        for path in sorted(panels.rglob(f"[!.]*{ending}")):
            key = path.relative_to(panels).as_posix().removesuffix(ending)
            try:
                with open_image(path) as panel:
                    self.tracker.log_image(SAMPLES + key, panel.copy(), step)
            except DataError as error:
                self.notice(f"the picture {error}, and is left out")
        for group in ("pseudo_mask", "val"):
            scores = class_quality(metrics, group, self.info.classes)
            if any(value == value for value in scores["iou"]):
                picture = draw_class_scores(scores, self.info, title=f"{group} after epoch {epoch + 1}")
                self.tracker.log_image(f"quality/{group}", picture, step)

    def checkpoint(self, state: TrainState) -> TrainState:
        """Logs the checkpoint; adds the tracker's run and the points that it has not delivered."""
        self.log.write("checkpoint", step=state.step, name=state.name)
        run_id = self.tracker.run_id or state.run_id
        return replace(state, run_id=run_id, untracked=tuple(self.tracker.undelivered_points()))

    def close(self) -> None:
        """Ends the bar and the GPU monitor; the log, the tracker and the watchdog stay open."""
        self._progress.close()
        self._gpus.close()


def _panel_ending(epoch: int) -> str:
    return f"-epoch-{epoch + 1:03d}.png"


def loss_key(name: str, prefix: str = "") -> str:
    """MLflow's name of a loss part; the total and what are no parts keep their names."""
    return f"train/{prefix}{name}" if name in NO_PARTS else f"train/{prefix}loss_{name}"


def _first_step_line(seconds: float, process: Process) -> str:
    if process.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(process.device) / 2**30:.2f} GiB of GPU memory at most"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory at most"
    return f"first step: {seconds:.2f} s, {memory}, on {process.device}"


def _score(metrics: Mapping[str, float]) -> str:
    """The validation's mIoU, in short; empty if it was not measured."""
    scores = validation_scores(metrics)
    return f"val mIoU {100 * scores[0]:.1f} %" if scores and scores[0] == scores[0] else ""


def _epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    shown = [f"loss {metrics['train/epoch_loss']:.3f}", f"{metrics['speed/images_per_second']:.2f} images/s"]
    shown.append(f"waiting for data {100 * metrics['speed/data_wait_fraction']:.1f} %")
    if "train/epoch_valid_share" in metrics:
        shown.append(f"valid pseudo labels {100 * metrics['train/epoch_valid_share']:.0f} %")
    for name in ("pseudo_mask/miou", "pseudo_mask/coverage", "val/mfdr", "val/mfnr"):
        if name in metrics:
            shown.append(f"{name} {100 * metrics[name]:.1f} %")
    shown += [f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name.startswith("val/miou_")]
    return f"epoch {epoch}/{epochs}: " + ", ".join(shown)
