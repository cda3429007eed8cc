"""labelme's files: areas, labels, what is left out, names of images, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.annotations import AnnotationExport, rasterize, read_annotations
from slrnet.data.manifest import DataError

IDS = {"cat": 1, "dog": 2}


def shape(label: str, points: Any, kind: str | None = "polygon", **others: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **others}


def write(path: Path, *shapes: dict[str, Any], **entries: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "version": "5.5.0",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": "a.jpg",
        "imageData": None,
    }
    path.write_text(json.dumps({**content, "imageHeight": 8, "imageWidth": 10, **entries}), encoding="utf-8")
    return path


def read(folder: Path) -> AnnotationExport:
    export = read_annotations(folder)
    assert export.tool == "labelme"
    return export


def test_areas(tmp_path: Path) -> None:
    """Two boxes, one as a polygon without type as old versions wrote it, a circle and a mask, in this order."""
    buffer = io.BytesIO()
    Image.fromarray(np.array([[255, 0], [255, 255]], dtype=np.uint8)).save(buffer, "PNG")
    write(
        tmp_path / "a.json",
        shape("cat", [[0, 0], [4, 0], [4, 8], [0, 8]], None),
        shape("dog", [[10, 3], [2, 0]], "rectangle"),
        shape("cat", [[8, 6], [8, 8]], "circle"),
        shape("dog", [[0, 6], [1, 7]], "mask", mask=base64.b64encode(buffer.getvalue()).decode()),
        shape("cat", [[2, 4], [4, 4], [4, 5], [2, 5]], "oriented_rectangle"),
    )
    export = read(tmp_path)
    assert export.class_names == ("cat", "dog")
    (image,) = export.images
    assert image.size == (10, 8)
    assert image.labels is None
    mask = rasterize(image, IDS, (10, 8))
    assert mask[0].tolist() == [1, 1, 2, 2, 2, 2, 2, 2, 2, 2]
    assert mask[4].tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    assert mask[6].tolist() == [2, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert mask[7].tolist() == [2, 2, 1, 1, 0, 0, 0, 1, 1, 0]


def test_flags_are_image_labels_and_lines_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.json", flags={"cat": True, "dog": False})
    write(
        tmp_path / "b.json",
        shape("cat", [[1, 1]], "point"),
        shape("cat", [[1, 1], [2, 2]], "line"),
        shape("cat", [[1, 1], [2, 2], [3, 3]], "linestrip"),
        imagePath="b.jpg",
    )
    export = read(tmp_path)
    assert export.class_names == ("cat",)
    assert [image.labels for image in export.images] == [("cat",), None]
    assert export.left_out == {
        "points": ["b.json, shape 1"],
        "lines": ["b.json, shape 2"],
        "line strips": ["b.json, shape 3"],
    }


def test_reserved_labels_are_no_classes(tmp_path: Path) -> None:
    areas = [("cat", 0), ("_background_", 2), ("__ignore__", 4), ("Void", 6)]
    write(tmp_path / "a.json", *(shape(label, [[x, 0], [10, 8]], "rectangle") for label, x in areas))
    export = read(tmp_path)
    assert export.class_names == ("cat",)
    assert rasterize(export.images[0], IDS, (10, 8))[0].tolist() == [1, 1, 0, 0, *[255] * 6]


@pytest.mark.parametrize(
    ("path", "expected"), [("a.jpg", "j/a.jpg"), ("..\\images\\a b.jpg", "images/a b.jpg"), ("../i/ä.png", "i/ä.png")]
)
def test_images_lie_relative_to_the_file(tmp_path: Path, path: str, expected: str) -> None:
    write(tmp_path / "j" / "a.json", imagePath=path)
    assert read(tmp_path / "j").images[0].paths[0] == (tmp_path / expected).as_posix()


def test_embedded_pixels_are_ignored_and_other_json_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.json", imageData="A" * 100_000)
    (tmp_path / "config.json").write_text('{"flags": {}}')
    write(tmp_path / ".ipynb_checkpoints" / "a.json")
    export = read(tmp_path)
    assert len(export.images) == 1
    assert export.left_out == {"JSON files that are not of labelme": [str(tmp_path / "config.json")]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "a.json")
    text = json.dumps(json.loads(path.read_text()) | {"imagePath": "käse.jpg"}, ensure_ascii=False)
    path.write_text(text, encoding=encoding)
    assert read(tmp_path).images[0].paths[1] == "käse.jpg"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (shape("cat", [[0, 0], [4, 4]]), "shape 2 .*2 point"),
        (shape("cat", [[0, 0], [4, 4], [float("nan"), 1]]), "shape 2 .*no finite number"),
        (shape("cat", [[0, 0], [4, 4], [1e7, 1]]), "shape 2 .*far beyond the image"),
        (shape("cat", [[0, 0], [4, 4], ["a", 1]]), "shape 2 has points that are not pairs"),
        (shape("cat", [[0, 0], [4, 4]], "star"), "shape 2 is a star of 2 points; known are"),
        (shape("cat", [[0, 0]], "circle"), "shape 2 is a circle of 1 points"),
        (shape("cat", [[3, 3], [3, 3]], "circle"), "shape 2 has the radii 0 and 0"),
        (shape("", [[0, 0], [4, 4]], "rectangle"), "shape 2 has the label ''"),
        (shape("a\nb", [[0, 0], [4, 4]], "rectangle"), "shape 2 has the label"),
        ({"label": "cat"}, "shape 2 lacks 'points'"),
        (shape("cat", [[0, 0], [1, 1]], "mask"), "shape 2 lacks 'mask'"),
        (shape("cat", [[0, 0], [1, 1]], "mask", mask=5), "shape 2 .*bitmap that cannot be read"),
        ("text", "shape 2 "),
    ],
)
def test_broken_shapes_are_refused_with_file_and_number(tmp_path: Path, entry: Any, words: str) -> None:
    path = write(tmp_path / "a.json", shape("cat", [[0, 0], [4, 8]], "rectangle"), entry)
    with pytest.raises(DataError, match=rf"{path}, image .*a.jpg': {words}"):
        rasterize(read(tmp_path).images[0], IDS, (10, 8))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"imageHeight": 10, "imageWidth": 8}, "says 8x10 pixels, the image has 10x8 upright, its sides swapped"),
        ({"imageHeight": 80}, "says 10x80 pixels, the image has 10x8 upright; take both"),
        ({"imageHeight": 0}, "10x0 pixels, which is no size"),
        ({"imageHeight": "tall"}, "no size"),
        ({"shapes": 5}, "int"),
    ],
)
def test_sizes_that_contradict_the_image_are_refused(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    write(tmp_path / "a.json", **entries)
    with pytest.raises(DataError, match=words):
        rasterize(read(tmp_path).images[0], IDS, (10, 8))


def test_a_size_that_is_not_stated_is_not_compared(tmp_path: Path) -> None:
    write(tmp_path / "a.json", imageHeight=None, imageWidth=None)
    assert not rasterize(read(tmp_path).images[0], IDS, (10, 8)).any()


def test_a_broken_file_is_a_problem_of_its_image(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    path = tmp_path / "b.json"
    path.write_text('{"shapes": [')
    image = read(tmp_path).images[1]
    assert Path(image.paths[0]) == tmp_path / "b"
    with pytest.raises(DataError, match=f"{path} is not JSON"):
        rasterize(image, IDS, (10, 8))


def test_a_folder_without_labelme_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="holds no JSON file of labelme"):
        read_annotations(tmp_path, "labelme")
