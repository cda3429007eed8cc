"""Reading of what people have: images of any kind as JPEG files, masks as arrays of class ids, lists.

A JPEG file that can go into a shard as it is, is copied. What cannot is converted: files of other formats (also those
that are called .jpg), CMYK, images that their EXIF data turn where they are to stand upright, and images beyond a
longest side. A file that cannot be read to its end is an error that names it.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.text_files import Readable, read_lines, read_xml
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.depth import Depth, ImageError
from slrnet.data.images import MOST_PIXELS, ORIENTATION, as_rgb, open_image, turned_upright
from slrnet.data.manifest import DataError

__all__ = [
    "ImageForm",
    "check_fraction",
    "check_size",
    "checked_ids",
    "copied",
    "drawn_split",
    "mask_ids",
    "measure_mask",
    "read_keys",
    "read_lines",
    "read_objects",
    "seeded_share",
    "split_words",
]

JPEG_QUALITY = 95
MOST_SIDE = 65_500
"""Pixels of a side of a JPEG, as libjpeg writes it."""
LOSSY = {"JPEG", "MPO", "JPEG2000", "AVIF"}
"""Formats, by Pillow's names, in which masks lose their ids."""


@dataclass(frozen=True, kw_only=True)
class ImageForm:
    """The form in which images, and their masks, go into the shards."""

    upright: bool = False
    """Whether EXIF orientation is applied; not where masks belong to the pixels as they are stored."""
    longest_side: int | None = None
    """Larger images are scaled down to it, pixels."""
    depth: Depth = field(default_factory=Depth)
    """How images with more than 8 bits become 8-bit ones."""
    remedy: str = "fetch it again, or drop it from the list"
    """What to do about a file that is missing or damaged."""

    def __post_init__(self) -> None:
        if self.longest_side is not None and self.longest_side < 1:
            raise DataError(f"--longest-side is {self.longest_side}; allowed are 0 (keep all sizes) and more")

    def measure(self, path: Readable) -> tuple[tuple[int, int], bool]:
        """Width and height that the image has in the shards, and whether the file is copied into them as it is.

        The file is read to its end.

        Raises:
            DataError: the file is missing or damaged.
        """
        with open_image(path, remedy=self.remedy) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not self._turned(image)
            if not plain or self._fit(image.size) != image.size:
                return _storable(self._pixels(image)).size, False
            size = _storable(image).size
            # A JPEG is read to its end for the smallest picture too, in two thirds of the time.
            image.draft("L", (1, 1))
            image.load()
            return size, True

    def jpeg(self, path: Readable, *, as_is: bool) -> bytes:
        """Bytes of the image as a JPEG file: the file's own if `measure` said `as_is`, else converted.

        Raises:
            DataError: the file is missing or damaged.
        """
        if as_is:
            return copied(path, remedy=self.remedy)
        with open_image(path, remedy=self.remedy) as image:
            buffer = io.BytesIO()
            self._pixels(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
            return buffer.getvalue()

    def mask(self, ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Ids (H, W) of a mask, scaled down as its image is; a pixel takes the id of the nearest one."""
        size = (ids.shape[1], ids.shape[0])
        if self._fit(size) == size:
            return ids
        return np.asarray(Image.fromarray(ids).resize(self._fit(size), Image.Resampling.NEAREST))

    def _turned(self, image: Image.Image) -> bool:
        return self.upright and image.getexif().get(ORIENTATION, 1) != 1

    def _pixels(self, image: Image.Image) -> Image.Image:
        """The image in this form, RGB; a large one is scaled down as early as its mode allows."""
        size = self._fit(image.size)
        smaller: Image.Image = image
        if size != image.size:
            image.draft(None, (2 * size[0], 2 * size[1]))  # decodes a JPEG at a half, a quarter or an eighth
            if image.mode in ("1", "L") and "transparency" not in image.info:
                smaller = image.convert("L").resize(size, Image.Resampling.LANCZOS)
        rgb = as_rgb(smaller, self.depth)
        if rgb.size != size:
            rgb = rgb.resize(size, Image.Resampling.LANCZOS)
        return turned_upright(rgb, image) if self.upright else rgb

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.longest_side is None or max(size) <= self.longest_side:
            return size
        scale = self.longest_side / max(size)
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _storable(image: Image.Image) -> Image.Image:
    """The image; raises `DataError` if it is too large for a shard."""
    if image.width * image.height > MOST_PIXELS or max(image.size) > MOST_SIDE:
        raise ImageError(
            f"it has {image.width} x {image.height} pixels; shards hold up to {MOST_PIXELS:,}, and {MOST_SIDE:,} "
            "a side: scale large images down with --longest-side"
        )
    return image


def copied(path: Readable, *, remedy: str) -> bytes:
    """Bytes of a file that has been read before; raises `DataError`, ending in `remedy`, if it is gone."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} was there a moment ago and cannot be read: {error.strerror}; {remedy}") from None


def measure_mask(path: Readable, *, remedy: str) -> tuple[npt.NDArray[np.uint8], bool]:
    """Ids of an indexed or gray mask, (H, W) uint8, and whether the file can go into a shard as it is.

    Raises:
        DataError: the file is missing, damaged, in colors, or its values are no ids; the message ends in `remedy`.
    """
    with open_image(path, remedy=remedy) as image:
        return mask_ids(image, path, remedy=remedy)


def mask_ids(image: Image.Image, path: Readable, *, remedy: str) -> tuple[npt.NDArray[np.uint8], bool]:
    """Ids of an open mask, as `measure_mask` returns them: the values as the file has them, of any number of bits.

    Raises:
        DataError: the file is in colors, its values are no ids, or its compression changes them.
    """
    if image.format in LOSSY:
        raise DataError(
            f"{path} is a {image.format} file, whose compression changes class ids; make masks anew, as PNG files"
        )
    if image.mode in ("P", "L", "1"):
        top = _top_value(image)
        ids = np.asarray(image).astype(np.uint8, copy=False)
        if top < 255:
            return (ids * (top / 255)).round().astype(np.uint8), False
        return ids, image.format == "PNG" and image.mode != "1"
    if not image.mode.startswith("I"):
        raise DataError(
            f"{path} is a {image.mode} image; masks must be indexed (mode P) or gray (L) with class ids as values: "
            f"{remedy}"
        )
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 255:
        raise DataError(
            f"{path} is a {image.mode} image with values from {values.min()} to {values.max()}; class ids are 0 to "
            f"255: {remedy}"
        )
    return values.astype(np.uint8), False


def _top_value(image: Image.Image) -> int:
    """The greatest value that a gray file can hold: Pillow spreads those of less than 8 bits over 0 to 255."""
    tile = getattr(image, "tile", None)
    arguments = tile[0].args if tile and image.mode == "L" else ""
    if image.format == "PPM":
        return int(arguments[1]) if isinstance(arguments, tuple) else 255
    raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    return {"L;2": 3, "L;4": 15, "L;2I": 3, "L;4I": 15}.get(raw_mode, 255)


def checked_ids(path: Readable, mask: npt.NDArray[np.uint8], num_classes: int, *, remedy: str) -> list[int]:
    """The ids in a mask, ascending.

    Raises:
        DataError: there are others than those of classes and void.
    """
    pixels = mask.ravel()
    ends = np.flatnonzero(pixels[1:] != pixels[:-1])  # of runs: a mask has few of them
    present: list[int] = np.unique(np.append(pixels[ends], pixels[-1:])).tolist()
    unknown = [label for label in present if label >= num_classes and label != IGNORE_INDEX]
    if unknown:
        more = f" and {len(unknown) - 10} others" if len(unknown) > 10 else ""
        raise DataError(
            f"{path} has ids {unknown[:10]}{more}; allowed are 0 to {num_classes - 1} and {IGNORE_INDEX} (void); "
            f"{remedy}"
        )
    return present


def check_size(
    path: Readable, mask: npt.NDArray[np.uint8], image: Readable, size: tuple[int, int], *, remedy: str
) -> None:
    """Raises `DataError` unless a mask fits its image, which is `size` pixels wide and high."""
    if mask.shape != size[::-1]:
        raise DataError(
            f"{path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image {image.name} {size[0]}x{size[1]}; {remedy}"
        )


def read_keys(path: Path) -> list[str]:
    """Keys in a list file, one image a line: its key, or the path of its file."""
    names = [Path(line.strip()).name for line in read_lines(path, "list of images") if line.strip()]
    return [name.rpartition(".")[0] or name for name in names]


def read_objects(path: Path, *, remedy: str) -> set[str]:
    """Names of the objects in an XML annotation of PASCAL VOC's form.

    Raises:
        DataError: the file cannot be read as XML; the message ends in `remedy`.
    """
    objects = read_xml(path, "annotation", remedy=remedy).findall("object")
    return {(entry.findtext("name") or "").strip() for entry in objects}


def check_fraction(val_fraction: float) -> None:
    """Raises `DataError` unless a share of the images can become the split `val`."""
    if not 0 <= val_fraction < 1:
        raise DataError(f"--val-fraction is {val_fraction}; allowed are shares from 0 to below 1")


def drawn_split(key: str, val_fraction: float, seed: int) -> str:
    """The split, `train` or `val`, that a key draws."""
    return "val" if seeded_share(key, seed) < val_fraction else "train"


def seeded_share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone, so that new images move no old ones."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_words(text: str | None) -> list[str] | None:
    """The words between the commas of an option, None where it was not given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
