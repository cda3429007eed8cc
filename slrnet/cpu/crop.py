"""Crops, resizes and mirrors an image with a C kernel; `data.transforms` does the same with PyTorch's operators."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

from slrnet.cpu.compiled import compiled

__all__ = ["CropKernel", "crop_kernel"]

CropKernel = Callable[[int, int, int, int, int, int, int, int, bool, int], int]
"""Writes a box of an image, resized to a square (bilinear, antialiased) and optionally mirrored left to right.

Arguments: the address of an image (H, W, 3) uint8, its size in bytes and that of a row; top, left, height and width of
the box, pixels; the side S of the result, pixels; whether to mirror; the address of the result (S, S, 3) uint8.
Returns 0, or another number if there is no memory for a few rows.
"""

_FEW = 128
"""Number of first crops of a process that PyTorch's operators make."""
_asked = itertools.count()


def crop_kernel() -> CropKernel | None:
    """The kernel for the next crop; None to use PyTorch's operators, whose bytes are the same.

    They make the first crops, so a process that makes few, or whose first batch somebody waits for, compiles nothing.
    They make all crops without a C compiler, or on a processor that is no x86 with AVX2.
    """
    if next(_asked) < _FEW:
        return None
    kernel = getattr(compiled("crop"), "crop", None)
    if kernel is not None:
        kernel.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_int] * 6, ctypes.c_void_p]
    return kernel
