"""Multi-view mask calibration (paper Sec. 3.2, Eq. 3) and the thresholds that make pseudo labels.

Calibration averages the un-warped logits of all views, applies softmax and refines the masks by appearance; thresholds
then make pseudo labels. Classes that the image labels rule out never appear, and only channels that can appear are
refined. The released code averages probabilities instead of logits (`calibration.fusion=probs`) and, without image
labels, cubes the background's (`calibration.background_power=3`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slrnet.calibration.refine import refine, scaled_dilations
from slrnet.config import CalibrationConfig
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.ops.maps import class_probs, resize, widened

__all__ = [
    "Calibrated",
    "calibrate_views",
    "make_pseudo_labels",
    "possible_classes",
    "seed_labels",
    "threshold",
    "to_class_ids",
]

SEED_SHARE, SEED_FLOOR = 0.4, 0.15
"""A class claims places above this share of its largest activation, the background where all are below the floor."""


@dataclass(frozen=True)
class Calibrated:
    """Fused masks of a batch. N images, M channels (`classes` says which class each is), K classes."""

    classes: Tensor
    """(N, M) int64 class of each channel: the background, the image's classes, then -1 for unused channels."""
    raw: Tensor
    """(N, M, h, w) fused probabilities before refinement, at the refinement's resolution."""
    refined: Tensor
    """(N, M, h, w) fused probabilities after refinement, and divided by their maxima if `peak_power` says so."""


def calibrate_views(
    masks: Sequence[Tensor],
    images: Tensor,
    image_labels: Tensor,
    config: CalibrationConfig,
    *,
    max_classes: int,
    features: Tensor | None = None,
    compiled: bool = False,
) -> Calibrated:
    """Fuses the views' masks and refines them (Eq. 3). No gradient flows.

    Args:
        masks: per view (N, K, h, w), un-warped to one size, background first: what `config.fusion` says, logits or
            probabilities.
        images: (N, 3, H, W) float in [0, 1]; masks are refined at 1 / `config.refine_stride` of their size, rounded up.
        image_labels: (N, K - 1) multi-hot, the classes that each image may show.
        config: how to fuse and refine.
        features: `Outputs.features` of the images; `config.feature_share` above 0 needs them.
        max_classes: most classes of one image of the batch; asking a GPU for it would stall the step.
        compiled: see `refine`.

    Raises:
        ValueError: an image has more than `max_classes` classes (checked on the CPU only).
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        height, width = (-(-side // config.refine_stride) for side in images.shape[-2:])
        images = resize(images, (height, width))
        probs = _average([widened(view) for view in masks], config.view_weights)
        if config.fusion == "logits":
            probs = class_probs(probs)
        if config.background_power != 1:
            probs = torch.cat([probs[:, :1] ** config.background_power, probs[:, 1:]], dim=1)
        classes = _present_classes(image_labels, max_classes=max_classes)
        channels = classes.clamp_min(0)[:, :, None, None].expand(-1, -1, *probs.shape[-2:])
        raw = resize(probs.gather(1, channels) * (classes >= 0)[:, :, None, None], images.shape[-2:])
        dilations = scaled_dilations(config.refine_dilations, side=config.refine_side, size=(height, width))
        attends = config.feature_source == "attention"
        if features is not None and not attends:
            features = resize(widened(features), (height, width))
        options: dict[str, Any] = {"num_iters": config.refine_iters, "dilations": dilations, "compiled": compiled}
        options |= {"features": features, "feature_share": config.feature_share, "attends": attends}
        refined = refine(images, raw, **options)
        if config.peak_power:
            peaks = refined.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(refined.dtype).tiny)
            refined = refined / peaks**config.peak_power
        return Calibrated(classes, raw, refined)


def _average(views: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The views' weighted mean; without weights, the equal one."""
    if not weights:
        return sum(views[1:], views[0]) / len(views)
    return sum((view * weight for view, weight in zip(views, weights, strict=True)), views[0] * 0) / sum(weights)


def make_pseudo_labels(calibrated: Calibrated, config: CalibrationConfig, *, size: tuple[int, int]) -> Tensor:
    """Thresholds refined masks at the resolution `size` = (H, W): (N, H, W) int64 class ids, 255 where undecided."""
    labels = threshold(
        resize(calibrated.refined, size),
        confidence_threshold=config.confidence_threshold,
        background_threshold=config.background_threshold,
        floor=config.floor,
        rule=config.rule,
    )
    return to_class_ids(labels, calibrated.classes)


