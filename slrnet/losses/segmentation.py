"""Class-balanced pixel cross-entropy (paper Eq. 1 with the weights of Araslanov and Roth 2020).

The paper writes plain cross-entropy; the balance between classes is that of the released code. True masks go without
it, unless asked for.

Logits are resized to the labels in parts that stay in the cache, and leave their gradient at their own small size: no
map of all classes at the labels' resolution is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slrnet.data.catalog import IGNORE_INDEX

__all__ = ["balanced_cross_entropy"]

_PART = {"cpu": 2**21, "cuda": 2**26}
"""Elements of resized logits that are worked on at a time: 8 MiB fit the cache of a core."""


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
    valid = labels != IGNORE_INDEX
    ids = torch.where(valid, labels, num_classes).flatten(1)
    pixels = logits.new_zeros(len(labels), num_classes + 1, dtype=torch.float32)
    pixels = pixels.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))[:, :num_classes]  # (N, K)
    total = pixels.sum(dim=1, keepdim=True)
    weights = (total - pixels) / (1 + total)
    if plain is not None:
        weights = torch.where(plain[:, None], 1.0, weights)
    weights = F.pad(weights, (0, 1)).gather(1, ids)  # void weighs 0
    loss: Tensor = _WeightedCrossEntropy.apply(logits, torch.where(valid, labels, 0), weights.view_as(labels))
    if image_labels is None:
        return loss
    complete = (pixels > 0).sum(dim=1) == image_labels.sum(dim=1).long() + 1
    return loss * (complete if checked is None else complete | ~checked)


class _WeightedCrossEntropy(torch.autograd.Function):
    """(N,) means over all pixels of weight times cross-entropy; the gradient is made on the way forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Logits (N, K, h, w) float, labels (N, H, W) int64 below K, weights (N, H, W) float32."""
        wanted = ctx.needs_input_grad[0]
        with torch.autocast(logits.device.type, enabled=False):
            small = logits.float().contiguous()
            rows, columns = (
                _interpolation(old, new, small) for old, new in zip(small.shape[2:], labels.shape[1:], strict=True)
            )
            gradient = torch.empty_like(small) if wanted else None
            losses = []
            count = max(1, _PART.get(logits.device.type, 2**21) // (small.shape[1] * labels[0].numel()))
            for start in range(0, len(labels), count):
                part = slice(start, start + count)
                label = labels[part].unsqueeze(1)
                weight = weights[part].unsqueeze(1) / labels[0].numel()
                logs = (rows @ small[part] @ columns.mT).log_softmax(dim=1)
                losses.append((logs.gather(1, label) * -weight).flatten(1).sum(dim=1))
                if gradient is not None:
                    slope = logs.exp_().mul_(weight).scatter_add_(1, label, -weight)
                    torch.matmul(rows.mT @ slope, columns, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient.to(logits.dtype))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slopes.view(-1, 1, 1, 1).to(gradient.dtype), None, None


def _interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old) matrix that resizes a row of pixels linearly with aligned corners."""
    place = torch.linspace(0, old - 1, new, dtype=torch.float64, device=like.device)
    distance = (place[:, None] - torch.arange(old, dtype=torch.float64, device=like.device)).abs()
    return (1 - distance).clamp_min(0).to(like.dtype)
