"""Class-balanced pixel cross-entropy (paper Eq. 1 with the weights of Araslanov and Roth 2020).

The paper writes plain cross-entropy; the balance between classes is that of the released code. True masks go without
it, unless asked for.

Logits are resized to the labels and leave their gradient at their own small size; no map of all classes at the labels'
resolution is kept. Kernels in Triton and in C do it, and PyTorch's operators, in parts, where neither can.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slrnet.cpu import cross_entropy as cross_entropy_cpu
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.ops import kernels

__all__ = ["WeighedLabels", "balanced_cross_entropy", "weigh", "weighted_cross_entropy"]

_PART = {"cpu": (2**20, 24), "cuda": (2**26, 2**16)}
"""Elements of resized logits that are worked on at a time, and rows at most: on CPUs elements that fit the caches, and
so few rows that they lie between a few of the small maps', from which each is made by a product with all of these."""
_SPREAD = 80.0
"""Logits so far below 0 have exponentials that are normal numbers in float32."""


class WeighedLabels(NamedTuple):
    """What the pixels of N images are to be, and how much each counts; for all logits that are compared with them."""

    labels: Tensor
    """(N, H, W) int64 class ids; any class where void."""
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
    """Cross-entropy in which a class weighs (total - its pixels) / (1 + total), total being all labelled pixels.

    Args:
        logits: (N, K, h, w), background first; resized to the labels (bilinear, aligned corners).
        labels: see `weigh`, as are the others.
        image_labels: (N, K - 1).
        checked: (N,).
        plain: (N,).

    Returns:
        (N,) the mean over all pixels of each image, void pixels adding 0; finite, with a graph, also where all is void.
    """
    weighed = weigh(labels, logits.shape[1], image_labels=image_labels, checked=checked, plain=plain)
    return weighted_cross_entropy(logits, weighed)


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
        image_labels: (N, K - 1) multi-hot. With it, an image whose labelled pixels do not show exactly as many classes
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


def weighted_cross_entropy(logits: Tensor, weighed: WeighedLabels) -> Tensor:
    """(N,) means over all pixels of weight times cross-entropy; (N, K, h, w) logits are resized to the labels."""
    return _WeightedCrossEntropy.apply(logits, *weighed)  # type: ignore[no-any-return]


class _WeightedCrossEntropy(torch.autograd.Function):
    """(N,) means over all pixels of weight times cross-entropy; the gradient is made on the way forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Logits (N, K, h, w) float, labels (N, H, W) int64 below K, weights (N, H, W) float32."""
        loss, gradient = _sums_and_slopes(logits.float(), labels, weights)
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
def _sums_and_slopes(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) sums over the pixels of weight times cross-entropy, and their gradients (N, K, h, w), channels last.

    One operator for PyTorch: neither its compiler nor tensors without data meet a kernel that looks into memory.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if min(*logits.shape[2:], *labels.shape[1:]) > 1:
            if kernels.triton_serves(logits):
                from slrnet.ops import cross_entropy_triton as cross_entropy_gpu

                return cross_entropy_gpu.resized_cross_entropy(logits, labels, weights)
            if logits.device.type == "cpu" and kernels.wanted() and cross_entropy_cpu.available():
                done = cross_entropy_cpu.resized_cross_entropy(logits, labels, weights)
                if done is not None:
                    return done
        return _by_operators(logits, labels, weights)


@_sums_and_slopes.register_fake
def _(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits)), torch.empty_like(logits, memory_format=torch.channels_last)


def _by_operators(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's operators, which take maps of any size and logits however far from each other."""
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
