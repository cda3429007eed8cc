"""Class-balanced pixel cross-entropy (paper Eq. 1 with the weights of Araslanov and Roth 2020).

The paper writes plain cross-entropy; the balance between classes follows the released code. By default, it does not
apply to true masks. `slrnet.ops.cross_entropy` resizes the logits and computes the sums.
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
    """Class and weight of each pixel of N images."""

    labels: Tensor
    """(N, H, W) int64 class ids; 0 where void."""
    weights: Tensor
    """(N, H, W) float32, 0 where void."""


def balanced_cross_entropy(logits: Tensor, labels: Tensor, *, image_labels: Tensor | None = None) -> Tensor:
    """Cross-entropy whose classes have the weights of `weigh`.

    Args:
        logits: (N, K, h, w), background first; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64 class ids below K, 255 for void.
        image_labels: (N, K - 1) multi-hot; see `weigh`.

    Returns:
        (N,) the mean over each image's pixels, where void adds 0; finite and with a graph even if all are void.
    """
    return resized_cross_entropy(logits, *weigh(labels, logits.shape[1], image_labels=image_labels))


def weigh(
    labels: Tensor,
    num_classes: int,
    *,
    image_labels: Tensor | None = None,
    checked: Tensor | None = None,
    plain: Tensor | None = None,
) -> WeighedLabels:
    """Balances the classes of each image: a class weighs (total - its pixels) / (1 + total) of the labeled pixels.

    Args:
        labels: (N, H, W) int64 class ids below K, 255 for void.
        num_classes: K, with the background.
        image_labels: (N, K - 1) multi-hot. An image has weight 0 if its labeled pixels do not show exactly as many
            classes as it has (background included), because its pseudo label then misses a class.
        checked: (N,) bool, the images to which `image_labels` applies; None: all.
        plain: (N,) bool, images whose classes all weigh 1; None: none.
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
