"""The objective: named loss parts of a step and their weighted sum (paper Sec. 4, "Implementation Details")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slrnet.config import LossConfig, WeightsConfig
from slrnet.losses.classification import classification_loss
from slrnet.losses.consistency import code_consistency, mask_consistency, mask_divergence
from slrnet.losses.segmentation import weigh
from slrnet.ops.cross_entropy import resized_cross_entropy

__all__ = ["AlignedOutputs", "Labels", "Objective", "objective"]


@dataclass(frozen=True)
class AlignedOutputs:
    """The network's outputs with all maps un-warped to the frame and size of the first view; lists are per view."""

    logits: list[Tensor]
    """(N, K, h, w) mask logits."""
    auxiliary_logits: list[Tensor]
    """(N, K, h, w) mask logits of the auxiliary head; empty without CVLR."""
    codes: list[Tensor]
    """(N, k, h, w) codes of CVLR; empty without CVLR."""
    class_scores: list[Tensor]
    """(N, K - 1); empty where the heads predict the background."""
    auxiliary_class_scores: list[Tensor]
    """(N, K - 1); empty without CVLR and where the heads predict the background."""


@dataclass(frozen=True)
class Objective:
    """The total to minimize and its parts before weighting; scalars with a graph."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Labels:
    """What a batch of N images trains on. H and W are the crop's; void and undecided pixels are 255.

    Which entries are None depends on the run and the epoch, never on the batch: all ranks then have the same loss
    parts, and a kind of label that a batch lacks gives an exact zero with a graph.
    """

    image_labels: Tensor
    """(N, K - 1) multi-hot; rows without known labels are 0."""
    has_image_labels: Tensor | None
    """(N,) bool, whether an image's labels are known; None if the setting uses no image labels."""
    pixel_labels: Tensor | None
    """(N, H, W) int64 true masks, 255 everywhere in images without one; None if the setting uses no masks."""
    has_pixel_labels: Tensor
    """(N,) bool, whether training may use an image's true mask."""
    pseudo_labels: Tensor | None
    """(N, H, W) int64, used for images without a true mask, or (V, N, H, W) where each view has its own; None while
    pretraining."""


def objective(
    outputs: AlignedOutputs, labels: Labels, *, weights: WeightsConfig, losses: LossConfig, divergence: bool = False
) -> Objective:
    """Adds up the loss parts of a batch.

    Args:
        outputs: the network's outputs, un-warped.
        labels: the batch's labels.
        weights: the weight of each part.
        losses: which quantities the consistency terms compare, and the balance between classes.
        divergence: add the Kullback-Leibler divergence between the views' masks, as part `mask_divergence`.

    Returns:
        Parts `classification` (Eq. 2, of images with image labels and no true mask), `segmentation` (Eq. 1, of pseudo
        labels) and `pixel_segmentation` (Eq. 1, of true masks), each the sum over the views plus the auxiliary head's
        mean over the views times its weight, `mask_consistency` (Eq. 4) and `code_consistency` (Eq. 9). Each is a sum
        over the images that it is of, divided by the number of images of the batch. Parts that the setting or the
        epoch does not have are missing.
    """
    parts = _segmentation_parts(outputs, labels, weights, losses)
    if labels.has_image_labels is not None:
        counted = (labels.has_image_labels & ~labels.has_pixel_labels).float()
        parts["classification"] = _with_auxiliary(
            [classification_loss(scores, labels.image_labels) * counted for scores in outputs.class_scores],
            [classification_loss(scores, labels.image_labels) * counted for scores in outputs.auxiliary_class_scores],
            weights.auxiliary,
        )
    known = labels.has_image_labels
    parts["mask_consistency"] = mask_consistency(
        outputs.logits,
        labels.image_labels,
        has_image_labels=torch.zeros_like(labels.has_pixel_labels) if known is None else known,
        compare=losses.mask_consistency,
    ).mean()
    if divergence:
        parts["mask_divergence"] = mask_divergence(outputs.logits).mean()
    if outputs.codes:
        parts["code_consistency"] = code_consistency(outputs.codes, compare=losses.code_consistency).mean()
    factors = {
        "classification": weights.classification,
        "mask_consistency": weights.consistency,
        "mask_divergence": weights.consistency,
        "code_consistency": weights.consistency,
        "segmentation": weights.segmentation,
        "pixel_segmentation": weights.segmentation * weights.pixel_labels,
    }
    total = sum((part * factors[name] for name, part in parts.items()), outputs.logits[0].new_zeros(()))
    return Objective(total, parts)


def _segmentation_parts(
    outputs: AlignedOutputs, labels: Labels, weights: WeightsConfig, losses: LossConfig
) -> dict[str, Tensor]:
    targets = labels.pixel_labels
    if labels.pseudo_labels is not None:
        true = labels.has_pixel_labels[:, None, None]
        targets = labels.pseudo_labels if targets is None else torch.where(true, targets, labels.pseudo_labels)
    if targets is None:
        return {}
    known = labels.has_image_labels
    checked = torch.zeros_like(labels.has_pixel_labels) if known is None else known & ~labels.has_pixel_labels
    plain = None if losses.pixel_balance else labels.has_pixel_labels
    count = partial(
        weigh, num_classes=outputs.logits[0].shape[1], image_labels=labels.image_labels, checked=checked, plain=plain
    )
    views = len(outputs.logits)
    weighed = [count(targets)] * views if targets.ndim == 3 else [count(own) for own in targets.unbind()[:views]]
    main, auxiliary = (
        [resized_cross_entropy(view, *own) for view, own in zip(maps, weighed, strict=bool(maps))]
        for maps in (outputs.logits, outputs.auxiliary_logits)
    )
    kinds = {"segmentation": (labels.pseudo_labels, ~labels.has_pixel_labels)}
    kinds["pixel_segmentation"] = (labels.pixel_labels, labels.has_pixel_labels)
    return {
        name: _with_auxiliary([loss * of for loss in main], [loss * of for loss in auxiliary], weights.auxiliary)
        for name, (exists, of) in kinds.items()
        if exists is not None
    }


def _with_auxiliary(main: Sequence[Tensor], auxiliary: Sequence[Tensor], weight: float) -> Tensor:
    total = sum((view.mean() for view in main), main[0].new_zeros(()))
    if auxiliary:
        total = total + weight * sum((view.mean() for view in auxiliary), main[0].new_zeros(())) / len(auxiliary)
    return total
