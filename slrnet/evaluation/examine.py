"""Examines a checkpoint image by image: scores, confidence, and what other values of gamma would keep."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from slrnet.calibration.pseudo_labels import threshold, to_class_ids
from slrnet.checkpoints.checkpoint import Checkpoint, check_classes, restore_network
from slrnet.config import Config
from slrnet.data.batch import EvalSample
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.supervision import supervision_of
from slrnet.evaluation.masks import (
    calibrate_sample,
    gated_probs,
    protocol_name,
    pseudo_mask_protocol,
    pseudo_mask_subset,
)
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.inference.forward import Inference
from slrnet.ops.maps import resize

__all__ = [
    "Bins",
    "EvaluationTarget",
    "Examination",
    "Example",
    "GammaSweep",
    "ImageScore",
    "choose_by_iou",
    "examine",
    "measured_images",
    "read_examples",
    "sweep_gamma",
]

NUM_BINS = 10
GAMMAS = tuple(round(0.05 * step, 2) for step in range(2, 20))
"""Values of gamma that `sweep_gamma` tries beside the run's own: 0.1 to 0.95."""


@dataclass(frozen=True)
class EvaluationTarget:
    """A checkpoint, the data set to examine it on, and the checkpoint's network, ready to predict."""

    checkpoint: Checkpoint
    shards: ShardSet
    inference: Inference

    @property
    def config(self) -> Config:
        """The run's settings."""
        return self.checkpoint.config

    @classmethod
    def of(cls, checkpoint: Checkpoint, shards: ShardSet, device: torch.device | str | None = None) -> EvaluationTarget:
        """Restores the network on a device; None for a GPU if there is one.

        Raises:
            CheckpointError: the checkpoint has other classes than the data set.
        """
        check_classes(checkpoint.state, shards.info.classes, data=shards.location)
        return cls(checkpoint, shards, Inference(restore_network(checkpoint, device), checkpoint.config))

    def predict(self, sample: EvalSample) -> Tensor:
        """Returns the probabilities (K, H, W) of an image on the CPU, by the protocol of the training's validation."""
        return gated_probs(self.inference, sample).cpu()


