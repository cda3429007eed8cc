"""Files that hold images: the one place that opens them; their pixels as RGB; masks as PNG files.

A file is taken for what its content is, whatever its name: a photograph or scan in one of `FORMATS`. Pillow knows more
formats, but some of them start other programs (PostScript) or are none of pictures. Its errors and those of its
decoders become `DataError`.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from slrnet.data.depth import Depth, ImageError
from slrnet.data.manifest_rows import DataError

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "MOST_PIXELS",
    "ORIENTATION",
    "DamagedFile",
    "Opens",
    "as_rgb",
    "check_scans",
    "deep_samples",
    "encode_mask",
    "left_out",
    "open_image",
    "rgb_pixels",
    "sample_type",
    "turned_upright",
    "upright_rgb",
    "upright_size",
]

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "PCX", "QOI")
"""Formats that are read, by Pillow's names; JPEG includes MPO. HEIF (phones' HEIC) too with the extra `heic`, and TGA
by its suffix, as it has no signature."""
IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "tif", "tiff", "webp", "bmp", "gif", "ppm", "pgm", "pbm"),
        *("pnm", "pfm", "jp2", "j2k", "jpx", "jpf", "jpc", "j2c", "avif", "avifs", "pcx", "qoi", "tga", "heic", "heif"),
        "hif",
    )
)
"""Suffixes, in lower case, of the files in a folder that count as images."""
MAX_PIXELS = 500_000_000
"""Pixels of the largest file that is read, which takes 4 bytes each, and as many again where it is converted."""
MOST_PIXELS = 178_000_000
"""Pixels of the largest image or mask in a shard; a hostile file of a few kB may claim billions."""
MOST_SCANS = 100
"""Scans of a progressive JPEG; common ones have about ten, and a hostile file of a few kB thousands."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation; 1 is upright."""

