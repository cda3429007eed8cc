"""Un-warps the maps of all views to one frame (paper Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slrnet.views.geometry import View, invert_view

__all__ = ["align_maps", "largest_size"]


def largest_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of the map with the most positions; `maps` are per view (N, C, h, w)."""
    sizes = [(view.shape[-2], view.shape[-1]) for view in maps]
    return max(sizes, key=lambda pair: pair[0] * pair[1])


def align_maps(maps: Sequence[Tensor], views: Sequence[View], *, size: tuple[int, int]) -> list[Tensor]:
    """Un-warps maps to the frame of the crop.

    Args:
        maps: per view (N, C, h, w); none at all gives none.
        views: how to undo each view.
        size: (H, W) of the results.

    Returns:
        Per view (N, C, H, W).
    """
    return [invert_view(maps_of_view, view, size=size) for maps_of_view, view in zip(maps, views, strict=bool(maps))]
