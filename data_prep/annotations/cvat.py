"""CVAT for images 1.1: annotations.xml of a task or project.

Polygons, boxes, ellipses and masks are areas; polylines, points, cuboids and skeletons are left out. Tags are image
labels. Shapes are drawn by their z_order, those of one order as they follow in the file. The class names have the order
of the task's labels. Projects state the split as the image's subset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from data_prep.annotations.export import (
    SPLITS,
    AnnotationExport,
    ImageAnnotation,
    LeftOut,
    ShapeReader,
    find_files,
    label_of,
    read_files,
    size_of,
)
from data_prep.annotations.shapes import Box, Polygons, RunLengths, Shape, box, ellipse, points_of, turned
from data_prep.text_files import read_xml
from slrnet.data.manifest import DataError

__all__ = ["read_cvat"]

NO_AREAS = {"polyline": "polylines", "points": "points", "cuboid": "cuboids", "skeleton": "skeletons"}
AREAS = ("polygon", "box", "ellipse", "mask")
TYPES_WITHOUT_AREA = {*NO_AREAS, "tag"}
REMEDY = "export it again as `CVAT for images 1.1`"


def read_cvat(path: Path) -> AnnotationExport:
    """Reads annotations.xml, or all XML files of a folder and the folders in it.

    Raises:
        DataError: there is no such file, or one cannot be read or is of another form.
    """
    missing = f"--annotations {path} holds no XML file with images of CVAT; {REMEDY} and unpack it there"
    return read_files("cvat", find_files(path, ".xml"), _read_file, missing=missing)


def _read_file(file: Path, left_out: LeftOut) -> tuple[Iterable[str], Iterable[ImageAnnotation]]:
    root = read_xml(file, "CVAT annotations", remedy=REMEDY)
    if root.tag != "annotations" or root.find("track") is not None:
        what = "of a video" if root.tag == "annotations" else f"an XML file of <{root.tag}>"
        raise DataError(f"{file} is {what}, not CVAT's annotations of images; {REMEDY}")
    return _class_names(root), [_image(file, element, left_out) for element in root.iterfind("image")]


def _class_names(root: Element) -> Iterator[str]:
    """Names of the labels that areas may have, in the order of the task or project."""
    for label in root.iterfind("meta//labels/label"):
        name = (label.findtext("name") or "").strip()
        if name and label.findtext("type") not in TYPES_WITHOUT_AREA and not label.findtext("parent"):
            yield name


def _image(file: Path, element: Element, left_out: LeftOut) -> ImageAnnotation:
    name = element.get("name", "").replace("\\", "/")
    reader, problem, size = ShapeReader(f"{file.name}, image {name!r}", left_out), None, None
    areas = [child for child in element if child.tag != "tag"]
    try:
        size = size_of(element.get("width"), element.get("height"))
        order = {number: _z_order(child) for number, child in enumerate(areas, start=1)}
        reader.read(areas, _shape)
        reader.shapes.sort(key=lambda shape: order[shape.number])
    except ValueError as error:
        problem = str(error)
    tags = tuple((tag.get("label") or "").strip() for tag in element.iterfind("tag"))
    return ImageAnnotation(
        file=file,
        paths=(name, f"{element.get('subset')}/{name}") if element.get("subset") else (name,),
        size=size,
        shapes=tuple(reader.shapes),
        labels=tuple(dict.fromkeys(tag for tag in tags if tag)) or None,
        split=SPLITS.get(element.get("subset", "").lower()),
        problem=problem or reader.problem,
    )


def _z_order(element: Element) -> int:
    try:
        return int(element.get("z_order", 0))
    except ValueError:
        raise ValueError(f"a {element.tag} has the z_order {element.get('z_order')!r}, which is no number") from None


def _shape(element: Element, number: int) -> Shape | str:
    if element.tag not in AREAS:
        return NO_AREAS.get(element.tag, f"<{element.tag}> elements")
    values: Mapping[str, str] = element.attrib
    label = label_of(values.get("label"))
    if element.tag == "mask":
        column, row, width, height = (int(values[name]) for name in ("left", "top", "width", "height"))
        runs = np.array([int(run) for run in values["rle"].split(",")], dtype=np.int64)
        return RunLengths(label=label, number=number, column=column, row=row, width=width, height=height, runs=runs)
    rotation = float(values.get("rotation", 0))
    if element.tag == "polygon":
        outline = points_of([[float(x) for x in pair.split(",")] for pair in values["points"].split(";")])
    elif element.tag == "ellipse":
        outline = ellipse(*(float(values[name]) for name in ("cx", "cy", "rx", "ry")), degrees=rotation)
    else:
        left, top, right, bottom = (float(values[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
        outline = turned(box(left, top, right, bottom), ((left + right) / 2, (top + bottom) / 2), rotation)
    form = Box if element.tag == "box" else Polygons
    return form(label=label, number=number, outlines=(outline,))
