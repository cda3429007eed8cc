"""Pictures in a grid with captions and a legend, such as an image's way from mask to pseudo label; bars of scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.manifest import DatasetInfo
from slrnet.viz.lettering import Font, drawable_names, font_for
from slrnet.viz.overlay import Mask, Pixels, check_mask, draw_overlay, void_stripes

__all__ = ["Color", "Tile", "class_legend", "draw_class_scores", "draw_grid", "draw_panel"]

Color: TypeAlias = tuple[int, int, int]
"""Red, green, and blue, 0 to 255."""

PAGE: Color = (255, 255, 255)
INK: Color = (34, 34, 34)
FAINT: Color = (190, 190, 190)
BACKGROUND: Color = (70, 70, 70)
"""Stands for the background, which overlays draw in dimmed gray, whatever its color in the palette."""
GAP = 10
"""Between tiles, pixels."""
LINE = 24
"""Height of a line of text, pixels."""
FONT_SIZE = 15
_SWATCH = 14
_MIN_TILE = 240
"""Narrower images are enlarged, pixels."""
_ROWS = 51
"""Classes below each other: the background and 50 others."""
_NAME, _BAR, _NUMBER = 150, 150, 52
"""Widths of a class's name, bar, and each figure, pixels."""


class Tile(NamedTuple):
    """A picture in a grid."""

    picture: Pixels
    """(H, W, 3) uint8 RGB."""
    caption: str = ""
    """Text above it, shortened to the picture's width."""


