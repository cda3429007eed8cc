"""Images of any mode as RGB and masks as PNG files, for data preparation and prediction."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

__all__ = ["EXIF_ORIENTATION", "as_rgb", "encode_mask", "upright_rgb", "upright_size"]

EXIF_ORIENTATION = 0x0112
"""EXIF tag of the orientation; 1 is upright."""
_TURNED_SIDEWAYS = (5, 6, 7, 8)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, turned as its EXIF orientation says; see `as_rgb`."""
    return as_rgb(ImageOps.exif_transpose(image))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) that `upright_rgb` gives; from the header alone."""
    sideways = image.getexif().get(EXIF_ORIENTATION, 1) in _TURNED_SIDEWAYS
    return (image.height, image.width) if sideways else image.size


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, with its pixels where they are stored.

    Transparent parts become white, 16-bit gray is scaled to 8 bit, other modes are converted.
    """
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.float64)
        image = Image.fromarray((gray / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def encode_mask(ids: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> bytes:
    """Bytes of an indexed PNG of (H, W) uint8 class ids, 255 where void, with a palette (256, 3) uint8 RGB by id."""
    image = Image.fromarray(ids)
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
