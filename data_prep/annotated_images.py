"""Which annotation of a tool belongs to which image, and which of its labels is which class."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from data_prep.annotations import AnnotationExport, ImageAnnotation, rasterize, reserved_id
from data_prep.annotations.shapes import Box
from data_prep.class_names import class_by_label, folded, separator_hint
from data_prep.image_names import ImageNames
from data_prep.label_table import ImageLabels
from data_prep.shard_writer import listed
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.images import open_image, upright_size
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["AnnotatedImages", "annotation_mask", "match_annotations"]


@dataclass(frozen=True, kw_only=True)
class AnnotatedImages:
    """What an export says about the images of a folder, by their keys."""

    labels: ImageLabels
    """Labels of the images that have any as a whole, splits, and names of the classes."""
    class_ids: Mapping[str, int]
    """Class id by label of a shape, 255 where its pixels are void."""
    drawn: Mapping[str, ImageAnnotation]
    """Annotations of the images that get a mask; one without shapes is all background."""


def match_annotations(
    export: AnnotationExport,
    names: ImageNames,
    chosen: Sequence[str] | None,
    *,
    skip_unmatched: bool = False,
    other_labels_void: bool = False,
) -> AnnotatedImages:
    """Finds the image of each annotation and the class of each label; says what was understood and what is left out.

    Args:
        export: What the tool exported.
        names: The images.
        chosen: Names of the foreground classes in the order of their ids; None for those of the export.
        skip_unmatched: Whether annotations of images that are not there are left out.
        other_labels_void: Whether shapes of labels that are not among `chosen` are void, instead of refused.

    Raises:
        DataError: annotations have no image or share one, or labels are no classes.
    """
    what = f"--annotations ({export.tool})"
    _say(export, what)
    by_key = _by_key(export, names, what, skip_unmatched=skip_unmatched)
    class_names, class_of = _classes(export, chosen, what, other_labels_void=other_labels_void)
    has_shapes = any(image.shapes for image in export.images)
    drawn, labels = {}, {}
    for key, image in by_key.items():
        tags = _tags(image, class_of, has_shapes=has_shapes)
        if image.shapes or image.problem or (has_shapes and image.annotated and tags is None):
            drawn[key] = image
        if tags is not None:
            shown = (class_of.get(shape.label) for shape in image.shapes)
            labels[key] = tuple(dict.fromkeys([*tags, *(name for name in shown if name is not None)]))
    splits = {key: image.split for key, image in by_key.items() if image.split is not None}
    return AnnotatedImages(
        labels=ImageLabels(what, labels, splits or None, class_names),
        class_ids={
            label: IGNORE_INDEX if name is None else class_names.index(name) + 1 for label, name in class_of.items()
        },
        drawn=drawn,
    )


def annotation_mask(path: Path, annotation: ImageAnnotation, class_ids: Mapping[str, int]) -> npt.NDArray[np.uint8]:
    """(H, W) uint8 class ids of the upright image at `path`; raises `DataError` if the annotation is not of it."""
    with open_image(path, remedy="replace it or take it away") as image:
        size = upright_size(image)
    return rasterize(annotation, class_ids, size)


def _say(export: AnnotationExport, what: str) -> None:
    shapes = [shape for image in export.images for shape in image.shapes]
    boxes = sum(isinstance(shape, Box) for shape in shapes)
    empty = sum(image.annotated and not image.shapes and image.labels is None for image in export.images)
    parts = [f"{len(export.images)} image(s)", f"{len(shapes)} shape(s)", f"{empty} image(s) without any"]
    parts += [f"{boxes} of the shapes are boxes, which are filled"] if boxes else []
    say(f"{what}: {', '.join(parts)}")
    for kind, places in export.left_out.items():
        say(f"{what}: left out {len(places)} {kind}: {listed(places)}")


def _tags(image: ImageAnnotation, class_of: Mapping[str, str | None], *, has_shapes: bool) -> tuple[str, ...] | None:
    """Classes by the labels of an image as a whole; None if they say nothing of classes."""
    tags = image.labels or ()
    classes = tuple(dict.fromkeys(name for tag in tags if (name := class_of.get(tag)) is not None))
    stated = classes or any(reserved_id(tag) == 0 for tag in tags)
    return classes if stated or (image.annotated and not has_shapes and not image.problem) else None


# Images.


def _by_key(
    export: AnnotationExport, names: ImageNames, what: str, *, skip_unmatched: bool
) -> dict[str, ImageAnnotation]:
    valid_names = _valid_names(names.paths)
    by_key: dict[str, ImageAnnotation] = {}
    ways: dict[str, list[str]] = {}
    unknown = []
    for image in export.images:
        found = _find(image, names, valid_names)
        if found is None:
            unknown.append(image.paths[0] + (f" ({image.problem})" if image.problem else ""))
            continue
        key, way = found
        if key in by_key:
            raise DataError(
                f"{what}: {by_key[key].file}, image {by_key[key].paths[0]!r}, and {image.file}, image "
                f"{image.paths[0]!r}, are both of {names.paths[key]}; leave one of them out of what you give"
            )
        by_key[key] = image
        if way:
            ways.setdefault(way, []).append(f"{image.paths[0]} as {names.paths[key]}")
    for way, texts in ways.items():
        say(f"{what}: {len(texts)} name(s) are those of images {way}: {listed(texts)}")
    if unknown and (not skip_unmatched or not by_key):
        raise DataError(
            f"{what} has annotations of {len(unknown)} image(s) that are not below --images: {listed(unknown)}; add "
            "them, or leave their annotations out with --skip-unmatched"
        )
    if unknown:
        say(f"{what}: left out annotations of {len(unknown)} image(s) that are not there: {listed(unknown)}")
    return by_key


def _find(image: ImageAnnotation, names: ImageNames, valid_names: Mapping[str, str | None]) -> tuple[str, str] | None:
    """Key of an annotation's image and how it was found, an empty text for the path as the tool writes it."""
    paths = list(dict.fromkeys(path for text in image.paths for path in (text, unquote(text))))
    found = [hit for path in paths if (hit := names.find(path)) is not None]
    if found:
        return min(found, key=lambda hit: (hit[1] != "", hit[1] == "in another folder"))
    keys = [key for path in paths if (key := valid_names.get(_valid_name(path))) is not None]
    return (keys[0], "as uploads are named") if keys else None


