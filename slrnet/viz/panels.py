"""Pictures of a run: an image's way from mask to pseudo label, and the scores of all classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slrnet.data.manifest import DatasetInfo
from slrnet.viz.grid import BACKGROUND, FAINT, FONT_SIZE, GAP, INK, LINE, PAGE, Tile, class_legend, draw_grid, shorten
from slrnet.viz.overlay import Mask, Pixels, check_mask, draw_overlay

__all__ = ["draw_class_scores", "draw_panel"]

_MIN_TILE = 240
"""Narrower images are enlarged, pixels."""
_ROWS = 51
"""Classes below each other: the background and 50 others."""
_NAME, _BAR, _NUMBER = 150, 150, 52
"""Widths of a class's name, bar, and each figure, pixels."""


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
    legend = class_legend(masks.values(), palette, info.classes)
    return draw_grid([tiles[:columns], tiles[columns:]], title=title, legend=legend)


def draw_class_scores(scores: Mapping[str, Sequence[float]], info: DatasetInfo, *, title: str) -> Image.Image:
    """Draws IoU as bars, and IoU, FDR and FNR in percent, a row for each class and 51 rows to a column.

    Args:
        scores: `iou`, `fdr` and `fnr` by class, in [0, 1]; NaN for a class that occurs nowhere.
        info: names and colors of the classes.
        title: line at the top.
    """
    font, bold = ImageFont.load_default(FONT_SIZE - 2), ImageFont.load_default(FONT_SIZE + 2)
    column = _NAME + _BAR + 3 * _NUMBER + 3 * GAP
    rows, columns = min(_ROWS, info.num_classes), -(-info.num_classes // _ROWS)
    page = Image.new("RGB", (columns * column + GAP, 2 * LINE + rows * (LINE - 4) + 2 * GAP), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), title, fill=INK, font=bold)
    for place, name in enumerate(info.classes):
        left, top = GAP + place // _ROWS * column, GAP + 2 * LINE + place % _ROWS * (LINE - 4)
        start, end = left + _NAME, left + _NAME + _BAR
        if place % _ROWS == 0:
            for number, text in enumerate(("IoU %", "FDR", "FNR")):
                draw.text((end + (number + 1) * _NUMBER, top - LINE / 2), text, fill=INK, font=font, anchor="rm")
        draw.text((left, top + 8), shorten(name, font, _NAME - GAP), fill=INK, font=font, anchor="lm")
        draw.rectangle((start, top, end, top + 15), outline=FAINT)
        shares = [scores[kind][place] for kind in ("iou", "fdr", "fnr")]
        if not math.isnan(shares[0]):
            color = info.palette[place] if place else BACKGROUND
            draw.rectangle((start, top, start + round(_BAR * shares[0]), top + 15), fill=color, outline=INK)
        for number, share in enumerate(shares):
            text = "-" if math.isnan(share) else f"{100 * share:.1f}"
            draw.text((end + (number + 1) * _NUMBER, top + 8), text, fill=INK, font=font, anchor="rm")
    return page
