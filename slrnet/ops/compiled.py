"""Regions of a training step that `torch.compile` may make fewer and larger kernels of (`train.compile`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from slrnet.ops.kernels import triton_obstacle

__all__ = ["compile_regions", "with_compiler"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_compiler(function: Callable[Arguments, Result], compiled: bool) -> Callable[Arguments, Result]:
    """The function, compiled if asked for: code for each size of its inputs, as a training has few."""
    return _compiled(function) if compiled else function


@functools.cache
def _compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    return torch.compile(function, dynamic=False)


def compile_regions(regions: Iterable[nn.Module], device: torch.device) -> None:
    """Compiles modules in place; parameters keep their names.

    Raises:
        ValueError: the device is no GPU, or Triton, which the compiler writes its kernels in, cannot run.
    """
    if device.type != "cuda":
        raise ValueError(
            f"train.compile is for GPUs, and this worker trains on {device.type}, where slrnet.cpu has faster "
            "convolutions; set train.compile=false"
        )
    if (obstacle := triton_obstacle()) is not None:
        raise ValueError(f"train.compile cannot run here: {obstacle}, or set train.compile=false")
    for region in regions:
        region.compile(dynamic=False)
