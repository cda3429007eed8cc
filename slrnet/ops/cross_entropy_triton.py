"""Cross-entropy of resized logits with its gradient in Triton; `ops.cross_entropy.by_operators` does the same.

Four neighbors of the small map enclose a cell of pixels, and a program works on the pixels of one cell. It goes over
the classes twice: for the sum of the exponentials, and for what each class adds to the gradients of the four neighbors.
It reads the small map, the labels and the weights, and writes gradients of the small map's size; no map of all classes
at the labels' size is ever in memory. There are no atomics: each cell writes its own four parts, which are added in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slrnet.ops.kernels import on_device_of_first

__all__ = ["BLOCK", "PIXELS", "WARPS", "plan_of", "sums_and_gradients"]

PIXELS = 128
"""Most pixels of a program; several programs share a larger cell."""
BLOCK = 16
"""Classes that a program works on at a time."""
WARPS = 8
"""Warps of a program; with half as many, only half of a multiprocessor's threads get registers."""


def plan_of(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """Pixels of a program (a power of 2), and programs of a cell, for resizing heights and widths `old` to `new`."""
    most = triton.cdiv(new[0] - 1, old[0] - 1) + 1
    most *= triton.cdiv(new[1] - 1, old[1] - 1) + 1
    pixels = min(PIXELS, triton.next_power_of_2(most))
    return pixels, triton.cdiv(most, pixels)


@triton.jit
def _first_pixel(place, old, count):
    """The first of `count` pixels at or after position `place` of `old`; the last pixel belongs to the last cell."""
    return tl.where(place == old - 1, count, (place * (count - 1) + old - 2) // (old - 1))


@triton.jit
def _blend(corner, neighbors, index, step, line, inside):
    """The values at `index` of the four neighbors, interpolated for each pixel."""
    upper_left = tl.load(neighbors + index, mask=inside, other=0.0)
    upper_right = tl.load(neighbors + step + index, mask=inside, other=0.0)
    lower_left = tl.load(neighbors + line + index, mask=inside, other=0.0)
    lower_right = tl.load(neighbors + line + step + index, mask=inside, other=0.0)
    return corner[0] * upper_left + corner[1] * upper_right + corner[2] * lower_left + corner[3] * lower_right


@triton.jit
def _cross_entropy_of_cells(
    logits, labels, weights, losses, parts, old_height, old_width, classes, height, width, shared,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes one cell's loss to `losses` and the gradients of its neighbors to `parts`.

    Logits (N, old_height, old_width, classes), labels and weights (N, height, width), losses (N, rows, columns, shared)
    and parts (N, rows, columns, shared, 4, classes), with rows and columns of cells.
    """
    column, share = tl.program_id(0) // shared, tl.program_id(0) % shared
    row, image = tl.program_id(1), tl.program_id(2)
    top, bottom = _first_pixel(row, old_height, height), _first_pixel(row + 1, old_height, height)
    left, right = _first_pixel(column, old_width, width), _first_pixel(column + 1, old_width, width)
    across = tl.maximum(right - left, 1)
    index = share * PIXELS + tl.arange(0, PIXELS)
    y, x = top + index // across, left + index % across
    inside = index < (bottom - top) * (right - left)
    below = (y * (old_height - 1) - row * (height - 1)).to(tl.float32) / (height - 1)
    beside = (x * (old_width - 1) - column * (width - 1)).to(tl.float32) / (width - 1)
    flat = ((1 - below) * (1 - beside), (1 - below) * beside, below * (1 - beside), below * beside)
    tall = (flat[0][:, None], flat[1][:, None], flat[2][:, None], flat[3][:, None])
    pixel = image.to(tl.int64) * height * width + y * width + x
    label = tl.load(labels + pixel, mask=inside, other=0)
    weight = tl.load(weights + pixel, mask=inside, other=0.0)
    neighbors = logits + ((image.to(tl.int64) * old_height + row) * old_width + column) * classes
    line = old_width * classes
    most = tl.full((PIXELS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = _blend(tall, neighbors, k[None, :], classes, line, (k < classes)[None, :])
        value = tl.where((k < classes)[None, :], value, float("-inf"))
        larger = tl.maximum(most, tl.max(value, axis=1))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(value - larger[:, None]), axis=1)
        most = larger
    own = _blend(flat, neighbors, label, classes, line, inside)
    cell = (image.to(tl.int64) * tl.num_programs(1) + row) * tl.num_programs(0) + tl.program_id(0)
    tl.store(losses + cell, tl.sum(tl.where(inside, (most + tl.log(total) - own) * weight, 0.0), axis=0))
    parts += cell * 4 * classes
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = _blend(tall, neighbors, k[None, :], classes, line, (k < classes)[None, :])
        slope = tl.exp(value - most[:, None]) * (weight / total)[:, None]
        slope -= tl.where(k[None, :] == label[:, None], weight[:, None], 0.0)
        for corner in tl.static_range(4):
            tl.store(parts + corner * classes + k, tl.sum(slope * tall[corner], axis=0), mask=k < classes)


@on_device_of_first
def sums_and_gradients(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """See `slrnet.ops.cross_entropy.sums_and_gradients`, for tensors on a GPU with sides of at least 2.

    The results have the same bits each time. Logits that are channels last save a copy.
    """
    maps, labels, weights = logits.permute(0, 2, 3, 1).contiguous(), labels.contiguous(), weights.contiguous()
    images, old_height, old_width, classes = maps.shape
    height, width = labels.shape[1:]
    rows, columns = old_height - 1, old_width - 1
    pixels, shared = plan_of((old_height, old_width), (height, width))
    losses = maps.new_empty(images, rows, columns, shared)
    parts = maps.new_empty(images, rows, columns, shared, 4, classes)
    _cross_entropy_of_cells[columns * shared, rows, images](
        maps, labels, weights, losses, parts, old_height, old_width, classes, height, width, shared,
        PIXELS=pixels, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    corners = parts.sum(dim=3) if shared > 1 else parts[:, :, :, 0]
    gradient = torch.zeros_like(maps)
    for corner, (y, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        gradient[:, y : y + rows, x : x + columns] += corners[:, :, :, corner]
    return losses.sum(dim=(1, 2, 3)), gradient.permute(0, 3, 1, 2)
