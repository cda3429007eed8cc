"""Shapes that annotation tools draw, and the pixels that they cover.

Coordinates are pixels from the top left corner of the upright image: the pixel of column x and row y is the square from
(x, y) to (x + 1, y + 1). A polygon covers the pixels whose centers it holds, by pycocotools as for COCO; boxes and
ellipses become polygons. Where a polygon crosses itself, the even-odd rule counts. What lies beyond the image is cut
off; a shape that reaches further than the image's own width or height beyond an edge is refused, as its coordinates
must be those of another image or in another unit.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slrnet.data.images import open_image

__all__ = ["Bitmap", "Bits", "Box", "Points", "Polygons", "RunLengths", "Shape", "box", "draw", "ellipse", "points_of"]

Points = npt.NDArray[np.float64]
"""(P, 2) x and y of the corners of a polygon, pixels."""
Bits = npt.NDArray[np.bool_]
Size = tuple[int, int]
"""Width and height, pixels."""

ELLIPSE_CORNERS = 180
FAR = 1 << 40
"""Pixels that no image has; greater numbers may not even be floats."""
LONGEST_PNG = 1 << 26
"""Bytes that a compressed bitmap may unpack to."""


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """Part of an image that a tool gives a label. Picklable."""

    label: str
    """Name of its class."""
    number: int
    """Its place among the shapes of its image in the file, from 1; messages name it."""

    @abstractmethod
    def cover(self, size: Size) -> tuple[int, int, Bits]:
        """The pixels that the shape covers in an image of `size`.

        Returns:
            Column and row of the first pixel, which may lie outside the image, and (h, w) bool from there.

        Raises:
            ValueError: the shape has no area, or is no shape of such an image.
        """


@dataclass(frozen=True, kw_only=True)
class Polygons(Shape):
    """All that lies in one of the `outlines` and in none of the `holes`."""

    outlines: tuple[Points, ...]
    holes: tuple[Points, ...] = ()

    def cover(self, size: Size) -> tuple[int, int, Bits]:
        for ring in (*self.outlines, *self.holes):
            _check_ring(ring, size)
        corners = np.concatenate(self.outlines)
        left, top = np.floor(corners.min(axis=0)).clip(0, size).astype(int).tolist()
        right, bottom = np.ceil(corners.max(axis=0)).clip(0, size).astype(int).tolist()
        if left >= right or top >= bottom:  # all of it lies beyond the image
            return 0, 0, np.zeros((0, 0), dtype=np.bool_)
        window = (left, top, right - left, bottom - top)
        return left, top, _filled(self.outlines, window) & ~_filled(self.holes, window)


@dataclass(frozen=True, kw_only=True)
class Box(Polygons):
    """A rectangle, upright or turned: it may hold more than the object."""


@dataclass(frozen=True, kw_only=True)
class Bitmap(Shape):
    """A PNG image, base64 and perhaps compressed by zlib, whose first pixel lies in a column and a row."""

    column: int
    row: int
    png: str

    def cover(self, size: Size) -> tuple[int, int, Bits]:
        try:
            data = base64.b64decode(str(self.png).encode(), validate=True)
            if not data.startswith(b"\x89PNG"):
                data = zlib.decompressobj().decompress(data, LONGEST_PNG)
        except (binascii.Error, zlib.error) as error:
            raise ValueError(f"has a bitmap that cannot be read: {error}") from None
        with open_image(data, name="has a bitmap that") as image:
            _check_window(self.column, self.row, image.size, size)
            return self.column, self.row, _set_pixels(image)


@dataclass(frozen=True, kw_only=True)
class RunLengths(Shape):
    """Runs of pixels within a window, row by row, that are in turn outside and inside the shape."""

    column: int
    row: int
    width: int
    height: int
    runs: npt.NDArray[np.int64]

    def cover(self, size: Size) -> tuple[int, int, Bits]:
        _check_window(self.column, self.row, (self.width, self.height), size)
        pixels = self.width * self.height
        if self.runs.min(initial=0) < 0 or self.runs.max(initial=0) > pixels or self.runs.sum() != pixels:
            raise ValueError(f"has run lengths that do not add up to its {self.width}x{self.height} pixels")
        inside = np.arange(len(self.runs)) % 2 == 1
        return self.column, self.row, np.repeat(inside, self.runs).reshape(self.height, self.width)


def draw(shapes: Sequence[Shape], ids: Mapping[str, int], size: Size) -> npt.NDArray[np.uint8]:
    """Mask of the shapes of an image, each over those before it.

    Args:
        shapes: What is drawn, in this order.
        ids: Class id by label; shapes of other labels are not drawn.
        size: Width and height of the image, pixels.

    Returns:
        (height, width) uint8 class ids, 0 where there is no shape.

    Raises:
        ValueError: a shape is no shape of such an image; the message names it.
    """
    mask = np.zeros(size[::-1], dtype=np.uint8)
    for shape in shapes:
        try:
            column, row, covered = shape.cover(size)
        except ValueError as error:
            raise ValueError(f"shape {shape.number} ({shape.label!r}) {error}") from None
        if shape.label not in ids:
            continue
        covered = covered[max(0, -row) :, max(0, -column) :]
        part = mask[max(0, row) :, max(0, column) :][: covered.shape[0], : covered.shape[1]]
        part[covered[: part.shape[0], : part.shape[1]]] = ids[shape.label]
    return mask


# Forms of polygons.


def points_of(values: Any) -> Points:
    """Points of pairs of numbers.

    Raises:
        ValueError: they are no pairs of numbers.
    """
    try:
        points = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"has points that are not pairs of numbers: {str(values)[:60]}")
    return points


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """Corners of a box, in pixels."""
    return points_of([(left, top), (right, top), (right, bottom), (left, bottom)])


def ellipse(x: float, y: float, radius_x: float, radius_y: float, *, degrees: float = 0.0) -> Points:
    """Points on an ellipse about (x, y), in pixels, turned clockwise; a polygon of as many corners as a circle looks.

    Raises:
        ValueError: a radius is not above 0.
    """
    if not (radius_x > 0 and radius_y > 0):
        raise ValueError(f"has the radii {radius_x:g} and {radius_y:g}; they must be above 0")
    angles = np.arange(ELLIPSE_CORNERS) * (2 * math.pi / ELLIPSE_CORNERS)
    # The polygon has the area of the ellipse: its corners lie a little outside.
    scale = math.sqrt(2 * math.pi / ELLIPSE_CORNERS / math.sin(2 * math.pi / ELLIPSE_CORNERS))
    around = np.stack([radius_x * np.cos(angles), radius_y * np.sin(angles)], axis=1) * scale
    center = np.array([x, y])
    return turned(around + center, (x, y), degrees)


def turned(points: Points, center: tuple[float, float], degrees: float) -> Points:
    """Points turned about a center, clockwise as seen on the screen."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    result: Points = (points - center) @ np.array([[cos, sin], [-sin, cos]]) + center
    return result


