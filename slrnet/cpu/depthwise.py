"""Depthwise convolutions for CPUs: dilated ones over interleaved maps, and a fast gradient of the weights.

At dilation r, a position depends only on those whose row and column differ from its own by multiples of r. The map
therefore splits into r x r independent interleaved maps, and an undilated convolution of these, stacked in the batch,
gives the same numbers. CPU libraries have no fast path for the dilated form.

The gradient of the weights is itself a depthwise convolution: each map of an image is convolved with the gradient of
its outputs, a kernel as large as the map, and the results are summed over the images. On small maps this is faster than
the libraries' form, which is slow in bfloat16 (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from slrnet.cpu.convolutions import StandInConv2d, convolution_dtype, eager_on_cpu, keeps_size

__all__ = ["DepthwiseConv2d"]


class DepthwiseConv2d(StandInConv2d):
    """A depthwise convolution in the form that is fast on CPUs."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Takes over the parameters of a convolution for which `serves` is true."""
        super().__init__(conv)
        self.pads_itself = isinstance(conv, Conv2dSame)

    @staticmethod
    def serves(conv: nn.Conv2d) -> bool:
        """Whether this class can replace a convolution: a depthwise one, undilated or keeping the map's size."""
        depthwise = type(conv) in (nn.Conv2d, Conv2dSame) and 1 < conv.groups == conv.in_channels == conv.out_channels
        strided = conv.dilation == (1, 1) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return depthwise and (strided or keeps_size(conv))

    def forward(self, input: Tensor) -> Tensor:
        """Convolves (N, C, H, W); output as of the replaced convolution."""
        if self.pads_itself:
            input = pad_same(input, list(self.kernel_size), list(self.stride))
        if not eager_on_cpu(input):
            return super().forward(input)
        maps, rate = input.to(convolution_dtype(input)), self.dilation[0]
        if rate > 1:
            out = _interleaved(maps, self.weight, rate)
        else:
            out = _undilated(maps, self.weight, self.stride, self.padding)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]


def _interleaved(maps: Tensor, weight: Tensor, rate: int) -> Tensor:
    channels, height, width = maps.shape[1:]
    # At least the kernel's size: smaller maps have no fast path either.
    rows, columns = (max(side, -(-size // rate)) for side, size in zip(weight.shape[-2:], (height, width), strict=True))
    parts = F.pad(maps, [0, columns * rate - width, 0, rows * rate - height]).permute(0, 2, 3, 1)
    parts = parts.reshape(-1, rows, rate, columns, rate, channels).permute(2, 4, 0, 1, 3, 5)
    parts = parts.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)
    out = _undilated(parts, weight, (1, 1), (weight.shape[2] // 2, weight.shape[3] // 2))
    out = out.permute(0, 2, 3, 1).reshape(rate, rate, -1, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
    return out.reshape(-1, rows * rate, columns * rate, channels).permute(0, 3, 1, 2)[..., :height, :width]


def _undilated(maps: Tensor, weight: Tensor, stride: tuple[int, ...], padding: str | tuple[int, ...]) -> Tensor:
    if maps.dtype == torch.bfloat16 or (stride == (1, 1) and _small(maps)):
        return _Depthwise.apply(maps, weight, stride, padding)  # type: ignore[no-any-return]
    return F.conv2d(maps, weight, None, stride, padding, groups=len(weight))


def _small(maps: Tensor) -> bool:
    """Whether maps are small enough to serve as kernels; for larger ones the library is faster."""
    return maps[0, 0].numel() <= (32 * 32 if maps.dtype == torch.bfloat16 else 8 * 8)


class _Depthwise(torch.autograd.Function):
    """The undilated convolution of (N, C, H, W) with (C, 1, I, J), in the dtype of the maps."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(maps, weight.to(maps.dtype), None, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        maps, weight = ctx.saved_tensors
        options = {"stride": ctx.stride, "padding": ctx.padding, "groups": len(weight)}
        wide = torch.promote_types(maps.dtype, torch.float32)  # there is no fast form in half precision
        of_maps = of_weight = None
        if ctx.needs_input_grad[0]:
            dtype = maps.dtype if ctx.stride == (1, 1) else wide
            of_maps = conv2d_input(maps.shape, weight.to(dtype), slopes.to(dtype), **options).to(maps.dtype)
        if ctx.needs_input_grad[1] and ctx.stride == (1, 1) and _small(slopes):
            of_weight = _by_maps(maps, slopes, ctx.padding)
        elif ctx.needs_input_grad[1]:
            of_weight = conv2d_weight(maps.to(wide), weight.shape, slopes.to(wide), **options)
        if of_weight is not None:
            of_weight = torch.empty_like(weight).copy_(of_weight)  # DDP asks for the strides of the weight
        return of_maps, of_weight, None, None


def _by_maps(maps: Tensor, slopes: Tensor, padding: tuple[int, ...]) -> Tensor:
    """The weight's gradient (C, 1, I, J): each map of each image is a channel, its outputs' slopes are the kernel."""
    images, channels, height, width = maps.shape
    each = images * channels
    sources = maps.permute(2, 3, 0, 1).reshape(1, height, width, each).permute(0, 3, 1, 2)
    products = F.conv2d(sources, slopes.reshape(each, 1, *slopes.shape[-2:]), padding=padding, groups=each)
    return products.view(images, channels, *products.shape[-2:]).sum(dim=0).unsqueeze(1)
