"""COCO's form of JSON, as Roboflow, CVAT, Label Studio and others export it.

Polygons and run lengths are areas. As in `prepare coco`, the smaller of two areas lies on top, of equal ones the one of
the larger id, crowds are void, and the labels of an image are the categories of its annotations. An image that has a
box without an area gets labels and no mask. The class names have the order of the categories' ids. The names of files
or folders state the split.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
)
from data_prep.annotations.shapes import Bits, Shape
from data_prep.coco_files import Annotations, read_annotations, read_spans
from data_prep.coco_masks import drawable, is_box_alone

__all__ = ["read_coco"]

BOXES = "boxes without an area"
INSTANCES, ROBOFLOW = "instances_", "_annotations.coco.json"


def read_coco(path: Path) -> AnnotationExport:
    """Reads an annotation file, or those of a folder and the folders in it: `instances_*.json` if there are any.

    Raises:
        DataError: there is no such file, or one cannot be read or is of another form.
    """
    files = find_files(path, ".json")
    instances = {file for file in files if file.name.startswith(INSTANCES)} or set(files)
    missing = f"--annotations {path} holds no JSON file with images; give the file, or the folder with the export"
    return read_files("coco", files, partial(_read_file, instances), missing=missing)


def _read_file(
    instances: Container[Path], file: Path, left_out: LeftOut
) -> tuple[Iterable[str], Iterable[ImageAnnotation]]:
    if file not in instances:
        left_out.add(f"JSON files that are not named {INSTANCES}*", str(file))
        return (), ()
    content = read_annotations(file)
    return _class_names(content), [_image(content, place, left_out) for place in range(len(content.images))]


def _class_names(content: Annotations) -> list[str]:
    """Names of the categories, without those that group others and have no annotations, such as Roboflow's first."""
    used = set(content.category_places.tolist())
    groups = {category.supercategory for category in content.categories}
    return [
        category.name
        for place, category in enumerate(content.categories)
        if place in used or category.name not in groups
    ]


def _image(content: Annotations, place: int, left_out: LeftOut) -> ImageAnnotation:
    image, rows = content.images[place], content.of_image(place)
    name = image.file_name.replace("\\", "/")
    names = {category.id: label_of(category.name) for category in content.categories}
    entries = read_spans(content.path, content.encoding, content.spans[rows])
    reader = ShapeReader(f"{content.path.name}, image {image.file_name!r}", left_out)
    reader.read(entries, partial(_shape, names, (image.width, image.height)))
    areas = [shape for shape in reader.shapes if isinstance(shape, _Area)]
    areas.sort(key=lambda area: (-area.pixels, area.number))
    labels = tuple(dict.fromkeys(names[entry["category_id"]] for entry in entries))
    return ImageAnnotation(
        file=content.path,
        paths=(name, f"{content.path.parent.absolute().as_posix()}/{name}"),
        size=(image.width, image.height),
        shapes=() if any(map(is_box_alone, entries)) else tuple(areas),
        labels=labels or None,
        split=SPLITS.get(_split_name(content.path)),
        problem=reader.problem,
    )


def _split_name(path: Path) -> str:
    name = path.parent.name if path.name == ROBOFLOW else path.stem.removeprefix(INSTANCES)
    return name.lower().rstrip("0123456789_-")


@dataclass(frozen=True, kw_only=True)
class _Area(Shape):
    """Packed run lengths of pycocotools, and how many pixels they cover."""

    runs: Mapping[str, Any]
    pixels: int

    def cover(self, size: tuple[int, int]) -> tuple[int, int, Bits]:
        from pycocotools import mask as coco_mask  # of the extra `coco`, for masks alone

        covered: Bits = np.asarray(coco_mask.decode(self.runs), dtype=np.bool_)
        return 0, 0, covered


def _shape(names: Mapping[Any, str], size: tuple[int, int], entry: Mapping[str, Any], number: int) -> Shape | str:
    from pycocotools import mask as coco_mask

    if is_box_alone(entry):
        return BOXES
    shape = drawable(entry, size[1], size[0])
    if not shape:
        return "polygons of less than three points"
    runs = coco_mask.frPyObjects(shape, size[1], size[0])
    runs = coco_mask.merge(runs) if isinstance(runs, list) else runs
    label = "void" if entry.get("iscrowd") else names[entry["category_id"]]
    identity = entry.get("id")
    number = identity if isinstance(identity, int) else number
    return _Area(label=label, number=number, runs=runs, pixels=int(coco_mask.area(runs)))
