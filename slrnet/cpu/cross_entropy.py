"""Cross-entropy of resized logits with its gradient in C; `ops.cross_entropy.by_operators` does the same."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from slrnet.cpu.compiled import compiled

__all__ = ["sums_and_gradients"]

_NO_MEMORY, _TOO_FAR, _NO_CLASS = 1, 2, 3
"""Results of the kernel if it fails."""


def sums_and_gradients(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
    """See `slrnet.ops.cross_entropy.sums_and_gradients`, for tensors on the CPU with sides of at least 2.

    The results have the same bits for any number of threads. Logits that are channels last save a copy.

    Returns:
        None without a compiler, or if a logit is not finite or is 80 or more below the largest one of its pixel.

    Raises:
        IndexError: a label is not 0 to K - 1.
        MemoryError: there is no memory for a few rows of the small maps.
    """
    library = compiled("cross_entropy")
    if library is None:
        return None
    maps, labels, weights = logits.permute(0, 2, 3, 1).contiguous(), labels.contiguous(), weights.contiguous()
    images, old_height, old_width, classes = maps.shape
    sums, own, gradients = torch.empty_like(weights), torch.empty_like(weights), torch.empty_like(maps)
    parts = maps.new_empty(images, old_height - 1, 2, old_width, classes)
    sizes = (images, old_height, old_width, classes, *labels.shape[1:])
    tensors = (maps, labels, weights, sums, own, parts, gradients)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    ended = library.cross_entropy(torch.get_num_threads(), *sizes, *pointers)
    if ended == _NO_MEMORY:
        raise MemoryError("the cross-entropy kernel got no memory for its rows; lower data.batch_size")
    if ended == _NO_CLASS:
        raise IndexError(f"labels are {int(labels.min())} to {int(labels.max())}; allowed are 0 to {classes - 1}")
    if ended == _TOO_FAR:
        return None
    return (sums.log_() - own).mul_(weights).sum(dim=(1, 2)), gradients.permute(0, 3, 1, 2)
