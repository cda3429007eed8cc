"""Label Studio's JSON: areas, choices, names of images, which annotation counts, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.annotations import AnnotationExport, rasterize, read_annotations
from slrnet.data.manifest import DataError

IDS = {"cat": 1, "dog": 2}
UPLOAD = "/data/upload/1/0a1b2c3d-a.jpg"


def pack(values: npt.NDArray[np.uint8]) -> list[int]:
    """Numbers as @thi.ng/rle-pack packs them: runs of equal numbers, and single ones in a run of their own."""
    sizes = (3, 4, 8, 16)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    for value, run in groupby(values.tolist()):
        length = len(list(run))
        while length > 0:
            place = next(place for place, size in enumerate(sizes) if min(length, 1 << 16) <= 1 << size)
            part = min(length, 1 << sizes[place])
            repeats = part > 1
            bits += f"{int(repeats)}{place:02b}{part - 1:0{sizes[place]}b}{value:08b}"
            length -= part
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


def brush(mask: npt.NDArray[np.bool_], label: str = "cat") -> dict[str, Any]:
    alpha = mask.astype(np.uint8) * 255
    rgba = np.stack([np.full_like(alpha, 120), np.full_like(alpha, 3), np.zeros_like(alpha), alpha], axis=2)
    size = (mask.shape[1], mask.shape[0])
    return result("brush", label, size=size, format="rle", rle=pack(rgba.ravel()))


def result(kind: str, label: str | None, *, size: tuple[int, int] = (10, 8), **value: Any) -> dict[str, Any]:
    labels = {} if label is None else {f"{kind}labels": [label]}
    return {
        "id": f"{kind}{label}",
        "type": f"{kind}labels" if labels else kind,
        "original_width": size[0],
        "original_height": size[1],
        "image_rotation": 0,
        "value": {**value, **labels},
    }


def choices(*names: str, **others: Any) -> dict[str, Any]:
    return {"id": "c", "type": "choices", "value": {"choices": list(names)}, **others}


def task(*results: dict[str, Any], image: Any = UPLOAD, **others: Any) -> dict[str, Any]:
    return {"id": 7, "data": {"image": image}, "annotations": [{"id": 1, "result": list(results)}], **others}


def read(folder: Path, *tasks: Any) -> AnnotationExport:
    (folder / "export.json").write_text(json.dumps(list(tasks)))
    export = read_annotations(folder)
    assert export.tool == "label-studio"
    return export


def mask_of(folder: Path, *results: dict[str, Any], size: tuple[int, int] = (10, 8)) -> npt.NDArray[np.uint8]:
    return rasterize(read(folder, task(*results)).images[0], IDS, size)


@pytest.mark.parametrize("seed", range(3))
def test_brushes_are_read_to_the_pixel(tmp_path: Path, seed: int) -> None:
    """Long runs, short runs and single pixels."""
    generator = np.random.default_rng(seed)
    mask = generator.random((60, 90)) < (0.5, 0.02, 0.98)[seed]
    mask[20:40, 10:70] = True
    assert np.array_equal(mask_of(tmp_path, brush(mask), size=(90, 60)), mask)


def test_runs_of_several_numbers_that_differ(tmp_path: Path) -> None:
    """The packer of Label Studio itself also writes runs of numbers as they are; here by hand: 4 and 12 numbers."""
    header = f"{16:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    first = "0" + "00" + f"{3:03b}" + "".join(f"{value:08b}" for value in (9, 9, 9, 255))
    second = "1" + "01" + f"{11:04b}" + f"{0:08b}"
    bits = header + first + second
    bits += "0" * (-len(bits) % 8)
    packed = [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]
    mask = mask_of(tmp_path, result("brush", "cat", size=(2, 2), rle=packed), size=(2, 2))
    assert mask.tolist() == [[1, 0], [0, 0]]


def test_other_areas_are_in_percent(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    bits = np.zeros((8, 10, 4), dtype=np.uint8)
    bits[7, 9] = 255
    Image.fromarray(bits).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    mask = mask_of(
        tmp_path,
        result("polygon", "cat", points=[[0, 0], [40, 0], [40, 100], [0, 100]], closed=True),
        result("rectangle", "dog", x=60, y=0, width=40, height=25, rotation=0),
        result("rectangle", "dog", x=60, y=50, width=20, height=40, rotation=90),
        result("bitmask", "dog", imageDataURL=url),
    )
    assert mask[0].tolist() == [1, 1, 1, 1, 0, 0, 2, 2, 2, 2]
    assert mask[4].tolist() == [1, 1, 1, 2, 2, 2, 0, 0, 0, 0]
    assert mask[7].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 2]


def test_ellipses_turn_about_their_center(tmp_path: Path) -> None:
    mask = mask_of(tmp_path, result("ellipse", "cat", x=50, y=50, radiusX=40, radiusY=25, rotation=90))
    assert mask.any(axis=1).tolist() == [True] * 8
    assert np.flatnonzero(mask.any(axis=0)).tolist() == [3, 4, 5, 6]


def test_labels_may_be_a_result_of_their_own(tmp_path: Path) -> None:
    shape = result("rectangle", None, x=0, y=0, width=100, height=100)
    labels = {**shape, "type": "labels", "value": {**shape["value"], "labels": ["dog"]}}
    assert (mask_of(tmp_path, shape, labels) == 2).all()


def test_choices_are_image_labels_and_the_rest_is_left_out(tmp_path: Path) -> None:
    box = result("rectangle", "cat", x=0, y=0, width=50, height=100)
    unlabeled = result("ellipse", None, x=50, y=50, radiusX=5, radiusY=5)
    export = read(
        tmp_path,
        task(box, choices("dog", "cat"), choices("blurred", id=box["id"])),
        task(unlabeled, result("keypoint", "cat", x=1, y=1), {"type": "relation", "from_id": "a"}),
        task(result("polygon", "dog", points=[[0, 0], [9, 9], [0, 9]], closed=False)),
        task(choices("dry")),
    )
    assert export.class_names == ("cat",)
    assert [image.labels for image in export.images] == [("dog", "cat"), None, None, ("dry",)]
    place = "export.json, task 7, shape"
    assert export.left_out == {
        "choices of single shapes": [f"{place} 3"],
        "shapes without a label": [f"{place} 1"],
        "key points": [f"{place} 2"],
        "polygons that are not closed": [f"{place} 1"],
    }
    assert read(tmp_path, task(choices("wet")), task(choices("dry"))).class_names == ("dry", "wet")


def test_which_annotation_counts(tmp_path: Path) -> None:
    def annotated(label: str, updated: str, **others: Any) -> dict[str, Any]:
        shape = result("rectangle", label, x=0, y=0, width=100, height=100)
        return {"result": [shape], "updated_at": f"2024-05-0{updated}T10:00:00Z", **others}

    export = read(
        tmp_path,
        task(annotations=[annotated("cat", "2"), annotated("dog", "1"), annotated("dog", "3", was_cancelled=True)]),
        task(annotations=[annotated("cat", "1", ground_truth=True), annotated("dog", "2")]),
        task(annotations=[annotated("cat", "3", was_cancelled=True)]),
        task(annotations=[], predictions=[annotated("cat", "1")]),
        task(),
    )
    masks = [rasterize(image, IDS, (10, 8)) for image in export.images]
    assert [int(mask.max()) for mask in masks] == [1, 1, 0, 0, 0]
    assert [image.annotated for image in export.images] == [True, True, False, False, True]
    assert {kind: len(places) for kind, places in export.left_out.items()} == {
        "skipped annotations": 2,
        "further annotations of an image": 2,
        "predictions": 1,
    }


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"image": UPLOAD}, ["/data/upload/1/0a1b2c3d-a.jpg", "/data/upload/1/a.jpg"]),
        ({"image": "/data/local-files/?d=photos/a%20b.jpg"}, ["photos/a b.jpg"]),
        ({"image": "/data/local-files/?d=photos%5Ca.jpg"}, ["photos/a.jpg"]),
        ({"image": "s3://bucket/deep/%C3%A4.jpg"}, ["/deep/ä.jpg"]),
        ({"image": "https://host:8080/x/a.jpg?token=1"}, ["/x/a.jpg"]),
        ({"text": "A cat.", "photo": "x/a.jpg"}, ["x/a.jpg"]),
        ({"name": "first", "file": "b.png"}, ["b.png"]),
    ],
)
def test_names_of_images(tmp_path: Path, data: dict[str, Any], expected: list[str]) -> None:
    (image,) = read(tmp_path, task(data=data)).images
    assert list(image.paths[: len(expected)]) == expected


BOX: dict[str, Any] = {"x": 0, "y": 0, "width": 50, "height": 50}
TWO_LABELS = result("rectangle", None, rectanglelabels=["cat", "dog"], **BOX) | {"type": "rectanglelabels"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (task(result("brush", "cat", rle=pack(np.zeros(40, dtype=np.uint8)))), "shape 1 .*40 numbers; its image has"),
        (task(result("brush", "cat", rle=pack(np.arange(320).astype(np.uint8))[:-40])), "shape 1 .*end too early"),
        (task(result("brush", "cat", rle=[1, 300])), "shape 1 .*end too early"),
        (task(result("brush", "cat")), "shape 1 .*end too early"),
        (task(result("polygon", "cat", points=[[0, 0], [9, 9]])), "shape 1 .*enclose no area"),
        (task(result("polygon", "cat", points=[[0, 0], [9, 9], [9000, 1]])), "shape 1 .*far beyond"),
        (task(result("polygon", "cat", points=[[0, 0], [9, 9], [float("nan"), 1]])), "shape 1 .*no finite number"),
        (task(result("rectangle", "cat", x=1, y=2)), "shape 1 lacks 'width'"),
        (task({**result("rectangle", "cat", **BOX), "image_rotation": 90}), "shape 1 .*turned by 90 degrees"),
        (task(TWO_LABELS), "shape 1 has the labels .*; give each shape one"),
        (task(result("rectangle", "cat", **BOX), result("ellipse", "cat", size=(20, 8))), "different sizes"),
        (task({"type": "rectanglelabels", "value": {**BOX, "rectanglelabels": ["cat"]}}), "lacks original_width"),
        (task(result("rectangle", "cat", size=(8, 10), **BOX)), "says 8x10 pixels, .* sides swapped"),
        (task({"value": {}}), "lacks 'type'"),
        (task(data={"image": 5}), "name no image"),
    ],
)
def test_broken_tasks_are_refused_with_file_and_number(tmp_path: Path, entry: Any, words: str) -> None:
    (image,) = read(tmp_path, entry).images
    with pytest.raises(DataError, match=rf"{tmp_path}/export.json, image '.*': .*{words}"):
        rasterize(image, IDS, (10, 8))


@pytest.mark.parametrize("content", ['[{"image": "a.jpg", "label": []}]', "[5]", "[]", "[{"])
def test_other_exports_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match="`JSON`|is not JSON"):
        read_annotations(tmp_path)