def _valid_names(paths: Mapping[str, str]) -> dict[str, str | None]:
    """Keys by the name that a server gives to an upload; None where several files would get it."""
    found: dict[str, str | None] = {}
    for key, path in paths.items():
        name = _valid_name(path)
        found[name] = None if name in found else key
    return found


def _valid_name(path: str) -> str:
    """A file's name as Django keeps it, on which Label Studio and CVAT are built."""
    return re.sub(r"[^-\w.]", "", path.rpartition("/")[2].strip().replace(" ", "_"))


# Labels.


def _classes(
    export: AnnotationExport, chosen: Sequence[str] | None, what: str, *, other_labels_void: bool
) -> tuple[tuple[str, ...], dict[str, str | None]]:
    """Names of the classes, and the class of each label, None of those that become void."""
    shapes, tags = _first_places(_shape_labels(export)), _first_places(_image_labels(export))
    labels = shapes or tags
    if chosen is None:
        names = export.class_names
        _check_spellings(names, what)
        class_of: dict[str, str | None] = {name: name for name in names}
    else:
        names = tuple(chosen)
        known = {folded(name) for name in names}
        others = {label: place for label, place in labels.items() if folded(label) not in known}
        if others and not other_labels_void:
            texts = [f"{label!r} ({place})" for label, place in others.items()]
            raise DataError(
                f"{what} has {len(others)} label(s) that are no class: {listed(texts)}; the classes are "
                f"{', '.join(names)}: name these too, or make their pixels void with --other-labels-void"
                f"{separator_hint(others, names)}"
            )
        if others:
            say(f"{what}: void are the pixels of the labels {listed(list(others))}")
        spelled = {label: place for label, place in (shapes | tags).items() if folded(label) in known}
        class_of = {**dict.fromkeys(others), **class_by_label(spelled, names, what)}
    if unknown := [f"{label!r} ({place})" for label, place in tags.items() if label not in class_of]:
        say(f"{what}: left out {len(unknown)} label(s) of images that are no class: {listed(unknown)}")
    return names, class_of


def _check_spellings(names: Sequence[str], what: str) -> None:
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(folded(name), []).append(name)
    if same := [" and ".join(map(repr, spelled)) for spelled in spellings.values() if len(spelled) > 1]:
        raise DataError(f"{what} spells labels in several ways: {listed(same)}; name each class with --classes")


def _shape_labels(export: AnnotationExport) -> Iterator[tuple[str, str]]:
    return (
        (shape.label, f"{image.paths[0]}, shape {shape.number}") for image in export.images for shape in image.shapes
    )


def _image_labels(export: AnnotationExport) -> Iterator[tuple[str, str]]:
    return ((label, image.paths[0]) for image in export.images for label in image.labels or ())


def _first_places(labels: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Where each label that is not reserved stands first."""
    places: dict[str, str] = {}
    for label, place in labels:
        if reserved_id(label) is None:
            places.setdefault(label, place)
    return places
