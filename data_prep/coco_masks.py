"""Masks of COCO's annotations: polygons and run lengths, checked before pycocotools' C code sees them.

pycocotools trusts what it gets: a polygon far outside takes memory for every pixel on the way, and run lengths that do
not fill the image exactly read or write beyond it, or leave pixels as they lay in memory. So every number is checked
here, and packed run lengths are unpacked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slrnet.data.catalog import IGNORE_INDEX

__all__ = ["class_mask", "drawable", "is_box_alone"]

LONGEST_OUTLINE = 1 << 22
"""Pixels that the outlines of one annotation may be long; pycocotools takes 80 bytes for each."""


def class_mask(
    annotations: Sequence[Mapping[str, Any]], height: int, width: int, class_of: Mapping[Any, int]
) -> npt.NDArray[np.uint8]:
    """Rasterizes an image's annotations; the docstring of `data_prep.coco` says what counts where they overlap.

    Args:
        annotations: Objects of COCO's annotation file: polygons, or run lengths as numbers or packed.
        height: Of the image, pixels.
        width: Of the image, pixels.
        class_of: Class by category id.

    Returns:
        (height, width) uint8 class ids, 255 in crowds.

    Raises:
        ValueError: an annotation cannot be drawn; see `drawable`.
    """
    from pycocotools import mask as coco_mask  # the extra is needed for masks alone

    pieces = []
    for place, annotation in enumerate(annotations):
        shape = drawable(annotation, height, width)
        if shape:
            runs = coco_mask.frPyObjects(shape, height, width)
            runs = coco_mask.merge(runs) if isinstance(runs, list) else runs
            number = annotation.get("id")
            order = (-int(coco_mask.area(runs)), number if isinstance(number, int) else 0, place)
            pieces.append((order, annotation, runs))
    mask = np.zeros((height, width), dtype=np.uint8)
    for _, annotation, runs in sorted(pieces, key=lambda piece: piece[0]):
        label = IGNORE_INDEX if annotation.get("iscrowd") else class_of[annotation["category_id"]]
        mask[coco_mask.decode(runs) > 0] = label
    return mask


def is_box_alone(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation has a box, but no polygon or run lengths: nothing says which pixels are the object's."""
    box = annotation.get("bbox")
    if annotation.get("segmentation") or not isinstance(box, list) or len(box) != 4:
        return False
    return all(type(side) in (int, float) and side > 0 for side in box[2:])


def drawable(annotation: Mapping[str, Any], height: int, width: int) -> list[list[float]] | dict[str, Any]:
    """Polygons of an annotation, or its run lengths as numbers; what is safe to give to pycocotools.

    Args:
        annotation: Object of COCO's annotation file.
        height: Of the image, pixels.
        width: Of the image, pixels.

    Returns:
        Polygons [x, y, x, y, ...] of at least three points, none where it covers nothing; or {"size", "counts"}, whose
        counts fill the image.

    Raises:
        ValueError: it is neither polygons nor run lengths of such an image; the message says why.
    """
    if annotation.get("iscrowd") not in (0, 1, None):
        raise ValueError(f"has the iscrowd {annotation['iscrowd']!r:.40}; allowed are 0 and 1")
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return {"size": [height, width], "counts": _counts(segmentation, height, width)}
    if not isinstance(segmentation, list):
        raise ValueError(f"has the segmentation {segmentation!r:.40}; polygons or run lengths are allowed")
    flat = bool(segmentation) and not isinstance(segmentation[0], list)
    polygons = [_polygon(polygon, height, width) for polygon in ([segmentation] if flat else segmentation)]
    steps = [np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0)).max(axis=1).sum() for polygon in polygons if polygon]
    if sum(steps) > LONGEST_OUTLINE:
        raise ValueError(f"has an outline of {sum(steps):.0f} pixels; allowed are {LONGEST_OUTLINE}")
    return [polygon for polygon in polygons if len(polygon) >= 6]  # pycocotools takes four numbers for a box


def _polygon(polygon: Any, height: int, width: int) -> list[float]:
    """Numbers of a polygon that reaches at most an image's size beyond the image."""
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        raise ValueError(f"has the polygon {polygon!r:.40}...; a list of numbers x, y, x, y, ... is allowed")
    if len(polygon) % 2:
        raise ValueError(f"has a polygon of {len(polygon)} numbers; pairs x, y are allowed")
    try:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    except OverflowError:
        raise ValueError("has a polygon with a number of more than 300 digits") from None
    far = ~((points >= [-width, -height]) & (points <= [2 * width, 2 * height])).all(axis=1)  # NaN is neither
    if far.any():
        x, y = points[far][0].tolist()
        raise ValueError(f"has a polygon with the point ({x:g}, {y:g}), far outside the image")
    return points.ravel().tolist()


def _counts(segmentation: Mapping[str, Any], height: int, width: int) -> list[int]:
    """Run lengths that fill an image."""
    if segmentation.get("size") != [height, width]:
        raise ValueError(f"has run lengths for the size {segmentation.get('size')!r:.40}, not [{height}, {width}]")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = _unpacked(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        raise ValueError(f"has the run lengths {counts!r:.40}; a list of whole numbers or a packed text is allowed")
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        wrong = "negative run lengths" if min(counts, default=0) < 0 else f"run lengths for {sum(counts)!r:.40} pixels"
        raise ValueError(f"has {wrong}; the image has {height * width} pixels")
    return counts


def _unpacked(packed: str) -> list[int]:
    """Run lengths of COCO's packed form.

    A character from "0" on holds five bits, the lowest come first, and whether more follow; from the fourth number on
    they are the differences to the second last one.
    """
    counts: list[int] = []
    number = shift = 0
    for character in packed:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > 35:
            raise ValueError("has damaged packed run lengths")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits & 16) << (shift - 4)  # the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("has packed run lengths that are cut off")
    return counts
