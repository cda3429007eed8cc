"""CVAT's XML of images: areas, order, labels, splits, what is left out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.annotations import AnnotationExport, rasterize, read_annotations
from slrnet.data.manifest import DataError

IDS = {"cat": 1, "dog": 2}
LABELS = [("dog", "any"), ("cat", "polygon"), ("nose", "points"), ("blurred", "tag")]


def write(folder: Path, images: str, labels: list[tuple[str, str]] = LABELS, name: str = "annotations.xml") -> Path:
    entries = "".join(f"<label><name>{name}</name><type>{kind}</type></label>" for name, kind in labels)
    path = folder / name
    path.write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
        f"<meta><task><labels>{entries}</labels></task></meta>{images}</annotations>",
        encoding="utf-8",
    )
    return path


def image(shapes: str = "", name: str = "a.jpg", **others: str) -> str:
    attributes = "".join(f' {key}="{value}"' for key, value in others.items())
    return f'<image id="0" name="{name}" width="10" height="8"{attributes}>{shapes}</image>'


def read(folder: Path) -> AnnotationExport:
    export = read_annotations(folder)
    assert export.tool == "cvat"
    return export


def test_areas_and_the_order_of_labels(tmp_path: Path) -> None:
    shapes = (
        '<polygon label="cat" points="0,0;4,0;4,8;0,8" z_order="0"/>'
        '<box label="dog" xtl="6" ytl="0" xbr="10" ybr="2" rotation="0.0" z_order="0"/>'
        '<box label="dog" xtl="4" ytl="5" xbr="10" ybr="7" rotation="90.0" z_order="0"/>'
        '<mask label="dog" rle="2, 3, 1" left="1" top="3" width="3" height="2" z_order="0"></mask>'
    )
    write(tmp_path, image(shapes))
    export = read(tmp_path)
    assert export.class_names == ("dog", "cat")
    mask = rasterize(export.images[0], IDS, (10, 8))
    assert mask[0].tolist() == [1, 1, 1, 1, 0, 0, 2, 2, 2, 2]
    assert mask[3].tolist() == [1, 1, 1, 2, 0, 0, 2, 2, 0, 0]
    assert mask[4].tolist() == [1, 2, 2, 1, 0, 0, 2, 2, 0, 0]
    assert mask[7].tolist() == [1, 1, 1, 1, 0, 0, 2, 2, 0, 0]


def test_ellipses(tmp_path: Path) -> None:
    write(tmp_path, image('<ellipse label="cat" cx="5" cy="4" rx="4" ry="2" z_order="0" rotation="90"/>'))
    mask = rasterize(read(tmp_path).images[0], IDS, (10, 8))
    assert mask.any(axis=1).tolist() == [True] * 8
    assert np.flatnonzero(mask.any(axis=0)).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(("orders", "top"), [((0, 0), 2), ((1, 0), 1), ((-1, -2), 1), ((3, 20), 2)])
def test_the_greater_z_order_lies_above_and_of_equal_ones_the_later(
    tmp_path: Path, orders: tuple[int, int], top: int
) -> None:
    box = '<box label="{}" xtl="0" ytl="0" xbr="10" ybr="8" z_order="{}"/>'
    write(tmp_path, image(box.format("cat", orders[0]) + box.format("dog", orders[1])))
    assert (rasterize(read(tmp_path).images[0], IDS, (10, 8)) == top).all()


def test_tags_splits_and_what_is_left_out(tmp_path: Path) -> None:
    shapes = (
        '<tag label="cat"/><points label="nose" points="1,1"/><polyline label="cat" points="1,1;2,2"/>'
        '<skeleton label="cat"><points label="nose" points="1,1"/></skeleton><cuboid label="cat" xtl1="1"/>'
    )
    write(tmp_path, image(shapes, subset="Train") + image(name="sub/b.jpg", subset="validation") + image(name="c.jpg"))
    export = read(tmp_path)
    assert export.class_names == ("dog", "cat")
    assert [(one.paths[0], one.split, one.labels) for one in export.images] == [
        ("a.jpg", "train", ("cat",)),
        ("sub/b.jpg", "val", None),
        ("c.jpg", None, None),
    ]
    place = "annotations.xml, image 'a.jpg', shape"
    assert export.left_out == {
        "points": [f"{place} 1"],
        "polylines": [f"{place} 2"],
        "skeletons": [f"{place} 3"],
        "cuboids": [f"{place} 4"],
    }


def test_tags_alone_are_the_classes(tmp_path: Path) -> None:
    write(
        tmp_path, image('<tag label="wet"/>') + image('<tag label="dry"/>', "b.jpg"), [("wet", "tag"), ("dry", "tag")]
    )
    assert read(tmp_path).class_names == ("dry", "wet")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ('<polygon label="cat" points="0,0;4,0"/>', "shape 1 .*enclose no area"),
        ('<polygon label="cat" points="0,0;4"/>', "shape 1 has points that are not pairs"),
        ('<polygon label="cat" points=""/>', "shape 1 could not convert"),
        ('<polygon label="cat" points="0,0;nan,0;3,3"/>', "shape 1 .*no finite number"),
        ('<polygon label="cat" points="0,0;1e30,0;3,3"/>', "shape 1 .*far beyond"),
        ('<polygon points="0,0;4,0;4,4"/>', "shape 1 has the label None"),
        ('<polygon label="cat"/>', "shape 1 lacks 'points'"),
        ('<box label="cat" xtl="1" ytl="1" xbr="1" ybr="5"/>', "shape 1 .*enclose no area"),
        ('<mask label="cat" rle="1, 2" left="0" top="0" width="2" height="2"/>', "shape 1 .*do not add up"),
        ('<mask label="cat" rle="1, x" left="0" top="0" width="2" height="2"/>', "shape 1 invalid literal"),
        (f'<mask label="cat" rle="{10**30}" left="0" top="0" width="2" height="2"/>', "shape 1 "),
        (
            '<box label="cat" xtl="1" ytl="1" xbr="4" ybr="5" z_order="top"/>',
            "a box has the z_order 'top', which is no number",
        ),
    ],
)
def test_broken_shapes_are_refused_with_file_image_and_number(tmp_path: Path, shapes: str, words: str) -> None:
    path = write(tmp_path, image(shapes))
    with pytest.raises(DataError, match=rf"{path}, image 'a.jpg': {words}"):
        rasterize(read(tmp_path).images[0], IDS, (10, 8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotations><image", "is not readable XML"),
        ("<annotation><object/></annotation>", "an XML file of <annotation>, not CVAT's"),
        ('<annotations><track id="0"/></annotations>', "of a video, not CVAT's annotations of images; export it again"),
        ('<!DOCTYPE a [<!ENTITY x "cat">]><annotations>&x;</annotations>', "declares entities"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "/etc/passwd">]><annotations>&x;</annotations>', "declares entities"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(DataError, match=words):
        read_annotations(tmp_path)