_MOST_PAGES = 64
_REDUCED, _MASK = 1, 4
"""Bits of TIFF's tag 254: the page is a smaller version of another one, or its transparency."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP = 2**24
_limit_lock = threading.Lock()


class DamagedFile(DataError):
    """A file is there and cannot be read as an image, by any option: its bytes are no image, or not all of one."""


class NoImage(ImageError):
    """The bytes of a file are no image of a known format."""


class Opens(Protocol):
    """A `Path`, or something else that opens like one, such as a file within a tar."""

    def open(self, mode: Any = ...) -> Any:
        """Opens it for reading bytes."""


@contextmanager
def open_image(
    source: Opens | bytes | memoryview,
    *,
    name: str = "the image",
    remedy: str = "",
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Image.Image]:
    """An open image; its pixels are read within. Of an animation it is the first picture; see `left_out`.

    Args:
        source: the file, or its bytes.
        name: what messages call bytes; a file is called by its path.
        remedy: end of the messages, where there is one.
        formats: formats that are taken, by Pillow's names.
        max_pixels: pixels that it may have; more are refused before they take memory.

    Raises:
        DamagedFile: it is in no such format or damaged. So does whatever a decoder raises while the image is open.
        DataError: it is missing, no regular file, too large, a TIFF of several pages, or needs a library.
    """
    what = name if isinstance(source, (bytes, memoryview)) else str(source)
    try:
        with _binary(source) as file, _recognized(file, what, formats) as image:
            _check(image, file, max_pixels)
            yield image
    except Exception as error:
        if isinstance(error, DataError) and not isinstance(error, ImageError):
            raise
        kind = DataError
        if isinstance(error, FileNotFoundError):
            reason = "is missing"
        else:
            kind = DamagedFile if isinstance(error, NoImage) or not isinstance(error, ImageError) else DataError
            text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            reason = f"cannot be read: {text if isinstance(error, ImageError) else text[:200]}"
        raise kind(f"{what} {reason}" + (f"; {remedy}" if remedy else "")) from error


def _binary(source: Opens | bytes | memoryview) -> IO[bytes]:
    if isinstance(source, (bytes, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, Path) and not stat.S_ISREG(os.stat(source).st_mode):  # a pipe would wait, a device never end
        raise ImageError("it is no regular file but a folder, pipe or device")
    file: IO[bytes] = source.open("rb")
    return file


def _recognized(file: IO[bytes], name: str, formats: tuple[str, ...]) -> Image.Image:
    start = file.read(16)
    file.seek(0)
    if not start:
        raise NoImage("it is empty")
    if formats is FORMATS:
        if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
            formats = (*formats, *_heif())
        elif name.lower().endswith(".tga"):
            formats = (*formats, "TGA")
    try:
        with _limit_lock:  # Pillow has one limit for all that its process opens; ours is checked before pixels are read
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(file, formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = before
    except UnidentifiedImageError:
        known = f"{', '.join(formats)} {'is' if len(formats) == 1 else 'are'} known"
        raise NoImage(f"no image, or of an unknown kind ({known})") from None


def _heif() -> tuple[str, ...]:
    if find_spec("pillow_heif") is None:
        raise ImageError("HEIC photos need another library: pip install 'slrnet[heic]'")
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return ("HEIF",)


def _check(image: Image.Image, file: IO[bytes], max_pixels: int) -> None:
    if not image.width * image.height:
        raise ImageError(f"it has {image.width} x {image.height} pixels")
    if image.width * image.height > max_pixels:
        raise ImageError(f"it has {image.width} x {image.height} pixels; at most {max_pixels:,} are read")
    if image.format == "TIFF" and getattr(image, "is_animated", False):
        _check_pages(image)
    if image.info.get("progressive"):
        file.seek(0)
        check_scans(file.read())


def check_scans(jpeg: bytes) -> None:
    """Raises `DataError` if a JPEG has more than `MOST_SCANS`, each of which may take as long as the whole image."""
    if (scans := jpeg.count(b"\xff\xda")) > MOST_SCANS:
        raise ImageError(f"it has {scans} scans; at most {MOST_SCANS} are read")


def _check_pages(image: Any) -> None:
    """Raises `DataError` if a TIFF has another page than smaller versions and the transparency of its first one."""
    for page in range(1, _MOST_PAGES):
        try:
            image.seek(page)
        except EOFError:
            image.seek(0)
            return
        if not int(image.tag_v2.get(254, 0)) & (_REDUCED | _MASK):
            break
    raise ImageError(f"it has several pages, {page + 1} at least; save each as a file of its own")


def left_out(image: Image.Image) -> str | None:
    """What an open image holds that its RGB pixels leave out, as a clause for people; from the header alone."""
    if image.format in ("GIF", "WEBP", "PNG", "AVIF") and getattr(image, "is_animated", False):
        return "is an animation; its first picture is taken"
    bands = _bands(image)
    if image.format == "TIFF" and bands > (used := 4 if image.mode == "CMYK" else 3 if bands > 2 else 1):
        return f"has {bands} bands; the first {'three are' if used == 3 else 'is' if used == 1 else 'four are'} taken"
    return None


def _bands(image: Any) -> int:
    return int(image.tag_v2.get(277, 1)) if hasattr(image, "tag_v2") else len(image.getbands())


def sample_type(image: Image.Image) -> str | None:
    """Type of an open or loaded image's samples, one of `depth.SAMPLE_TYPES`; None for 8 bits and fewer.

    Formats that state how many bits are used, such as JPEG 2000 and AVIF, are decoded to 8 bits by that.
    """
    bits, sign = _tiff_samples(image)
    if image.mode.startswith("I;16"):
        return "uint16"
    if image.mode == "F":
        return "float32"
    if image.mode == "I":
        return "uint16" if image.format == "PPM" else f"{'int' if sign == 2 or not bits else 'uint'}{bits or 32}"
    if bits == 8 and sign == 2:
        return "int8"
    return "uint16" if bits == 16 or _is_deep_png(image) else None


def _tiff_samples(image: Any) -> tuple[int, int]:
    """Bits and sign (TIFF's tag 339; 2: signed) of a TIFF's samples; zeros for other formats."""
    if image.format != "TIFF" or not hasattr(image, "tag_v2"):
        return 0, 0
    bits, sign = image.tag_v2.get(258, (1,)), image.tag_v2.get(339, (1,))
    return int(np.max(bits)), int(np.max(sign))


def _is_deep_png(image: Any) -> bool:
    return image.format == "PNG" and any(str(tile.args).endswith(";16B") for tile in getattr(image, "tile", ()))


def deep_samples(image: Image.Image) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Samples of an open image that has a `sample_type`, in that type, (H, W) or in colors (H, W, C); and transparency.

    Pillow keeps 8 bits of colors, so files with more are read by other libraries, with pixels where they are stored. Of
    a TIFF the first three bands are taken (four of CMYK); a PNG may have transparency, (H, W, 1).

    Raises:
        ImageError: the library is not installed, or the pixels have been read by Pillow.
    """
    kind = sample_type(image)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image).astype(kind, copy=False), None
    if kind == "int8":
        return np.asarray(image).view(np.int8), None
    file: Any = getattr(image, "fp", None)
    if file is None:
        raise ImageError("it has been read with 8 of its bits; give the open file")
    file.seek(0)
    if image.format == "TIFF":
        samples = _decode_tiff(file.read())
        return samples[..., : 4 if image.mode == "CMYK" else 3], None
    samples = _decode_png(file.read())
    opaque = samples.shape[2] % 2 == 1
    return (samples, None) if opaque else (samples[..., :-1], samples[..., -1:])


