"""Pictures for MLflow's page and the demo: an image's way from mask to pseudo label, and the scores of all classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.viz.overlay import check_mask, draw_overlay, void_stripes

__all__ = ["draw_class_scores", "draw_panel"]

Pixels: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[Any]
Colour: TypeAlias = tuple[int, int, int]

_PAGE: Colour = (255, 255, 255)
_INK: Colour = (34, 34, 34)
_FAINT: Colour = (190, 190, 190)

_MIN_TILE = 240
_GAP = 10
_FONT_SIZE = 15
_LINE = 24
_SWATCH = 14
_ROWS = 51
"""Classes below each other, the background with 50 others."""
_NAME, _BAR, _NUMBER = 150, 150, 52


def draw_panel(
    image: Pixels,
    raw_mask: Mask,
    refined_mask: Mask,
    pseudo_labels: Mask,
    ground_truth: Mask | None,
    *,
    palette: Pixels,
    class_names: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Draws image, raw mask, refined mask, pseudo label and ground truth in two rows, with captions and a legend.

    Two rows, because MLflow's page and small screens give a picture a square.

    Args:
        image: (H, W, 3) uint8 RGB.
        raw_mask: (H, W) class ids of the fused masks before refinement; 255 is void here and below.
        refined_mask: (H, W) class ids after refinement.
        pseudo_labels: (H, W) class ids after the thresholds.
        ground_truth: (H, W) class ids, or None where there are none: then there are four pictures.
        palette: (C, 3) uint8 colours by class id, C >= the number of classes.
        class_names: Names by class id, background first.
        title: Line above, for instance the image's key; empty for none.

    Returns:
        RGB picture; small images are enlarged by a whole factor so that details can be seen.

    Raises:
        ValueError: a mask's size differs from the image's, or it holds an id without a name or colour.
    """
    masks = {"raw mask": raw_mask, "refined mask": refined_mask, "pseudo label": pseudo_labels}
    if ground_truth is not None:
        masks["ground truth"] = ground_truth
    for name, mask in masks.items():
        check_mask(mask, image, min(len(class_names), len(palette)), name)
    factor = -(-_MIN_TILE // image.shape[1])
    tiles = {"image": _enlarge(image, factor)}
    for name, mask in masks.items():
        tiles[name] = np.asarray(draw_overlay(_enlarge(image, factor), _enlarge_mask(mask, factor), palette))
    occurring = sorted(set(np.unique(np.stack(list(masks.values()))).tolist()))
    return _compose(tiles, _legend_entries(occurring, palette, class_names), title)


def draw_class_scores(
    iou: Sequence[float],
    fdr: Sequence[float],
    fnr: Sequence[float],
    *,
    palette: Pixels,
    class_names: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Draws IoU as bars, and IoU, FDR and FNR in percent, a row for each class and 51 rows to a column.

    Args:
        iou: by class, shares in [0, 1]; NaN where the class occurs nowhere.
        fdr: likewise.
        fnr: likewise.
        palette: (C, 3) uint8 colours by class id, C >= the number of classes.
        class_names: K names, background first.
        title: Line above.
    """
    font, bold = ImageFont.load_default(_FONT_SIZE - 2), ImageFont.load_default(_FONT_SIZE + 2)
    column = _NAME + _BAR + 3 * _NUMBER + 3 * _GAP
    rows, columns = min(_ROWS, len(class_names)), -(-len(class_names) // _ROWS)
    page = Image.new("RGB", (columns * column + _GAP, 2 * _LINE + rows * (_LINE - 4) + 2 * _GAP), _PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP), title, fill=_INK, font=bold)
    for place, name in enumerate(class_names):
        left, top = _GAP + place // _ROWS * column, _GAP + 2 * _LINE + place % _ROWS * (_LINE - 4)
        start, end = left + _NAME, left + _NAME + _BAR
        if place % _ROWS == 0:
            for number, text in enumerate(("IoU %", "FDR", "FNR")):
                draw.text((end + (number + 1) * _NUMBER, top - _LINE / 2), text, fill=_INK, font=font, anchor="rm")
        draw.text((left, top + 8), _shortened(name, font), fill=_INK, font=font, anchor="lm")
        draw.rectangle((start, top, end, top + 15), outline=_FAINT)
        if iou[place] == iou[place]:
            colour = tuple(int(value) for value in palette[place]) if place else (70, 70, 70)
            draw.rectangle((start, top, start + round(_BAR * iou[place]), top + 15), fill=colour, outline=_INK)
        for number, values in enumerate((iou, fdr, fnr)):
            text = f"{100 * values[place]:.1f}" if values[place] == values[place] else "-"
            draw.text((end + (number + 1) * _NUMBER, top + 8), text, fill=_INK, font=font, anchor="rm")
    return page


def _shortened(name: str, font: Any) -> str:
    """The name, cut where it does not fit its column."""
    if font.getlength(name) <= _NAME - _GAP:
        return name
    while name and font.getlength(name + "…") > _NAME - _GAP:
        name = name[:-1]
    return name + "…"


def _enlarge(image: Pixels, factor: int) -> Pixels:
    height, width = image.shape[:2]
    size = (width * factor, height * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) if factor > 1 else image


def _enlarge_mask(mask: Mask, factor: int) -> Mask:
    return np.repeat(np.repeat(mask, factor, axis=0), factor, axis=1)


def _legend_entries(
    occurring: Sequence[int], palette: Pixels, class_names: Sequence[str]
) -> list[tuple[str, Image.Image]]:
    entries = []
    for index in occurring:
        swatch = np.zeros((_SWATCH, _SWATCH, 3), dtype=np.uint8)
        if index == IGNORE_INDEX:
            swatch[:] = void_stripes(swatch.shape[:2])
        else:
            # The background is drawn as dimmed grey, whatever its colour in the palette.
            swatch[:] = palette[index] if index else 70
        name = "void" if index == IGNORE_INDEX else class_names[index]
        entries.append((name, Image.fromarray(swatch)))
    return entries


def _compose(tiles: dict[str, Pixels], legend: list[tuple[str, Image.Image]], title: str) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    height, width = next(iter(tiles.values())).shape[:2]
    columns = -(-len(tiles) // 2)
    total_width = _GAP + columns * (width + _GAP)
    positions = _legend_positions([font.getlength(name) for name, _ in legend], total_width)
    top = _GAP + (_LINE if title else 0)
    row_height = _LINE + height + _GAP
    legend_top = top + -(-len(tiles) // columns) * row_height
    total_height = legend_top + (positions[-1][1] + 1) * _LINE + _GAP // 2
    page = Image.new("RGB", (total_width, total_height), _PAGE)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((_GAP, top - _LINE + 2), title, fill=_INK, font=ImageFont.load_default(_FONT_SIZE + 2))
    for place, (caption, tile) in enumerate(tiles.items()):
        left, row_top = _GAP + place % columns * (width + _GAP), top + place // columns * row_height
        draw.text((left + width / 2, row_top + _LINE / 2), caption, fill=_INK, font=font, anchor="mm")
        page.paste(Image.fromarray(tile), (left, row_top + _LINE))
    for (name, swatch), (left, line) in zip(legend, positions, strict=True):
        y = legend_top + line * _LINE
        draw.rectangle((left - 1, y + 4, left + _SWATCH, y + 5 + _SWATCH), outline=_FAINT)
        page.paste(swatch, (left, y + 5))
        draw.text((left + _SWATCH + 6, y + 5 + _SWATCH / 2), name, fill=_INK, font=font, anchor="lm")
    return page


def _legend_positions(widths: Sequence[float], total_width: int) -> list[tuple[int, int]]:
    """(left, line) of each entry, with a new line where the page ends."""
    positions, left, line = [], _GAP, 0
    for width in widths:
        needed = _SWATCH + 6 + round(width) + 2 * _GAP
        if left > _GAP and left + needed > total_width:
            left, line = _GAP, line + 1
        positions.append((left, line))
        left += needed
    return positions