# Checks and pixels.


def _check_ring(ring: Points, size: Size) -> None:
    if not np.isfinite(ring).all():
        raise ValueError("has a coordinate that is no finite number")
    if len(ring):
        _check_reach(ring.min(axis=0).tolist(), ring.max(axis=0).tolist(), size)
    if len(ring) < 3 or np.linalg.matrix_rank(ring - ring[0]) < 2:
        raise ValueError(f"has {len(ring)} point(s) on one line, which enclose no area")


def _check_window(column: int, row: int, window: Size, size: Size) -> None:
    if min(window) < 1:
        raise ValueError(f"is {window[0]}x{window[1]} pixels; it needs one at least")
    edges = (column, row, column + window[0], row + window[1])
    left, top, right, bottom = (max(-FAR, min(edge, FAR)) for edge in edges)
    _check_reach((left, top), (right, bottom), size)


def _check_reach(least: Sequence[float], greatest: Sequence[float], size: Size) -> None:
    if any(low < -side or high > 2 * side for low, high, side in zip(least, greatest, size, strict=True)):
        raise ValueError(
            f"reaches from ({least[0]:g}, {least[1]:g}) to ({greatest[0]:g}, {greatest[1]:g}), "
            f"far beyond the image of {size[0]}x{size[1]} pixels"
        )


def _filled(rings: Sequence[Points], window: tuple[int, int, int, int]) -> Bits:
    """(h, w) bool: the pixels of a window (column, row, w, h) that lie in any of the rings."""
    from pycocotools import mask as coco_mask  # of the extra `coco`, for masks alone

    column, row, width, height = window
    if not rings:
        return np.zeros((height, width), dtype=np.bool_)
    flat = [(ring - (column, row)).ravel().tolist() for ring in rings]
    filled: Bits = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width))).astype(np.bool_)
    return filled


def _set_pixels(image: Image.Image) -> Bits:
    """(h, w) bool: pixels that are not transparent, or of an image without transparency those that are not 0."""
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        return np.asarray(image.convert("RGBA"))[..., 3] > 0
    values = np.asarray(image)
    return np.asarray(values.reshape(*values.shape[:2], -1).any(axis=2), dtype=np.bool_)
