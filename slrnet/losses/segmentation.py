"""Class-balanced pixel cross-entropy (paper Eq. 1 with the weights of Araslanov and Roth 2020).

The paper writes plain cross-entropy; the balance between classes is that of the released code. True masks go without
it, unless asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.models.decoder import resize

__all__ = ["balanced_cross_entropy"]


def balanced_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    image_labels: Tensor | None = None,
    checked: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in which a class weighs (total - its pixels) / (1 + total), total being all labelled pixels.

    Args:
        logits: (N, K, h, w), background first; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64 class ids below K, 255 for void.
        image_labels: (N, K - 1) multi-hot. With it, an image whose labelled pixels do not show exactly as many classes
            as it has (background included) counts 0: its pseudo label misses a class.
        checked: (N,) bool, the images to which that applies; None: all of them.
        plain: (N,) bool, images all of whose classes weigh 1; None: none of them.

    Returns:
        (N,) the mean over all pixels of each image, void pixels adding 0; finite, with a graph, also where all is void.
    """
    num_classes = logits.shape[1]
    losses = F.cross_entropy(
        resize(logits.float(), labels.shape[-2:]), labels, ignore_index=IGNORE_INDEX, reduction="none"
    )
    valid = labels != IGNORE_INDEX
    ids = torch.where(valid, labels, num_classes).flatten(1)
    pixels = losses.new_zeros(len(labels), num_classes + 1)
    pixels = pixels.scatter_add_(1, ids, torch.ones_like(ids, dtype=losses.dtype))[:, :num_classes]  # (N, K)
    total = pixels.sum(dim=1, keepdim=True)
    weights = (total - pixels) / (1 + total)
    if plain is not None:
        weights = torch.where(plain[:, None], 1.0, weights)
    weights = F.pad(weights, (0, 1))  # void weighs 0
    loss = (weights.gather(1, ids) * losses.flatten(1)).mean(dim=1)
    if image_labels is None:
        return loss
    complete = (pixels > 0).sum(dim=1) == image_labels.sum(dim=1).long() + 1
    return loss * (complete if checked is None else complete | ~checked)
