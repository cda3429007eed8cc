"""A box of an image, resized and mirrored, on the CPU; `data.transforms` has the form it must equal."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable

from slrnet.cpu.compiled import compiled
from slrnet.ops.kernels import wanted

__all__ = ["Kernel", "available", "kernel"]

Kernel = Callable[[int, int, int, int, int, int, int, int, bool, int], int]
"""Writes a box, resized to a square (bilinear, antialiased), and mirrored left to right if need be.

It takes the address of an image of (H, W, 3) uint8, its bytes and those of a row; top, left, height and width of a box
within it, pixels; the side of the result; whether left becomes right; and the address of the result, (S, S, 3) uint8.
It returns 0, or another number where there is no memory for a few rows.
"""

_FEW = 16
"""Times that a process is given no kernel."""
_asked = itertools.count()


def available() -> bool:
    """Whether the kernel can be used on this machine: an x86 processor with AVX2, and a C compiler."""
    library = compiled("crop")
    return library is not None and _function_of(library) is not None


def kernel() -> Kernel | None:
    """The kernel for the crops of a batch; None where operators have to make them, or should.

    They should make the first ones: their bytes are the same, and a process that makes few, or whose first batch is
    waited for, does without half a second of compiling.
    """
    if next(_asked) < _FEW or not wanted():
        return None
    library = compiled("crop")
    return None if library is None else _function_of(library)


@functools.cache
def _function_of(library: ctypes.CDLL) -> Kernel | None:
    """The kernel in a library; None where the processor lacks its instructions."""
    if not library.can_crop():
        return None
    function = library.crop
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_int] * 6, ctypes.c_void_p]
    return function
