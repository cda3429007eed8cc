"""Dropout after a ReLU, in the place of its input.

Apart, the two keep three maps for the backward pass: what the ReLU gave, what was drawn, and what is left of it. The
last one alone says where the gradient passes, and the convolution that follows keeps it too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RectifiedDropout", "RectifiedDropout2d", "draw_kept"]


class RectifiedDropout(nn.Dropout):
    """`dropout(relu(x))`, where each element is dropped by itself; x is overwritten."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape and dtype."""
        return _rectify_and_drop(input, self, drawn=input)


class RectifiedDropout2d(nn.Dropout2d):
    """`dropout(relu(x))`, where each channel of an image is dropped as a whole; x is overwritten."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape and dtype."""
        return _rectify_and_drop(input, self, drawn=input[:, :, :1, :1])


def draw_kept(like: Tensor, probability: float) -> Tensor:
    """Ones and zeros by chance, of the shape, layout, dtype and device of a dense tensor.

    Args:
        like: says how the result looks.
        probability: of a one. On CPUs it is rounded to a multiple of 2^-16: four draws are made at once there, as one
            by one they would take longer than the convolution before.

    Returns:
        The tensor, drawn from PyTorch's generator of the device.
    """
    kept = torch.empty_like(like)
    below = round(probability * 2**16) - 2**15
    if not _four_at_once(like) or below == 2**15:
        return kept.bernoulli_(probability)
    draws = torch.empty(-(-kept.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    ones = draws.view(torch.int16)[: kept.numel()] < below
    return kept.copy_(ones.as_strided(kept.shape, kept.stride()))


def _four_at_once(like: Tensor) -> bool:
    return like.device.type == "cpu"


def _rectify_and_drop(x: Tensor, dropout: nn.Dropout | nn.Dropout2d, *, drawn: Tensor) -> Tensor:
    """Draws once for each element of a tensor like `drawn`."""
    if not (dropout.training and dropout.p):
        return F.relu(x, inplace=True)
    kept = draw_kept(drawn, 1 - dropout.p)
    return _RectifyAndDrop.apply(x, kept, 1 / (1 - dropout.p) if dropout.p < 1 else 0.0)  # type: ignore[no-any-return]


class _RectifyAndDrop(torch.autograd.Function):
    """relu(x) * kept * scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        """Overwrites x; where the result is positive the gradient passes."""
        ctx.mark_dirty(x)
        ctx.scale = scale
        out = x.relu_().mul_(kept.mul_(scale))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (out,) = ctx.saved_tensors
        return torch.where(out > 0, gradients[0] * ctx.scale, 0), None, None
