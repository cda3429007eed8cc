"""labelme: one JSON file for each image, beside it or in a folder of their own.

Polygons, rectangles, circles, oriented rectangles and masks are areas; lines, line strips and points are left out.
Flags of an image that are true are its labels. Shapes are drawn in the order of the file. Pixels that the file embeds
(`imageData`) are ignored.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.annotations.export import (
    AnnotationExport,
    ImageAnnotation,
    LeftOut,
    ShapeReader,
    find_files,
    label_of,
    read_files,
    read_json,
    size_of,
)
from data_prep.annotations.shapes import Bitmap, Box, Points, Polygons, Shape, box, ellipse, points_of
from slrnet.data.manifest import DataError

__all__ = ["read_labelme"]

NO_AREAS = {"line": "lines", "linestrip": "line strips", "point": "points", "points": "points"}


def read_labelme(path: Path) -> AnnotationExport:
    """Reads a file of labelme, or all files of a folder and the folders in it.

    Raises:
        DataError: there is no such file, or one cannot be read.
    """
    missing = f"--annotations {path} holds no JSON file of labelme; give the folder with them"
    return read_files("labelme", find_files(path, ".json"), _read_file, missing=missing)


def _read_file(file: Path, left_out: LeftOut) -> tuple[Iterable[str], Iterable[ImageAnnotation]]:
    try:
        content = read_json(file, "labelme annotation", hook=_without_pixels)
    except DataError as error:
        return (), [ImageAnnotation(file=file, paths=(str(file.with_suffix("")),), size=None, problem=str(error))]
    if _is_labelme(content):
        return (), [_image(file, content, left_out)]
    left_out.add("JSON files that are not of labelme", str(file))
    return (), ()


def _is_labelme(content: Any) -> bool:
    """Whether the value in a JSON file has the form of labelme's."""
    return isinstance(content, Mapping) and "shapes" in content and "imagePath" in content


def _without_pixels(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("imageData", None)
    return entry


def _image(file: Path, content: Mapping[str, Any], left_out: LeftOut) -> ImageAnnotation:
    name, problem, size = str(content["imagePath"]).replace("\\", "/"), None, None
    reader = ShapeReader(file.name, left_out)
    flags = content.get("flags")
    flags = flags if isinstance(flags, Mapping) else {}
    try:
        size = size_of(content.get("imageWidth"), content.get("imageHeight"))
        reader.read(content["shapes"] or (), _shape)
    except (TypeError, ValueError) as error:
        problem = str(error)
    return ImageAnnotation(
        file=file,
        paths=(posixpath.normpath(posixpath.join(file.parent.absolute().as_posix(), name)), name),
        size=size,
        shapes=tuple(reader.shapes),
        labels=tuple(str(flag) for flag, is_set in flags.items() if is_set is True) or None,
        problem=problem or reader.problem,
    )


def _shape(entry: Mapping[str, Any], number: int) -> Shape | str:
    label, kind = label_of(entry["label"]), entry.get("shape_type") or "polygon"
    if kind in NO_AREAS:
        return NO_AREAS[kind]
    points = points_of(entry["points"])
    if kind == "mask":
        column, row = points[0].round().astype(int).tolist()
        return Bitmap(label=label, number=number, column=column, row=row, png=entry["mask"])
    form = Box if kind in ("rectangle", "oriented_rectangle") else Polygons
    return form(label=label, number=number, outlines=(_outline(kind, points),))


def _outline(kind: str, points: Points) -> Points:
    if kind in ("polygon", "oriented_rectangle"):
        return points
    if kind not in ("rectangle", "circle") or len(points) != 2:
        raise ValueError(f"is a {kind} of {len(points)} points; known are polygons, and rectangles and circles of 2")
    (x, y), (other_x, other_y) = points.tolist()
    if kind == "rectangle":
        return box(x, y, other_x, other_y)
    radius = math.hypot(other_x - x, other_y - y)
    return ellipse(x, y, radius, radius)
