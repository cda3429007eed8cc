"""Measures a run's checkpoint for the report: masks, codes, and what another gamma would keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slrnet.checkpoints.checkpoint import Checkpoint
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.evaluation.examine import (
    EvaluationTarget,
    Examination,
    Example,
    GammaSweep,
    choose_by_iou,
    examine,
    measured_images,
    read_examples,
    sweep_gamma,
)
from slrnet.storage.remote import is_remote
from slrnet.tools.codes import code_maps, draw_code_maps, low_rank_module

__all__ = ["Measurements", "gamma_advice", "measure_run"]

CLEAR_GAIN = 0.005
"""Smallest gain in the harmonic mean of fidelity and completeness for which the advice is another gamma."""


@dataclass
class Measurements:
    """What a checkpoint gives on a data set, and why a part is absent."""

    examination: Examination | None = None
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Images by `Best` and `Worst`."""
    sweep: GammaSweep | None = None
    code_pictures: dict[str, Image.Image] = field(default_factory=dict)
    palette: Any = None
    """(256, 3) uint8 colors by class id."""
    absent: dict[str, str] = field(default_factory=dict)
    """Reasons by part: `masks`, `sweep`, `codes`."""
    note: str = ""
    """A warning about the data."""


def measure_run(
    checkpoint: Checkpoint, *, data: Path | None, device: str | None, images: int, at_most: int | None
) -> Measurements:
    """Measures a checkpoint on a data set, or on that of its training if it is still there.

    Args:
        checkpoint: the run's checkpoint.
        data: folder with shards; None for those of the training.
        device: the network's device; None for a GPU if there is one.
        images: number of best images, of worst images, and of images with code maps.
        at_most: largest number of validation images, and of training images, to measure; None for all.

    Raises:
        DataError: the data set is damaged or has other classes.
    """
    config = checkpoint.config
    location = str(data or config.data.path)
    if data is None and not is_remote(location) and not (Path(location) / "dataset.json").is_file():
        reason = "the training's data are not here; give their folder with --data"
        return Measurements(absent={"masks": reason, "codes": reason, "sweep": reason})
    shards = load_dataset(location)
    target = EvaluationTarget.of(checkpoint, shards, device)
    measured = Measurements(palette=shards.info.palette_array())
    if shards.info.fingerprint != checkpoint.state.data_fingerprint:
        measured.note = (
            f"The data in {shards.location} are not those of the training: their fingerprints differ, although the "
            "classes are the same."
        )
    split = config.data.val_split
    if reason := _no_masks(shards, split):
        measured.absent |= {"masks": reason, "codes": reason}
    else:
        measured.examination = examine(target, split, at_most=at_most)
        for title, hardest in (("Best", False), ("Worst", True)):
            chosen = choose_by_iou(measured.examination.scores, images, hardest=hardest)
            measured.examples[title] = read_examples(target, split, chosen)
        try:
            low_rank_module(target.inference.model)
        except ValueError as error:
            measured.absent["codes"] = str(error)
        else:
            for example in measured.examples["Best"]:
                maps = code_maps(target.inference, example.image)
                measured.code_pictures[example.key] = draw_code_maps(example.image, maps, checkpoint.state.classes)
    reason = _no_masks(shards, config.data.train_split)
    if not reason and not config.evaluation.pseudo_mask_images:
        reason = "evaluation.pseudo_mask_images is 0: the run measures no pseudo masks"
    if not reason and not measured_images(target):
        reason = "the run trains on every true mask of its training images: none is left to compare with"
    if reason:
        measured.absent["sweep"] = reason
    else:
        measured.sweep = sweep_gamma(target, at_most=at_most)
    return measured


def gamma_advice(sweep: GammaSweep, gamma: float) -> str:
    """Says whether the pseudo labels of another value suggest it in place of `gamma`, the run's own."""
    means = sweep.harmonic_means
    if all(map(math.isnan, means)):
        return "No gamma that was tried gives any foreground label, so that the curve suggests nothing."
    own, best = sweep.gammas.index(gamma), int(np.nanargmax(means))

    def describe(place: int) -> str:
        return (
            f"{100 * sweep.fidelity[place]:.1f} % of the foreground labels are right, and "
            f"{100 * sweep.completeness[place]:.1f} % of the foreground gets its right label"
        )

    now = f"At the run's gamma of {gamma:g}, {describe(own)}."
    if means[best] - (0 if math.isnan(means[own]) else means[own]) < CLEAR_GAIN:
        advice = "No other gamma raises the harmonic mean of both by half a point: leave it."
    else:
        advice = (
            f"Their harmonic mean is highest at {sweep.gammas[best]:g}: {describe(best)}. So try "
            f"calibration.confidence_threshold={sweep.gammas[best]:g}, a {'lower' if best < own else 'higher'} gamma."
        )
    return f"{now} {advice} The weights were trained with {gamma:g}; only a training with another gamma can prove it."


def _no_masks(shards: ShardSet, split: str) -> str:
    """Why a split has no masks to compare with; empty if it has some."""
    if split in shards.splits and len(shards.split(split).with_masks):
        return ""
    return f"the data in {shards.location} have no masks in split {split!r} to compare with"
