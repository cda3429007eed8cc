"""Supervisely's projects: areas, labels, splits, what is left out, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.annotations import AnnotationExport, rasterize, read_annotations
from slrnet.data.manifest import DataError

IDS = {"cat": 1, "dog": 2}
SIZE = {"height": 8, "width": 10}


def packed(pixels: Any) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(np.array(pixels, dtype=np.uint8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(buffer, "PNG", transparency=0)
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def figure(label: str, kind: str, exterior: Any = (), interior: Any = (), **others: Any) -> dict[str, Any]:
    points = {"exterior": exterior, "interior": interior}
    return {"classTitle": label, "geometryType": kind, "tags": [], "points": points, **others}


def write(root: Path, name: str = "a.jpg", *objects: Any, dataset: str = "ds0", **others: Any) -> Path:
    path = root / dataset / "ann" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"description": "", "tags": [], "size": SIZE, "objects": list(objects), **others}))
    classes = [("dog", "bitmap"), ("cat", "polygon"), ("nose", "point")]
    meta = {"classes": [{"title": title, "shape": kind, "color": "#F6FF00"} for title, kind in classes], "tags": []}
    (root / "meta.json").write_text(json.dumps(meta))
    return path


def read(folder: Path) -> AnnotationExport:
    export = read_annotations(folder)
    assert export.tool == "supervisely"
    return export


def test_areas_and_the_order_of_classes(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.jpg",
        figure("cat", "polygon", [[0, 0], [10, 0], [10, 6], [0, 6]], [[[2, 2], [5, 2], [5, 4], [2, 4]]]),
        figure("dog", "rectangle", [[7, 3], [8, 7]]),
        figure("dog", "bitmap", bitmap={"origin": [1, 6], "data": packed([[1, 0, 1], [0, 1, 0]])}),
    )
    export = read(tmp_path)
    assert export.class_names == ("dog", "cat")
    mask = rasterize(export.images[0], IDS, (10, 8))
    assert mask[1].tolist() == [1] * 10
    assert mask[3].tolist() == [1, 1, 0, 0, 0, 1, 1, 2, 2, 1]
    assert mask[6].tolist() == [0, 2, 0, 2, 0, 0, 0, 2, 2, 0]
    assert mask[7].tolist() == [0, 0, 2, 0, 0, 0, 0, 2, 2, 0]


def test_names_tags_splits_and_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", figure("nose", "point", [[1, 1]]), tags=[{"name": "cat"}, {"name": "val"}])
    write(tmp_path, "b.png", figure("cat", "line", [[1, 1], [2, 2]]), dataset="train", tags=["dog"])
    write(tmp_path, "c.png", figure("cat", "alpha_mask"), dataset="deep/test")
    export = read(tmp_path / "meta.json")
    assert [(image.paths, image.labels, image.split) for image in export.images] == [
        (("deep/test/img/c.png", "deep/test/c.png"), None, "test"),
        (("ds0/img/a.jpg", "ds0/a.jpg"), ("cat",), "val"),
        (("train/img/b.png", "train/b.png"), ("dog",), "train"),
    ]
    assert export.left_out == {
        "shapes of the type 'alpha_mask'": ["test/c.png, shape 1"],
        "points": ["ds0/a.jpg, shape 1"],
        "lines": ["train/b.png, shape 1"],
    }


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (figure("cat", "polygon", [[0, 0], [4, 4]]), "shape 1 .*enclose no area"),
        (figure("cat", "polygon", [[0, 0], [4, 4], [float("nan"), 0]]), "shape 1 .*no finite number"),
        (figure("cat", "polygon", [[0, 0], [4, 4], [0, 4]], [[[1, 1]]]), "shape 1 .*enclose no area"),
        (figure("cat", "bitmap", bitmap={"origin": [1, 6], "data": "AAAA"}), "shape 1 .*bitmap that cannot be read"),
        (figure("cat", "bitmap", bitmap={"origin": [1], "data": packed([[1]])}), "shape 1 not enough values"),
        (figure("cat", "bitmap", bitmap={"origin": [900, 0], "data": packed([[1]])}), "shape 1 .*far beyond"),
        (figure("cat", "bitmap"), "shape 1 lacks 'bitmap'"),
        ({"geometryType": "polygon"}, "shape 1 lacks 'classTitle'"),
    ],
)
def test_broken_shapes_are_refused_with_file_and_number(tmp_path: Path, entry: Any, words: str) -> None:
    path = write(tmp_path, "a.jpg", entry)
    with pytest.raises(DataError, match=rf"{path}, image .*a.jpg': {words}"):
        rasterize(read(tmp_path).images[0], IDS, (10, 8))


@pytest.mark.parametrize(
    ("others", "words"),
    [({"size": {"height": 8}}, "lacks 'width'"), ({"size": None}, "NoneType"), ({"tags": [5]}, "has the label 5")],
)
def test_broken_files_are_problems_of_their_images(tmp_path: Path, others: dict[str, Any], words: str) -> None:
    write(tmp_path, **others)
    with pytest.raises(DataError, match=words):
        rasterize(read(tmp_path).images[0], IDS, (10, 8))


def test_a_project_needs_classes_and_annotations(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"classes": 3}')
    with pytest.raises(DataError, match="lists no classes"):
        read_annotations(tmp_path)
    (tmp_path / "meta.json").write_text('{"classes": []}')
    with pytest.raises(DataError, match="no folder `ann`"):
        read_annotations(tmp_path)
