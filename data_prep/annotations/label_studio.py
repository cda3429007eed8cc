"""Label Studio: the export `JSON`, a list of tasks with their annotations.

Brushes, bit masks, polygons, rectangles and ellipses are areas, in percent of the image where they are not pixels; key
points, vectors and unlabeled shapes are left out. Choices are image labels. Shapes are drawn in the order of the file.
An image whose tasks nobody has submitted is not annotated. Where several people have annotated an image, the annotation
marked as ground truth counts, else the one that was last updated; the others are left out, as predictions are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import numpy.typing as npt

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
from data_prep.annotations.shapes import Bitmap, Bits, Box, Points, Polygons, Shape, box, ellipse, points_of, turned
from slrnet.data.manifest import DataError

__all__ = ["read_label_studio"]

AREAS = ("brush", "bitmask", "polygon", "rectangle", "ellipse")
IMAGE_KEYS = ("image", "img", "picture", "photo")
"""Names of the entry of a task's data that holds the image, where several could."""
UPLOAD = re.compile(r"[0-9a-f]{8}-(.+)")
"""Label Studio's own name of a file that was uploaded."""


def read_label_studio(path: Path) -> AnnotationExport:
    """Reads an exported JSON file, or all JSON files of a folder and the folders in it.

    Raises:
        DataError: there is no such file, or one cannot be read or is of another form.
    """
    missing = f"--annotations {path} holds no tasks of Label Studio; export them again as `JSON`"
    return read_files("label-studio", find_files(path, ".json"), _read_file, missing=missing)


def _read_file(file: Path, left_out: LeftOut) -> tuple[Iterable[str], Iterable[ImageAnnotation]]:
    content = read_json(file, "Label Studio export", hook=_packed)
    if not _is_export(content):
        raise DataError(f"{file} is no export `JSON` of Label Studio; export it again as `JSON`, not as `JSON-MIN`")
    return (), [_image(file, task, place, left_out) for place, task in enumerate(content, start=1)]


def _is_export(content: Any) -> bool:
    """Whether the value in a JSON file has the form of Label Studio's `JSON`."""
    return isinstance(content, list) and all(
        isinstance(task, Mapping) and isinstance(task.get("data"), Mapping) for task in content
    )


def _packed(entry: dict[str, Any]) -> dict[str, Any]:
    """With the bytes of a brush as bytes: a list of numbers takes eight times as much memory."""
    if "rle" in entry:
        try:
            entry["rle"] = bytes(entry["rle"] if isinstance(entry["rle"], list) else ())
        except (TypeError, ValueError):
            entry["rle"] = b""  # too short for any image
    return entry


def _image(file: Path, task: Mapping[str, Any], place: int, left_out: LeftOut) -> ImageAnnotation:
    name = f"task {task.get('id', place)}"
    paths: tuple[str, ...] = (name,)
    problem = None
    reader, parts = ShapeReader(f"{file.name}, {name}", left_out), _Parts([])
    annotation = None
    try:
        paths = tuple(_image_paths(task["data"]))
        annotation = _annotation(task, f"{file.name}, {name}", left_out)
        parts = _Parts(annotation["result"] if annotation else [])
        reader.read(parts.results, parts.shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return ImageAnnotation(
        file=file,
        paths=paths,
        size=parts.size,
        shapes=tuple(reader.shapes),
        labels=parts.choices,
        annotated=annotation is not None,
        problem=problem or reader.problem,
    )


def _annotation(task: Mapping[str, Any], place: str, left_out: LeftOut) -> Mapping[str, Any] | None:
    """The annotation of a task that counts; None where there is none."""
    if task.get("predictions"):
        left_out.add("predictions", place)
    submitted = []
    for annotation in task.get("annotations") or task.get("completions") or ():
        if annotation.get("was_cancelled"):
            left_out.add("skipped annotations", place)
        else:
            submitted.append(annotation)
    submitted.sort(key=lambda entry: (bool(entry.get("ground_truth")), str(entry.get("updated_at"))))
    for _ in submitted[:-1]:
        left_out.add("further annotations of an image", place)
    return submitted[-1] if submitted else None


def _image_paths(data: Mapping[str, Any]) -> Iterator[str]:
    """Where the image of a task may be found, the likeliest first."""
    texts = {key: value for key, value in data.items() if isinstance(value, str) and "." in value}
    url = next((texts[key] for key in IMAGE_KEYS if key in texts), next(iter(texts.values()), None))
    if url is None:
        raise ValueError(f"the task's data {str(dict(data))[:80]} name no image")
    parts = urlsplit(url)
    path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0].replace("\\", "/")
    folder, _, name = path.rpartition("/")
    yield path
    if upload := UPLOAD.fullmatch(name):
        yield f"{folder}/{upload.group(1)}"
    yield url.replace("\\", "/")


