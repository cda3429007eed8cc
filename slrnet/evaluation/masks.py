"""Measures masks during and after training: predicted masks of a split, and pseudo masks of training images.

Every figure names its protocol: a score is comparable only with scores of the same name. `ss` is one view, no flip, no
CRF, at the size nearest to the image's own that fits the output stride: 377 x 497 for 375 x 500 after crops of 321 (see
`evaluation.resizing`). Pseudo masks are the refined, fused masks of all configured views, without flip and color
distortion. Image labels gate them, as in the paper's Table 1, if the training has those labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slrnet.calibration.pseudo_labels import (
    Calibrated,
    calibrate_views,
    make_pseudo_labels,
    possible_classes,
    to_class_ids,
)
from slrnet.config import Config, EvaluationConfig
from slrnet.data.batch import EvalSample
from slrnet.data.catalog import class_keys
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.manifest import DataError, SplitView
from slrnet.data.supervision import Supervision
from slrnet.distributed.process import Process, sum_over_ranks
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.inference.forward import Inference
from slrnet.ops.maps import resize

__all__ = [
    "PseudoMask",
    "Quality",
    "calibrate_sample",
    "evaluate_masks",
    "gated_probs",
    "gating_labels",
    "measure_pseudo_masks",
    "protocol_name",
    "pseudo_mask_protocol",
    "pseudo_mask_subset",
    "quality_metrics",
]


TOGETHER = 8
"""Images that go through the network of a GPU together."""
WAITING = 64
"""Images that wait in memory for others of their size."""


@dataclass(frozen=True)
class Quality:
    """A confusion matrix over all ranks, the protocol that filled it, and the number of its images."""

    matrix: ConfusionMatrix
    protocol: str
    images: int

    @classmethod
    def over_ranks(cls, matrix: ConfusionMatrix, protocol: str, images: int, process: Process) -> Quality:
        """Adds up what the ranks have counted; every rank must make this call."""
        total = ConfusionMatrix(matrix.num_classes)
        total.counts = sum_over_ranks(matrix.counts, process)
        return cls(total, protocol, int(sum_over_ranks(torch.tensor(images), process)))


@dataclass(frozen=True)
class PseudoMask:
    """The masks of one training image at its own size (H, W), as int64 class ids, 255 where undecided."""

    sample: EvalSample
    raw: Tensor
    refined: Tensor
    pseudo_labels: Tensor


def evaluate_masks(
    inference: Inference, samples: Iterable[EvalSample], *, process: Process, together: int | None = None
) -> Quality:
    """Compares masks predicted with the protocol `ss` with true ones, over all ranks, which must all make this call.

    `samples` are this rank's share of the images; those without a mask are skipped. Up to
    `together` images of one size go through the network at once; None: 8 on a GPU, where that is faster, else 1.
    """
    matrix, images = ConfusionMatrix(inference.model.num_classes), 0
    most = together or (1 if inference.device.type == "cpu" else TOGETHER)
    for batch in _of_one_size((sample for sample in samples if sample.pixel_labels is not None), most):
        pixels = torch.stack([sample.image for sample in batch]).to(inference.device)
        truth = torch.stack([sample.pixel_labels for sample in batch if sample.pixel_labels is not None])
        labels = torch.stack([gating_labels(sample, inference.config) for sample in batch])
        matrix.update(inference.predict(pixels, "ss", labels)[0].argmax(dim=1), truth)
        images += len(batch)
    return Quality.over_ranks(matrix, protocol_name(inference.config.evaluation), images, process)


def _of_one_size(samples: Iterable[EvalSample], most: int) -> Iterator[list[EvalSample]]:
    """Batches of up to `most` images of one size, from the images as they come; none waits for more than others."""
    waiting: dict[torch.Size, list[EvalSample]] = {}
    for sample in samples:
        same = waiting.setdefault(sample.image.shape, [])
        same.append(sample)
        if len(same) == most:
            yield waiting.pop(sample.image.shape)
        elif sum(map(len, waiting.values())) > WAITING:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def gated_probs(inference: Inference, sample: EvalSample) -> Tensor:
    """Predicts an image by the protocol `ss`, gating included; returns (K, H, W) probabilities on the network's device.

    Raises:
        DataError: the protocol gates by image labels, and they are not known.
    """
    labels = gating_labels(sample, inference.config)
    return inference.predict(sample.image.to(inference.device), "ss", labels)[0][0]


def measure_pseudo_masks(
    inference: Inference, samples: Iterable[EvalSample], *, process: Process, show: Callable[[PseudoMask], None]
) -> tuple[Quality, Quality]:
    """Measures pseudo masks against true masks, over all ranks, which must all make this call.

    `samples` are this rank's share of the fixed subset of training images; `show` gets each image's masks, for
    pictures. Returns the quality of the refined masks (the most probable class of every pixel), and of the pseudo
    labels (undecided pixels are 255: their share is 1 - coverage).
    """
    num_classes, images = inference.model.num_classes, 0
    dense, kept = ConfusionMatrix(num_classes), ConfusionMatrix(num_classes)
    for sample in samples:
        masks = _pseudo_mask(inference, sample)
        show(masks)
        if sample.pixel_labels is not None:
            dense.update(masks.refined, sample.pixel_labels)
            kept.update(masks.pseudo_labels, sample.pixel_labels)
            images += 1
    protocol = pseudo_mask_protocol(inference.config)
    refined = Quality.over_ranks(dense, protocol, images, process)
    return refined, Quality.over_ranks(kept, f"{protocol}, thresholded", images, process)


def quality_metrics(prefix: str, quality: Quality, classes: tuple[str, ...]) -> dict[str, float]:
    """Names the figures of a confusion matrix: PREFIX/miou, mfdr, mfnr and iou/KEY, fdr/KEY, fnr/KEY.

    KEY is the class's from `class_keys`. All are shares in [0, 1]. Classes that occur nowhere are left out.
    """
    matrix = quality.matrix
    values = {f"{prefix}/miou": matrix.miou(), f"{prefix}/mfdr": matrix.mfdr(), f"{prefix}/mfnr": matrix.mfnr()}
    for kind, shares in (("iou", matrix.iou()), ("fdr", matrix.fdr()), ("fnr", matrix.fnr())):
        names = (f"{prefix}/{kind}/{key}" for key in class_keys(classes))
        values |= {name: float(share) for name, share in zip(names, shares, strict=True)}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def pseudo_mask_subset(split: SplitView, supervision: Supervision, config: Config) -> tuple[int, ...]:
    """Chooses the fixed, seeded subset of training images on which pseudo masks are measured.

    They have a mask to compare with that the training does not see, as `supervision` says. Returns indices within the
    training split.
    """
    among = (split.with_masks & supervision.members) - supervision.pixel_labels
    return choose_subset(split, config.evaluation.pseudo_mask_images, seed=config.train.seed, among=among)


def calibrate_sample(inference: Inference, sample: EvalSample) -> Calibrated:
    """Fuses and refines the masks of a training image, as they are measured: all views, no flip, no color distortion.

    Returns:
        Probabilities of one image at the refinement's resolution, of the classes that it may show.
    """
    config = inference.config
    masks, images, features = inference.view_masks(sample.image.to(inference.device))
    known = torch.tensor([sample.has_image_labels and config.setting != "sss"])
    labels = possible_classes(sample.image_labels[None], known)
    labels, most = labels.to(images.device), int(labels.sum())
    return calibrate_views(masks, images, labels, config.calibration, max_classes=most, features=features)


def _pseudo_mask(inference: Inference, sample: EvalSample) -> PseudoMask:
    calibrated, size = calibrate_sample(inference, sample), (sample.image.shape[-2], sample.image.shape[-1])
    raw, refined = (
        to_class_ids(resize(probs, size).argmax(dim=1), calibrated.classes)[0].cpu()
        for probs in (calibrated.raw, calibrated.refined)
    )
    labels = make_pseudo_labels(calibrated, inference.config.calibration, size=size)[0].cpu()
    return PseudoMask(sample, raw, refined, labels)


def protocol_name(config: EvaluationConfig, protocol: str = "ss") -> str:
    """Names a protocol (`ss`, `ms`, `ms_crf`), followed by what differs from the plain arg max at full size."""
    name = protocol
    if protocol != "ss" and config.scales != EvaluationConfig().scales:
        name += f"+scales_{','.join(f'{scale:g}' for scale in config.scales)}"
    if config.scale != 1:
        name += f"+scale_{config.scale:g}"
    if config.resizing != "fitted":
        name += f"+resizing_{config.resizing}"
    if config.gating != "none":
        name += f"+gated_by_{config.gating}"
    if config.background_power != 1:
        name += f"+background_power_{config.background_power:g}"
    return name


def pseudo_mask_protocol(config: Config) -> str:
    """Names the way in which a run makes its refined pseudo masks."""
    gated = "not gated" if config.setting == "sss" else "gated by image labels"
    return f"fused {len(config.views.scales)} views, refined, {gated}"


def gating_labels(sample: EvalSample, config: Config) -> Tensor:
    """Returns the image labels (K - 1,) of an image for `gate`.

    Raises:
        DataError: the protocol gates by image labels, and they are not known.
    """
    if config.evaluation.gating == "image_labels" and not sample.has_image_labels:
        raise DataError(
            f"evaluation.gating is 'image_labels', and image {sample.key!r} has none; use none or scores, or prepare "
            "the data with image labels"
        )
    return sample.image_labels
