"""From the bytes of a JPEG to a training crop, on the CPU (paper Sec. 4.1: random crops of a fixed size).

Only geometry happens here, on uint8: decoding, a random resized crop and mirroring. Colors change in batch on the
device (`slrnet.views.color`), where hue costs a tenth of what it costs per image. The crop is drawn as by
torchvision's RandomResizedCrop, from a key that is passed in, so a sample's crop depends on that alone. A large
JPEG is decoded at a reduced size if that still has the crop's pixels.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from slrnet.data.counter_random import Bits, uniform
from slrnet.data.images import MOST_PIXELS, check_scans, open_image
from slrnet.data.manifest import DataError
from slrnet.ops import kernels

__all__ = [
    "ASPECT_RATIOS",
    "Crop",
    "crop_into",
    "crop_mask",
    "decode_image",
    "decode_mask",
    "draw_crops",
]

ASPECT_RATIOS = (3.0 / 4.0, 4.0 / 3.0)
"""Narrowest and widest width / height of a crop before it is resized to a square."""

_MARKER = re.compile(rb"\xff+[^\x00\xff]", re.DOTALL)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xDA)))
"""Markers of a JPEG: of frames, whose headers have its size, of those in several scans, and such without a length."""
_REDUCED_FROM = 2**20
"""Pixels from which decoding at a reduced size pays, although the library that does it is a little slower."""
_REDUCTIONS = (1, 2, 4, 8)
_LOG_RATIOS = tuple(math.log(ratio) for ratio in ASPECT_RATIOS)
_ATTEMPTS = 10
_NUMBERS = np.arange(1 + 4 * _ATTEMPTS)
_PARTS = range(1, len(_NUMBERS), _ATTEMPTS)
"""Where those for areas, aspect ratios and the two sides of a box begin among the numbers that a crop is drawn from."""
_decode_jpeg = torch.ops.image.decode_jpeg
"""torchvision's operator; its function asks all filters for warnings at every call, for 2 % of the loader's time."""


class Crop(NamedTuple):
    """A box of an image, in pixels, and whether what it holds is mirrored left to right.

    The image itself, but not its mask, is decoded to 1 / `reduction` of its size; the box lies on such pixels.
    """

    top: int
    left: int
    height: int
    width: int
    mirrored: bool
    reduction: int = 1

    def on_decoded(self) -> tuple[int, int, int, int]:
        """The box in pixels of the image as it is decoded."""
        times = self.reduction
        return self.top // times, self.left // times, self.height // times, self.width // times


def draw_crops(
    sizes: Sequence[tuple[int, int]], *, size: int, scale: tuple[float, float], flip: float, keys: Bits
) -> list[Crop]:
    """Draws a crop of each of some images.

    The area is uniform, the aspect ratio log-uniform in `ASPECT_RATIOS`; a box that does not fit is drawn again. After
    ten misses it is the central box of the largest fitting size. Images of a million pixels and more are decoded to a
    half, a quarter or an eighth where both sides of the box have as many pixels as the crop even so.

    Args:
        sizes: (height, width) of n images, pixels.
        size: side of the crops, pixels.
        scale: smallest and largest share of the image's area, 0 to 1.
        flip: probability of mirroring, 0 to 1.
        keys: (n,) uint64, from each of which alone the image's crop follows.
    """
    height, width = np.array(sizes, dtype=np.float64).T
    mirrored, areas, ratios, tops, lefts = np.split(uniform(keys[:, None], _NUMBERS), _PARTS, axis=1)
    areas = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * areas)
    ratios = np.exp(_LOG_RATIOS[0] + (_LOG_RATIOS[1] - _LOG_RATIOS[0]) * ratios)
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths <= width[:, None]) & (heights <= height[:, None]) & (np.minimum(widths, heights) > 0)
    rows, first = np.arange(len(keys)), fits.argmax(axis=1)
    missed = ~fits[rows, first]
    widths, heights, tops, lefts = (part[rows, first] for part in (widths, heights, tops, lefts))
    narrowest, widest = ASPECT_RATIOS
    widths = np.where(missed, np.minimum(width, np.maximum(1, np.rint(height * widest))), widths)
    heights = np.where(missed, np.minimum(height, np.maximum(1, np.rint(width / narrowest))), heights)
    tops = np.where(missed, (height - heights) // 2, tops * (height - heights + 1))
    lefts = np.where(missed, (width - widths) // 2, lefts * (width - widths + 1))
    reductions = np.array(_REDUCTIONS)[np.searchsorted(_REDUCTIONS[1:], np.minimum(heights, widths) // size, "right")]
    reductions[height * width < _REDUCED_FROM] = 1
    parts = ((part.astype(np.int64) // reductions * reductions).tolist() for part in (tops, lefts, heights, widths))
    return list(map(Crop, *parts, (mirrored[:, 0] < flip).tolist(), reductions.tolist()))


def crop_into(out: Tensor, image: Tensor, crop: Crop, *, mode: Literal["bilinear", "bicubic"] = "bilinear") -> None:
    """Cuts the box out and resizes it with antialiasing; the same bytes with and without the compiled kernel.

    Args:
        out: (3, S, S) uint8, where the result goes: a part of a batch.
        image: (3, H, W) uint8, as decoded with the crop's reduction.
        crop: the box within the image.
        mode: interpolation; the compiled kernel is bilinear.

    Raises:
        MemoryError: the compiled kernel got no memory.
    """
    compact = all(one.is_cpu and one.stride() == (1, 3 * one.shape[-1], 3) for one in (image, out))
    if mode == "bilinear" and compact and kernels.wanted():
        from slrnet.cpu.crop import crop_kernel

        if (kernel := crop_kernel()) is not None:
            source = (image.data_ptr(), image.numel(), image.stride(1))
            if kernel(*source, *crop.on_decoded(), out.shape[-1], crop.mirrored, out.data_ptr()):
                raise MemoryError("the crop's kernel got no memory for its rows; lower data.workers")
            return
    out.copy_(_crop_by_operators(image, crop, out.shape[-1], mode))


def _crop_by_operators(image: Tensor, crop: Crop, size: int, mode: str = "bilinear") -> Tensor:
    top, left, height, width = crop.on_decoded()
    box = image[:, top : top + height, left : left + width]
    # A batch of one whose strides say channels last, where the image is, as decoded ones are: PyTorch resizes and
    # mirrors these without rearranging them. Indexing with None would give it strides from which that cannot be told.
    pixels = box.as_strided((1, *box.shape), (image.numel(), *box.stride()))
    resized = F.interpolate(pixels, size=(size, size), mode=mode, antialias=True)
    return (resized.flip(-1) if crop.mirrored else resized)[0]


def crop_mask(mask: Tensor, crop: Crop, *, size: int) -> Tensor:
    """Does to a mask what `crop_into` does to its image; ids are never mixed.

    Args:
        mask: (H, W) uint8 class ids, 255 where void.
        crop: within the mask.
        size: side of the result, pixels.

    Returns:
        (size, size) uint8; each pixel has the id of the mask's pixel nearest to its center.
    """
    box = (crop.top, crop.left, crop.height, crop.width)
    out: Tensor = tv.resized_crop(mask.unsqueeze(0), *box, [size, size], interpolation=InterpolationMode.NEAREST_EXACT)
    out = out.squeeze(0)
    return out.flip(-1) if crop.mirrored else out


def decode_image(data: bytes | memoryview, reduction: int = 1) -> Tensor:
    """Decodes a JPEG; gray and CMYK ones become RGB. Exif orientation is ignored, as masks are drawn on stored pixels.

    Args:
        data: the bytes; a view of memory that may be written, as torch wants it, is not copied.
        reduction: 1, 2, 4 or 8: the sides are divided by it and rounded up, which saves most of the arithmetic.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        DataError: the bytes are no complete JPEG, or one of more than `MOST_PIXELS`.
    """
    if not data:
        raise DataError("the image is empty")
    _check_jpeg(data)
    if reduction > 1:  # torchvision's operator decodes whole images alone
        with open_image(data, formats=("JPEG",)) as small:
            small.draft(None, (small.width // reduction, small.height // reduction))
            pixels = np.array(small if small.mode == "RGB" else small.convert("RGB"))
            return torch.from_numpy(pixels).permute(2, 0, 1)
    try:
        memory = bytearray(data) if isinstance(data, bytes) else data
        image: Tensor = _decode_jpeg(torch.frombuffer(memory, dtype=torch.uint8), ImageReadMode.RGB.value)
    except RuntimeError as error:  # the message begins with a source file of torchvision
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error).partition("\n")[0])
        raise DataError(f"the image cannot be decoded as JPEG: {reason}") from None
    return image


def decode_mask(data: bytes | memoryview) -> Tensor:
    """Decodes an indexed (or gray) PNG mask to (H, W) uint8 class ids, 255 where void; the palette is not applied.

    Raises:
        DataError: the bytes are no PNG, or one whose pixels are not single ids.
    """
    with open_image(data, name="the mask", formats=("PNG",), max_pixels=MOST_PIXELS) as mask:
        if mask.mode not in ("P", "L"):
            raise DataError(f"the mask has mode {mask.mode}; allowed are indexed (P) and gray (L) PNGs")
        return torch.from_numpy(np.array(mask, dtype=np.uint8))


def _check_jpeg(data: bytes | memoryview) -> None:
    """Raises `DataError` if a JPEG's frame has more than `MOST_PIXELS`, or more scans than are read.

    Reads the markers up to the frame as libjpeg does, which takes microseconds; what is no JPEG is left to the decoder.
    """
    place = 2
    while (marker := _MARKER.search(data, place)) is not None and len(data) >= marker.end() + 7:
        kind, place = data[marker.end() - 1], marker.end()
        if kind in _FRAMES:
            height, width = struct.unpack_from(">HH", data, place + 3)
            if width * height > MOST_PIXELS:
                raise DataError(f"the image has {width} x {height} pixels; at most {MOST_PIXELS:,} are read")
            if kind in _PROGRESSIVE:
                check_scans(bytes(data))
            return
        if kind not in _WITHOUT_LENGTH:
            place += int.from_bytes(data[place : place + 2], "big")
