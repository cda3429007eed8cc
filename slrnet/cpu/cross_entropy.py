"""Cross-entropy of resized logits with its gradient in C; `ops.cross_entropy.by_operators` does the same."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from slrnet.cpu.compiled import compiled

__all__ = ["sums_and_gradients"]

_LARGEST_SPREAD = 80.0
"""Exponentials of logits that are farther below the largest one of their pixel would underflow."""


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
    maps = (logits - logits.amax(dim=1, keepdim=True)).permute(0, 2, 3, 1).contiguous()
    if not maps.amin() > -_LARGEST_SPREAD:  # NaN is not either
        return None
    images, old_height, old_width, classes = maps.shape
    lowest, highest = (int(label) for label in labels.aminmax())
    if lowest < 0 or highest >= classes:
        raise IndexError(f"labels are {lowest} to {highest}; allowed are 0 to {classes - 1}")
    labels, weights = labels.contiguous(), weights.contiguous()
    sums, own, gradients = torch.ones_like(weights), torch.empty_like(weights), torch.empty_like(maps)
    parts = maps.new_empty(images, old_height - 1, 2, old_width, classes)
    sizes = (images, old_height, old_width, classes, *labels.shape[1:])
    tensors = (maps, labels, weights, sums, own, parts)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    if not library.cross_entropy(torch.get_num_threads(), *sizes, *pointers):
        raise MemoryError("the cross-entropy kernel got no memory for its rows; lower data.batch_size")
    gradients[:, 0], gradients[:, -1] = parts[:, 0, 0], parts[:, -1, 1]
    torch.add(parts[:, 1:, 0], parts[:, :-1, 1], out=gradients[:, 1:-1])
    return (sums.log_() - own).mul_(weights).sum(dim=(1, 2)), gradients.permute(0, 3, 1, 2)
