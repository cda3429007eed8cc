"""The objective: the named loss parts of a step and their weighted sum (paper Sec. 4, "Implementation Details")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slrnet.config import LossConfig, WeightsConfig
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.losses.consistency import code_consistency, mask_consistency, mask_divergence
from slrnet.losses.segmentation import weigh
from slrnet.models.network import Outputs
from slrnet.ops.cross_entropy import resized_cross_entropy
from slrnet.ops.maps import widened

__all__ = ["Labels", "Objective", "classification_loss", "objective"]

BALANCE_POWERS = {"balanced": 1.0, "sqrt": 0.5, "plain": 0.0}
"""Exponents on the weights of classes, by `losses.pseudo_balance`."""
PROBE_RATE = 0.1
"""Share of the new layers' rate at which a linear probe learns masks. At the full rate it runs after its own labels
until a class is gone."""


@dataclass(frozen=True)
class Objective:
    """The total to minimize, and its parts before weighting; scalars with a graph."""

    total: Tensor
    parts: dict[str, Tensor]
    figures: dict[str, Tensor]
    """What else to show: the outputs' figures, and after pretraining `valid_share`, the share of the images with pseudo
    labels whose label shows all their classes (0 if the batch has no such image)."""


@dataclass(frozen=True)
class Labels:
    """Labels of a batch of N images. H and W are the crop's; void and undecided pixels are 255.

    The run and the epoch decide which entries are None, never the batch. All ranks then have the same loss parts, and
    labels that a batch lacks give an exact zero with a graph.
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
    """(N, H, W) int64, or (V, N, H, W) with one for each view, for images without a true mask; None in pretraining."""
    seeds: Tensor | None = None
    """(N, h, w) int64, what a linear probe learns from without pseudo labels; None without a probe, or with them."""
    pixel_labeled_share: Tensor | None = None
    """(), share of the images with true masks in the global batch, of which these may be a part; None: in these."""


def objective(
    outputs: Outputs, labels: Labels, *, weights: WeightsConfig, losses: LossConfig, divergence: bool = False
) -> Objective:
    """Adds up the loss parts of a batch.

    Args:
        outputs: the network's outputs, all maps un-warped to the frame and size of one view.
        labels: the batch's labels.
        weights: the weight of each part.
        losses: which quantities the consistency terms compare, and the balance between classes.
        divergence: whether to add the divergence between the views' masks, as part `mask_divergence`.

    Returns:
        Parts `classification` (Eq. 2, images with image labels and no true mask), `segmentation` (Eq. 1, pseudo labels)
        and `pixel_segmentation` (Eq. 1, true masks), each the sum over the views plus the auxiliary head's weighted
        mean over the views, `mask_consistency` (Eq. 4), `code_consistency` (Eq. 9); `probe`, the cross-entropy of a
        linear probe, and `probe_classification`, the loss of its mean activations in images with image labels, the mean
        over the views each. Each part is a sum over its images, divided by the number of images in the batch. Parts
        that the setting or the epoch lacks are missing.
    """
    parts, valid_share = _segmentation_parts(outputs, labels, weights, losses)
    known = labels.has_image_labels
    if known is not None:
        counted = (known & ~labels.has_pixel_labels).float()
        main, auxiliary = (
            [classification_loss(view, labels.image_labels, losses.positive_weight) * counted for view in scores]
            for scores in (outputs.class_scores, outputs.auxiliary_class_scores)
        )
        own = weights.auxiliary_classification
        parts["classification"] = _with_auxiliary(main, auxiliary, weights.auxiliary if own is None else own)
    parts["mask_consistency"] = mask_consistency(
        outputs.logits if losses.mask_consistency == "logits" else outputs.probs,
        labels.image_labels,
        has_image_labels=torch.zeros_like(labels.has_pixel_labels) if known is None else known,
        background=losses.mask_background,
        divisor=losses.class_divisor,
    ).mean()
    if outputs.probe_logits:
        parts["probe"] = _probe_part(outputs, labels)
    if outputs.probe_activations and known is not None:
        scores = [activations.mean(dim=(2, 3)) for activations in outputs.probe_activations]
        each = [classification_loss(view, labels.image_labels, losses.positive_weight) for view in scores]
        parts["probe_classification"] = (sum(each[1:], each[0]) / len(each) * known).mean()
    if divergence:
        parts["mask_divergence"] = mask_divergence(outputs.logits).mean()
    if outputs.codes:
        distances = code_consistency(outputs.codes, compare=losses.code_consistency, divisor=losses.class_divisor)
        parts["code_consistency"] = distances.mean()
    of_masks, of_codes = (
        weights.consistency if own is None else own for own in (weights.mask_consistency, weights.code_consistency)
    )
    factors = {
        "classification": weights.classification,
        "mask_consistency": of_masks,
        "mask_divergence": of_masks,
        "code_consistency": of_codes,
        "probe": PROBE_RATE,
        "probe_classification": 1.0,  # of the probe alone, as "probe"
        "segmentation": weights.segmentation,
        "pixel_segmentation": weights.segmentation * _pixel_factor(labels, weights),
    }
    total = sum((part * factors[name] for name, part in parts.items()), outputs.logits[0].new_zeros(()))
    figures = outputs.figures if valid_share is None else outputs.figures | {"valid_share": valid_share}
    return Objective(total, parts, figures)