def _decode_png(data: bytes) -> npt.NDArray[Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    samples: npt.NDArray[Any] = pixels.permute(1, 2, 0).numpy()
    return samples


def _decode_tiff(data: bytes) -> npt.NDArray[Any]:
    if find_spec("tifffile") is None:
        raise ImageError("TIFFs in colors of 16 bits need another library: pip install 'slrnet[tiff]'")
    from tifffile import TiffFile

    with TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        samples: npt.NDArray[Any] = page.asarray()
        return np.moveaxis(samples, 0, -1) if page.planarconfig == 2 else samples


def as_rgb(image: Image.Image, depth: Depth | None = None) -> Image.Image:
    """An image of any mode as 8-bit RGB, with its pixels where they are stored (a TIFF's are upright).

    Transparent parts become white. A TIFF's fourth band is left out, as it is infrared more often than transparency.
    More than 8 bits are scaled by `depth`. Other modes are converted.

    Raises:
        DataError: there are more than 8 bits, and `depth` has no range for them or they are beyond it.
    """
    kind = sample_type(image)
    if kind is not None:
        image = _scaled(image, kind, depth or Depth())
    image.load()
    if image.format == "TIFF" and image.mode in ("RGBA", "RGBa", "LA", "La"):
        image = image.convert("RGBA" if image.mode[0] == "R" else "LA").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image, kind: str, depth: Depth) -> Image.Image:
    """An image of 8 bits in one of the modes L, RGB, CMYK, LA and RGBA."""
    samples, alpha = deep_samples(image)
    pixels = depth.to_8_bit(samples, kind)
    if alpha is not None:  # transparency uses all of its bits
        pixels = np.concatenate([pixels, (alpha.astype(np.uint16) >> 8).astype(np.uint8)], axis=2)
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    return Image.fromarray(pixels, "CMYK") if image.mode == "CMYK" else Image.fromarray(pixels)


def upright_rgb(image: Image.Image, depth: Depth | None = None) -> Image.Image:
    """An image as 8-bit RGB (see `as_rgb`), turned as its EXIF or XMP orientation says."""
    return turned_upright(as_rgb(image, depth), image)


def turned_upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """What was made of an image's pixels, turned as the image's orientation says.

    Call it after the pixels were read: a TIFF is turned as it is read, and a PNG may say it after its pixels.
    """
    turn = _TURNS.get(image.getexif().get(ORIENTATION, 1))
    return pixels if turn is None else pixels.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an open image seen upright, from the header alone, in which a PNG need not say it."""
    sideways = image.format != "TIFF" and Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if sideways else image.size


def rgb_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3) uint8 of an RGB image, which may be written; large ones are copied without a second copy."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    step = max(1, _STRIP // image.width)
    for top in range(0, image.height, step):
        pixels[top : top + step] = np.asarray(image.crop((0, top, image.width, min(top + step, image.height))))
    return pixels


def encode_mask(ids: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> bytes:
    """Bytes of an indexed PNG of (H, W) uint8 class ids, 255 where void, with a palette (256, 3) uint8 RGB by id."""
    image = Image.fromarray(ids)
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
