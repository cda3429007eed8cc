"""From the bytes of a JPEG to a training crop, on the CPU (paper Sec. 4.1: random crops of a fixed size).

Only the geometry is done here, on uint8: decoding, a random resized crop and a mirror image. Colour is changed in
batch on the device (`slrnet.data.colour`), where hue costs a tenth of what it costs per image. The crop is drawn as by
torchvision's RandomResizedCrop, from a generator that is passed in, so a sample's crop depends on that alone.
"""

from __future__ import annotations

import io
import math
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from slrnet.data.manifest import DataError
from slrnet.kernels import crop_cpu, wanted

__all__ = [
    "ASPECT_RATIOS",
    "MOST_PIXELS",
    "Crop",
    "crop_image",
    "crop_mask",
    "decode_image",
    "decode_mask",
    "draw_crop",
]

ASPECT_RATIOS = (3.0 / 4.0, 4.0 / 3.0)
"""Narrowest and widest width / height of a crop before it is resized to a square."""

MOST_PIXELS = 178_000_000
"""Pixels of the largest image or mask that is decoded; a few kB of a hostile file may claim billions."""
_JPEG_EXPANSION = 1000
"""More pixels than a byte of a JPEG can hold."""
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Crop:
    """A box of an image, in pixels, and whether what it holds is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def draw_crop(height: int, width: int, *, scale: tuple[float, float], flip: float, rng: random.Random) -> Crop:
    """Draws a crop of an image of `height` x `width` pixels.

    The area is uniform, the aspect ratio log-uniform in `ASPECT_RATIOS`; a box that does not fit is drawn again. After
    ten misses it is the central box of the largest fitting size.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        scale: smallest and largest share of the image's area, 0 to 1.
        flip: probability of mirroring, 0 to 1.
        rng: the only source of randomness.
    """
    mirrored = rng.random() < flip
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
            return Crop(top, left, box_height, box_width, mirrored)
    narrowest, widest = ASPECT_RATIOS
    box_width = min(width, max(1, round(height * widest)))
    box_height = min(height, max(1, round(width / narrowest)))
    return Crop((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, mirrored)


def crop_image(image: Tensor, crop: Crop, *, size: int, out: Tensor | None = None) -> Tensor:
    """Cuts the box out and resizes it, bilinear with antialiasing; the same bytes with and without the compiled kernel.

    Args:
        image: (3, H, W) uint8.
        crop: within the image.
        size: side of the result, pixels.
        out: (3, size, size) uint8, where the result goes; None: new memory, channels last.

    Returns:
        `out`.
    """
    if out is None:
        out = torch.empty(1, 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)[0]
    suits = _lies_channels_last(image) and _lies_channels_last(out)
    if not (suits and wanted() and crop_cpu.pays() and crop_cpu.available()):
        return out.copy_(_crop_by_operators(image, crop, size))
    box = {"top": crop.top, "left": crop.left, "height": crop.height, "width": crop.width}
    crop_cpu.resized_crop(image, out, **box, mirrored=crop.mirrored)
    return out


def _lies_channels_last(image: Tensor) -> bool:
    return image.device.type == "cpu" and image.stride() == (1, 3 * image.shape[-1], 3)


def _crop_by_operators(image: Tensor, crop: Crop, size: int) -> Tensor:
    box = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # A batch of one whose strides say channels last, where the image is, as decoded ones are: PyTorch resizes and
    # mirrors these without rearranging them. Indexing with None would give it strides from which that cannot be told.
    pixels = box.as_strided((1, *box.shape), (image.numel(), *box.stride()))
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return (resized.flip(-1) if crop.mirrored else resized)[0]


def crop_mask(mask: Tensor, crop: Crop, *, size: int) -> Tensor:
    """Does to a mask what `crop_image` does to its image; ids are never mixed.

    Args:
        mask: (H, W) uint8 class ids, 255 where void.
        crop: within the mask.
        size: side of the result, pixels.

    Returns:
        (size, size) uint8; each pixel has the id of the mask's pixel nearest to its centre.
    """
    box = (crop.top, crop.left, crop.height, crop.width)
    out: Tensor = tv.resized_crop(mask.unsqueeze(0), *box, [size, size], interpolation=InterpolationMode.NEAREST_EXACT)
    out = out.squeeze(0)
    return out.flip(-1) if crop.mirrored else out


def decode_image(data: bytes) -> Tensor:
    """Decodes a JPEG; grey and CMYK ones become RGB. Exif orientation is ignored, as masks are drawn on stored pixels.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        DataError: the bytes are no complete JPEG, or one of more than `MOST_PIXELS`.
    """
    if not data:
        raise DataError("the image is empty")
    if len(data) * _JPEG_EXPANSION > MOST_PIXELS:  # a smaller one cannot hold as many; its header need not be read
        _check_size(data)
    try:
        # The copy is needed: torch wants memory that may be written.
        image: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise DataError(f"the image cannot be decoded as JPEG: {_last_words(error)}") from None
    return image


def decode_mask(data: bytes) -> Tensor:
    """Decodes an indexed (or grey) PNG mask to its ids; the palette is not applied.

    Returns:
        (H, W) uint8 class ids, 255 where void.

    Raises:
        DataError: the bytes are no PNG, or one whose pixels are not single ids.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as mask:
            if mask.width * mask.height > MOST_PIXELS:
                raise DataError(f"the mask has {mask.width} x {mask.height} pixels; at most {MOST_PIXELS} are read")
            if mask.mode not in ("P", "L"):
                raise DataError(f"the mask has mode {mask.mode}; allowed are indexed (P) and grey (L) PNGs")
            return torch.from_numpy(np.array(mask, dtype=np.uint8))
    except DataError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the mask cannot be decoded as PNG: {error}") from None


def _check_size(data: bytes) -> None:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be decoded as JPEG: {error}") from None
    if width * height > MOST_PIXELS:
        raise DataError(f"the image has {width} x {height} pixels; at most {MOST_PIXELS} are read")


def _last_words(error: RuntimeError) -> str:
    """The reason at the end of torchvision's message, without the source file it begins with."""
    lines = str(error).splitlines() or [""]
    return re.sub(r"^\w+, \S+:\d+, ", "", lines[0])