def classification_loss(class_scores: Tensor, image_labels: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of each class against the rest (paper Eq. 2).

    Args:
        class_scores: (N, K - 1) scores before the sigmoid.
        image_labels: (N, K - 1) multi-hot.
        positive_weight: factor on the losses of classes that an image shows.

    Returns:
        (N,) the mean over the classes for each image.
    """
    scores = widened(class_scores)
    losses = F.binary_cross_entropy_with_logits(scores, image_labels.to(scores), reduction="none")
    if positive_weight != 1:
        losses = losses * (1 + (positive_weight - 1) * image_labels)
    return losses.mean(dim=1)


def _pixel_factor(labels: Labels, weights: WeightsConfig) -> Tensor | float:
    """Factor on the sum over the images with true masks, divided by the number of images in the batch."""
    factor = weights.pixel_labels
    if labels.pseudo_labels is None and weights.pixel_pretraining is not None:
        factor = weights.pixel_pretraining
    if not weights.pixel_mean:
        return factor
    share = labels.pixel_labeled_share
    if share is None:
        share = labels.has_pixel_labels.float().mean()
    return factor + torch.where(share > 0, weights.pixel_mean / share, 0.0)


def _segmentation_parts(
    outputs: Outputs, labels: Labels, weights: WeightsConfig, losses: LossConfig
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The parts of Eq. 1, and the share of valid pseudo labels."""
    targets = labels.pixel_labels
    if labels.pseudo_labels is not None:
        true = labels.has_pixel_labels[:, None, None]
        targets = labels.pseudo_labels if targets is None else torch.where(true, targets, labels.pseudo_labels)
    if targets is None:
        return {}, None
    known = labels.has_image_labels
    checked = torch.zeros_like(labels.has_pixel_labels) if known is None else known
    if not losses.pixel_validity:
        checked = checked & ~labels.has_pixel_labels
    plain = None if losses.pixel_balance else labels.has_pixel_labels
    balance = partial(
        weigh,
        num_classes=outputs.logits[0].shape[1],
        image_labels=labels.image_labels,
        checked=checked,
        plain=plain,
        power=BALANCE_POWERS[losses.pseudo_balance],
        validity=losses.validity,
    )
    views = len(outputs.logits)
    weighed = [balance(targets)] * views if targets.ndim == 3 else [balance(own) for own in targets.unbind()[:views]]
    main, auxiliary = (
        [resized_cross_entropy(view, own.labels, own.weights) for view, own in zip(maps, weighed, strict=False)]
        for maps in (outputs.logits, outputs.auxiliary_logits)
    )
    parts = {
        "segmentation": (labels.pseudo_labels, ~labels.has_pixel_labels),
        "pixel_segmentation": (labels.pixel_labels, labels.has_pixel_labels),
    }
    losses_of = {
        name: _with_auxiliary([loss * of for loss in main], [loss * of for loss in auxiliary], weights.auxiliary)
        for name, (exists, of) in parts.items()
        if exists is not None
    }
    if labels.pseudo_labels is None:
        return losses_of, None
    pseudo = ~labels.has_pixel_labels
    valid = torch.stack([own.complete & pseudo for own in weighed]).float().mean(dim=0)
    return losses_of, valid.sum() / pseudo.sum().clamp_min(1)


def _probe_part(outputs: Outputs, labels: Labels) -> Tensor:
    """The mean over the views of a linear probe's cross-entropy, plain and over each image's labeled pixels alone.

    The labels are those that the views learn from, or `Labels.seeds`.
    """
    total = outputs.probe_logits[0].new_zeros(())
    targets = labels.seeds if labels.pseudo_labels is None else labels.pseudo_labels
    for view, logits in enumerate(outputs.probe_logits):
        own = targets[view] if targets is not None and targets.ndim == 4 else targets
        if labels.pixel_labels is not None:
            own = _with_masks(own, labels.pixel_labels, labels.has_pixel_labels)
        assert own is not None
        valid = own != IGNORE_INDEX
        weights = valid / valid.float().mean(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
        loss = resized_cross_entropy(logits, torch.where(valid, own, 0), weights)
        total = total + loss.mean()
    return total / len(outputs.probe_logits)


def _with_masks(others: Tensor | None, pixel_labels: Tensor, has_pixel_labels: Tensor) -> Tensor:
    """(N, H, W) true masks, and the labels of the other images, of any size; None: void."""
    if others is None:
        return pixel_labels
    if others.shape != pixel_labels.shape:
        others = F.interpolate(others[:, None].float(), size=pixel_labels.shape[1:], mode="nearest")[:, 0].long()
    return torch.where(has_pixel_labels[:, None, None], pixel_labels, others)


def _with_auxiliary(main: Sequence[Tensor], auxiliary: Sequence[Tensor], weight: float) -> Tensor:
    total = sum((view.mean() for view in main), main[0].new_zeros(()))
    if auxiliary:
        total = total + weight * sum((view.mean() for view in auxiliary), main[0].new_zeros(())) / len(auxiliary)
    return total
