"""Masks of a user's folder as class ids, by value, by color or by shape, and whether they agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.palettes import Palette
from data_prep.shard_writer import listed
from data_prep.source_files import LOSSY, mask_ids
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.images import open_image
from slrnet.data.manifest import DataError

__all__ = ["MaskReader", "MaskValues", "check_masks"]

REMEDY = "make it so, or name its colors with --palette FILE; if it has one class on black, use --binary-masks"


@dataclass(frozen=True, slots=True)
class MaskValues:
    """What a mask's file holds, for comparing masks. Small, as it is kept for every mask."""

    ids: bytes
    """Ids that it has, ascending."""
    colors: bytes = b""
    """Their colors in its own palette, 3 bytes each; empty if it has none, or one of grays in order."""


@dataclass(frozen=True, kw_only=True)
class MaskReader:
    """Reads masks as `--palette` and `--binary-masks` say; else their values are the ids."""

    palette: Palette | None = None
    binary: bool = False
    """Whether each value other than 0 is class 1."""

    def read(self, path: Path) -> tuple[npt.NDArray[np.uint8], bool, npt.NDArray[np.uint8] | None]:
        """Ids (H, W) of a mask, whether its file can go into a shard as it is, and the colors (256, 3) of its palette.

        The colors are None for masks that are read by color, are gray, or have a palette of grays in order.

        Raises:
            DataError: the file is missing or damaged, or its values or colors are no ids.
        """
        with open_image(path, remedy="make it again") as image:
            if self.palette is not None:
                return _ids_of_colors(image, path, self.palette), False, None
            if self.binary:
                return _ids_of_shape(image, path), False, None
            colors = _own_palette(image)
            return *mask_ids(image, path, remedy=REMEDY), colors


def check_masks(masks: Iterable[tuple[str, MaskValues]], num_classes: int) -> None:
    """Compares the masks of a set, whose values are ids.

    Args:
        masks: Path and values of each mask.
        num_classes: Number K of classes, background included.

    Raises:
        DataError: no mask shows a class and some show void, which says that 255 is the class; or one id has several
            colors.
    """
    shown, bright, mixed = False, list[str](), False
    colors: dict[int, tuple[bytes, str]] = {}
    for path, values in masks:
        void, present = IGNORE_INDEX in values.ids, any(0 < label < IGNORE_INDEX for label in values.ids)
        shown, mixed = shown or present, mixed or (present and void)
        if void and not present:
            bright.append(path)
        for place, label in enumerate(values.ids if values.colors else b""):
            color = values.colors[3 * place : 3 * place + 3]
            first = colors.setdefault(label, (color, path))
            if first[0] != color and label != IGNORE_INDEX:
                raise DataError(
                    f"masks have different palettes: id {label} is #{first[0].hex()} in {first[1]} and #{color.hex()} "
                    f"in {path}; name the colors of the classes with --palette FILE, or save the masks as gray files "
                    "if the ids are right"
                )
    if bright and (not shown or (num_classes == 2 and not mixed)):
        raise DataError(
            f"{len(bright)} mask(s) hold no value but 0 and {IGNORE_INDEX}, such as {listed(bright[:3])}; "
            f"{IGNORE_INDEX} means void, which no training sees: use --binary-masks if every value other than 0 is the "
            "class, else write class ids 1, 2, ..."
        )


def _own_palette(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    entries = image.getpalette("RGB") if image.mode == "P" else None
    if not entries:
        return None
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(entries) // 3] = np.array(entries, dtype=np.uint8).reshape(-1, 3)[:256]
    gray = np.arange(len(entries) // 3, dtype=np.uint8)[:, None].repeat(3, axis=1)
    return None if np.array_equal(colors[: len(gray)], gray) else colors


def _ids_of_colors(image: Image.Image, path: Path, palette: Palette) -> npt.NDArray[np.uint8]:
    _refuse_transparent(image, path)
    pixels = np.asarray(image.convert("RGB"))
    try:
        return palette.ids(pixels)
    except DataError as error:
        lossy = f" ({image.format} changes colors)" if image.format in LOSSY else ""
        gray = image.mode in ("P", "L") and int(np.asarray(image).max()) < len(palette.names)
        hint = "; its values may be class ids: give --classes instead of --palette then" if gray else ""
        raise DataError(f"{path} {error}{lossy}{hint}") from None


def _ids_of_shape(image: Image.Image, path: Path) -> npt.NDArray[np.uint8]:
    if image.format in LOSSY:
        raise DataError(
            f"{path} is a {image.format} file, whose compression blurs the edge of the class; save it as PNG"
        )
    _refuse_transparent(image, path)
    pixels = np.asarray(image.convert("RGB") if image.mode not in ("1", "L", "F") and image.mode[0] != "I" else image)
    return np.asarray(np.atleast_3d(pixels).any(axis=2), dtype=np.uint8)


def _refuse_transparent(image: Image.Image, path: Path) -> None:
    """Transparent black is nothing; what else is not opaque could be the class or the background."""
    if image.mode not in ("RGBA", "LA", "PA"):
        return
    pixels = np.asarray(image.convert("RGBA"))
    doubtful = (pixels[..., 3] < 255) & pixels.any(axis=2)
    if doubtful.any():
        row, column = np.argwhere(doubtful)[0]
        color = "#" + bytes(pixels[row, column].tolist()).hex()
        raise DataError(
            f"{path} has {int(doubtful.sum())} transparent pixel(s), first {color} at row {row}, column {column}; save "
            "it without transparency"
        )
