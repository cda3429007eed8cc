"""The switch that turns off all kernels, and the constants of Algorithm 1."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

__all__ = ["MASS_FLOOR", "NORM_FLOOR", "SWITCH", "triton_serves", "wanted"]

SWITCH = "SLRNET_KERNELS"
"""Environment variable; with `off`, PyTorch's operators replace the kernels in Triton and C."""
MASS_FLOOR = 1e-6
"""Smallest code mass to divide an atom by."""
NORM_FLOOR = 1e-6
"""Smallest norm to divide an atom by."""


def wanted() -> bool:
    """Whether kernels may be used.

    Raises:
        ValueError: the variable is neither `on` nor `off`.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise ValueError(f"{SWITCH} is {value!r}; allowed are 'on' (the default) and 'off'")
    return value == "on"


def triton_serves(like: Tensor) -> bool:
    """Whether Triton kernels may be used for tensors like this one: on a GPU, if Triton is installed."""
    return like.device.type == "cuda" and find_spec("triton") is not None and wanted()
