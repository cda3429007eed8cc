"""Dilated 3x3 convolutions for CPUs whose taps mostly lie outside the map.

At stride 8, a crop of 321 pixels is a map of 41x41. A tap 36 positions away overlaps only five of its rows or columns.
On a view of half the size, only the center tap overlaps. Here each tap is a matrix product over the positions where it
overlaps the map. CPU libraries also multiply the padding's zeros, or copy the map once for each tap. In bfloat16, their
dilated convolutions of thousands of channels are slower than nine products of whole maps. Numbers differ by rounding.
`docs/performance.md` has the time that this saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slrnet.cpu.convolutions import StandInConv2d, convolution_dtype, eager_on_cpu

__all__ = ["FewTapsConv2d"]

_MOST_TAPS = 0.7
"""Largest share of products that are not padding for which to use this form."""
_MANY_CHANNELS = 2048
"""Channels, in or out, from which dilated convolutions in bfloat16 always use this form."""


class FewTapsConv2d(StandInConv2d):
    """A 3x3 convolution that skips the products with padding if there are many."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolves (N, C, H, W) to (N, K, H, W)."""
        if not self._few_taps(input):
            return super().forward(input)
        maps = input.to(convolution_dtype(input)).permute(0, 2, 3, 1)
        # Permuted here because PyTorch forbids in-place changes to a view that a custom function returns.
        out: Tensor = _FewTaps.apply(maps, self.weight, self.dilation[0]).permute(0, 3, 1, 2)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def _few_taps(self, input: Tensor) -> bool:
        dtype, rate = convolution_dtype(input), self.dilation[0]
        if not eager_on_cpu(input) or dtype not in (torch.bfloat16, self.weight.dtype):
            return False
        if dtype == torch.bfloat16 and rate > 1 and max(self.in_channels, self.out_channels) >= _MANY_CHANNELS:
            return True
        height, width = (1 + 2 * max(0, side - rate) / side for side in input.shape[-2:])
        return height * width <= _MOST_TAPS * 9


class _FewTaps(torch.autograd.Function):
    """The convolution of (N, H, W, C) with (K, C, 3, 3) to (N, H, W, K)."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, rate: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.rate = rate
        filters = _filters(weight, maps.dtype)
        out = maps.new_zeros(*maps.shape[:3], len(weight), dtype=_sum_dtype(maps))
        for i, j, outputs, inputs in _taps(maps.shape[1], maps.shape[2], rate):
            part = out[outputs]
            part += (maps[inputs].flatten(0, 2) @ filters[i, j].T).view(part.shape)
        return out.to(maps.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        maps, weight = ctx.saved_tensors
        filters = _filters(weight, maps.dtype)
        of_maps = torch.zeros_like(maps, dtype=_sum_dtype(maps)) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i, j, outputs, inputs in _taps(maps.shape[1], maps.shape[2], ctx.rate):
            slope = slopes[outputs].flatten(0, 2)
            if of_maps is not None:
                part = of_maps[inputs]
                part += (slope @ filters[i, j]).view(part.shape)
            if of_weight is not None:
                of_weight[:, :, i, j] = slope.T @ maps[inputs].flatten(0, 2)
        return None if of_maps is None else of_maps.to(maps.dtype), of_weight, None


def _sum_dtype(maps: Tensor) -> torch.dtype:
    """float32 for half precision, otherwise the maps' dtype."""
    return torch.promote_types(maps.dtype, torch.float32)


def _filters(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Filters (3, 3, K, C); contiguous in half precision, where each product would copy them otherwise."""
    filters = weight.permute(2, 3, 0, 1).to(dtype)
    return filters.contiguous() if dtype == torch.bfloat16 else filters


def _taps(height: int, width: int, rate: int) -> Iterator[tuple[int, int, tuple[slice, ...], tuple[slice, ...]]]:
    """Row and column of each tap that overlaps the map, the outputs that it adds to, and the inputs that it reads."""

    def part(size: int, shift: int) -> slice:
        return slice(max(0, shift), size + min(0, shift))

    for i, j in product(range(3), repeat=2):
        down, across = (i - 1) * rate, (j - 1) * rate
        if abs(down) < height and abs(across) < width:
            outputs = (slice(None), part(height, -down), part(width, -across))
            yield i, j, outputs, (slice(None), part(height, down), part(width, across))
