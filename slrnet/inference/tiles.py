"""Predicts large images in overlapping tiles, without seams.

Each tile is predicted like an image of its own. Where tiles overlap, one fades linearly into the next: the tiles'
weights sum to 1 at each pixel. Maps are summed in a band as high as a tile, and rows that no later tile reaches leave
the band as class ids. So the band is all that memory holds besides the image, its mask, and the network's pass over one
tile: K classes x tile x shorter side x 4 bytes, 0.5 GB for 21 classes, tiles of 768 and a shorter side of 8,000 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["fading_weights", "predict_tiles", "tile_starts"]

Maps = npt.NDArray[np.float32]


def tile_starts(length: int, *, tile: int, overlap: int) -> tuple[int, ...]:
    """Places tiles along a side of `length` pixels: as few as possible, evenly spread.

    Neighbors share at least `overlap` pixels, fewer than the `tile` has. Returns the first pixel of each tile; the last
    one ends with the side.
    """
    if length <= tile:
        return (0,)
    steps = -(-(length - tile) // (tile - overlap))
    return tuple((length - tile) * step // steps for step in range(steps + 1))


def fading_weights(length: int, starts: Sequence[int], *, tile: int) -> list[Maps]:
    """Computes the weights of the tiles along a side of `length` pixels; they sum to 1 at each pixel.

    `starts` has the first pixel of each tile, ascending; neighbors may overlap by any part of a tile.

    Returns:
        Per tile (min(tile, length),) float32: 1 where no other tile is, falling linearly toward its ends elsewhere.
    """
    size = min(tile, length)
    weights = []
    for place, start in enumerate(starts):
        before = starts[place - 1] + size - start if place else 0  # pixels shared with the neighbors
        after = start + size - starts[place + 1] if place + 1 < len(starts) else 0
        rise, fall = np.arange(1, size + 1) / (before + 1), np.arange(size, 0, -1) / (after + 1)
        weights.append(np.minimum(np.minimum(rise, fall), 1))
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    return [
        (weight / total[start : start + size]).astype(np.float32) for start, weight in zip(starts, weights, strict=True)
    ]


def predict_tiles(
    image: npt.NDArray[np.uint8],
    predict: Callable[[npt.NDArray[np.uint8]], Maps],
    *,
    num_classes: int,
    tile: int,
    overlap: int,
) -> npt.NDArray[np.uint8]:
    """Predicts an image tile by tile.

    Args:
        image: (H, W, 3) uint8.
        predict: returns (K, h, w) probabilities of an (h, w, 3) tile.
        num_classes: K with the background.
        tile: side of a tile, pixels.
        overlap: smallest number of pixels that neighbors share, at most half a tile.

    Returns:
        (H, W) uint8 class ids.
    """
    height, width = image.shape[:2]
    if width > height:  # the band lies along the shorter side, or a long strip would take more than any other image
        turned = predict_tiles(
            image.transpose(1, 0, 2),
            lambda part: predict(part.transpose(1, 0, 2)).transpose(0, 2, 1),
            num_classes=num_classes,
            tile=tile,
            overlap=overlap,
        )
        return np.ascontiguousarray(turned.T)
    rows, columns = (tile_starts(side, tile=tile, overlap=overlap) for side in (height, width))
    row_weights, column_weights = (
        fading_weights(side, starts, tile=tile) for side, starts in ((height, rows), (width, columns))
    )
    size = min(tile, height)
    mask = np.empty((height, width), dtype=np.uint8)
    band = np.zeros((num_classes, size, width), dtype=np.float32)
    for place, top in enumerate(rows):
        for left, weight in zip(columns, column_weights, strict=True):
            part = image[top : top + size, left : left + len(weight)]
            band[:, :, left : left + len(weight)] += predict(part) * (row_weights[place][:, None] * weight)
        done = (rows[place + 1] if place + 1 < len(rows) else height) - top
        mask[top : top + done] = _choose(band[:, :done])
        for maps in band:  # one by one, because the copy takes memory
            maps[: size - done] = maps[done:].copy()
            maps[size - done :] = 0
    return mask


def _choose(maps: Maps) -> npt.NDArray[np.uint8]:
    """Returns the most probable class, row by row: one arg max over all would need eight bytes a pixel."""
    chosen = np.empty(maps.shape[1:], dtype=np.uint8)
    for row in range(maps.shape[1]):
        chosen[row] = maps[:, row].argmax(axis=0)
    return chosen
