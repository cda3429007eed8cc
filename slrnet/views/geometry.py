"""Views of a batch and their exact inverses (paper Sec. 3.1 and 4.6, Table 7).

A view resizes the crops by a scale, bilinear with align_corners=True, and mirrors each image by a coin of its own.
The released code has one fixed second view (half the size, never mirrored); here any number of views with any scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["View", "apply_view", "draw_views", "invert_view", "view_size"]


@dataclass(frozen=True, slots=True)
class View:
    """A geometric view of N images.

    Attributes:
        scale: side relative to the crop, above 0.
        flip: (N,) bool, True where the image is mirrored left to right; None where no image is.
    """

    scale: float
    flip: Tensor | None = None


def draw_views(n: int, *, scales: Sequence[float], flip: bool, generator: torch.Generator) -> list[View]:
    """Draws one view per scale for a batch of `n` images.

    Args:
        n: number of images.
        scales: scale of each view.
        flip: mirror each image of each view with probability 1/2; False: no view is mirrored.
        generator: on the CPU; used only where `flip` is True.
    """
    return [
        View(scale, torch.rand(n, generator=generator) < 0.5 if flip else None) for scale in (float(s) for s in scales)
    ]


def view_size(size: tuple[int, int], scale: float, *, stride: int) -> tuple[int, int]:
    """Height and width of a view.

    At scale 1 it is `size`. Else each side is the number nearest to scale * side (the larger of two equally near)
    that leaves the remainder of `side` modulo `stride` where that is 0 or 1, and either 0 or 1 where it is another:
    321 at stride 8 gives 161 for scale 0.5, and 192 gives 96. No side is smaller than one stride.

    Args:
        size: (H, W) in pixels.
        scale: above 0.
        stride: output stride of the encoder, pixels.

    Raises:
        ValueError: `scale` is not a finite number above 0, or `stride` is smaller than 1.
    """
    if not (math.isfinite(scale) and scale > 0.0):
        raise ValueError(f"scale is {scale}; a view's scale is a finite number above 0")
    if stride < 1:
        raise ValueError(f"stride is {stride}; it is at least 1 pixel")
    if scale == 1.0:
        return size
    return _side(size[0], scale, stride), _side(size[1], scale, stride)


def apply_view(images: Tensor, view: View, *, stride: int) -> Tensor:
    """Makes the view of a batch: resize, then mirror the images that the view mirrors.

    Args:
        images: (N, C, H, W) float.
        view: drawn for N images.
        stride: output stride of the encoder, pixels; see `view_size`.

    Returns:
        (N, C, h, w) with (h, w) = `view_size((H, W), view.scale, stride=stride)`; `images` itself if nothing changes.
    """
    return _resize_and_flip(images, view_size((images.shape[-2], images.shape[-1]), view.scale, stride=stride), view)


def invert_view(maps: Tensor, view: View, *, size: tuple[int, int]) -> Tensor:
    """Brings maps computed on a view back onto the crop: un-mirror, then resize; differentiable.

    Args:
        maps: (N, C, h, w) float, for instance logits of the view at any stride.
        view: the view that the maps were computed on.
        size: (H, W) of the result. Where (h, w) is already `size`, nothing is resampled.

    Returns:
        (N, C, H, W).
    """
    if maps.shape[-2:] != size:
        # As all maps of the network but codes are: those of many channels PyTorch would copy to this layout and back.
        maps = maps.contiguous(memory_format=torch.channels_last)
    return _resize_and_flip(maps, size, view)


def _resize_and_flip(maps: Tensor, size: tuple[int, int], view: View) -> Tensor:
    """Mirroring and aligned-corners resizing commute, so the mirroring is done on the smaller of the two sizes."""
    now = (maps.shape[-2], maps.shape[-1])
    if now == size:
        return _mirror(maps, view.flip)
    if now[0] * now[1] <= size[0] * size[1]:
        return functional.interpolate(_mirror(maps, view.flip), size=size, mode="bilinear", align_corners=True)
    return _mirror(functional.interpolate(maps, size=size, mode="bilinear", align_corners=True), view.flip)


def _mirror(maps: Tensor, flip: Tensor | None) -> Tensor:
    if flip is None:
        return maps
    mask = flip.to(device=maps.device, non_blocking=True).view(-1, 1, 1, 1)
    return _Mirror.apply(maps, mask)  # type: ignore[no-any-return]


class _Mirror(torch.autograd.Function):
    """Mirrors some images left to right. So does its gradient, in half of the operators that autograd would take."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, mask: Tensor) -> Tensor:
        """(N, C, H, W) maps, and (N, 1, 1, 1) bool, which of them are mirrored; keeps the maps' layout."""
        ctx.save_for_backward(mask)
        if _pixels_lie_together(maps):
            return _mirror_by_pixels(maps, mask)
        # torch.where, not indexing: a boolean index asks the device for its count and waits for the answer.
        return torch.where(mask, maps.flip(-1), maps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _Mirror.apply(gradients[0], mask), None


def _pixels_lie_together(maps: Tensor) -> bool:
    """Whether copying pixel by pixel pays: on CPUs, where the channels of each are neighbours in memory."""
    return maps.device.type == "cpu" and maps.is_contiguous(memory_format=torch.channels_last)


def _mirror_by_pixels(maps: Tensor, mask: Tensor) -> Tensor:
    """Each map's memory is passed once; with a mirror image of all of them it is three times."""
    n, channels, height, width = maps.shape
    column = torch.arange(width)
    column = torch.where(mask.view(n, 1, 1), width - 1 - column, column)
    source = (torch.arange(n * height).view(n, height, 1) * width + column).flatten()
    pixels = maps.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, source)
    return pixels.view(n, height, width, channels).permute(0, 3, 1, 2)


def _side(side: int, scale: float, stride: int) -> int:
    remainders = (side % stride,) if side % stride in (0, 1) else (0, 1)
    target = scale * side
    candidates = []
    for remainder in remainders:
        below = max(1, math.floor((target - remainder) / stride)) * stride + remainder
        candidates += [below, below + stride]
    return min(candidates, key=lambda value: (abs(value - target), -value))
