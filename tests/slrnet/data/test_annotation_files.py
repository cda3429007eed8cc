"""Masks as COCO's and labelme's files: read again, they are the same masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_prep.annotations import rasterize, read_annotations
from slrnet.data.annotation_files import AnnotationFormat, AnnotationWriter
from slrnet.data.manifest import DataError

coco_mask = pytest.importorskip("pycocotools.mask")
pytest.importorskip("shapely")
CLASSES = ("background", "ant", "été 猫", "cat")
Mask = npt.NDArray[np.uint8]

MASK = np.zeros((9, 12), dtype=np.uint8)
MASK[1:8, 1:8] = 1
MASK[3:6, 3:6] = 2  # a hole in class 1, and one in this
MASK[4, 4] = 0
MASK[0, 10:] = MASK[8, 9:11] = 1  # further parts
MASK[5:7, 10:] = 255


def write(folder: Path, *forms: AnnotationFormat, tolerance: float = 0.0, keep_void: bool = False) -> list[str]:
    writer = AnnotationWriter(
        out=folder,
        labelme=folder / "labelme",
        classes=CLASSES,
        formats=forms,
        tolerance=tolerance,
        keep_void=keep_void,
    )
    writer.add("a", "../photos/a.jpg", MASK)
    writer.add("empty", "../photos/empty.png", np.zeros((2, 3), dtype=np.uint8))
    return writer.close()


def drawn(entries: list[tuple[int, Any]]) -> Mask:
    mask = np.zeros(MASK.shape, dtype=np.uint8)
    for label, segmentation in entries:
        if isinstance(segmentation, list):
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *MASK.shape))
        mask[coco_mask.decode(segmentation) > 0] = label
    return mask


@pytest.mark.parametrize("form", ["coco", "coco-polygons"])
@pytest.mark.parametrize("keep_void", [False, True])
def test_coco_gives_the_mask_again(tmp_path: Path, form: AnnotationFormat, keep_void: bool) -> None:
    notes = write(tmp_path, form, keep_void=keep_void)
    record = json.loads((tmp_path / f"{form}.json").read_text(encoding="utf-8"))
    assert record["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 12, "height": 9},
        {"id": 2, "file_name": "empty.png", "width": 3, "height": 2},
    ]
    names = {category["id"]: category["name"] for category in record["categories"]}
    assert names == {1: "ant", 2: "été 猫", 3: "cat"} | ({255: "void"} if keep_void else {})
    entries = record["annotations"]
    assert [entry["id"] for entry in entries] == list(range(1, len(entries) + 1))
    mask = drawn([(entry["category_id"], entry["segmentation"]) for entry in entries])
    np.testing.assert_array_equal(mask, MASK if keep_void else np.where(MASK == 255, 0, MASK))
    assert {entry["iscrowd"] for entry in entries} == {0}
    ant, other = entries[:2]
    assert (ant["area"], ant["bbox"], ant["image_id"]) == (49 - 9 + 4, [1, 0, 11, 9], 1)
    assert (other["area"], other["bbox"]) == (8, [3, 3, 3, 3])
    assert isinstance(ant["segmentation"], dict) == (form == "coco")
    assert len(notes) == (not keep_void)


def test_labelme_gives_the_mask_again_and_its_own_form(tmp_path: Path) -> None:
    write(tmp_path, "labelme", keep_void=True)
    record = json.loads((tmp_path / "labelme" / "a.json").read_text(encoding="utf-8"))
    assert (record["imagePath"], record["imageData"]) == ("../photos/a.jpg", None)
    assert (record["imageHeight"], record["imageWidth"]) == MASK.shape
    ids = {"ant": 1, "été 猫": 2, "void": 255}
    shapes = record["shapes"]
    assert {shape["label"] for shape in shapes} == set(ids)
    assert {shape["shape_type"] for shape in shapes} == {"polygon"}
    flat = [(ids[shape["label"]], [np.ravel(shape["points"]).tolist()]) for shape in shapes]
    np.testing.assert_array_equal(drawn(flat), MASK)
    groups = {label: {shape["group_id"] for shape in shapes if shape["label"] == label} for label in ids}
    assert groups == {"ant": {1}, "été 猫": {2}, "void": {None}}  # void has a single part
    assert json.loads((tmp_path / "labelme" / "empty.json").read_text())["shapes"] == []


def test_void_that_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    (note,) = write(tmp_path, "coco", "labelme")
    assert note.startswith("left out of coco, labelme: 4 void pixels in 1 images (a), which become background")
    assert "--keep-void" in note
    assert "void" not in (tmp_path / "labelme" / "a.json").read_text()


def test_equal_masks_give_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, "coco", "coco-polygons", "labelme", tolerance=1.5)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tolerance": -1.0}, "the tolerance is -1.0 pixels; 0 or more is needed"),
        ({"tolerance": float("nan")}, "the tolerance is nan pixels"),
        ({"classes": ("background", "void"), "keep_void": True}, "a class is called 'void'"),
    ],
)
def test_mistakes_are_refused_at_the_start(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    choice: dict[str, Any] = {"classes": CLASSES, "formats": ["labelme"], **values}
    with pytest.raises(DataError, match=message):
        AnnotationWriter(out=tmp_path, labelme=tmp_path, **choice)


def test_labelme_comes_back_by_the_reader_of_annotation_tools(tmp_path: Path) -> None:
    write(tmp_path, "labelme", keep_void=True)
    export = read_annotations(tmp_path / "labelme")
    assert export.class_names == ("ant", "été 猫")
    (found,) = [image for image in export.images if image.file.name == "a.json"]
    ids = {name: place for place, name in enumerate(CLASSES)}
    np.testing.assert_array_equal(rasterize(found, ids, (12, 9)), MASK)
