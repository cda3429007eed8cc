"""Weighted cross-entropy of logits that are resized to the labels, with its gradient.

The gradient is computed on the way forward, at the logits' own small size; no map of all classes at the labels'
resolution is ever kept. A Triton kernel does it on GPUs and a C kernel on CPUs; where neither can run, PyTorch's
operators do it part by part (`by_operators`, the form that both kernels must equal).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slrnet.ops import kernels

__all__ = ["by_operators", "resized_cross_entropy", "sums_and_gradients"]

_PART = {"cpu": (2**20, 24), "cuda": (2**26, 2**16)}
"""Resized logits and rows of them to work on at a time, at most. On CPUs the logits then fit the caches, and the rows
lie between few rows of the small map, so that one small product of matrices makes them."""
_SPREAD = 80.0
"""Logits so far below 0 have exponentials that are normal numbers in float32."""


def resized_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over each image's pixels of weight times cross-entropy.

    Args:
        logits: (N, K, h, w) float; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64, 0 to K - 1.
        weights: (N, H, W) float32; 0 leaves a pixel out.

    Returns:
        (N,) float32.
    """
    return _ResizedCrossEntropy.apply(logits, labels, weights)  # type: ignore[no-any-return]


class _ResizedCrossEntropy(torch.autograd.Function):
    """Computes the gradient on the way forward, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Logits (N, K, h, w) float, labels (N, H, W) int64 below K, weights (N, H, W) float32."""
        loss, gradient = sums_and_gradients(logits.float(), labels, weights)
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

    This is one operator for PyTorch, so its compiler and its tensors without data never meet the kernels.

    Args:
        logits: (N, K, h, w) float32; resized to the labels (bilinear, aligned corners).
        labels: (N, H, W) int64, 0 to K - 1.
        weights: (N, H, W) float32.

    Returns:
        (N,) the sums, and their gradients (N, K, h, w), channels last.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if min(*logits.shape[2:], *labels.shape[1:]) > 1:
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
    """`sums_and_gradients` by PyTorch's operators, which take maps of any size and logits of any distance.

    Args:
        logits: (N, K, h, w) float32 or float64.
        labels: (N, H, W) int64, 0 to K - 1.
        weights: (N, H, W) of the logits' dtype.

    Returns:
        (N,) the sums, and their gradients (N, K, h, w).
    """
    small = logits - logits.amax(dim=1, keepdim=True)  # what is resized from it is at most 0 then
    near = _known_to_be_near(small)
    down, across = (_interpolation(old, new, small) for old, new in zip(small.shape[2:], labels.shape[1:], strict=True))
    gradient = torch.zeros_like(small, memory_format=torch.channels_last)
    loss, room = small.new_zeros(len(small)), small.new_empty(0, 0)
    shape = small.shape[1], labels.shape[2]
    for images, bands in _parts(weights, small.shape[1], small.shape[2]):
        label, weight = (maps[images].transpose(0, 1).unsqueeze(2) for maps in (labels, weights))
        maps = small[images].permute(2, 0, 1, 3)  # (h, n, K, w): rows come first from here on
        wide = (maps.reshape(-1, maps.shape[3]) @ across.mT).view(len(maps), -1)  # (h, n K W)
        slopes = torch.zeros_like(wide)
        total, right = torch.empty_like(weight), torch.empty_like(weight)  # (H, n, 1, W)
        for rows, source in bands:
            own = down[rows, source]
            if len(room) < len(own) or room.shape[1] != wide.shape[1]:
                room = wide.new_empty(len(own), wide.shape[1])
            scores = torch.mm(own, wide[source], out=room[: len(own)]).view(len(own), -1, *shape)
            if not near:
                scores -= scores.amax(dim=2, keepdim=True)
            torch.gather(scores, 2, label[rows], out=right[rows])
            torch.sum(scores.exp_(), dim=2, keepdim=True, out=total[rows])
            scores.mul_(weight[rows] / total[rows]).scatter_add_(2, label[rows], -weight[rows])
            slopes[source].addmm_(own.mT, scores.view(len(own), -1))
        loss[images] = ((total.log_() - right) * weight).sum(dim=(0, 2, 3))
        slopes = slopes.view(-1, shape[1]) @ across
        gradient[images] = slopes.view(maps.shape).permute(1, 2, 0, 3)
    return loss, gradient


def _parts(weights: Tensor, num_classes: int, height: int) -> Iterator[tuple[slice, Iterator[tuple[slice, slice]]]]:
    """Images to work on at a time, and bands of rows; on CPUs, where it costs nothing to ask, images that count alone.

    Args:
        weights: (N, H, W), of the pixels.
        num_classes: K.
        height: h, of the maps before they are resized.

    Yields:
        Images, and for each band its rows of H and those of h from which they are made.
    """
    images, new_height, width = weights.shape
    elements, most = _PART.get(weights.device.type, _PART["cpu"])
    at_once = max(1, elements // (num_classes * width))  # rows
    rows = min(new_height, at_once, most)
    together = max(1, at_once // rows)
    for start in range(0, images, together):
        part = slice(start, start + together)
        if not _known_to_weigh_nothing(weights[part]):
            yield part, _bands(height, new_height, rows)


def _bands(old: int, new: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Bands of `rows` out of `new` rows, with those of the `old` ones that they lie between."""
    for top in range(0, new, rows):
        bottom = min(new, top + rows)
        first, last = (row * (old - 1) // max(1, new - 1) for row in (top, bottom - 1))
        yield slice(top, bottom), slice(first, last + 2)


def _known_to_weigh_nothing(weights: Tensor) -> bool:
    return weights.device.type == "cpu" and not weights.any()


def _known_to_be_near(logits: Tensor) -> bool:
    """Whether no class of a pixel resized from these, whose largest is 0, can be as far below it as exp underflows."""
    return logits.device.type == "cpu" and bool(logits.amin() > -_SPREAD)


def _interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old) matrix that resizes a row of pixels linearly with aligned corners."""
    place = torch.linspace(0, old - 1, new, dtype=torch.float64, device=like.device)
    distance = (place[:, None] - torch.arange(old, dtype=torch.float64, device=like.device)).abs()
    return (1 - distance).clamp_min(0).to(like.dtype)
