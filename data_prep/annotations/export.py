"""What an annotation tool exported, in one form for all tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_prep.annotations.shapes import Shape, draw
from data_prep.text_files import SURROGATE, read_text
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.manifest import DataError

__all__ = [
    "AnnotationExport",
    "ImageAnnotation",
    "LeftOut",
    "ShapeReader",
    "find_files",
    "label_of",
    "ordered_names",
    "rasterize",
    "read_files",
    "read_json",
    "reserved_id",
    "size_of",
]

RESERVED = {BACKGROUND: 0, "ignore": IGNORE_INDEX, "void": IGNORE_INDEX}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
Form = TypeVar("Form", bound=Shape)


@dataclass(frozen=True, kw_only=True)
class ImageAnnotation:
    """What a tool says about one image. Picklable."""

    file: Path
    """The file that says it."""
    paths: tuple[str, ...]
    """Paths under which the image may be found, the likeliest first; as the tool writes them, with `/`."""
    size: tuple[int, int] | None
    """Width and height that the tool states, pixels; None where it states none."""
    shapes: tuple[Shape, ...] = ()
    """In the order in which they are drawn: a later one lies over those before it."""
    labels: tuple[str, ...] | None = None
    """Image labels by tags, choices or flags; None where there are none."""
    split: str | None = None
    """Split that the tool states."""
    annotated: bool = True
    """Whether someone has looked at it; an image without shapes is then background, else unlabeled."""
    problem: str | None = None
    """Why the annotation cannot be used."""


@dataclass(frozen=True, kw_only=True)
class AnnotationExport:
    """All that is read of an export."""

    tool: str
    """`labelme`, `cvat`, `label-studio`, `coco` or `supervisely`."""
    class_names: tuple[str, ...]
    """Foreground classes: those of shapes, or of image labels in an export without shapes."""
    images: tuple[ImageAnnotation, ...]
    left_out: Mapping[str, Sequence[str]]
    """What is no area and no label, by kind, such as `points`: where each stands."""


class LeftOut(dict[str, list[str]]):
    """Collects what is left out, by kind."""

    def add(self, kind: str, place: str) -> None:
        """Notes that something of a kind at a place is left out."""
        self.setdefault(kind, []).append(place)


@dataclass
class ShapeReader:
    """Reads the shapes of one image one by one, and says where a shape stands that cannot be read."""

    place: str
    """The image, for messages."""
    left_out: LeftOut
    shapes: list[Shape] = field(default_factory=list)
    problem: str | None = None
    """What is wrong with the first shape that cannot be read."""

    def read(self, entries: Iterable[Any], parse: Callable[[Any, int], Shape | str | None]) -> None:
        """Parses every entry.

        Args:
            entries: Shapes as the file has them.
            parse: From an entry and its number, from 1, to the shape, or to the kind of what is left out, or to None
                for what is read elsewhere.
        """
        for number, entry in enumerate(entries, start=1):
            try:
                shape = parse(entry, number)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                self.problem = self.problem or f"shape {number} {reason}"
                continue
            if isinstance(shape, str):
                self.left_out.add(shape, f"{self.place}, shape {number}")
            elif shape is not None:
                self.shapes.append(shape)


def rasterize(annotation: ImageAnnotation, ids: Mapping[str, int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Mask of an image's shapes.

    Args:
        annotation: Of the image.
        ids: Class id by label; shapes of other labels are not drawn. Labels that `reserved_id` knows need no entry.
        size: Width and height of the upright image, pixels.

    Returns:
        (height, width) uint8 class ids, 0 where no shape lies, 255 where void.

    Raises:
        DataError: the annotation cannot be used, or is one of an image of another size; it names file and shape.
    """
    where = f"{annotation.file}, image {annotation.paths[0]!r}"
    if annotation.problem is not None:
        raise DataError(f"{where}: {annotation.problem}; correct or remove it in the tool and export again")
    if annotation.size is not None and annotation.size != size:
        swapped = ", its sides swapped, as by a tool that does not follow EXIF data"
        raise DataError(
            f"{where}: the tool says {annotation.size[0]}x{annotation.size[1]} pixels, the image has "
            f"{size[0]}x{size[1]} upright{swapped if annotation.size == size[::-1] else ''}; take both from one export"
        )
    reserved = {shape.label: label for shape in annotation.shapes if (label := reserved_id(shape.label)) is not None}
    try:
        return draw(annotation.shapes, {**ids, **reserved}, size)
    except ValueError as error:
        raise DataError(f"{where}: {error}; correct or remove it in the tool and export again") from None


