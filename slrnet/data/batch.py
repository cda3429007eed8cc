"""What the loaders hand over: a batch of training crops, and a whole image for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "EvalSample"]


@dataclass(frozen=True, slots=True)
class Batch:
    """N training crops of side S with their labels."""

    images: Tensor
    """(N, 3, S, S) uint8 RGB, channels last as the loader makes them."""
    image_labels: Tensor
    """(N, K-1) float32 of 0 and 1; column c is class c + 1."""
    has_image_labels: Tensor
    """(N,) bool, which images' labels are known and may be used; rows of the others are 0."""
    keys: tuple[str, ...]
    has_pixel_labels: Tensor
    """(N,) bool, which images come with a mask that may be used."""
    pixel_labels: Tensor | None = None
    """(N, S, S) uint8 class ids, 255 where void and all over an image without such a mask; None if no image has one."""

    def floats(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, 3, S, S) images in [0, 1], contiguous by channel, which makes color changes faster."""
        return self.images.to(dtype, memory_format=torch.contiguous_format).div_(255)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch with all tensors on `device`; `non_blocking` copies from pinned memory without waiting."""
        return self._with(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def part(self, rows: slice) -> Batch:
        """Some of the images with their labels."""
        return replace(self._with(lambda values: values[rows]), keys=self.keys[rows])

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: Any = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class EvalSample:
    """One whole image at its own size."""

    key: str
    image: Tensor
    """(3, H, W) uint8 RGB."""
    pixel_labels: Tensor | None
    """(H, W) uint8 class ids, 255 where void; None where the image has no mask."""
    image_labels: Tensor
    """(K-1,) float32 of 0 and 1; entry c is class c + 1."""
    has_image_labels: bool = True
    """Whether they are known; where not, `image_labels` is 0."""
    jpeg: bytes = b""
    """The image's file."""
