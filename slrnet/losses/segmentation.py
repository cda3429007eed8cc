"""Class-balanced pixel cross-entropy (paper Eq. 1 with the weights of Araslanov and Roth 2020).

The paper writes plain cross-entropy; the balance between classes is that of the released code. True masks go without
it, unless asked for.

`slrnet.ops.cross_entropy` resizes the logits and computes the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.ops.cross_entropy import resized_cross_entropy

__all__ = ["WeighedLabels", "balanced_cross_entropy", "weigh"]


class WeighedLabels(NamedTuple):
    """Class and weight of each pixel of N images, for all logits that are compared with them."""

    labels: Tensor
    """(N, H, W) int64 class ids; 0 where void."""
    weights: Tensor
    """(N, H, W) float32, 0 where void."""


def balanced_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    image_labels: Tensor | None = None,
    checked: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in which a class weighs (total - its pixels) / (1 + total), total being all labeled pixels.

    Args:
        logits: (N, K, h, w), background first; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64 class ids below K, 255 for void.
        image_labels: (N, K - 1) multi-hot; see `weigh`.
        checked: (N,) bool; see `weigh`.
        plain: (N,) bool; see `weigh`.

    Returns:
        (N,) the mean over all pixels of each image, void pixels adding 0; finite, with a graph, also where all is void.
    """
    weighed = weigh(labels, logits.shape[1], image_labels=image_labels, checked=checked, plain=plain)
    return resized_cross_entropy(logits, *weighed)


def weigh(
    labels: Tensor,
    num_classes: int,
    *,
    image_labels: Tensor | None = None,
    checked: Tensor | None = None,
    plain: Tensor | None = None,
) -> WeighedLabels:
    """The balance between the classes of each image: one weighs (total - its pixels) / (1 + total).

    Args:
        labels: (N, H, W) int64 class ids below K, 255 for void.
        num_classes: K with the background.
        image_labels: (N, K - 1) multi-hot. With it, an image whose labeled pixels do not show exactly as many classes
            as it has (background included) counts 0: its pseudo label misses a class.
        checked: (N,) bool, the images to which that applies; None: all of them.
        plain: (N,) bool, images all of whose classes weigh 1; None: none of them.
    """
    valid = labels != IGNORE_INDEX
    ids = torch.where(valid, labels, num_classes).flatten(1)
    pixels = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    pixels = pixels.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))[:, :num_classes]  # (N, K)
    total = pixels.sum(dim=1, keepdim=True)
    weights = (total - pixels) / (1 + total)
    if plain is not None:
        weights = torch.where(plain[:, None], 1.0, weights)
    weights = F.pad(weights, (0, 1)).gather(1, ids)  # void weighs 0
    if image_labels is not None:
        complete = (pixels > 0).sum(dim=1) == image_labels.sum(dim=1).long() + 1
        weights = weights * (complete if checked is None else complete | ~checked)[:, None]
    return WeighedLabels(torch.where(valid, labels, 0), weights.view_as(labels))
