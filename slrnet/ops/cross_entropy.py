"""Weighted cross-entropy of logits that are resized to the labels, with its gradient.

The forward pass computes the gradient, at the logits' own small size; no map of all classes at the labels' resolution
is kept. A Triton kernel computes both on GPUs and a C kernel on CPUs. Where neither can run, PyTorch's operators do,
row by row (`by_operators`, the reference for both kernels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slrnet.ops import kernels
from slrnet.ops.maps import widened

__all__ = ["by_operators", "resized_cross_entropy", "sums_and_gradients"]

_ROWS = 24
"""Rows of resized logits in a part of the work of PyTorch's operators; they stay in a CPU's caches."""


def resized_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over each image's pixels of weight times cross-entropy.

    Args:
        logits: (N, K, h, w) float; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64, 0 to K - 1.
        weights: (N, H, W) float32; pixels with weight 0 add nothing.

    Returns:
        (N,) float32.
    """
    return _ResizedCrossEntropy.apply(logits, labels, weights)  # type: ignore[no-any-return]


class _ResizedCrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        wide = widened(logits)
        loss, gradient = sums_and_gradients(wide, labels, weights.to(wide))
        ctx.save_for_backward(gradient.to(logits.dtype))
        ctx.pixels = labels[0].numel()
        mean: Tensor = loss / ctx.pixels
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (slopes / ctx.pixels).view(-1, 1, 1, 1).to(gradient.dtype), None, None


@torch.library.custom_op("slrnet::weighted_cross_entropy", mutates_args=())
def sums_and_gradients(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each image's pixels of weight times cross-entropy, and their gradients.

    This is one operator of PyTorch, so its compiler and its fake tensors never reach the kernels.

    Args:
        logits: (N, K, h, w) float32; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64, 0 to K - 1.
        weights: (N, H, W) float32.

    Returns:
        (N,) the sums, and their gradients (N, K, h, w), channels last.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if logits.dtype == torch.float32 and min(*logits.shape[2:], *labels.shape[1:]) > 1:
            if kernels.triton_serves(logits):
                from slrnet.ops import cross_entropy_triton

                return cross_entropy_triton.sums_and_gradients(logits, labels, weights)
            if logits.device.type == "cpu" and kernels.wanted():
                from slrnet.cpu import cross_entropy

                computed = cross_entropy.sums_and_gradients(logits, labels, weights)
                if computed is not None:
                    return computed
        return by_operators(logits, labels, weights)


@sums_and_gradients.register_fake
def _(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits)), torch.empty_like(logits, memory_format=torch.channels_last)


def by_operators(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`sums_and_gradients` by PyTorch's operators, for float32 or float64, maps of any size and any logits."""
    losses, gradients = logits.new_zeros(len(logits)), torch.empty_like(logits, memory_format=torch.channels_last)
    down, across = (_interpolation(*sides, logits) for sides in zip(logits.shape[2:], labels.shape[1:], strict=True))
    for i in range(len(logits)):
        wide = logits[i].transpose(0, 1) @ across.mT  # (h, K, W)
        slopes = torch.zeros_like(wide).flatten(1)
        for top in range(0, len(down), _ROWS):
            rows = slice(top, top + _ROWS)
            label, weight = labels[i, rows].unsqueeze(1), weights[i, rows].unsqueeze(1)  # (rows, 1, W)
            scores = (down[rows] @ wide.flatten(1)).view(-1, *wide.shape[1:]).log_softmax(dim=1)
            losses[i] -= (scores.gather(1, label) * weight).sum()
            own = scores.exp_().mul_(weight).scatter_add_(1, label, -weight)
            slopes.addmm_(down[rows].mT, own.flatten(1))
        gradients[i] = (slopes.view_as(wide) @ across).transpose(0, 1)
    return losses, gradients


def _interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """The matrix (new, old) that resizes a row of pixels linearly with aligned corners."""
    place = torch.linspace(0, old - 1, new, dtype=torch.float64, device=like.device)
    distance = (place[:, None] - torch.arange(old, dtype=torch.float64, device=like.device)).abs()
    return (1 - distance).clamp_min(0).to(like.dtype)