def reserved_id(label: str) -> int | None:
    """Id of a label that is no class: 0 of `background`, 255 of `void` and `ignore`, None of all others.

    Case and underscores around it make no difference, as in labelme's `_background_` and `__ignore__`.
    """
    return RESERVED.get(label.strip("_").lower())


# What the readers share.


def read_files(
    tool: str,
    files: Sequence[Path],
    read: Callable[[Path, LeftOut], tuple[Iterable[str], Iterable[ImageAnnotation]]],
    *,
    missing: str,
    stated: Sequence[str] = (),
) -> AnnotationExport:
    """Reads an export file by file.

    Args:
        tool: The tool, as `AnnotationExport` names it.
        files: The files, in order.
        read: From a file to the class names that it states and the images that it annotates; adds what it leaves out.
        missing: The error if there are no images.
        stated: Class names that the export states for all of its files.

    Raises:
        DataError: no file annotates an image, or `read` refuses one.
    """
    left_out, names, images = LeftOut(), list(stated), list[ImageAnnotation]()
    for file in files:
        names_of_file, images_of_file = read(file, left_out)
        names += names_of_file
        images += images_of_file
    if not images:
        raise DataError(missing)
    return AnnotationExport(
        tool=tool, class_names=ordered_names(images, names), images=tuple(images), left_out=left_out
    )


def read_json(path: Path, what: str, *, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value in a JSON file; numbers that are not finite pass, so that they can be named with their shape.

    Args:
        path: The file.
        what: What it should be, for messages.
        hook: Replaces each object, the inner ones first, before the outer ones are read.

    Raises:
        DataError: the file cannot be read, or is no JSON.
    """
    try:
        text = read_text(path, what)
        value = json.loads(text, object_hook=hook)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False, default=repr).encode()  # half a character is a ValueError
        return value
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the {what} {path} is not JSON: {error}; export it again") from None


def find_files(path: Path, suffix: str) -> list[Path]:
    """The file itself, or all files of a suffix in a folder and the folders in it, sorted, without hidden ones."""
    if path.is_file():
        return [path]
    found = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() == suffix and file.is_file())
    return [path / file for file in sorted(found) if not any(part.startswith((".", "@")) for part in file.parts)]


def label_of(value: Any) -> str:
    """A label without the spaces around it.

    Raises:
        ValueError: it is no text, empty, or holds characters that cannot be printed.
    """
    label = value.strip() if isinstance(value, str) else ""
    if not label or not label.isprintable():
        raise ValueError(f"has the label {value!r}; a text of printable characters is needed")
    return label


def size_of(width: Any, height: Any) -> tuple[int, int] | None:
    """A size in pixels that a file states, None where it states none.

    Raises:
        ValueError: it is no size.
    """
    if width is None and height is None:
        return None
    try:
        size = int(width), int(height)
    except (TypeError, ValueError, OverflowError):
        size = 0, 0
    if min(size) < 1:
        raise ValueError(f"the image is said to be {width!r}x{height!r} pixels, which is no size")
    return size


def ordered_names(images: Iterable[ImageAnnotation], stated: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the foreground classes: those that the tool states, in its order, then others that occur, sorted.

    An export without any shape has the image labels as classes.
    """
    images = list(images)
    used = {shape.label for image in images for shape in image.shapes}
    used = used or {label for image in images for label in image.labels or ()}
    names = [*stated, *sorted(used - set(stated))]
    return tuple(name for name in dict.fromkeys(names) if reserved_id(name) is None)