def draw_grid(
    rows: Sequence[Sequence[Tile]],
    *,
    title: str = "",
    row_names: Sequence[str] = (),
    legend: Sequence[tuple[str, Color | None]] = (),
) -> Image.Image:
    """Draws tiles in rows and columns; returns an RGB picture.

    Args:
        rows: tiles, left to right; at least one. All columns are as wide as the widest tile.
        title: line at the top; empty for none.
        row_names: texts at the left of the rows; empty for none.
        legend: names and colors below the tiles; None is drawn as the stripes of void.
    """
    margin = GAP + max((round(font_for(name, FONT_SIZE).getlength(name)) + GAP for name in row_names), default=0)
    width = max(tile.picture.shape[1] for row in rows for tile in row)
    total_width = margin + max(map(len, rows)) * (width + GAP)
    tops = [GAP + (LINE if title else 0)]
    for row in rows:
        tops.append(tops[-1] + LINE + max(tile.picture.shape[0] for tile in row) + GAP)
    places = _legend_positions([font_for(name, FONT_SIZE).getlength(name) for name, _ in legend], total_width)
    lines = places[-1][1] + 1 if places else 0
    page = Image.new("RGB", (total_width, tops[-1] + lines * LINE + GAP // 2), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP + 2), title, fill=INK, font=font_for(title, FONT_SIZE + 2))
    for top, row in zip(tops, rows, strict=False):
        for column, tile in enumerate(row):
            left = margin + column * (width + GAP)
            font = font_for(tile.caption, FONT_SIZE)
            caption = _shorten(tile.caption, font, width)
            draw.text((left + width / 2, top + LINE / 2), caption, fill=INK, font=font, anchor="mm")
            page.paste(Image.fromarray(tile.picture), (left, top + LINE))
    for name, top, below in zip(row_names, tops, tops[1:], strict=False):
        font = font_for(name, FONT_SIZE)
        draw.text((GAP, (top + LINE + below - GAP) / 2), name, fill=INK, font=font, anchor="lm")
    for (name, color), (left, line) in zip(legend, places, strict=True):
        top = tops[-1] + line * LINE + 5
        draw.rectangle((left - 1, top - 1, left + _SWATCH, top + _SWATCH), fill=color, outline=FAINT)
        if color is None:
            page.paste(Image.fromarray(void_stripes((_SWATCH, _SWATCH)).astype(np.uint8)), (left, top))
        font = font_for(name, FONT_SIZE)
        draw.text((left + _SWATCH + 6, top + _SWATCH / 2), name, fill=INK, font=font, anchor="lm")
    return page


def class_legend(
    masks: Iterable[Mask], palette: Pixels, class_names: Sequence[str], *, foreground_only: bool = False
) -> list[tuple[str, Color | None]]:
    """Lists names and colors of the classes that masks show, in the order of their ids; the color of void is None.

    Args:
        masks: each (H, W) class ids, 255 for void.
        palette: (C, 3) uint8 colors by class id.
        class_names: K names, background first.
        foreground_only: leave out the background and void.
    """
    shown = {int(index) for mask in masks for index in np.unique(mask)}
    special: dict[int, tuple[str, Color | None]] = {0: (class_names[0], BACKGROUND), IGNORE_INDEX: ("void", None)}
    return [
        special.get(index) or (class_names[index], tuple(palette[index].tolist()))
        for index in sorted(shown)
        if index not in special or not foreground_only
    ]


def draw_panel(image: Pixels, masks: Mapping[str, Mask], info: DatasetInfo, *, title: str = "") -> Image.Image:
    """Draws an image and masks over it, such as its stages and the ground truth, in two rows with a legend.

    There are two rows, because MLflow's page and small screens give a picture a square. Small images are enlarged by a
    whole factor so that you can see details.

    Args:
        image: (H, W, 3) uint8 RGB.
        masks: (H, W) class ids by caption; 255 is void.
        info: names and colors of the classes.
        title: line at the top, for instance the image's key; empty for none.

    Raises:
        ValueError: a mask's size differs from the image's, or it holds an id that is no class.
    """
    for name, mask in masks.items():
        check_mask(mask, image, info.num_classes, name)
    palette = info.palette_array()
    factor = -(-_MIN_TILE // image.shape[1])
    size = (image.shape[1] * factor, image.shape[0] * factor)
    large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    tiles = [Tile(large, "image")]
    for name, mask in masks.items():
        overlay = draw_overlay(large, mask.repeat(factor, axis=0).repeat(factor, axis=1), palette)
        tiles.append(Tile(np.asarray(overlay), name))
    columns = -(-len(tiles) // 2)
    legend = class_legend(masks.values(), palette, drawable_names(info.classes))
    return draw_grid([tiles[:columns], tiles[columns:]], title=title, legend=legend)


def draw_class_scores(scores: Mapping[str, Sequence[float]], info: DatasetInfo, *, title: str) -> Image.Image:
    """Draws IoU as bars, and IoU, FDR and FNR in percent, a row for each class and 51 rows to a column.

    Args:
        scores: `iou`, `fdr` and `fnr` by class, in [0, 1]; NaN for a class that occurs nowhere.
        info: names and colors of the classes.
        title: line at the top.
    """
    font = font_for("", FONT_SIZE - 2)
    column = _NAME + _BAR + 3 * _NUMBER + 3 * GAP
    rows, columns = min(_ROWS, info.num_classes), -(-info.num_classes // _ROWS)
    page = Image.new("RGB", (columns * column + GAP, 2 * LINE + rows * (LINE - 4) + 2 * GAP), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), title, fill=INK, font=font_for(title, FONT_SIZE + 2))
    for place, name in enumerate(drawable_names(info.classes)):
        left, top = GAP + place // _ROWS * column, GAP + 2 * LINE + place % _ROWS * (LINE - 4)
        start, end = left + _NAME, left + _NAME + _BAR
        if place % _ROWS == 0:
            for number, text in enumerate(("IoU %", "FDR", "FNR")):
                draw.text((end + (number + 1) * _NUMBER, top - LINE / 2), text, fill=INK, font=font, anchor="rm")
        own = font_for(name, FONT_SIZE - 2)
        draw.text((left, top + 8), _shorten(name, own, _NAME - GAP), fill=INK, font=own, anchor="lm")
        draw.rectangle((start, top, end, top + 15), outline=FAINT)
        shares = [scores[kind][place] for kind in ("iou", "fdr", "fnr")]
        if not math.isnan(shares[0]):
            color = info.palette[place] if place else BACKGROUND
            draw.rectangle((start, top, start + round(_BAR * shares[0]), top + 15), fill=color, outline=INK)
        for number, share in enumerate(shares):
            text = "-" if math.isnan(share) else f"{100 * share:.1f}"
            draw.text((end + (number + 1) * _NUMBER, top + 8), text, fill=INK, font=font, anchor="rm")
    return page


def _shorten(text: str, font: Font, width: float) -> str:
    """Cuts a text that is wider than `width` pixels, and marks the cut with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _legend_positions(widths: Sequence[float], total_width: int) -> list[tuple[int, int]]:
    """(left, line) of each entry, with a new line where the page ends."""
    positions, left, line = [], GAP, 0
    for width in widths:
        needed = _SWATCH + 6 + round(width) + 2 * GAP
        if left > GAP and left + needed > total_width:
            left, line = GAP, line + 1
        positions.append((left, line))
        left += needed
    return positions
