"""Reads a run: checkpoint, curves, environment, pictures, evaluations; and says why something is missing."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from slrnet.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint, read_state
from slrnet.config import Config
from slrnet.data.images import open_image
from slrnet.evaluation.masks import protocol_name, pseudo_mask_protocol
from slrnet.launch.evaluation import training_run
from slrnet.recipes import RECIPES, get_recipe
from slrnet.storage.files import read_json
from slrnet.tracking.protocol import RunHandle, metric_key
from slrnet.tracking.reader import logged_pictures, metric_history, run_tags

__all__ = ["Run", "find_records", "metrics_by_protocol", "read_run", "training_command", "val_key"]

Curve = list[tuple[float, float]]
"""Points of a curve: epochs, and values by epoch."""

_PANEL = re.compile(r"(?P<key>.+)-epoch-(?P<epoch>\d+)\.png")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training, as far as it can be read."""

    name: str
    """Name of the run's folder."""
    checkpoint: Checkpoint
    """The checkpoint that the page is about."""
    curves: dict[str, Curve]
    """By the names of the metrics in MLflow."""
    curves_from: str
    """Source of the curves, in words."""
    environment: dict[str, str]
    """Versions and commit of the training; empty if its MLflow run is out of reach."""
    panels: dict[str, dict[int, Image.Image]]
    """Pictures of the way from mask to pseudo label, by image and epoch."""
    panels_from: str
    """Where the pictures are from, or why there are none."""
    evaluations: dict[Path, dict[str, Any]]
    """Contents of the run's `evaluation.json` files."""

    @property
    def protocols(self) -> dict[str, str]:
        """Names of the protocols of the metrics `val` and `pseudo_mask`."""
        config = self.checkpoint.config
        return {"val": protocol_name(config.evaluation), "pseudo_mask": pseudo_mask_protocol(config)}


def read_run(path: Path) -> Run:
    """Reads a checkpoint, or a run's folder with its best one, and what MLflow holds of the training.

    Raises:
        CheckpointError: there is no complete checkpoint.
        ValueError: a record of the run is damaged.
    """
    checkpoint = load_checkpoint(path.expanduser())
    place = checkpoint.path.resolve()
    folder = place.parents[1] if place.parent.name == "checkpoints" else None
    handle = training_run(checkpoint) if folder else None
    curves, curves_from = _curves(checkpoint, handle)
    panels, panels_from = _panels(folder, handle, checkpoint.config)
    wanted = ("git_commit", "git_state", "version.", "slrnet.world_size", "slrnet.global_batch")
    tags = sorted(run_tags(handle).items()) if handle else []
    return Run(
        name=(folder or place).name,
        checkpoint=checkpoint,
        curves=curves,
        curves_from=curves_from,
        environment={key: value for key, value in tags if key.startswith(wanted)},
        panels=panels,
        panels_from=panels_from,
        evaluations=find_records(folder / "evaluations", "evaluation.json") if folder else {},
    )


def find_records(folder: Path, name: str) -> dict[Path, dict[str, Any]]:
    """Reads all files `name` below a folder, by path; there are none if the folder does not exist.

    Raises:
        ValueError: a file is no JSON object.
    """
    records: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.rglob(name)):
        try:
            record = read_json(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; measure again, into another folder") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} holds no JSON object; measure again, into another folder")
        records[path] = record
    return records


def metrics_by_protocol(record: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The metrics of an `evaluation.json`, with those before a CRF."""
    earlier = record.get("before_crf")
    parts = {record.get("protocol", "unknown"): record.get("metrics")} | (earlier if isinstance(earlier, dict) else {})
    return {
        str(protocol): {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for protocol, metrics in parts.items()
        if isinstance(metrics, dict)
    }


def val_key(config: Config) -> str:
    """Returns the name of the validation's mIoU in MLflow and in a checkpoint's metrics."""
    return metric_key("val", f"miou_{protocol_name(config.evaluation)}")


def training_command(checkpoint: Checkpoint) -> str:
    """Returns a command that trains with a checkpoint's settings: the recipe, and every field that differs from it.

    The command that started the training is not recorded; this one gives the same settings.
    """
    config = checkpoint.config
    known = config.recipe in RECIPES
    words = ["slrnet", "train", *(["--recipe", config.recipe] if known else ["--config", "config.json"])]
    words += ["--data", config.data.path or "SHARDS", "--num-workers", str(checkpoint.state.world_size)]
    if known:
        usual = get_recipe(config.recipe).flat()
        for key, value in config.flat().items():
            if value != usual[key] and not key.startswith("tracking.") and key != "data.path":
                words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def _curves(checkpoint: Checkpoint, handle: RunHandle | None) -> tuple[dict[str, Curve], str]:
    """Returns the run's curves over epochs, from MLflow or else from the checkpoints, and their source."""
    keys = [f"pseudo_mask/{name}" for name in ("miou", "mfdr", "mfnr", "coverage")]
    keys += [val_key(checkpoint.config), "val/mfdr", "val/mfnr", "train/epoch_loss", "train/loss"]
    if handle and (steps := _steps_per_epoch(checkpoint, handle)):
        # A step that was logged again after a restart has its last value.
        values = {key: dict(metric_history(handle, key)) for key in keys}
        curves = {key: [(step / steps, value) for step, value in points.items()] for key, points in values.items()}
        return curves, f"MLflow run {handle.run_id}"
    kept = {checkpoint.state.epoch: checkpoint.state.metrics}
    for place in checkpoint.path.resolve().parent.glob("checkpoint-*"):
        with suppress(CheckpointError):  # damaged
            state = read_state(place)
            kept |= {state.epoch: state.metrics} if state.metrics else {}  # none within an epoch
    epochs = sorted(kept.items())
    points = {key: [(float(epoch), values[key]) for epoch, values in epochs if key in values] for key in keys}
    return points, "the checkpoints that were kept; the MLflow run with the other epochs is out of reach"


def _steps_per_epoch(checkpoint: Checkpoint, handle: RunHandle) -> float:
    """Returns the steps of an epoch; from the run's curve if the checkpoint is within an epoch, 0 if unknown."""
    state = checkpoint.state
    if not state.unfinished:
        return state.step / state.epoch if state.epoch else 0.0  # 0: weights that were converted
    ends = metric_history(handle, "epoch")
    return ends[-1][0] / ends[-1][1] if ends else 0.0


def _panels(
    folder: Path | None, handle: RunHandle | None, config: Config
) -> tuple[dict[str, dict[int, Image.Image]], str]:
    panels: dict[str, dict[int, Image.Image]] = {}
    for file in sorted((folder / "panels").glob("*.png")) if folder else ():
        if match := _PANEL.fullmatch(file.name):
            with open_image(file) as panel:
                panels.setdefault(match["key"], {})[int(match["epoch"])] = panel.convert("RGB")
    if panels:
        return panels, "the run's folder panels"
    for (key, step), picture in (logged_pictures(handle) if handle else {}).items():  # MLflow's grid counts from 0
        panels.setdefault(key, {})[min((step + 1) * config.evaluation.every, config.train.epochs)] = picture
    if panels:
        return panels, "the pictures in MLflow"
    where = "beside the checkpoint and its MLflow run has none" if handle else "and no MLflow run can be reached"
    return {}, f"there is no folder panels with pictures {where} (evaluation.panel_images says how many are drawn)"
