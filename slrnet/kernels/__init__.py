"""Kernels in Triton for GPUs and in C for CPUs; the PyTorch form that each must equal stands where it is used."""

from __future__ import annotations

import os

__all__ = ["SWITCH", "wanted"]

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
