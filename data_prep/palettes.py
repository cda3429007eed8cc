"""Palette files: names and colors of the classes, for masks in colors.

A line per class: `name #rrggbb`, `name r g b`, or the color first; names may have spaces and stand in quotes. So do
CVAT's labelmap.txt, `name:r,g,b:parts:actions`, and CSV files `name,r,g,b`. A JSON file is an object of colors by name,
or a list of objects with `name` and `color`. One class is `background`; `void` is the color of pixels whose class is
not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.class_names import folded, normalized
from data_prep.shard_writer import listed
from data_prep.text_files import read_json, read_lines
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.manifest import DataError

__all__ = ["Palette", "read_palette"]

_HEX, _RGB = r"#[0-9a-fA-F]{6}", r"\d+[\s,;]+\d+[\s,;]+\d+"
_LINE = re.compile(rf"(?P<name>.*\S)[\s:,;=]+(?P<color>{_HEX}|{_RGB})(?:\s*:.*)?")
_COLOR_FIRST = re.compile(rf"(?P<color>{_HEX}|{_RGB})[\s,;]+(?P<name>\S.*)")
_HEADER = re.compile(
    r"(?i)#.*|//.*|[\"']?(name|label|class)[\"']?[\s,;]+([\"']?(r|g|b|red|green|blue|color|rgb|hex)[\"']?[\s,;]*)+"
)

Color = tuple[int, int, int]


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
        if self.void is not None:
            ids[codes == _codes(self.void)] = IGNORE_INDEX
        for label, code in enumerate(_codes(self.colors)):
            ids[codes == code] = label
        unknown = ids < 0
        if unknown.any():
            row, column = np.argwhere(unknown)[0]
            color = "#" + bytes(pixels[row, column].tolist()).hex()
            count, kinds = int(unknown.sum()), len(np.unique(codes[unknown]))
            remedy = "export it without smoothing (anti-aliasing), as PNG" if kinds > 1 else "add it"
            raise DataError(
                f"has {count} pixel(s) in {kinds} color(s) that the palette file lacks, first {color} at row {row}, "
                f"column {column}; {remedy}"
            )
        return ids.astype(np.uint8)


def read_palette(path: str | Path) -> Palette:
    """Reads a palette file; the module's docstring has its forms.

    Raises:
        DataError: the file cannot be read, or a line is not of that form, or a name or color occurs twice.
    """
    path = Path(path)
    pairs = list(_json_pairs(path) if path.suffix.lower() == ".json" else _text_pairs(path))
    for place, what in ((0, "name"), (1, "color")):
        seen: dict[Any, str] = {}
        for name, color, where in pairs:
            value = (folded(name), color)[place]
            if value in seen:
                raise DataError(
                    f"{path} has a {what} twice, {seen[value]} and {where} ({name!r}); each class needs its own"
                )
            seen[value] = where
    void = next((color for name, color, _ in pairs if folded(name) == "void"), None)
    colors = {normalized(name): color for name, color, _ in pairs if folded(name) not in ("void", BACKGROUND)}
    background = next((color for name, color, _ in pairs if folded(name) == BACKGROUND), None)
    if background is None:
        raise DataError(
            f"{path} has the classes {listed(list(colors)) or 'none'}, but no {BACKGROUND!r}; add a line "
            f"`{BACKGROUND} #000000` with the color of pixels of no class"
        )
    if not 1 <= len(colors) < IGNORE_INDEX:
        raise DataError(
            f"{path} names {len(colors)} classes beside the background; 1 to {IGNORE_INDEX - 1} are allowed"
        )
    return Palette(
        (BACKGROUND, *colors),
        np.array([background, *colors.values()], dtype=np.uint8),
        None if void is None else np.array(void, dtype=np.uint8),
    )


def _text_pairs(path: Path) -> Iterator[tuple[str, Color, str]]:
    """Name, color and place of each class in a text file."""
    for number, text in enumerate(read_lines(path, "palette file"), start=1):
        line = text.strip()
        match = _COLOR_FIRST.fullmatch(line) or _LINE.fullmatch(line)
        if match is None and (not line or _HEADER.fullmatch(line)):
            continue
        color = None if match is None else _color(match["color"])
        if match is None or color is None:
            raise DataError(f"{path}, line {number}: {line!r} is not `name #rrggbb` or `name r g b` with 0 to 255")
        name = match["name"].strip()
        if name[0] not in "\"'" and (re.search(r"[,;]", name) or re.search(r"[\s,;:]\d+$", name)):
            raise DataError(
                f"{path}, line {number}: {line!r} has more than a name and three numbers; if the name is {name!r}, put "
                "it into quotes"
            )
        yield name.strip("\"'"), color, f"line {number}"


def _json_pairs(path: Path) -> Iterator[tuple[str, Color, str]]:
    value = read_json(path, "palette file")
    value = [{"name": name, "color": color} for name, color in value.items()] if isinstance(value, dict) else value
    for number, entry in enumerate(value if isinstance(value, list) else [value], start=1):
        name = entry.get("name") if isinstance(entry, dict) else None
        color = _color(entry.get("color")) if isinstance(entry, dict) else None
        if not isinstance(name, str) or color is None:
            raise DataError(
                f'{path}, entry {number}: {entry!r} is no class with a color; write {{"name": "#rrggbb"}} or '
                '[{"name": "cat", "color": [255, 0, 0]}]'
            )
        yield name, color, f"entry {number}"


def _color(value: Any) -> Color | None:
    """`#rrggbb`, `r g b` or [r, g, b] as numbers; None if it is no color."""
    if isinstance(value, str) and re.fullmatch(_HEX, value):
        value = list(bytes.fromhex(value[1:]))
    elif isinstance(value, str) and re.fullmatch(_RGB, value):
        value = [int(word) for word in re.split(r"[\s,;]+", value)]
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(part) is int and 0 <= part <= 255 for part in value)
    ):
        return None
    return value[0], value[1], value[2]


def _codes(colors: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """One number per color (..., 3)."""
    wide = colors.astype(np.int64)
    codes: npt.NDArray[np.int64] = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return codes
