"""Images and masks as people have them, and as files: what data preparation and prediction share."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

__all__ = ["encode_mask", "upright_rgb"]


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB.

    EXIF orientation is applied, transparent parts become white, 16-bit grey is scaled to 8 bit, other modes are
    converted.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.float64)
        upright = Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def encode_mask(ids: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> bytes:
    """Bytes of an indexed PNG.

    Args:
        ids: (H, W) uint8 class ids, 255 where void.
        palette: (256, 3) uint8 RGB by id.
    """
    image = Image.fromarray(ids)
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
