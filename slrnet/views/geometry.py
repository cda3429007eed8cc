"""Views of a batch and their exact inverses (paper Sec. 3.1 and 4.6, Table 7).

A view resizes the crops by a scale (bilinear, align_corners=True) and mirrors each image with probability 1/2. The
released code has one fixed second view, of half the size and never mirrored; here any number of views has any scales.
`views.sizes=truncated` gives the released sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slrnet.config import ViewsConfig
from slrnet.ops.maps import resize

__all__ = ["View", "align_maps", "apply_view", "draw_views", "invert_view", "largest_size", "view_size"]


@dataclass(frozen=True, slots=True)
class View:
    """A geometric view of N images.

    `scale` is the side relative to the crop, above 0. `flip`, (N,) bool, says which images are mirrored left to right;
    None: none.
    """

    scale: float
    flip: Tensor | None = None

    def part(self, rows: slice) -> View:
        """The view of some of the images."""
        return View(self.scale, None if self.flip is None else self.flip[rows])


def draw_views(n: int, config: ViewsConfig, *, generator: torch.Generator) -> list[View]:
    """Draws one view per scale of `config` for a batch of `n` images, by a generator on the CPU."""
    return [View(scale, torch.rand(n, generator=generator) < 0.5 if config.flip else None) for scale in config.scales]


def view_size(size: tuple[int, int], scale: float, *, stride: int | None) -> tuple[int, int]:
    """Height and width of a view.

    At scale 1 it is `size`. Without a stride, each side is scale * side rounded down. With one, it is the allowed
    number nearest to scale * side, the larger of two equally near. Allowed are numbers from one stride up that leave
    the same remainder as `side` modulo `stride`, or if that is neither 0 nor 1, that leave one of these. At stride 8
    and scale 0.5, 321 gives 161 and 192 gives 96.

    Args:
        size: (H, W) in pixels.
        scale: side of the view relative to the crop, above 0.
        stride: output stride of the encoder, in pixels, at least 1; None to fit no stride (released code).
    """
    if scale == 1.0:
        return size
    if stride is None:
        return int(size[0] * scale), int(size[1] * scale)
    return _side(size[0], scale, stride), _side(size[1], scale, stride)


def _side(side: int, scale: float, stride: int) -> int:
    target = scale * side
    candidates = []
    for remainder in (side % stride,) if side % stride in (0, 1) else (0, 1):
        below = max(1, math.floor((target - remainder) / stride)) * stride + remainder
        candidates += [below, below + stride]
    return min(candidates, key=lambda value: (abs(value - target), -value))


def apply_view(images: Tensor, view: View, *, stride: int | None) -> Tensor:
    """Makes the view of a batch: resizes images (N, C, H, W), then mirrors those that the view mirrors.

    Returns:
        (N, C, h, w) with (h, w) = `view_size((H, W), view.scale, stride=stride)`; `images` itself if nothing changes.
    """
    size = view_size((images.shape[-2], images.shape[-1]), view.scale, stride=stride)
    return _mirror(resize(images, size), view.flip)


def invert_view(maps: Tensor, view: View, *, size: tuple[int, int]) -> Tensor:
    """Brings maps computed on a view back onto the crop: mirrors back, then resizes; differentiable.

    Args:
        maps: (N, C, h, w) float, for instance logits of the view at any stride.
        view: the view that the maps were computed on.
        size: (H, W) of the result (N, C, H, W). Where (h, w) is already `size`, nothing is resampled.
    """
    if maps.shape[-2:] != size:
        # Codes are not channels last, and interpolation would copy maps of many channels to that layout and back.
        maps = maps.contiguous(memory_format=torch.channels_last)
    return resize(_mirror(maps, view.flip), size)


def largest_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of the map with the most positions; `maps` has one (N, C, h, w) per view."""
    return max(((view.shape[-2], view.shape[-1]) for view in maps), key=lambda size: size[0] * size[1])


def align_maps(maps: Sequence[Tensor], views: Sequence[View], *, size: tuple[int, int]) -> list[Tensor]:
    """Un-warps maps to the frame of the crop (paper Eq. 3); differentiable.

    Args:
        maps: per view (N, C, h, w); fewer than views are those of the first ones.
        views: the view that each map was computed on.
        size: (H, W) of the results, per view (N, C, H, W).
    """
    return [invert_view(view_maps, view, size=size) for view_maps, view in zip(maps, views, strict=False)]


def _mirror(maps: Tensor, flip: Tensor | None) -> Tensor:
    if flip is None:
        return maps
    # torch.where, not indexing: a boolean index asks the device for its count and waits for the answer.
    return torch.where(flip.to(maps.device, non_blocking=True).view(-1, 1, 1, 1), maps.flip(-1), maps)
