"""Dilated depthwise convolutions for CPUs, as undilated ones over interleaved maps.

At dilation r a position meets only those whose row and column differ from its own by multiples of r. So the map falls
into r x r interleaved maps that do not touch each other, and an undilated convolution of those, side by side in the
batch, gives the same numbers. CPU libraries have no fast path for the dilated form (benchmarks/dilated.py). On other
devices nothing changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slrnet.models.convolutions import StandInConv2d, keeps_size, replace_convolutions

__all__ = ["InterleavedConv2d", "interleave_dilated"]


class InterleavedConv2d(StandInConv2d):
    """A dilated depthwise convolution that works on interleaved maps on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        rate = self.dilation[0]
        height, width = input.shape[-2:]
        rows, columns = -(-height // rate), -(-width // rate)
        # Maps smaller than the kernel have no fast path either.
        if input.device.type != "cpu" or min(rows, columns) < max(self.kernel_size) or torch.compiler.is_exporting():
            return super().forward(input)
        padded = F.pad(input, [0, columns * rate - width, 0, rows * rate - height])
        maps = padded.permute(0, 2, 3, 1).reshape(-1, rows, rate, columns, rate, self.in_channels)
        maps = maps.permute(2, 4, 0, 1, 3, 5).reshape(-1, rows, columns, self.in_channels).permute(0, 3, 1, 2)
        padding = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        maps = F.conv2d(maps, self.weight, self.bias, padding=padding, groups=self.groups)
        maps = maps.permute(0, 2, 3, 1).reshape(rate, rate, -1, rows, columns, self.out_channels)
        whole = maps.permute(2, 3, 0, 4, 1, 5).reshape(-1, rows * rate, columns * rate, self.out_channels)
        return whole.permute(0, 3, 1, 2)[..., :height, :width]


def interleave_dilated(root: nn.Module) -> None:
    """Replaces the dilated depthwise convolutions within a module.

    Args:
        root: module that holds convolutions; changed in place. Parameters stay the same objects.
    """
    replace_convolutions(root, _can_interleave, InterleavedConv2d)


def _can_interleave(conv: nn.Conv2d) -> bool:
    """Depthwise, dilated, keeping the size of the map."""
    return keeps_size(conv) and conv.dilation[0] > 1 and conv.groups == conv.in_channels == conv.out_channels
