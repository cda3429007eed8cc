"""The decoder: ASPP, skip fusion, global cue injection, stochastic gate, mask head.

Paper Sec. 4 ("Implementation Details"). The parts follow Chen et al. 2018 (ASPP, skip fusion) and Araslanov and Roth
2020 (global cue injection, stochastic gate). As in the released code, the batch norms of the ASPP keep their initial
statistics (mean 0, variance 1) and so act as an affine map, and the background's logit is the constant 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slrnet.ops.maps import resize, widened

__all__ = [
    "ASPP",
    "GlobalCueInjection",
    "MaskHead",
    "SkipFusion",
    "StochasticGate",
    "complementary_dropout",
    "conv_norm",
    "conv_norm_relu",
]

BATCH_NORM_MOMENTUM = 0.05
RECTIFIED_VARIANCE = 0.5 - 0.5 / math.pi
"""Variance of max(x, 0) for a standard normal x."""


def conv_norm(inputs: int, outputs: int, kernel: int, *, dilation: int = 1, affine: bool = True) -> nn.Sequential:
    """A size-keeping convolution without bias, and batch norm."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs, momentum=BATCH_NORM_MOMENTUM, affine=affine),
    )


def conv_norm_relu(inputs: int, outputs: int, kernel: int, *, dilation: int = 1) -> nn.Sequential:
    """A size-keeping convolution without bias, batch norm and ReLU."""
    return conv_norm(inputs, outputs, kernel, dilation=dilation).append(nn.ReLU(inplace=True))