class Bins:
    """Counts pixels, and right ones among them, by confidence.

    Attributes:
        pixels: (10,) int64 counts; bin i holds the confidences from i / 10 to (i + 1) / 10.
        right: (10,) int64 counts of the pixels whose class is the true one.
    """

    def __init__(self) -> None:
        self.pixels = np.zeros(NUM_BINS, dtype=np.int64)
        self.right = np.zeros(NUM_BINS, dtype=np.int64)
        self._confidence = np.zeros(NUM_BINS)

    def update(self, confidence: Tensor, right: Tensor) -> None:
        """Adds pixels: their confidence (n,) in [0, 1], and whether their class is the true one, (n,) bool."""
        values = confidence.double().cpu().numpy()
        places = np.clip((values * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
        self.pixels += np.bincount(places, minlength=NUM_BINS)
        self.right += np.bincount(places[right.cpu().numpy()], minlength=NUM_BINS)
        self._confidence += np.bincount(places, weights=values, minlength=NUM_BINS)

    def points(self) -> list[tuple[float, float]]:
        """Returns mean confidence and accuracy of each bin that holds pixels."""
        filled = np.flatnonzero(self.pixels)
        return [(self._confidence[i] / self.pixels[i], self.right[i] / self.pixels[i]) for i in filled]

    def error(self) -> float:
        """Returns the expected calibration error: the mean distance of confidence and accuracy; NaN without pixels."""
        total = self.pixels.sum()
        return float(np.abs(self._confidence - self.right).sum() / total) if total else float("nan")


@dataclass(frozen=True)
class ImageScore:
    """How well the mask of one image fits the true mask."""

    index: int
    """Place in the split."""
    key: str
    """Name of the image."""
    iou: npt.NDArray[np.float64]
    """(K,) by class; NaN for classes that neither mask shows."""
    true_pixels: npt.NDArray[np.int64]
    """(K,) number of pixels of the true mask by class."""

    @property
    def foreground_iou(self) -> float:
        """Mean IoU over the foreground classes that either mask shows; NaN if there is none.

        The background would hide an object that is missed: it is most of the image.
        """
        return float(np.nanmean(self.iou[1:])) if not np.isnan(self.iou[1:]).all() else float("nan")

    @property
    def main_class(self) -> int:
        """Largest foreground class of the true mask; 0 if it has none."""
        return int(self.true_pixels[1:].argmax()) + 1 if self.true_pixels[1:].any() else 0


@dataclass(frozen=True)
class Examination:
    """Scores of a split's masks, in one scale and without a CRF."""

    split: str
    protocol: str
    matrix: ConfusionMatrix
    scores: tuple[ImageScore, ...]
    confidence: Bins
    """Confidence of the predicted class: its share of the pixel's probabilities, after gating."""


@dataclass(frozen=True)
class Example:
    """One image of H x W pixels with its masks."""

    key: str
    image: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    mask: npt.NDArray[np.uint8]
    """(H, W) predicted class ids."""
    truth: npt.NDArray[np.uint8]
    """(H, W) true class ids, 255 for void."""
    foreground_iou: float
    """Mean IoU of this image, over the foreground classes that either mask shows."""


@dataclass(frozen=True)
class GammaSweep:
    """Quality of the pseudo labels that other values of gamma would give with the same weights."""

    protocol: str
    images: int
    gammas: tuple[float, ...]
    """Ascending; the run's own value is among them."""
    fidelity: tuple[float, ...]
    """By gamma: share of the pixels with a foreground label whose label is right; NaN without such pixels."""
    completeness: tuple[float, ...]
    """By gamma: share of the true foreground pixels that get their right label; NaN without such pixels."""
    confidence: Bins
    """Confidence of pixels whose most probable class is foreground: that class's probability as a share of its maximum
    over the image, which is what gamma is compared with."""

    @property
    def harmonic_means(self) -> tuple[float, ...]:
        """Harmonic mean of fidelity and completeness by gamma; NaN where it is not defined."""
        pairs = zip(self.fidelity, self.completeness, strict=True)
        return tuple(2 * one * two / (one + two) if one + two > 0 else math.nan for one, two in pairs)


def examine(target: EvaluationTarget, split: str, *, at_most: int | None = None) -> Examination:
    """Compares a split's masks with the true ones, as the training's validation does.

    `at_most` is the largest number of images, a fixed choice of those with a mask; None for all.

    Raises:
        DataError: the split does not exist or has no mask, or an image is damaged.
    """
    view = target.shards.split(split)
    chosen = choose_subset(view, view.num_samples if at_most is None else at_most, seed=0, among=view.with_masks)
    if not chosen:
        raise DataError(f"split {split!r} of {target.shards.location} has no image with a mask to compare with")
    matrix, confidence, scores = ConfusionMatrix(target.inference.model.num_classes), Bins(), []
    loader = EvalLoader(target.shards, split=split, indices=chosen)
    for index, sample in zip(chosen, tqdm(loader, desc=f"{split} masks", unit="image", disable=None), strict=True):
        assert sample.pixel_labels is not None
        probs, own = target.predict(sample), ConfusionMatrix(target.inference.model.num_classes)
        mask = probs.argmax(dim=0)
        own.update(mask, sample.pixel_labels)
        matrix.merge(own)
        scores.append(ImageScore(index, sample.key, own.iou().numpy(), own.counts.sum(dim=1).numpy()))
        valid = sample.pixel_labels != IGNORE_INDEX
        share = probs.amax(dim=0) / probs.sum(dim=0).clamp_min(1e-12)
        confidence.update(share[valid], (mask == sample.pixel_labels)[valid])
    return Examination(split, protocol_name(target.config.evaluation), matrix, tuple(scores), confidence)


def choose_by_iou(scores: Sequence[ImageScore], number: int, *, hardest: bool) -> list[ImageScore]:
    """Chooses up to `number` images with the highest foreground IoU, or the lowest with `hardest`.

    No class comes again before every class has come once. Images without true foreground are skipped.
    """
    known = [score for score in scores if score.main_class and not np.isnan(score.foreground_iou)]
    ranked = sorted(known, key=lambda one: (one.foreground_iou if hardest else -one.foreground_iou, one.key))
    turns: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
    order = sorted((next(turns[score.main_class]), place) for place, score in enumerate(ranked))
    return [ranked[place] for place in sorted(place for _, place in order[:number])]


def read_examples(target: EvaluationTarget, split: str, scores: Sequence[ImageScore]) -> list[Example]:
    """Reads and predicts images again, in the order of `scores`.

    Raises:
        DataError: an image is damaged.
    """
    ious = {score.index: score.foreground_iou for score in scores}
    indices = sorted(ious)
    examples: dict[str, Example] = {}
    for index, sample in zip(indices, EvalLoader(target.shards, split=split, indices=indices), strict=True):
        assert sample.pixel_labels is not None
        mask = target.predict(sample).argmax(dim=0).numpy().astype(np.uint8)
        pixels = sample.image.permute(1, 2, 0).contiguous().numpy()
        examples[sample.key] = Example(sample.key, pixels, mask, sample.pixel_labels.numpy(), ious[index])
    return [examples[score.key] for score in scores]


def measured_images(target: EvaluationTarget) -> list[int]:
    """Returns the indices of the training images whose pseudo masks the run measures."""
    view = target.shards.split(target.config.data.train_split)
    return list(pseudo_mask_subset(view, supervision_of(target.config, target.shards), target.config))


def sweep_gamma(target: EvaluationTarget, *, at_most: int | None = None) -> GammaSweep:
    """Thresholds the refined masks of the run's measured training images with many values of gamma.

    Background threshold and floor stay the run's own. `at_most` takes the first images; None for all.

    Raises:
        DataError: no training image has a mask to compare with, or one is damaged.
    """
    config = target.config
    chosen = measured_images(target)[:at_most]
    if not chosen:
        raise DataError(
            f"no training image of {target.shards.location} has a mask to compare pseudo labels with, or "
            "evaluation.pseudo_mask_images is 0"
        )
    gammas = tuple(sorted({*GAMMAS, config.calibration.confidence_threshold}))
    matrices = {gamma: ConfusionMatrix(target.inference.model.num_classes) for gamma in gammas}
    confidence = Bins()
    loader = EvalLoader(target.shards, split=config.data.train_split, indices=chosen)
    for sample in tqdm(loader, desc="pseudo labels", unit="image", disable=None):
        _count_sample(target, sample, matrices, confidence)
    counts = torch.stack([matrix.counts for matrix in matrices.values()])  # (gammas, true, predicted)
    right = counts.diagonal(dim1=1, dim2=2)[:, 1:].sum(dim=1)
    labeled, true = counts[:, :, 1:-1].sum(dim=(1, 2)), counts[:, 1:].sum(dim=(1, 2))
    fidelity, completeness = (tuple((right / total).tolist()) for total in (labeled, true))
    return GammaSweep(pseudo_mask_protocol(config), len(chosen), gammas, fidelity, completeness, confidence)


def _count_sample(
    target: EvaluationTarget, sample: EvalSample, matrices: Mapping[float, ConfusionMatrix], confidence: Bins
) -> None:
    """Adds the pixels of an image to the confusion matrices of the pseudo labels by gamma, and to the bins."""
    config, truth = target.config, sample.pixel_labels
    assert truth is not None
    calibrated = calibrate_sample(target.inference, sample)
    probs, classes = resize(calibrated.refined, (truth.shape[0], truth.shape[1])).cpu(), calibrated.classes.cpu()
    highest, channel = probs[0].max(dim=0)
    share = highest / probs[0].amax(dim=(1, 2)).clamp_min(1e-12)[channel]
    best = to_class_ids(channel[None], classes)[0]
    foreground = (truth != IGNORE_INDEX) & (best > 0)
    confidence.update(share[foreground], (best == truth)[foreground])
    settings = config.calibration
    for gamma, matrix in matrices.items():
        labels = threshold(
            probs,
            confidence_threshold=gamma,
            background_threshold=settings.background_threshold,
            floor=settings.floor,
            rule=settings.rule,
        )
        matrix.update(to_class_ids(labels, classes)[0], truth)
