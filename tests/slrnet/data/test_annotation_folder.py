"""A data set as a folder for annotation tools: its images, splits and labels, and refusals before work is lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from data_prep.conversion import Output
from data_prep.folder import FolderInput, convert
from slrnet.data.annotation_files import AnnotationFormat
from slrnet.data.annotation_folder import check_annotation_folder, write_annotation_folder
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet, load_dataset

coco_mask = pytest.importorskip("pycocotools.mask")
pytest.importorskip("shapely")


@pytest.mark.parametrize("form", ["coco", "labelme"])
def test_images_masks_splits_and_labels_are_those_of_the_data_set(
    tiny_data: ShardSet, tmp_path: Path, form: AnnotationFormat
) -> None:
    out, classes = tmp_path / "tool", tiny_data.info.classes
    notes = write_annotation_folder(tiny_data, out, form=form, tolerance=0.0, keep_void=True)
    assert notes == []
    with (out / "labels.csv").open(encoding="utf-8", newline="") as file:
        labels = {row["image"]: row["labels"] for row in csv.DictReader(file)}
    record = json.loads((out / "coco.json").read_text()) if form == "coco" else {}
    ids = {entry["file_name"]: entry["id"] for entry in record.get("images", [])}
    for split in tiny_data.splits:
        keys = tiny_data.split(split).keys.to_pylist()
        assert (out / f"{split}.txt").read_text().split() == sorted(f"{key}.jpg" for key in keys)
        for sample in EvalLoader(tiny_data, split=split):
            name = f"{sample.key}.jpg"
            assert (out / "images" / name).read_bytes() == sample.jpeg
            assert labels.pop(name) == ";".join(classes[i + 1] for i in np.flatnonzero(sample.image_labels))
            assert sample.pixel_labels is not None
            mask = np.zeros(sample.pixel_labels.shape, dtype=np.uint8)
            for entry in record.get("annotations", []):
                if entry["image_id"] == ids[name]:
                    mask[coco_mask.decode(entry["segmentation"]) > 0] = entry["category_id"]
            if form == "labelme":
                beside = json.loads((out / "images" / f"{sample.key}.json").read_text())
                assert beside["imagePath"] == name
                for shape in beside["shapes"]:
                    points = [np.ravel(shape["points"]).tolist()]
                    region = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(points, *mask.shape)))
                    mask[region > 0] = 255 if shape["label"] == "void" else classes.index(shape["label"])
            np.testing.assert_array_equal(mask, sample.pixel_labels.numpy())
    assert labels == {}


def test_void_of_all_images_is_counted(tiny_data: ShardSet, tmp_path: Path) -> None:
    voids = [(s.pixel_labels == 255).sum() for split in tiny_data.splits for s in EvalLoader(tiny_data, split=split)]
    (note,) = write_annotation_folder(tiny_data, tmp_path / "tool", form="coco", tolerance=1.0, keep_void=False)
    assert f"{sum(voids)} void pixels in 14 images" in note
    assert note.count("_") == 10  # the first ten keys are named
    assert "and 4 more" in note


def test_what_would_fail_is_refused_before_the_work(tmp_path: Path) -> None:
    def check(*classes: str) -> None:
        check_annotation_folder(("background", *classes), tmp_path, form="coco", tolerance=0.0, keep_void=True)

    check("ant")
    with pytest.raises(DataError, match="the class 'a;b' has a `;`, which separates labels"):
        check("ant", "a;b")
    with pytest.raises(DataError, match="a class is called 'void'"):
        check("void")
    (tmp_path / "mine").write_text("")
    with pytest.raises(DataError, match="exists; give another folder"):
        check("ant")


@pytest.mark.parametrize("form", get_args(AnnotationFormat))
def test_prepare_folder_makes_the_same_data_set_of_it(
    tiny_data: ShardSet, tmp_path: Path, form: AnnotationFormat
) -> None:
    """The way of corrected pseudo masks, nothing corrected: masks, labels, splits and a subset are as they were."""
    tool = tmp_path / "tool"
    write_annotation_folder(tiny_data, tool, form=form, tolerance=0.0, keep_void=True)
    (tmp_path / "corrected.txt").write_text("train_0.jpg\ntrain_4.jpg\n")
    given = FolderInput(
        images=tool / "images",
        annotations=tool / "images" if form == "labelme" else tool / f"{form}.json",
        labels=tool / "labels.csv",
        split={"val": tool / "val.txt"},
    )
    convert(given, Output(tmp_path / "again", subsets={"corrected": tmp_path / "corrected.txt"}))
    again = load_dataset(tmp_path / "again")
    assert sorted(again.info.classes) == sorted(tiny_data.info.classes)
    ids = np.array([*(again.info.classes.index(name) for name in tiny_data.info.classes), *[255] * 252])
    for split in tiny_data.splits:
        found = {sample.key: sample for sample in EvalLoader(again, split=split)}
        assert len(found) == tiny_data.split(split).num_samples
        for sample in EvalLoader(tiny_data, split=split):
            assert sample.pixel_labels is not None
            mask, labels = found[sample.key].pixel_labels, found[sample.key].image_labels
            assert mask is not None
            np.testing.assert_array_equal(mask.numpy(), ids[sample.pixel_labels.numpy()])
            assert set(np.flatnonzero(labels) + 1) == set(ids[np.flatnonzero(sample.image_labels) + 1])
    train = again.split("train")
    assert {train.key(i) for i in np.flatnonzero(train.in_subset("corrected"))} == {"train_0", "train_4"}
