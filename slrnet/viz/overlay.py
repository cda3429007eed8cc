"""Draws a mask over its image.

Classes have their colors and an outline, the background is dimmed, and void pixels are striped, so that undecided
pixels never look like a class.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from slrnet.data.catalog import IGNORE_INDEX

__all__ = ["check_mask", "draw_overlay", "void_stripes"]

Pixels: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[Any]

_VOID_LIGHT = (250, 250, 250)
_VOID_DARK = (150, 150, 150)
_CLASS_OPACITY = 0.62
_BACKGROUND_DIM = 0.55
_STRIPE = 8


def draw_overlay(image: Pixels, mask: Mask, palette: Pixels) -> Image.Image:
    """Draws a mask over its image.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) class ids; 0 is the background (dimmed), 255 is void (striped).
        palette: (C, 3) uint8 colors by class id.

    Returns:
        RGB picture of the image's size.

    Raises:
        ValueError: the mask's size differs from the image's, or it holds an id without a color.
    """
    check_mask(mask, image, len(palette), "mask")
    ids = np.where(mask == IGNORE_INDEX, 0, mask).astype(np.intp)
    # Gray keeps the photo's texture, and leaves all color to the classes.
    gray = (image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    shaded = _CLASS_OPACITY * palette[ids].astype(np.float32) + (1.0 - _CLASS_OPACITY) * gray
    out = np.where((ids > 0)[..., None], shaded, _BACKGROUND_DIM * gray)
    out = np.where((mask == IGNORE_INDEX)[..., None], 0.5 * void_stripes(mask.shape) + 0.5 * out, out)
    edge = np.zeros(ids.shape, dtype=bool)  # foreground that touches another class
    for pixels, border in ((ids, edge), (ids.T, edge.T)):
        change = pixels[1:] != pixels[:-1]
        border[1:] |= change
        border[:-1] |= change
    edge &= ids > 0
    out[edge] = 0.35 * out[edge] + 0.65 * 255.0
    return Image.fromarray(np.clip(np.rint(out), 0, 255).astype(np.uint8))


def check_mask(mask: Mask, image: Pixels, num_known: int, name: str) -> None:
    """Raises ValueError unless the image is (H, W, 3) uint8, and the mask (H, W) of ids < `num_known` and 255."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image has shape {image.shape} and type {image.dtype}; it must be (H, W, 3) uint8")
    if mask.shape != image.shape[:2]:
        raise ValueError(f"{name} has shape {mask.shape}, its image {image.shape[:2]}; resize the mask (nearest) first")
    foreign = [i for i in np.unique(mask).tolist() if i != IGNORE_INDEX and not 0 <= i < num_known]
    if foreign:
        raise ValueError(f"{name} holds the ids {foreign}; known are 0 to {num_known - 1}, and {IGNORE_INDEX} for void")


def void_stripes(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Returns light and dark stripes (H, W, 3), 0 to 255, that stand for void."""
    rows, columns = np.indices(shape)
    light = ((rows + columns) // (_STRIPE // 2)) % 2 == 0
    return np.where(light[..., None], _VOID_LIGHT, _VOID_DARK).astype(np.float32)
