"""A box of an image, resized and mirrored, by a C kernel; `data.transforms` has the form that it must equal."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable

from slrnet.cpu.compiled import compiled

__all__ = ["CropKernel", "available", "crop_kernel"]

CropKernel = Callable[[int, int, int, int, int, int, int, int, bool, int], int]
"""Writes a box, resized to a square (bilinear, antialiased), and mirrored left to right if need be.

It takes the address of an image of (H, W, 3) uint8, its bytes and those of a row; top, left, height and width of a box
within it, pixels; the side of the result; whether left becomes right; and the address of the result, (S, S, 3) uint8.
It returns 0, or another number where there is no memory for a few rows.
"""

_FEW = 128
"""Crops for which a process is given no kernel."""
_asked = itertools.count()


def available() -> bool:
    """Whether the kernel can be used on this machine: an x86 processor with AVX2, and a C compiler."""
    library = compiled("crop")
    return library is not None and _function_of(library) is not None


def crop_kernel() -> CropKernel | None:
    """The kernel for the next crop; None if PyTorch's operators have to make it, or should.

    They make the first ones: the bytes are the same, and a process that makes few crops, or whose first batch somebody
    waits for, saves half a second of compiling.
    """
    if next(_asked) < _FEW:
        return None
    library = compiled("crop")
    return None if library is None else _function_of(library)


@functools.cache
def _function_of(library: ctypes.CDLL) -> CropKernel | None:
    """The kernel in a library; None where the processor lacks its instructions."""
    if not library.can_crop():
        return None
    function = library.crop
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_int] * 6, ctypes.c_void_p]
    return function
