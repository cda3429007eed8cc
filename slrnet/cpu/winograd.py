"""3x3 convolutions for inference on CPUs by Winograd's minimal filtering, F(4x4, 3x3).

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks": a tile of 4x4 outputs takes 36 products for
each pair of channels instead of 144, after linear transforms of input (6x6), filter and output. CPU libraries have no
such path that is fast for large maps (docs/performance.md). At dilation r, the positions of a tile are r apart.

Numbers differ from the direct form by rounding, about 1e-5 of the largest output. Training uses the direct form,
because gradients need values that this form does not keep.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from slrnet.cpu.convolutions import convolution_dtype, eager_on_cpu, keeps_size
from slrnet.cpu.few_taps import FewTapsConv2d

__all__ = ["WinogradConv2d"]

_TILE = 4
"""Side of a tile of outputs; tiles of inputs have two more."""
_INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_FILTER = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
_TO_INPUT, _TO_FILTER, _TO_OUTPUT = (
    torch.kron(*[torch.tensor(side, dtype=torch.float64)] * 2) for side in (_INPUT, _FILTER, _OUTPUT)
)
"""The transforms of whole tiles, rows and columns at once."""
_GAIN = 2.0
"""Least ratio of the direct form's multiplications to this form's, whose transforms also move memory."""
_BUFFER = 2**20
"""Values of transformed tiles in a part of the work, so that they stay in the processor's cache."""
_FEW_TILES = 512
"""Least number of tiles in a part, because each part reads all filters."""


class WinogradConv2d(FewTapsConv2d):
    """A 3x3 convolution that uses Winograd's form when no gradients are needed, and otherwise its base class's form.

    It keeps the transformed filters, four times the memory of the weights, until the weights change or training begins.
    """

    _filters: tuple[tuple[int, int], Tensor] | None = None

    @staticmethod
    def serves(conv: nn.Conv2d) -> bool:
        """Whether this class can replace a convolution: a 3x3 one of one group that keeps the map's size."""
        return type(conv) is nn.Conv2d and keeps_size(conv) and conv.groups == 1 and tuple(conv.kernel_size) == (3, 3)

    def forward(self, input: Tensor) -> Tensor:
        """Convolves (N, C, H, W) to (N, K, H, W)."""
        if not self._pays(input):
            return super().forward(input)
        out = _convolve(input, self._transformed(), self.dilation[0])
        return out if self.bias is None else out.add_(self.bias[:, None, None])

    def train(self, mode: bool = True) -> Self:
        """Drops the transformed filters when training begins."""
        if mode:
            self._filters = None
        return super().train(mode)

    def _pays(self, input: Tensor) -> bool:
        single = convolution_dtype(input) in (torch.float32, torch.float64)
        if not (eager_on_cpu(input) and single) or torch.is_grad_enabled():
            return False
        rate, (height, width) = self.dilation[0], input.shape[-2:]
        down, across = _tiles(height, rate), _tiles(width, rate)
        sources, targets = self.in_channels, self.out_channels
        own = down * across * rate * rate * (36 * sources * targets + 36 * 36 * sources + 16 * 36 * targets)
        return height * width * 9 * sources * targets >= _GAIN * own

    def _transformed(self) -> Tensor:
        """The transformed filters (36, C, K)."""
        of = (self.weight.data_ptr(), self.weight._version)
        if self._filters is None or self._filters[0] != of:
            taps = self.weight.detach().permute(2, 3, 1, 0).reshape(9, -1)
            self._filters = of, (_TO_FILTER.to(taps) @ taps).view(36, self.in_channels, self.out_channels)
        return self._filters[1]


def _tiles(size: int, rate: int) -> int:
    """Tiles along a side; a tile covers `_TILE` positions that are `rate` apart, and `rate` tiles interleave."""
    return -(-size // (_TILE * rate))


def _convolve(maps: Tensor, filters: Tensor, rate: int) -> Tensor:
    """Convolves (N, C, H, W) with transformed filters (36, C, K) to (N, K, H, W), channels last."""
    images, sources, height, width = maps.shape
    targets = filters.shape[2]
    down, across = _tiles(height, rate), _tiles(width, rate)
    rows, columns = rate * _TILE * down, rate * _TILE * across
    of_row = rate * across * rate
    at_once = max(_FEW_TILES, _BUFFER // (36 * max(sources, targets)))
    height_of_part = max(1, min(down, at_once // of_row))
    images_of_part = max(1, min(images, at_once // (of_row * height_of_part)))
    padded = maps.new_zeros(images, rows + 2 * rate, columns + 2 * rate, sources)
    padded[:, rate : rate + height, rate : rate + width] = maps.permute(0, 2, 3, 1)
    row, column = padded.stride(1), padded.stride(2)
    # Input tiles (N, down, rate, across, rate, 6, 6, C), and views of their outputs (N, down, ..., 4, 4, K).
    tiles = padded.as_strided(
        (images, down, rate, across, rate, 6, 6, sources),
        (padded.stride(0), _TILE * rate * row, row, _TILE * rate * column, column, rate * row, rate * column, 1),
    )
    out = maps.new_empty(images, rows, columns, targets)
    places = out.view(images, down, _TILE, rate, across, _TILE, rate, targets).permute(0, 1, 3, 4, 6, 2, 5, 7)
    to_input, to_output = _TO_INPUT.to(maps.dtype), _TO_OUTPUT.to(maps.dtype)
    for first in range(0, images, images_of_part):
        for top in range(0, down, height_of_part):
            part = (slice(first, first + images_of_part), slice(top, top + height_of_part))
            taken = tiles[part].reshape(-1, 36, sources)
            products = (to_input @ taken).transpose(0, 1) @ filters  # (36, tiles, K)
            places[part] = (to_output @ products.transpose(0, 1)).view(places[part].shape)
    return out[:, :height, :width].permute(0, 3, 1, 2)
