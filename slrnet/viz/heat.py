"""Values as colors, from dark (0) to yellow (1)."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

__all__ = ["COLORS", "heat"]

COLORS = "viridis"
"""Grows in lightness, so it reads the same in gray and to the color-blind."""


def heat(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Colors (..., 3) uint8 of values (...) in [0, 1], which are clipped."""
    colors: npt.NDArray[np.uint8] = mpl.colormaps[COLORS](np.clip(values, 0, 1), bytes=True)[..., :3]
    return colors
