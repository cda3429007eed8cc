"""Palette files: names and colors of the classes, for masks in colors.

A line `name #rrggbb` (or `name r g b`) per class, the background first, and a line `void #rrggbb` where there is void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.source_files import read_lines
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.manifest import DataError

__all__ = ["Palette", "read_palette"]


@dataclass(frozen=True)
class Palette:
    """Classes by color: `names` (background first), `colors` (K, 3) uint8, `void` (3,) or None."""

    names: tuple[str, ...]
    colors: npt.NDArray[np.uint8]
    void: npt.NDArray[np.uint8] | None

    def ids(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(H, W) class ids of a mask in colors, (H, W, 3) uint8.

        Raises:
            DataError: it has a color that is not in the palette.
        """
        codes = _codes(pixels)
        ids = np.full(codes.shape, -1, dtype=np.int16)
        ids[codes == _codes(self.void)] = IGNORE_INDEX if self.void is not None else -1
        for label, code in enumerate(_codes(self.colors)):
            ids[codes == code] = label
        if (ids < 0).any():
            row, column = np.argwhere(ids < 0)[0]
            color = "#" + bytes(pixels[row, column].tolist()).hex()
            raise DataError(f"has the color {color} at row {row}, column {column}, which the palette file lacks")
        return ids.astype(np.uint8)


def read_palette(path: str | Path) -> Palette:
    """Reads a palette file; the module's docstring has its form.

    Raises:
        DataError: the file cannot be read, or a line is not of that form, or a name or color occurs twice.
    """
    names: list[str] = []
    colors: list[tuple[int, int, int]] = []
    void = None
    for number, line in enumerate(read_lines(path, "palette file"), start=1):
        words = line.split()
        if not words or line.lstrip().startswith("//"):
            continue
        color = _color(words[1:])
        if color is None:
            raise DataError(f"{path}, line {number}: {line!r} is not `name #rrggbb` or `name r g b` with 0 to 255")
        if words[0] == "void":
            void = np.array(color, dtype=np.uint8)
            continue
        names.append(words[0])
        colors.append(color)
    every = [*colors, *([] if void is None else [tuple(void.tolist())])]
    if len(set(names)) < len(names) or len(set(every)) < len(every):
        raise DataError(f"{path} has a name or a color twice; each class needs its own")
    if not 2 <= len(names) <= IGNORE_INDEX or names[0] != BACKGROUND:
        raise DataError(f"{path} names {len(names)} classes; it needs {BACKGROUND!r} first and 1 to 254 others")
    return Palette(tuple(names), np.array(colors, dtype=np.uint8), void)


def _color(words: Sequence[str]) -> tuple[int, int, int] | None:
    try:
        if len(words) == 1 and len(words[0]) == 7 and words[0][0] == "#":
            red, green, blue = bytes.fromhex(words[0][1:])
        else:
            red, green, blue = (int(word) for word in words)
    except ValueError:
        return None
    return (red, green, blue) if all(0 <= value <= 255 for value in (red, green, blue)) else None


def _codes(colors: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.int64]:
    """One number per color (..., 3); none for None."""
    if colors is None:
        return np.array(-1)
    wide = colors.astype(np.int64)
    codes: npt.NDArray[np.int64] = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return codes
