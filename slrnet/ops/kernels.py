"""What all kernels share: the switch that turns them off, and the constants of Algorithm 1."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

__all__ = ["MASS_FLOOR", "NORM_FLOOR", "SWITCH", "triton_serves", "wanted"]

SWITCH = "SLRNET_KERNELS"
"""Environment variable; `off` makes PyTorch's operators do the work of the kernels in Triton and in C."""
MASS_FLOOR = 1e-6
"""An atom's code mass is not divided by less than this; larger masses are left as they are."""
NORM_FLOOR = 1e-6
"""An atom is not divided by a norm below this when it is normalized."""


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
