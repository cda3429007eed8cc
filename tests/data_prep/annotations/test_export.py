"""Which tool wrote an export, class names, reserved labels, and what is no export."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.annotations import read_annotations, reserved_id
from data_prep.annotations.export import ImageAnnotation, ordered_names
from data_prep.annotations.shapes import Polygons, box
from slrnet.data.manifest import DataError

LABELME = '{"version": "5.5.0", "flags": {}, "shapes": [], "imagePath": "a.jpg", "imageData": null}'
CVAT = '<annotations><image name="a.jpg" width="10" height="8"/></annotations>'
LABEL_STUDIO = '[{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}]'
COCO = (
    '{"images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 8}], '
    '"categories": [{"id": 1, "name": "cat"}], "annotations": []}'
)
PROJECT = {
    "meta.json": '{"classes": [{"title": "cat", "shape": "polygon"}]}',
    "ds/ann/a.jpg.json": '{"size": {"width": 10, "height": 8}, "objects": []}',
}


@pytest.mark.parametrize(
    ("tool", "files"),
    [
        ("labelme", {"a.json": LABELME}),
        ("labelme", {"deep/a.json": LABELME, "config.json": "{}"}),
        ("cvat", {"annotations.xml": CVAT}),
        ("cvat", {"annotations.xml": CVAT, "note.json": '{"made": "today"}'}),
        ("label-studio", {"project-1.json": LABEL_STUDIO}),
        ("coco", {"train/_annotations.coco.json": COCO}),
        ("supervisely", PROJECT),
    ],
)
def test_the_form_of_the_files_says_which_tool_wrote_them(tmp_path: Path, tool: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    export = read_annotations(tmp_path)
    assert (export.tool, len(export.images)) == (tool, 1)
    if len(files) == 1:
        assert read_annotations(tmp_path / next(iter(files))) == export


@pytest.mark.parametrize(
    ("tool", "files", "others"),
    [
        ("labelme", {"a.json": LABELME, "a.xml": "<annotation/>"}, "XML files, which are not of labelme"),
        ("cvat", {"annotations.xml": CVAT, "note.json": '{"made": "today"}'}, "JSON files, which are not of cvat"),
    ],
)
def test_files_of_the_other_kind_are_named(tmp_path: Path, tool: str, files: dict[str, str], others: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    export = read_annotations(tmp_path)
    assert (export.tool, export.left_out) == (tool, {others: [str(tmp_path / list(files)[1])]})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("export.zip", "PK", "is an archive; unpack it"),
        ("notes.txt", "cat", "no JSON or XML file of a known form; known are labelme, "),
        ("a.json", '{"cat": 1}', "no JSON or XML file of a known form"),
        ("a.json", "", "no JSON or XML file of a known form"),
    ],
)
def test_what_is_no_export_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(DataError, match="--annotations .* is missing"):
        read_annotations(tmp_path / name)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_annotations(tmp_path / name)


def test_class_names(tmp_path: Path) -> None:
    """Stated ones first, in their order; then those that occur; image labels count where there are no shapes."""

    def image(*labels: str, tags: tuple[str, ...] = ()) -> ImageAnnotation:
        shapes = tuple(
            Polygons(label=label, number=number, outlines=(box(0, 0, 1, 1),))
            for number, label in enumerate(labels, start=1)
        )
        return ImageAnnotation(file=tmp_path, paths=("a",), size=None, shapes=shapes, labels=tags)

    images = [image("dog", "cat", "void", tags=("wet",)), image("cow")]
    assert ordered_names(images) == ("cat", "cow", "dog")
    assert ordered_names(images, ["dog", "bird", "dog"]) == ("dog", "bird", "cat", "cow")
    assert ordered_names([image(tags=("wet", "background")), image(tags=("dry",))]) == ("dry", "wet")


@pytest.mark.parametrize(
    ("label", "expected"),
    [("background", 0), ("_background_", 0), ("__ignore__", 255), ("Void", 255), ("cat", None), ("voided", None)],
)
def test_reserved_labels(label: str, expected: int | None) -> None:
    assert reserved_id(label) == expected