def complementary_dropout(views: Sequence[Tensor], share: float) -> list[Tensor]:
    """Splits the channels of an image between two views (UniMatch V2, Yang et al. 2025, Sec. 3.3).

    Each pair of following views gets one random half of the channels, doubled, and the other half; a view without a
    partner stays as it is.

    Args:
        views: per view (N, C, h, w) features.
        share: probability in [0, 1] that an image is split at all; other images keep all channels.
    """
    result = list(views)
    for first in range(0, len(views) - 1, 2) if share else ():
        n, channels = views[first].shape[:2]
        kept = torch.rand(n, channels, 1, 1, device=views[first].device) < 0.5
        split = torch.rand(n, 1, 1, 1, device=views[first].device) < share
        for place, mask in ((first, kept), (first + 1, ~kept)):
            result[place] = views[place] * torch.where(split, 2.0 * mask, 1.0).to(views[place].dtype)
    return result


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with batch norms whose statistics stay frozen.

    Args:
        inputs: channels of the deepest encoder features.
        dim: channels of each branch and of the output.
        dilations: dilations of the three 3x3 branches, in pixels of the features.
        dropout: dropout probability on the output.
    """

    def __init__(self, inputs: int, *, dim: int, dilations: tuple[int, int, int], dropout: float = 0.5) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_norm_relu(inputs, dim, 1)])
        self.branches.extend(conv_norm_relu(inputs, dim, 3, dilation=rate) for rate in dilations)
        self.pooled = conv_norm_relu(inputs, dim, 1)
        self.project = conv_norm_relu(5 * dim, dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.train()

    def forward(self, features: Tensor) -> Tensor:
        """(N, inputs, h, w) to (N, dim, h, w)."""
        maps = [branch(features) for branch in self.branches]
        # torch.export cannot trace adaptive_avg_pool2d for free sizes: it asks how the features lie in memory.
        cue = self.pooled(features.mean(dim=(2, 3), keepdim=True)).expand_as(maps[0])
        # What is concatenated with a map of other strides would not be channels last.
        cue = cue.contiguous(memory_format=torch.channels_last)
        return self.dropout(self.project(torch.cat([*maps, cue], dim=1)))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Self:
        """Keeps the batch norms' statistics at mean 0, variance 1; their affine parameters train."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class SkipFusion(nn.Module):
    """Joins the ASPP output with shallow features at the shallow features' resolution.

    Args:
        dim: channels of the ASPP output and of the result.
        skip_channels: channels of the shallow encoder features.
        skip_dim: channels of the shallow features after their projection.
        skip_share: share of the variance of what is fused that the shallow features have at the start: batch norms
            bring both to a known variance, and a fixed factor weighs them. 0: no such norm and factor.
    """

    def __init__(self, dim: int, *, skip_channels: int, skip_dim: int, skip_share: float = 0.0) -> None:
        super().__init__()
        self.project = conv_norm_relu(skip_channels, skip_dim, 1)
        self.normalize: nn.Module = nn.Identity()
        self.gain = 1.0
        self.dim = dim
        if skip_share:
            # Deep features of untrained weights can be tiny; PyTorch's usual eps would leave them so.
            self.normalize = nn.BatchNorm2d(dim, eps=1e-8, momentum=BATCH_NORM_MOMENTUM, affine=False)
            self.gain = math.sqrt(skip_share / (1 - skip_share) * dim / (skip_dim * RECTIFIED_VARIANCE))
        self.fuse = conv_norm_relu(dim + skip_dim, dim, 3)

    def forward(self, deep: Tensor, skip: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fuses (N, dim, h, w) and (N, skip_channels, H, W).

        Returns:
            (N, dim, H, W), and in training the share of what is fused that is shallow: of its variance over images and
            pixels, a scalar without gradient.
        """
        grown = self.normalize(resize(deep, skip.shape[-2:]))  # in this order, for resizing smooths
        joined = torch.cat([grown, self.project(skip) * self.gain], dim=1)
        return self.fuse(joined), self._shallow_share(joined) if self.training else None

    @torch.no_grad()
    def _shallow_share(self, joined: Tensor) -> Tensor:
        variance = widened(joined).var(dim=(0, 2, 3), correction=0)
        return variance[self.dim :].sum() / variance.sum().clamp_min(1e-12)


class GlobalCueInjection(nn.Module):
    """Modulates shallow features by a global description of the deep ones (adaptive instance normalization).

    Args:
        skip_channels: channels of the shallow features.
        dim: channels of the deep features and of the result.
    """

    def __init__(self, skip_channels: int, *, dim: int) -> None:
        super().__init__()
        self.describe = conv_norm(dim, 2 * dim, 1)
        self.shallow = conv_norm(skip_channels, dim, 1, affine=False)
        self.project = conv_norm_relu(dim, dim, 1)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        """(N, skip_channels, H, W) and (N, dim, h, w) to (N, dim, H, W)."""
        # ReLU and maximum commute; this order needs no rectified map. Channels last keep the gradient channels last.
        described = self.describe(deep).movedim(1, -1).flatten(1, 2)  # (N, h w, 2 dim)
        cue = described.max(dim=1).values.relu()[..., None, None]  # (N, 2 dim, 1, 1)
        scale, shift = cue.chunk(2, dim=1)
        return self.project(F.relu(self.shallow(skip) * (scale + 1) + shift, inplace=True))  # type: ignore[no-any-return]


class StochasticGate(nn.Module):
    """Mixes deep and shallow features: at random per element in training, in fixed shares otherwise.

    In training, an element is either the shallow one or (deep - rate shallow) / (1 - rate), so that the mean over the
    gates is the deep feature, as in the released code.

    Args:
        rate: share of the shallow features, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """Two (N, dim, H, W) to one; outside training (1 - rate) deep + rate shallow."""
        if not self.training or self.rate == 0:
            return deep + self.rate * (shallow - deep)
        return shallow + F.dropout(deep - shallow, self.rate)


class MaskHead(nn.Module):
    """One or two 3x3 convolutions and a classifier for the foreground; the background's logit is the constant 1.

    Args:
        dim: channels of the features.
        num_classes: K with the background.
        dropout: dropout probability after the first convolution; one fifth of it after the second.
        predict_background: the classifier also predicts the background's logit.
        layers: number of 3x3 convolutions, 1 or 2.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_classes: int,
        dropout: float = 0.5,
        predict_background: bool = False,
        layers: Literal[1, 2] = 2,
    ) -> None:
        super().__init__()
        self.predict_background = predict_background
        self.convs = nn.Sequential(conv_norm_relu(dim, dim, 3), nn.Dropout(dropout))
        if layers == 2:
            self.convs.extend([conv_norm_relu(dim, dim, 3), nn.Dropout(dropout / 5)])
        self.classify = nn.Conv2d(dim, num_classes - (not predict_background), 1)

    def forward(self, features: Tensor) -> Tensor:
        """(N, dim, H, W) features to (N, K, H, W) logits, background first."""
        foreground = widened(self.classify(self.convs(features)))
        if self.predict_background:
            return foreground
        return torch.cat([torch.ones_like(foreground[:, :1]), foreground], dim=1)
