"""The base class and the conditions that the faster convolutions share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StandInConv2d", "convolution_dtype", "eager_on_cpu", "keeps_size"]


class StandInConv2d(nn.Conv2d):
    """A convolution that replaces another one and shares its settings and parameters; subclasses define `forward`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Takes over the attributes of `conv`; parameters keep their names."""
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)


def keeps_size(conv: nn.Conv2d) -> bool:
    """Whether the map keeps its size: stride 1, odd kernel, zero padding, one dilation for rows and columns."""
    same = tuple(rate * (size - 1) // 2 for size, rate in zip(conv.kernel_size, conv.dilation, strict=True))
    return (
        len(set(conv.dilation)) == 1
        and all(size % 2 for size in conv.kernel_size)
        and set(conv.stride) == {1}
        and conv.padding_mode == "zeros"
        and conv.padding in ("same", same)
    )


def eager_on_cpu(input: Tensor) -> bool:
    """Whether a batch of maps is on a CPU and no compiler or exporter traces the operators."""
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return input.device.type == "cpu" and input.ndim == 4 and not traced


def convolution_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which a convolution on the CPU computes: autocast's if it is on, otherwise the input's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
