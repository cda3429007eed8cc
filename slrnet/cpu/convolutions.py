"""Convolutions that stand in for those of PyTorch: same parameters, same numbers up to rounding, another way there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StandInConv2d", "convolution_dtype", "eager_on_cpu", "keeps_size"]


class StandInConv2d(nn.Conv2d):
    """Takes over the parameters of a convolution that pads with zeros, for a subclass with a `forward` of its own.

    Parameters have the names of `nn.Conv2d`, so state dicts of either fit the other.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Makes no parameters: it has those of `conv`, the same objects."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias


def keeps_size(conv: nn.Conv2d) -> bool:
    """Whether the map keeps its size: stride 1, odd kernel, a padding of zeros, one dilation for rows and columns."""
    rate, side = _pair(conv.dilation), _pair(conv.kernel_size)
    same = tuple((size - 1) * step // 2 for size, step in zip(side, rate, strict=True))
    return (
        rate[0] == rate[1]
        and all(size % 2 for size in side)
        and _pair(conv.stride) == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.padding in ("same", same)
    )


def eager_on_cpu(input: Tensor) -> bool:
    """Whether a batch of maps is worked on by a CPU, operator by operator: not compiled, not exported."""
    return (
        input.device.type == "cpu"
        and input.ndim == 4
        and not (torch.compiler.is_compiling() or torch.compiler.is_exporting())
    )


def convolution_dtype(input: Tensor) -> torch.dtype:
    """What a convolution on the CPU works in: autocast's dtype where it is on, else that of its input."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[-1]
