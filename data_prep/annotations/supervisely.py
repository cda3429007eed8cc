"""Supervisely: a project with meta.json and, in each data set, a folder `ann` of JSON files named as the images.

Bitmaps, polygons with their holes and rectangles are areas; points, lines, graphs and cuboids are left out. Tags of an
image are its labels. Shapes are drawn in the order of the file. The class names have the order of meta.json. A data set
or a tag named train, val or test states the split.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.annotations.export import (
    SPLITS,
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
from data_prep.annotations.shapes import Bitmap, Box, Polygons, Shape, box, points_of
from slrnet.data.manifest import DataError

__all__ = ["read_supervisely"]

AREAS = ("bitmap", "polygon", "rectangle")
KINDS = {"point": "points", "line": "lines", "graph": "graphs of key points", "cuboid": "cuboids"}


def read_supervisely(path: Path) -> AnnotationExport:
    """Reads a project: the folder that holds meta.json, or meta.json itself.

    Raises:
        DataError: it is no project, or a file cannot be read.
    """
    folder = path.parent if path.is_file() else path
    meta = read_json(folder / "meta.json", "project file of Supervisely")
    if not _is_project(meta):
        raise DataError(f"{folder / 'meta.json'} lists no classes; give the folder of a project of Supervisely")
    kind_of = {str(entry.get("title")): str(entry.get("shape")) for entry in meta["classes"]}
    return read_files(
        "supervisely",
        [file for file in find_files(folder, ".json") if file.parent.name == "ann"],
        lambda file, left_out: ((), [_image(folder, file, kind_of, left_out)]),
        missing=f"--annotations {folder} has no folder `ann` with JSON files; export images with annotations",
        stated=[name for name, kind in kind_of.items() if kind not in KINDS],
    )


def _is_project(content: Any) -> bool:
    """Whether the value in meta.json has the form of Supervisely's."""
    classes = content.get("classes") if isinstance(content, Mapping) else None
    return isinstance(classes, list) and all(isinstance(entry, Mapping) and "title" in entry for entry in classes)


def _image(folder: Path, file: Path, kind_of: Mapping[str, str], left_out: LeftOut) -> ImageAnnotation:
    dataset, name = file.parent.parent, file.name.removesuffix(".json")
    reader, problem, size, tags = ShapeReader(f"{dataset.name}/{name}", left_out), None, None, tuple[str, ...]()
    try:
        content = read_json(file, "annotation of Supervisely")
        size = size_of(content["size"]["width"], content["size"]["height"])
        tags = tuple(label_of(tag["name"] if isinstance(tag, Mapping) else tag) for tag in content.get("tags") or ())
        reader.read(content["objects"], partial(_shape, kind_of))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    within = dataset.relative_to(folder).as_posix()
    splits = [SPLITS[word.lower()] for word in (*tags, dataset.name) if word.lower() in SPLITS]
    return ImageAnnotation(
        file=file,
        paths=(f"{within}/img/{name}", f"{within}/{name}"),
        size=size,
        shapes=tuple(reader.shapes),
        labels=tuple(tag for tag in dict.fromkeys(tags) if tag.lower() not in SPLITS) or None,
        split=splits[0] if splits else None,
        problem=problem or reader.problem,
    )


def _shape(kind_of: Mapping[str, str], entry: Mapping[str, Any], number: int) -> Shape | str:
    label = label_of(entry["classTitle"])
    kind = entry.get("geometryType") or kind_of.get(label, "")
    if kind not in AREAS:
        return KINDS.get(kind, f"shapes of the type {kind!r}")
    if kind == "bitmap":
        column, row = (int(number) for number in entry["bitmap"]["origin"])
        return Bitmap(label=label, number=number, column=column, row=row, png=entry["bitmap"]["data"])
    exterior = points_of(entry["points"]["exterior"])
    if kind == "rectangle":
        (left, top), (right, bottom) = exterior.min(axis=0), exterior.max(axis=0)
        # The last column and row belong to it.
        return Box(label=label, number=number, outlines=(box(left, top, right + 1, bottom + 1),))
    holes = tuple(points_of(hole) for hole in entry["points"].get("interior") or ())
    return Polygons(label=label, number=number, outlines=(exterior,), holes=holes)