def threshold(
    probs: Tensor,
    *,
    confidence_threshold: float,
    background_threshold: float,
    floor: float,
    rule: Literal["claims", "normalized"] = "claims",
) -> Tensor:
    """Keeps the pixels that exactly one class claims.

    A class claims a pixel where its probability is strictly above max(share * its maximum over the image, floor). By
    the rule `normalized`, a foreground class does where its share of its maximum is strictly above the threshold, and
    the background where that of no foreground class is strictly above the floor.

    Args:
        probs: (N, K, H, W) probabilities, background first; a class that cannot occur is 0 everywhere.
        confidence_threshold: gamma, the share for the foreground classes, in [0, 1].
        background_threshold: the share for the background, in [0, 1].
        floor: absolute probability, in [0, 1]; a share by the rule `normalized`.
        rule: see `CalibrationConfig.rule`.

    Returns:
        (N, H, W) int64 class ids, 255 where no class or several classes claim the pixel.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    given = {"confidence_threshold": confidence_threshold, "background_threshold": background_threshold, "floor": floor}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; allowed are numbers from 0 to 1")
    largest = probs.amax(dim=(2, 3), keepdim=True)
    if rule == "normalized":
        shares = probs[:, 1:] / (largest[:, 1:] + 1e-6)
        background = ~(shares > floor).any(dim=1, keepdim=True)
        claims = torch.cat([background, shares > confidence_threshold], dim=1)
    else:
        share = probs.new_full((probs.shape[1], 1, 1), confidence_threshold)
        share[0] = background_threshold
        claims = probs > (largest * share).clamp_min(floor)
    claimed = claims.to(torch.uint8)  # (N, K, H, W); K is at most 255, and so are the sums
    ids = torch.arange(probs.shape[1], dtype=torch.uint8, device=probs.device).view(-1, 1, 1)
    claimant = (claimed * ids).sum(dim=1, dtype=torch.uint8)  # meaningful where exactly one class claims the pixel
    return torch.where(claimed.sum(dim=1, dtype=torch.uint8) == 1, claimant.long(), IGNORE_INDEX)


@torch.no_grad()
def seed_labels(activations: Sequence[Tensor], image_labels: Tensor) -> Tensor:
    """First labels from the views' class activation maps: (N, h, w) int64 class ids, 255 where undecided.

    Args:
        activations: per view (N, K - 1, h, w), un-warped to one size; positive where a place speaks for a class.
        image_labels: (N, K - 1) multi-hot, the classes that each image shows; an image without any is undecided.
    """
    shown = _average(activations, ()).clamp_min(0) * image_labels[:, :, None, None]
    background = torch.zeros_like(shown[:, :1])  # takes no part in the rule
    labels = threshold(
        torch.cat([background, shown], dim=1),
        confidence_threshold=SEED_SHARE,
        background_threshold=0.0,
        floor=SEED_FLOOR,
        rule="normalized",
    )
    return torch.where(image_labels.any(dim=1)[:, None, None], labels, IGNORE_INDEX)


def to_class_ids(channel_labels: Tensor, classes: Tensor) -> Tensor:
    """Translates labels that count channels, (N, H, W) with 255 for void, into class ids by (N, M) `classes`."""
    void = channel_labels == IGNORE_INDEX
    channels = torch.where(void, 0, channel_labels).flatten(1)
    ids = classes.clamp_min(0).gather(1, channels).view_as(channel_labels)
    return torch.where(void, IGNORE_INDEX, ids)


def possible_classes(image_labels: Tensor, has_image_labels: Tensor) -> Tensor:
    """(N, K - 1) multi-hot: the image labels, or every class where they are unknown."""
    return torch.where(has_image_labels[:, None], image_labels, 1.0)


def _present_classes(image_labels: Tensor, *, max_classes: int) -> Tensor:
    """Class ids of the background and of each image's classes: (N, 1 + max_classes) int64, -1 where there are fewer."""
    labels, num_classes = image_labels.bool(), image_labels.shape[1]
    if labels.device.type == "cpu" and (largest := int(labels.sum(dim=1).max())) > max_classes:
        raise ValueError(
            f"an image has {largest} classes and max_classes is {max_classes}; pass the largest number of the batch"
        )
    ids = torch.arange(1, num_classes + 1, device=labels.device)
    ranked = torch.where(labels, ids, num_classes + 1).sort(dim=1).values[:, :max_classes]
    ranked = torch.where(ranked <= num_classes, ranked, -1)
    return torch.cat([ranked.new_zeros(len(ranked), 1), ranked], dim=1)
