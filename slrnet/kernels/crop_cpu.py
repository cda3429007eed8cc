"""A box of an image, resized and mirrored, on the CPU; `data.transforms` has the form it must equal."""

from __future__ import annotations

import ctypes
import itertools

from torch import Tensor

from slrnet.kernels.compiled import compiled

__all__ = ["available", "pays", "resized_crop"]

_FEW = 256
"""Crops of a process that are left to the operators."""
_asked = itertools.count()


def available() -> bool:
    """Whether the kernel can be used on this machine: an x86 processor with AVX2, and a C compiler."""
    library = compiled("crop_cpu")
    return library is not None and bool(library.can_crop())


def pays() -> bool:
    """Whether the next crop is for the kernel, which must be available; counts the crops of this process.

    The first ones are not: their bytes are the same, and a process that makes few, or whose first batch is waited for,
    does without half a second of compiling.
    """
    return next(_asked) >= _FEW


def resized_crop(image: Tensor, out: Tensor, *, top: int, left: int, height: int, width: int, mirrored: bool) -> None:
    """Writes a box to `out`, resized to its side (bilinear, antialiased) and mirrored left to right if need be.

    Args:
        image: (3, H, W) uint8 on the CPU, channels last without gaps.
        out: (3, S, S) uint8 on the CPU, channels last without gaps.
        top: of the box, pixels, as the next three; the box lies within the image.
        left: of the box.
        height: of the box, at least 1.
        width: of the box, at least 1.
        mirrored: whether left becomes right.

    Raises:
        MemoryError: there is no memory for a few rows.
    """
    library = compiled("crop_cpu")
    assert library is not None
    failed = library.crop(
        ctypes.c_void_p(image.data_ptr()),
        ctypes.c_int64(image.numel()),
        ctypes.c_int64(image.stride(1)),
        top,
        left,
        height,
        width,
        out.shape[-1],
        mirrored,
        ctypes.c_void_p(out.data_ptr()),
    )
    if failed:
        raise MemoryError("the crop's kernel got no memory for its rows; lower data.workers")
