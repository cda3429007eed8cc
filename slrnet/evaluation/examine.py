"""Looks into a checkpoint's masks image by image: scores, confidence, and what other values of gamma would keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from slrnet.calibration.pseudo_labels import threshold, to_class_ids
from slrnet.checkpoints.checkpoint import Checkpoint, check_classes, restore_network
from slrnet.data.batch import EvalSample
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.supervision import supervision_of
from slrnet.evaluation.masks import calibrate_sample, gated_probs, pseudo_mask_subset
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.evaluation.protocols import protocol_name, pseudo_mask_protocol
from slrnet.models.network import Network, Normalize
from slrnet.ops.maps import resize

__all__ = [
    "Bins",
    "Examination",
    "Example",
    "GammaSweep",
    "ImageScore",
    "Subject",
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
class Subject:
    """A checkpoint's network, ready to predict, and the data set that it is looked at on."""

    checkpoint: Checkpoint
    shards: ShardSet
    model: Network
    normalize: Normalize
    device: torch.device

    @classmethod
    def of(cls, checkpoint: Checkpoint, shards: ShardSet, device: torch.device | str | None = None) -> Subject:
        """Restores the network.

        Args:
            checkpoint: to look at.
            shards: the data set.
            device: for the network; None: a GPU where there is one.

        Raises:
            CheckpointError: the checkpoint is of other classes.
        """
        check_classes(checkpoint.state, shards.info.classes, data=shards.location)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(checkpoint, shards, *restore_network(checkpoint, place), place)


