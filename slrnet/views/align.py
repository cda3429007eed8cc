"""Un-warps the maps of all views to one frame (paper Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slrnet.views.geometry import View, invert_view

__all__ = ["align_maps", "largest_size"]


def largest_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of the map with the most positions; `maps` has one (N, C, h, w) per view."""
    return max(((view.shape[-2], view.shape[-1]) for view in maps), key=lambda size: size[0] * size[1])


def align_maps(maps: Sequence[Tensor], views: Sequence[View], *, size: tuple[int, int]) -> list[Tensor]:
    """Un-warps maps to the frame of the crop; differentiable.

    Args:
        maps: per view (N, C, h, w); an empty sequence gives an empty list.
        views: the view that each map was computed on.
        size: (H, W) of the results, per view (N, C, H, W).
    """
    return [invert_view(view_maps, view, size=size) for view_maps, view in zip(maps, views, strict=bool(maps))]
