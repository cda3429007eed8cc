"""What the faster convolutions share: they take over a convolution's parameters and give its numbers up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StandInConv2d", "convolution_dtype", "eager_on_cpu", "keeps_size"]


class StandInConv2d(nn.Conv2d):
    """A convolution with the settings and parameters of another one, for a subclass with its own `forward`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Copies the attributes of a convolution; its parameters are shared, under the same names.

        Args:
            conv: the convolution that this one replaces.
        """
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
    return (
        input.device.type == "cpu"
        and input.ndim == 4
        and not (torch.compiler.is_compiling() or torch.compiler.is_exporting())
    )


def convolution_dtype(input: Tensor) -> torch.dtype:
    """The dtype that a convolution on the CPU computes in: autocast's if it is on, else the input's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
