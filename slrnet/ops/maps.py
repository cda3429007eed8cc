"""Small operations on maps that models, losses and calibration share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_probs", "resize", "widened"]


def resize(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resizes (N, C, h, w) to (N, C, *size), bilinear with aligned corners, as everywhere in this method."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def class_probs(logits: Tensor) -> Tensor:
    """Softmax over the K classes of (N, K, H, W) logits; makes no copy if they are channels last."""
    return logits.movedim(1, -1).softmax(dim=-1).movedim(-1, 1)


def widened(values: Tensor) -> Tensor:
    """The values in float32 if they are in half precision, otherwise as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
