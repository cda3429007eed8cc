"""What a process asks of glibc's allocator; other C libraries are left alone."""

from __future__ import annotations

import ctypes

from torch import nn

__all__ = ["LARGE_NETWORK", "keep_memory", "keep_small_pieces", "spare_memory"]

LARGE_NETWORK = 2**28
"""Bytes of weights from which on `spare_memory` acts."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of <malloc.h>


def spare_memory(model: nn.Module) -> None:
    """Lets a CPU process with a large network give memory back to the system as soon as a map is done with.

    glibc keeps what is freed below 32 MiB for itself, in pieces that later maps of other sizes do not fit into: an
    eighth of a training step's peak with WideResNet-38. Taking every map of 4 MiB and more from the system anew costs a
    twentieth of that network's step, but half of a small network's, which stays as it is.

    Args:
        model: of the process.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if weights >= LARGE_NETWORK:
        _tell_allocator(_M_MMAP_THRESHOLD, 2**22)


def keep_memory() -> None:
    """Lets a process that only predicts, on a CPU, keep the memory of its maps for those to come.

    glibc gives every map above 32 MiB back as soon as it is done with, and the system fills the pages of the next one
    with zeros: a fifth of an evaluation at several scales with WideResNet-38 (benchmarks/evaluate.py), which takes a
    quarter less memory that way.
    """
    _tell_allocator(_M_MMAP_MAX, 0)
    _tell_allocator(_M_TRIM_THRESHOLD, -1)


def keep_small_pieces() -> None:
    """Lets a process that reads images keep the memory of its batches, but not that of a giant image.

    glibc gives the end of its memory back whenever a few batches of it are free, for 3 % of the loader's time.
    """
    _tell_allocator(_M_MMAP_THRESHOLD, 2**25)
    _tell_allocator(_M_TRIM_THRESHOLD, 2**27)


def _tell_allocator(parameter: int, value: int) -> None:
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None:
        setting(parameter, value)
