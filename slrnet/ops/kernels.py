"""Kernels in Triton for GPUs and in C for CPUs; the PyTorch form that each must equal stands where it is used."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

__all__ = ["SWITCH", "triton_serves", "wanted"]

SWITCH = "SLRNET_KERNELS"
"""Environment variable; `off` leaves the work to PyTorch's operators where a kernel would be chosen."""


def wanted() -> bool:
    """Whether kernels may be chosen.

    Raises:
        ValueError: the variable has a value that means nothing.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise ValueError(f"{SWITCH} is {value!r}; allowed are 'on' (as without it) and 'off'")
    return value == "on"


def triton_serves(like: Tensor) -> bool:
    """Whether a kernel in Triton may be chosen for tensors like this one: on GPUs, where Triton is installed."""
    return like.device.type == "cuda" and find_spec("triton") is not None and wanted()
