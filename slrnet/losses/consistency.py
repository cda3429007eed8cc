"""Cross-view consistency of masks (paper Eq. 4) and of codes (Eq. 9), with the L1 distance.

Both sum over unordered pairs of views: the ordered pairs of the paper count each distance twice, a factor that belongs
to lambda_reg, and two views then give the released code's scale. As there, the mean is taken over images, foreground
classes and pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

__all__ = ["code_consistency", "mask_consistency"]


def mask_consistency(
    masks: Sequence[Tensor], image_labels: Tensor, *, compare: Literal["logits", "probs"] = "logits"
) -> Tensor:
    """Eq. 4: distance between the masks of the views, over the classes that the image has.

    Args:
        masks: per view (N, K, h, w) logits, un-warped to one size, background first (it is left out).
        image_labels: (N, K - 1) multi-hot.
        compare: the logits themselves (paper) or their probabilities (released code).

    Returns:
        (N,) sum over pairs of views of the mean over classes and pixels; 0 with a graph for a single view.
    """
    maps = [view if compare == "logits" else view.softmax(dim=1) for view in masks]
    present = image_labels[:, :, None, None]
    return _sum_of_pairs([view[:, 1:] * present for view in maps])


def code_consistency(codes: Sequence[Tensor], *, compare: Literal["all", "maximum"] = "all") -> Tensor:
    """Eq. 9: distance between the codes of the views.

    Args:
        codes: per view (N, k, h, w), un-warped to one size.
        compare: the codes as they are (paper), or with all but each pixel's maximum set to 0 (released code).

    Returns:
        (N,) sum over pairs of views of the mean over atoms and pixels; 0 with a graph for a single view.
    """
    if compare == "maximum":
        codes = [torch.where(view == view.amax(dim=1, keepdim=True), view, 0) for view in codes]
    return _sum_of_pairs(codes)


def _sum_of_pairs(maps: Sequence[Tensor]) -> Tensor:
    total = maps[0].flatten(1).sum(dim=1) * 0
    for first, second in combinations(maps, 2):
        total = total + (first - second).abs().flatten(1).mean(dim=1)
    return total
