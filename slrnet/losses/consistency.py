"""Cross-view consistency of masks (paper Eq. 4) and codes (Eq. 9) in L1 distance, and the divergence of masks (Fig. 4).

All sum over unordered pairs of views. The paper's ordered pairs count each distance twice, a factor that lambda_reg can
absorb; two views then give the released code's scale. As in that code, the mean is over images, classes and pixels;
with `losses.class_divisor=voc`, VOC's number of classes divides the sum over the data's. If an image's labels are
known, only its foreground classes are compared. Otherwise all classes are, including the background, which
`losses.mask_background=false` leaves out as the released code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ClassDivisor", "code_consistency", "mask_consistency", "mask_divergence"]

ClassDivisor = Literal["voc", "data"]
"""See `losses.class_divisor`."""
VOC_FOREGROUND = 20
"""VOC's classes without the background."""


def mask_consistency(
    masks: Sequence[Tensor],
    image_labels: Tensor,
    *,
    has_image_labels: Tensor | None = None,
    background: bool = True,
    divisor: ClassDivisor = "data",
) -> Tensor:
    """Eq. 4: distance between the masks of the views, over the classes that the image has.

    Args:
        masks: per view (N, K, h, w), un-warped to one size, background first: logits (paper) or probabilities
            (released code).
        image_labels: (N, K - 1) multi-hot.
        has_image_labels: (N,) bool, whether an image's labels are known; None: all are.
        background: whether to compare the background too where the labels are unknown.
        divisor: whose number of classes divides the sum over classes.

    Returns:
        (N,) sum over pairs of views of the mean over all classes (the background if compared) and pixels; 0 with a
        graph for a single view.
    """
    known = image_labels.new_ones(len(image_labels)) if has_image_labels is None else has_image_labels
    known = known.to(masks[0].dtype)[:, None]
    labels = image_labels.to(masks[0].dtype)
    with_background = (1 - known) * background  # (N, 1)
    compared = torch.cat([with_background, labels * known + (1 - known)], dim=1)  # (N, K)
    num_classes = masks[0].shape[1]
    foreground = num_classes - 1 if divisor == "data" else VOC_FOREGROUND
    weights = compared * num_classes / (foreground + with_background)  # a mean over K or K - 1 classes
    return (_sum_of_pairs(masks) * weights).mean(dim=1)


def code_consistency(
    codes: Sequence[Tensor], *, compare: Literal["all", "maximum"] = "all", divisor: ClassDivisor = "data"
) -> Tensor:
    """Eq. 9: distance between the codes of the views.

    Args:
        codes: per view (N, k, h, w), un-warped to one size.
        compare: `all` codes (paper), or each pixel's `maximum` with the others set to 0 (released code).
        divisor: whose number of classes divides the sum over atoms, one of which stands for the background.

    Returns:
        (N,) sum over pairs of views of the mean over atoms and pixels; 0 with a graph for a single view.
    """
    if compare == "maximum":
        codes = [torch.where(view == view.amax(dim=1, keepdim=True), view, 0) for view in codes]
    own = _sum_of_pairs(codes).mean(dim=1)
    return own if divisor == "data" else own * (codes[0].shape[1] / (VOC_FOREGROUND + 1))


def mask_divergence(masks: Sequence[Tensor]) -> Tensor:
    """Kullback-Leibler divergence between the masks of the views, averaged over both directions.

    Args:
        masks: per view (N, K, h, w) logits, un-warped to one size.

    Returns:
        (N,) sum over pairs of views of the mean over pixels, in nats; 0 with a graph for a single view.
    """
    total = masks[0].flatten(1).sum(dim=1) * 0
    for first, second in combinations([view.log_softmax(dim=1) for view in masks], 2):
        both = (first.exp() - second.exp()) * (first - second)  # KL(p, q) + KL(q, p), per class
        total = total + both.sum(dim=1).flatten(1).mean(dim=1) / 2
    return total


def _sum_of_pairs(maps: Sequence[Tensor]) -> Tensor:
    """Distances (N, K) of each class or atom: the mean over pixels, summed over pairs of views."""
    last = [view.movedim(1, -1) for view in maps]  # gradients then have the layout of maps that are channels last
    total = last[0].sum(dim=(1, 2)) * 0
    for first, second in combinations(last, 2):
        total = total + (first - second).abs().mean(dim=(1, 2))
    return total
