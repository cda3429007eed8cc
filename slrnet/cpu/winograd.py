"""3x3 convolutions for inference on CPUs by Winograd's minimal filtering, F(4x4, 3x3).

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks": a tile of 4x4 outputs takes 36 products for
each pair of channels instead of 144, after linear transforms of the input (6x6), the filter and the output. CPU
libraries have no such path that is fast for large maps (benchmarks/winograd.py). At dilation r a position meets only
those whose row and column differ from its own by multiples of r, so tiles are taken at that distance.

Numbers differ from the direct form by rounding, about 1e-5 of the largest output. Training does without, as its
gradients need what this form does not keep. On other devices nothing changes.
"""

from __future__ import annotations

import math
import threading
from typing import Self

import torch
from torch import Tensor, nn

from slrnet.cpu.convolutions import convolution_dtype, eager_on_cpu, keeps_size
from slrnet.cpu.few_taps import FewTapsConv2d

__all__ = ["WinogradConv2d"]

_TILE = 4
"""Side of a tile of outputs; of inputs it is two more."""
_INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
_FILTER = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
) / torch.tensor([[24.0]], dtype=torch.float64)
_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64
)
_TO_INPUT, _TO_FILTER, _TO_OUTPUT = (torch.kron(side, side) for side in (_INPUT, _FILTER, _OUTPUT))
"""The transforms of whole tiles, rows and columns at once."""
_GAIN = 2.0
"""Least ratio of multiplications, direct over this form, at which this one is taken: its transforms move memory."""
_BUFFER = 2**20
"""Values of a buffer of transformed tiles; larger maps are worked on in parts, which stay in the processor's cache."""
_FEW_TILES = 512
"""Tiles below which parts are not made smaller, whatever their size: each part reads all filters."""


class WinogradConv2d(FewTapsConv2d):
    """A 3x3 convolution that is fast on CPUs where no gradient is wanted, and elsewhere where there is much padding.

    The transformed filters are kept until the weights change or the module is told to train: four times the weights'
    memory.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Takes over the parameters of a convolution.

        Args:
            conv: 3x3, of stride 1, one group, and a padding of zeros that keeps the size of the map.
        """
        super().__init__(conv)
        self._filters: tuple[tuple[int, int], Tensor] | None = None

    @staticmethod
    def serves(conv: nn.Conv2d) -> bool:
        """Whether it can take the place of a convolution: a 3x3 one of one group that keeps the map's size."""
        return type(conv) is nn.Conv2d and keeps_size(conv) and conv.groups == 1 and tuple(conv.kernel_size) == (3, 3)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K, H, W)."""
        if not self._pays(input):
            return super().forward(input)
        out = _convolve(input, self._transformed(), self.dilation[0])
        return out if self.bias is None else out.add_(self.bias[:, None, None])

    def train(self, mode: bool = True) -> Self:
        """Forgets the transformed filters when training begins."""
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
        """(36, C, K)."""
        of = (self.weight.data_ptr(), self.weight._version)
        if self._filters is None or self._filters[0] != of:
            taps = self.weight.detach().permute(2, 3, 1, 0).reshape(9, -1)
            self._filters = of, (_TO_FILTER.to(taps) @ taps).view(36, self.in_channels, self.out_channels)
        return self._filters[1]


def _tiles(size: int, rate: int) -> int:
    """Tiles along a side; a tile reaches over `_TILE` positions that are `rate` apart, `rate` of them interleaved."""
    return -(-size // (_TILE * rate))


def _convolve(maps: Tensor, filters: Tensor, rate: int) -> Tensor:
    """(N, C, H, W) and (36, C, K) to (N, K, H, W), channels last."""
    images, sources, height, width = maps.shape
    targets = filters.shape[2]
    down, across = _tiles(height, rate), _tiles(width, rate)
    rows, columns = rate * _TILE * down, rate * _TILE * across
    of_row = rate * across * rate
    at_once = max(_FEW_TILES, _BUFFER // (36 * max(sources, targets)))
    height_of_part = max(1, min(down, at_once // of_row))
    images_of_part = max(1, min(images, at_once // (of_row * height_of_part)))
    most = images_of_part * height_of_part * of_row
    padded, raw, inputs, products, outputs = _workspace(
        maps,
        (images, rows + 2 * rate, columns + 2 * rate, sources),
        (most, 36, sources),
        (most, 36, sources),
        (36, most, targets),
        (most, 16, targets),
    )
    padded[:, :rate].zero_()
    padded[:, rate + height :].zero_()
    padded[:, :, :rate].zero_()
    padded[:, :, rate + width :].zero_()
    padded[:, rate : rate + height, rate : rate + width].copy_(maps.permute(0, 2, 3, 1))
    row, column = padded.stride(1), padded.stride(2)
    # Input tiles, (N, down, rate, across, rate, 6, 6, C), and where their outputs belong, (N, down, ..., 4, 4, K).
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
            taken, place = tiles[part], places[part]
            count = taken[..., 0, 0, 0].numel()
            raw[:count].view(taken.shape).copy_(taken)
            torch.bmm(to_input.expand(count, 36, 36), raw[:count], out=inputs[:count])
            torch.bmm(inputs[:count].transpose(0, 1), filters, out=products[:, :count])
            torch.bmm(to_output.expand(count, 16, 36), products[:, :count].transpose(0, 1), out=outputs[:count])
            place.copy_(outputs[:count].view(place.shape))
    return out[:, :height, :width].permute(0, 3, 1, 2)


class _Local(threading.local):
    """A thread's workspace: memory that is asked for anew at every call costs more than what is done with it."""

    values = torch.empty(0)


_local = _Local()


def _workspace(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Uninitialised tensors that hold until the next call in this thread."""
    sizes = [math.prod(shape) for shape in shapes]
    if _local.values.dtype != like.dtype or _local.values.numel() < sum(sizes):
        _local.values = torch.empty(0)  # frees it first
        with torch.inference_mode(False):  # it may be written to in any mode
            _local.values = torch.empty(sum(sizes), dtype=like.dtype)
    parts = _local.values[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
