"""COCO's form as tools export it: areas, order, labels, splits, what is left out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data_prep.annotations import AnnotationExport, rasterize, read_annotations
from data_prep.coco import class_mask
from slrnet.data.manifest import DataError

IDS = {"cat": 1, "dog": 2}
ROBOFLOW = [
    {"id": 0, "name": "pets", "supercategory": "none"},
    {"id": 2, "name": "dog", "supercategory": "pets"},
    {"id": 1, "name": "cat", "supercategory": "pets"},
]


def entry(category: int, segmentation: Any, image: int = 1, **others: Any) -> dict[str, Any]:
    return {"category_id": category, "segmentation": segmentation, "image_id": image, "iscrowd": 0, **others}


def write(path: Path, *annotations: dict[str, Any], names: tuple[str, ...] = ("a.jpg", "b.jpg")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": n, "file_name": name, "width": 10, "height": 8} for n, name in enumerate(names, start=1)]
    numbered = [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)]
    path.write_text(json.dumps({"images": images, "categories": ROBOFLOW, "annotations": numbered}))
    return path


def read(path: Path) -> AnnotationExport:
    export = read_annotations(path)
    assert export.tool == "coco"
    return export


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def test_the_smaller_area_lies_above_and_crowds_are_void(tmp_path: Path) -> None:
    bits = np.zeros((8, 10), dtype=np.uint8, order="F")
    bits[6:, 8:] = 1
    packed = coco_mask.encode(bits)
    annotations = [
        entry(2, [box(0, 0, 2, 2), box(3, 0, 5, 2)]),
        entry(1, [box(0, 0, 10, 4)]),
        entry(1, {"size": [8, 10], "counts": [56, 24]}, iscrowd=1),
        entry(2, {"size": [8, 10], "counts": packed["counts"].decode()}),
    ]
    path = write(tmp_path / "annotations" / "instances_default.json", *annotations)
    export = read(path)
    assert export == read(tmp_path)
    assert export.class_names == ("cat", "dog")
    image = export.images[0]
    mask = rasterize(image, IDS, (10, 8))
    assert mask[1].tolist() == [2, 2, 1, 2, 2, 1, 1, 255, 255, 255]
    assert mask[7].tolist() == [0] * 7 + [255, 2, 2]
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)]
    assert np.array_equal(mask, class_mask(numbered, 8, 10, {1: 1, 2: 2}))
    assert image.labels == ("dog", "cat")
    assert (export.images[1].shapes, export.images[1].labels) == ((), None)


def test_roboflows_folders_are_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "valid", "test")):
        write(tmp_path / name / "_annotations.coco.json", entry(1, [box(0, 0, 2, 2)]), names=(f"{number}.jpg",))
    splits = {image.paths[0]: image.split for image in read(tmp_path).images}
    assert splits == {"0.jpg": "train", "1.jpg": "val", "2.jpg": "test"}


@pytest.mark.parametrize(
    ("name", "split"),
    [("instances_Train.json", "train"), ("instances_val2017.json", "val"), ("instances_default.json", None)],
)
def test_names_of_files_are_splits(tmp_path: Path, name: str, split: str | None) -> None:
    write(tmp_path / "annotations" / name, names=("sub\\a.jpg",))
    (image,) = read(tmp_path).images
    folder = (tmp_path / "annotations").as_posix()
    assert (image.split, image.paths) == (split, ("sub/a.jpg", f"{folder}/sub/a.jpg"))


def test_boxes_alone_give_labels_and_no_mask(tmp_path: Path) -> None:
    write(
        tmp_path / "result.json",
        entry(1, [box(0, 0, 2, 2)]),
        entry(2, [], bbox=[1, 1, 3, 3]),
        entry(1, [[1, 1, 2, 2]], image=2),
    )
    export = read(tmp_path)
    assert [(image.shapes, image.labels) for image in export.images] == [((), ("cat", "dog")), ((), ("cat",))]
    assert export.left_out == {
        "boxes without an area": ["result.json, image 'a.jpg', shape 2"],
        "polygons of less than three points": ["result.json, image 'b.jpg', shape 1"],
    }


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[0, 0, 4, 4, float("nan"), 1]], "shape 1 .*far outside"),
        ([[0, 0, 4, 4, 1e7, 1]], "shape 1 .*far outside"),
        ({"size": [8, 10], "counts": [81]}, "shape 1 has run lengths for 81 pixels"),
        ({"size": [10, 8], "counts": [80]}, "shape 1 has run lengths for the size"),
        ("text", "shape 1 has the segmentation"),
    ],
)
def test_broken_areas_are_refused_with_file_image_and_number(tmp_path: Path, segmentation: Any, words: str) -> None:
    path = write(tmp_path / "result.json", entry(1, segmentation))
    with pytest.raises(DataError, match=rf"{path}, image 'a.jpg': {words}"):
        rasterize(read(tmp_path).images[0], IDS, (10, 8))


def test_files_that_are_not_of_instances_are_named(tmp_path: Path) -> None:
    write(tmp_path / "instances_val.json")
    (tmp_path / "captions_val.json").write_text('{"images": [], "annotations": []}')
    left_out = {"JSON files that are not named instances_*": [str(tmp_path / "captions_val.json")]}
    assert read(tmp_path).left_out == left_out
    (tmp_path / "instances_val.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"instances_val\.json is no file of COCO's"):
        read_annotations(tmp_path)
