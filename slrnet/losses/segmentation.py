"""Class-balanced pixel cross-entropy (paper Eq. 1 with the weights of Araslanov and Roth 2020).

The paper writes plain cross-entropy; the balance between classes follows the released code. By default, it does not
apply to true masks. `slrnet.ops.cross_entropy` resizes the logits and computes the sums.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.ops.cross_entropy import resized_cross_entropy

__all__ = ["WeighedLabels", "balanced_cross_entropy", "weigh"]


Validity = Literal["whole_image", "present_classes", "soft"]
"""See `losses.validity`."""


class WeighedLabels(NamedTuple):
    """Class and weight of each pixel of N images."""

    labels: Tensor
    """(N, H, W) int64 class ids; 0 where void."""
    weights: Tensor
    """(N, H, W) float32, 0 where void."""
    complete: Tensor
    """(N,) bool, whether the labeled pixels show as many classes as the image has; True where that is not known."""


def balanced_cross_entropy(logits: Tensor, labels: Tensor, *, image_labels: Tensor | None = None) -> Tensor:
    """Cross-entropy whose classes have the weights of `weigh`.

    Args:
        logits: (N, K, h, w), background first; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64 class ids below K, 255 for void.
        image_labels: (N, K - 1) multi-hot; see `weigh`.

    Returns:
        (N,) the mean over each image's pixels, where void adds 0; finite and with a graph even if all are void.
    """
    weighed = weigh(labels, logits.shape[1], image_labels=image_labels)
    return resized_cross_entropy(logits, weighed.labels, weighed.weights)


def weigh(
    labels: Tensor,
    num_classes: int,
    *,
    image_labels: Tensor | None = None,
    checked: Tensor | None = None,
    plain: Tensor | None = None,
    power: float = 1.0,
    validity: Validity = "whole_image",
) -> WeighedLabels:
    """Balances the classes of each image: a class weighs (total - its pixels) / (1 + total) of the labeled pixels.

    Args:
        labels: (N, H, W) int64 class ids below K, 255 for void.
        num_classes: K, with the background.
        image_labels: (N, K - 1) multi-hot. If an image's labeled pixels do not show exactly as many classes as it has
            (background included), its pseudo label misses a class, and `validity` says what counts.
        checked: (N,) bool, the images to which `image_labels` applies; None: all.
        plain: (N,) bool, images whose classes all weigh 1; None: none.
        power: exponent on the weights of classes; 0 for equal ones.
        validity: as `losses.validity`, for images to which `image_labels` applies.
    """
    valid = labels != IGNORE_INDEX
    ids = torch.where(valid, labels, num_classes).flatten(1)
    pixels = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    pixels = pixels.scatter_add_(1, ids, torch.ones_like(ids, dtype=pixels.dtype))[:, :num_classes]  # (N, K)
    total = pixels.sum(dim=1, keepdim=True)
    weights = ((total - pixels) / (1 + total)).pow(power)
    if plain is not None:
        weights = torch.where(plain[:, None], 1.0, weights)
    complete = torch.ones_like(total[:, 0], dtype=torch.bool)
    if image_labels is not None:
        shown, wanted = (pixels > 0).sum(dim=1), image_labels.sum(dim=1).long() + 1
        complete = shown == wanted if checked is None else (shown == wanted) | ~checked
        weights = weights * _share_that_counts(weights, shown / wanted, complete, validity)
    weights = F.pad(weights, (0, 1)).gather(1, ids)  # void weighs 0
    return WeighedLabels(torch.where(valid, labels, 0), weights.view_as(labels), complete)


def _share_that_counts(weights: Tensor, share: Tensor, complete: Tensor, validity: Validity) -> Tensor:
    """Factors (N, K) on the weights of classes; `share` (N,) of an image's classes are shown."""
    if validity == "soft":
        return torch.where(complete, 1.0, share.clamp_max(1.0))[:, None]
    factors = complete.float()[:, None].expand_as(weights)
    if validity == "present_classes":
        return torch.cat([factors[:, :1], torch.ones_like(factors[:, 1:])], dim=1)
    return factors