class _Parts:
    """The results of an annotation: shapes, labels of shapes, choices."""

    def __init__(self, results: Iterable[Mapping[str, Any]]) -> None:
        self.results = [result for result in results if result.get("type") != "relation"]
        self.labels_of = {
            result.get("id"): result["value"].get("labels") for result in self.results if result["type"] == "labels"
        }
        self.shapes = {result.get("id") for result in self.results if _kind(result) in AREAS}
        choices = [
            choice
            for result in self.results
            if result["type"] == "choices" and result.get("id") not in self.shapes
            for choice in result["value"]["choices"]
        ]
        self.choices = tuple(dict.fromkeys(label_of(choice) for choice in choices)) or None
        sizes = {size_of(result.get("original_width"), result.get("original_height")) for result in self.results}
        stated = sorted(size for size in sizes if size is not None)
        if len(stated) > 1:
            raise ValueError(f"its shapes are of images of different sizes {stated}")
        self.size = stated[0] if stated else None

    def shape(self, result: Mapping[str, Any], number: int) -> Shape | str | None:
        """Parses a result."""
        kind, value = _kind(result), result["value"]
        if kind == "choices" and result.get("id") in self.shapes:
            return "choices of single shapes"
        if kind in ("choices", ""):
            return None
        if kind not in AREAS:
            return {"keypoint": "key points", "textarea": "texts"}.get(kind, f"results of the type {result['type']}")
        labels = value.get(f"{kind}labels") or value.get("labels") or self.labels_of.get(result.get("id"))
        if not labels:
            return "shapes without a label"
        if len(labels) > 1:
            raise ValueError(f"has the labels {labels}; give each shape one")
        if result.get("image_rotation"):
            raise ValueError(f"lies on an image that is turned by {result['image_rotation']} degrees in the tool")
        if self.size is None:
            raise ValueError("lacks original_width and original_height")
        common: dict[str, Any] = {"label": label_of(labels[0]), "number": number}
        if kind == "brush":
            return _Brush(**common, rle=value.get("rle", b""))
        if kind == "bitmask":
            return Bitmap(**common, column=0, row=0, png=value["imageDataURL"].partition("base64,")[2])
        if value.get("closed") is False:
            return "polygons that are not closed"
        form = Box if kind == "rectangle" else Polygons
        return form(**common, outlines=(_outline(kind, value, self.size),))


def _kind(result: Mapping[str, Any]) -> str:
    """`brush` of the types `brush` and `brushlabels`, and so on; empty of labels alone."""
    return str(result["type"]).lower().removesuffix("labels")


def _outline(kind: str, value: Mapping[str, Any], size: tuple[int, int]) -> Points:
    """A shape in pixels; a rectangle turns about its corner, an ellipse about its center."""
    scale_x, scale_y = size[0] / 100, size[1] / 100
    if kind == "polygon":
        return points_of(value["points"]) * (scale_x, scale_y)
    x, y, degrees = float(value["x"]) * scale_x, float(value["y"]) * scale_y, float(value.get("rotation") or 0)
    if kind == "ellipse":
        return ellipse(x, y, float(value["radiusX"]) * scale_x, float(value["radiusY"]) * scale_y, degrees=degrees)
    right, bottom = x + float(value["width"]) * scale_x, y + float(value["height"]) * scale_y
    return turned(box(x, y, right, bottom), (x, y), degrees)


@dataclass(frozen=True, kw_only=True)
class _Brush(Shape):
    """Pixels of a brush: red, green, blue and alpha of the whole image, packed by @thi.ng/rle-pack."""

    rle: bytes

    def cover(self, size: tuple[int, int]) -> tuple[int, int, Bits]:
        alpha = _unpacked(self.rle, 4 * size[0] * size[1]).reshape(size[1], size[0], 4)[..., 3]
        return 0, 0, alpha > 0


def _unpacked(data: bytes, count: int) -> npt.NDArray[np.uint8]:
    """The numbers of a packed list: 32 bits of how many, 5 of the size of one, four sizes of run lengths, then runs.

    Raises:
        ValueError: they are not `count` numbers.
    """
    bits = (np.unpackbits(np.frombuffer(data, dtype=np.uint8)) + ord("0")).tobytes()
    position = 0

    def take(size: int) -> int:
        nonlocal position
        position += size
        if position > len(bits):
            raise ValueError("has a brush whose run lengths end too early")
        return int(bits[position - size : position], 2)

    if (stated := take(32)) != count:
        raise ValueError(f"has a brush of {stated} numbers; its image has {count}")
    word = take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    values = np.zeros(count, dtype=np.uint8)
    done = 0
    while done < count:
        repeats, length = take(1), take(lengths[take(2)]) + 1
        if repeats:
            values[done : done + length] = min(take(word), 255)
        else:
            some = [min(take(word), 255) for _ in range(min(length, count - done))]
            values[done : done + length] = some
        done += length
    return values
