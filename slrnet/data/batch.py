"""What the loaders hand over: a batch of training crops, and a whole image for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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

    def floats(self) -> Tensor:
        """(N, 3, S, S) float32 images in [0, 1], contiguous by channel, which makes color changes faster."""
        return self.images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch with all tensors on `device`; `non_blocking` copies from pinned memory without waiting."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self._tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})  # type: ignore[arg-type]

    def part(self, rows: slice) -> Batch:
        """Some of the images with their labels."""
        return replace(self, keys=self.keys[rows], **{name: value[rows] for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


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