class Bins:
    """Pixels by confidence: how many there are, how many of them are right.

    Attributes:
        pixels: (10,) int64 counts; bin i holds the confidences from i / 10 to (i + 1) / 10.
        right: (10,) int64 of them, those whose class is the true one.
    """

    def __init__(self) -> None:
        self.pixels = np.zeros(NUM_BINS, dtype=np.int64)
        self.right = np.zeros(NUM_BINS, dtype=np.int64)
        self._confidence = np.zeros(NUM_BINS)

    def update(self, confidence: Tensor, right: Tensor) -> None:
        """Adds pixels: their confidence in [0, 1] and whether each is right, two tensors of one shape (n,)."""
        values = confidence.double().cpu().numpy()
        places = np.clip((values * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
        self.pixels += np.bincount(places, minlength=NUM_BINS)
        self.right += np.bincount(places[right.cpu().numpy()], minlength=NUM_BINS)
        self._confidence += np.bincount(places, weights=values, minlength=NUM_BINS)

    def points(self) -> list[tuple[float, float]]:
        """Mean confidence and accuracy of each bin that holds pixels."""
        held = np.flatnonzero(self.pixels)
        return [(self._confidence[i] / self.pixels[i], self.right[i] / self.pixels[i]) for i in held]

    def error(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy over all pixels; NaN without any."""
        total = self.pixels.sum()
        return float(np.abs(self._confidence - self.right).sum() / total) if total else float("nan")


@dataclass(frozen=True)
class ImageScore:
    """How well one image's mask fits the true one."""

    index: int
    """Place in the split."""
    key: str
    """Name of the image."""
    iou: npt.NDArray[np.float64]
    """(K,) by class, NaN for those that neither mask shows."""
    true_pixels: npt.NDArray[np.int64]
    """(K,) pixels of the true mask by class."""

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that either mask shows; NaN where the true mask is void throughout."""
        return float(np.nanmean(self.iou)) if not np.isnan(self.iou).all() else float("nan")

    @property
    def main_class(self) -> int:
        """The largest foreground class of the true mask; 0 where it has none."""
        return int(self.true_pixels[1:].argmax()) + 1 if self.true_pixels[1:].any() else 0


@dataclass(frozen=True)
class Examination:
    """What the masks of a split are worth, in one scale and without a CRF."""

    split: str
    protocol: str
    matrix: ConfusionMatrix
    scores: tuple[ImageScore, ...]
    confidence: Bins
    """Of the predicted class: its share of the pixel's probabilities, after gating."""


@dataclass(frozen=True)
class Example:
    """One image of H x W pixels with its masks."""

    key: str
    image: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    mask: npt.NDArray[np.uint8]
    """(H, W) predicted class ids."""
    truth: npt.NDArray[np.uint8]
    """(H, W) true class ids, 255 where void."""
    miou: float
    """Of this image, over the classes that either mask shows."""


@dataclass(frozen=True)
class GammaSweep:
    """What the pseudo labels of training images would be with other values of gamma and the same weights."""

    protocol: str
    images: int
    gammas: tuple[float, ...]
    """Ascending; the run's own is among them."""
    fidelity: tuple[float, ...]
    """By gamma: of the pixels that get a foreground label, the share whose label is right; NaN without such pixels."""
    completeness: tuple[float, ...]
    """By gamma: of the true foreground pixels, the share that gets its right label; NaN without such pixels."""
    confidence: Bins
    """Of the most probable class where it is a foreground class: its probability as a share of its maximum over the
    image, which is what gamma is compared with."""


def examine(subject: Subject, split: str, *, at_most: int | None = None) -> Examination:
    """Compares a split's masks with the true ones, as the training's validation does.

    Args:
        subject: network and data.
        split: of the data set.
        at_most: images, a fixed choice of those with a mask; None for all.

    Raises:
        DataError: there is no such split, it has no mask, or an image is damaged.
    """
    config = subject.checkpoint.config
    view = subject.shards.split(split)
    chosen = choose_subset(view, view.num_samples if at_most is None else at_most, seed=0, among=view.with_masks)
    if not chosen:
        raise DataError(f"split {split!r} of {subject.shards.location} has no image with a mask to compare with")
    matrix, confidence, scores = ConfusionMatrix(subject.model.num_classes), Bins(), []
    loader = EvalLoader(subject.shards, split=split, indices=chosen)
    for index, sample in zip(chosen, tqdm(loader, desc=f"{split} masks", unit="image", disable=None), strict=True):
        assert sample.pixel_labels is not None
        probs, own = _gated_probs(subject, sample), ConfusionMatrix(subject.model.num_classes)
        mask = probs.argmax(dim=0)
        own.update(mask, sample.pixel_labels)
        matrix.merge(own)
        scores.append(ImageScore(index, sample.key, own.iou().numpy(), own.counts.sum(dim=1).numpy()))
        valid = sample.pixel_labels != IGNORE_INDEX
        share = probs.amax(dim=0) / probs.sum(dim=0).clamp_min(1e-12)
        confidence.update(share[valid], (mask == sample.pixel_labels)[valid])
    return Examination(split, protocol_name(config.evaluation), matrix, tuple(scores), confidence)


def choose_by_iou(scores: Sequence[ImageScore], number: int, *, hardest: bool) -> list[ImageScore]:
    """The images with the highest mIoU, or the lowest; another image of a class only once every class has had its turn.

    Args:
        scores: of a split's images; those without any class, or without foreground in the truth, are passed over.
        number: how many at most.
        hardest: the lowest.
    """
    known = [score for score in scores if score.main_class and not np.isnan(score.miou)]
    ranked = sorted(known, key=lambda score: (score.miou if hardest else -score.miou, score.key))
    taken: Counter[int] = Counter()
    turns = []
    for score in ranked:
        turns.append(taken[score.main_class])
        taken[score.main_class] += 1
    order = sorted(range(len(ranked)), key=lambda place: turns[place])  # stable: by IoU within a turn
    chosen = sorted(order[:number])
    return [ranked[place] for place in chosen]


def read_examples(subject: Subject, split: str, scores: Sequence[ImageScore]) -> list[Example]:
    """Reads and predicts images again, in the order of `scores`.

    Raises:
        DataError: an image is damaged.
    """
    indices = sorted({score.index for score in scores})
    found: dict[str, Example] = {}
    known = {score.key: score.miou for score in scores}
    for sample in EvalLoader(subject.shards, split=split, indices=indices):
        assert sample.pixel_labels is not None
        mask = _gated_probs(subject, sample).argmax(dim=0).numpy().astype(np.uint8)
        pixels = sample.image.permute(1, 2, 0).contiguous().numpy()
        found[sample.key] = Example(sample.key, pixels, mask, sample.pixel_labels.numpy(), known[sample.key])
    return [found[score.key] for score in scores]


def measured_images(subject: Subject) -> list[int]:
    """Rows of the training split whose pseudo masks the run measures: masks that it does not train on, a subset."""
    config = subject.checkpoint.config
    view = subject.shards.split(config.data.train_split)
    return list(pseudo_mask_subset(view, supervision_of(config, subject.shards), config))


def sweep_gamma(subject: Subject, *, at_most: int | None = None) -> GammaSweep:
    """Thresholds the refined masks of the run's measured training images with many values of gamma.

    Background threshold and floor stay the run's own.

    Args:
        subject: network and data.
        at_most: images, the first ones; None for all that the run measures.

    Raises:
        DataError: no training image has a mask to compare with, or one is damaged.
    """
    config = subject.checkpoint.config
    chosen = measured_images(subject)[:at_most]
    if not chosen:
        raise DataError(
            f"no training image of {subject.shards.location} has a mask to compare pseudo labels with, or "
            "evaluation.pseudo_mask_images is 0"
        )
    gammas = tuple(sorted({*GAMMAS, config.calibration.confidence_threshold}))
    counts, confidence = np.zeros((len(gammas), 3)), Bins()
    loader = EvalLoader(subject.shards, split=config.data.train_split, indices=chosen)
    for sample in tqdm(loader, desc="pseudo labels", unit="image", disable=None):
        counts += _count_sample(subject, sample, gammas, confidence)
    right, labelled, true = counts.T
    with np.errstate(invalid="ignore"):
        fidelity, completeness = right / labelled, right / true
    return GammaSweep(
        pseudo_mask_protocol(config),
        len(chosen),
        gammas,
        tuple(fidelity.tolist()),
        tuple(completeness.tolist()),
        confidence,
    )


def _count_sample(
    subject: Subject, sample: EvalSample, gammas: Sequence[float], confidence: Bins
) -> npt.NDArray[np.float64]:
    """By gamma: right foreground labels, foreground labels, true foreground pixels."""
    config = subject.checkpoint.config
    calibrated = calibrate_sample(
        subject.model, sample, config=config, normalize=subject.normalize, device=subject.device
    )
    assert sample.pixel_labels is not None
    truth = sample.pixel_labels
    probs = resize(calibrated.refined, (truth.shape[0], truth.shape[1])).cpu()
    classes, valid = calibrated.classes.cpu(), truth != IGNORE_INDEX
    best = to_class_ids(probs.argmax(dim=1), classes)[0]
    share = (probs / probs.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12))[0]
    share = share.gather(0, probs[0].argmax(dim=0, keepdim=True))[0]
    shown = valid & (best > 0)
    confidence.update(share[shown], (best == truth)[shown])
    rows = []
    for gamma in gammas:
        labels = threshold(
            probs,
            confidence_threshold=gamma,
            background_threshold=config.calibration.background_threshold,
            floor=config.calibration.floor,
        )
        ids = to_class_ids(labels, classes)[0]
        foreground = valid & (ids > 0) & (ids != IGNORE_INDEX)
        right = int((foreground & (ids == truth)).sum())
        rows.append((right, int(foreground.sum()), int((valid & (truth > 0)).sum())))
    return np.array(rows, dtype=np.float64)


def _gated_probs(subject: Subject, sample: EvalSample) -> Tensor:
    """(K, H, W) on the CPU, by the protocol of the training's validation."""
    config = subject.checkpoint.config
    return gated_probs(subject.model, sample, config=config, normalize=subject.normalize, device=subject.device).cpu()
