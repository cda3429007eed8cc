"""Data sets from what annotation tools export: pixels, classes, names of images, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.conversion import Output
from data_prep.folder import FolderInput, convert
from slrnet.cli.main import main
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, load_dataset
from tests.fixtures.shards import table_of

Array = npt.NDArray[np.uint8]
Shapes = list[tuple[str, float, float, float, float]]
"""Boxes with labels: left, top, right, bottom."""
BOXES: Shapes = [("dog", 0, 0, 6, 4), ("cat", 4, 2, 10, 8)]


def corners(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def labelme(folder: Path, images: dict[str, Shapes]) -> None:
    for name, shapes in images.items():
        path = (folder / name).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"label": label, "points": corners(*box), "shape_type": "polygon"} for label, *box in shapes]
        content = {"shapes": entries, "imagePath": Path(name).name, "imageHeight": 8, "imageWidth": 10}
        path.write_text(json.dumps(content))


def cvat(folder: Path, images: dict[str, Shapes], tags: str = "", subset: str = "") -> None:
    text = ""
    for name, shapes in images.items():
        points = [(label, ";".join(f"{x},{y}" for x, y in corners(*box))) for label, *box in shapes]
        polygons = "".join(f'<polygon label="{label}" points="{pairs}" z_order="0"/>' for label, pairs in points)
        text += f'<image name="{name}" width="10" height="8" subset="{subset}">{polygons}{tags}</image>'
    folder.mkdir(exist_ok=True)
    (folder / "annotations.xml").write_text(f"<annotations>{text}</annotations>", encoding="utf-8")


def label_studio(folder: Path, images: dict[str, Shapes]) -> None:
    tasks = []
    for name, shapes in images.items():
        results = [
            {
                "type": "polygonlabels",
                "original_width": 10,
                "original_height": 8,
                "value": {"points": [[x * 10, y * 12.5] for x, y in corners(*box)], "polygonlabels": [label]},
            }
            for label, *box in shapes
        ]
        tasks.append({"data": {"image": name}, "annotations": [{"result": results}]})
    folder.mkdir(exist_ok=True)
    (folder / "export.json").write_text(json.dumps(tasks))


def coco(folder: Path, images: dict[str, Shapes]) -> None:
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog"), start=1)]
    for image, (name, shapes) in enumerate(images.items()):
        content["images"].append({"id": image, "file_name": name, "width": 10, "height": 8})
        for label, *box in shapes:
            flat = [number for corner in corners(*box) for number in corner]
            entry = {"id": len(content["annotations"]), "image_id": image, "segmentation": [flat]}
            content["annotations"].append(entry | {"category_id": 1 + (label == "dog")})
    folder.mkdir(exist_ok=True)
    (folder / "instances_default.json").write_text(json.dumps(content))


def supervisely(folder: Path, images: dict[str, Shapes]) -> None:
    for name, shapes in images.items():
        objects = [
            {"classTitle": label, "geometryType": "polygon", "points": {"exterior": corners(*box), "interior": []}}
            for label, *box in shapes
        ]
        path = folder / Path(name).parent / "ann" / f"{Path(name).name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"size": {"width": 10, "height": 8}, "objects": objects, "tags": []}))
    (folder / "meta.json").write_text('{"classes": [{"title": "cat"}, {"title": "dog"}]}')


TOOLS: list[Callable[[Path, dict[str, Shapes]], None]] = [labelme, cvat, label_studio, coco, supervisely]


def photo(path: Path, size: tuple[int, int] = (10, 8), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path, **options)


def make(root: Path, **options: Any) -> dict[str, tuple[str, list[int] | None, bool]]:
    shared = {name: options.pop(name) for name in ("skip_damaged",) if name in options}
    given = FolderInput(images=root / "images", annotations=root / "export", **options)
    convert(given, Output(root / "out", shards=1, **shared))
    rows = table_of(root / "out").to_pylist()
    return {row["key"]: (row["split"], row["classes"], row["has_mask"]) for row in rows}


def masks(root: Path, split: str = "train") -> dict[str, Array]:
    samples = EvalLoader(load_dataset(root / "out"), split=split)
    labels = {sample.key: sample.pixel_labels for sample in samples}
    return {key: np.asarray(ids).astype(np.uint8) for key, ids in labels.items() if ids is not None}


def expected(cat: int = 1, dog: int = 2) -> Array:
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[:4, :6] = dog
    mask[2:8, 4:10] = cat
    return mask


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_gives_the_right_pixels(tmp_path: Path, tool: Callable[[Path, dict[str, Shapes]], None]) -> None:
    """In a folder below, with a space; an image that is listed without shapes is all background."""
    photo(tmp_path / "images" / "more" / "a b.jpg")
    photo(tmp_path / "images" / "c.png")
    # Of COCO's areas the smaller one lies above, so the box of the cat is the smaller there.
    boxes: Shapes = [("dog", 0, 0, 6, 4), ("cat", 4, 2, 7, 5)] if tool is coco else BOXES
    tool(tmp_path / "export", {"more/a b.jpg": boxes, "c.png": []})
    rows = make(tmp_path)
    assert rows == {"more_a_b": ("train", [1, 2], True), "c": ("train", [], True)}
    assert load_dataset(tmp_path / "out").info.classes == ("background", "cat", "dog")
    mask = expected()
    if tool is coco:
        mask[2:, 4:] = 0
        mask[2:4, 4:6] = 2
        mask[2:5, 4:7] = 1
    assert np.array_equal(masks(tmp_path)["more_a_b"], mask)
    assert not masks(tmp_path)["c"].any()


def test_classes_choose_and_order(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    cvat(tmp_path / "export", {"a.jpg": BOXES})
    assert make(tmp_path, classes=["Dog", "cat"]) == {"a": ("train", [1, 2], True)}
    assert np.array_equal(masks(tmp_path)["a"], expected(cat=2, dog=1))


def test_labels_that_are_no_class_are_refused_or_void(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    cvat(tmp_path / "export", {"a.jpg": BOXES})
    with pytest.raises(DataError, match=r"1 label.* no class: 'dog' \(a\.jpg, shape 1\); .*--other-labels-void"):
        make(tmp_path, classes=["cat"])
    assert make(tmp_path, classes=["cat"], other_labels_void=True) == {"a": ("train", [1], True)}
    assert np.array_equal(masks(tmp_path)["a"], expected(dog=255))


def test_two_spellings_of_a_label_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    cvat(tmp_path / "export", {"a.jpg": [("cat", 0, 0, 5, 5), ("Cat", 1, 1, 3, 3)]})
    with pytest.raises(
        DataError, match="spells labels in several ways: 'Cat' and 'cat'; name each class with --classes"
    ):
        make(tmp_path)
    assert make(tmp_path, classes=["cat"]) == {"a": ("train", [1], True)}


@pytest.mark.parametrize(
    ("tool", "name", "path"),
    [
        (label_studio, "/data/upload/3/0a1b2c3d-a.jpg", "a.jpg"),
        (label_studio, "/data/upload/3/0a1b2c3d-my_photo_1.jpg", "my photo (1).jpg"),
        (label_studio, "/data/local-files/?d=sets/one/a%20b.jpg", "one/a b.jpg"),
        (label_studio, "s3://bucket/sets/%C3%A4.jpg", "ä.jpg"),
        (label_studio, "http://host/deep/a.jpg?token=x", "here/a.jpg"),
        (cvat, "C:\\photos\\one\\a.jpg", "one/a.jpg"),
        (cvat, "one/A.JPG", "one/a.jpg"),
        (cvat, "a%20b.jpg", "a b.jpg"),
        (cvat, "other/a.jpg", "deep/down/a.jpg"),
        (coco, "images/a_jpg.rf.0123456789abcdef.jpg", "a_jpg.rf.0123456789abcdef.jpg"),
    ],
)
def test_names_of_images(tmp_path: Path, tool: Callable[[Path, dict[str, Shapes]], None], name: str, path: str) -> None:
    photo(tmp_path / "images" / path)
    photo(tmp_path / "images" / "other one.jpg")
    tool(tmp_path / "export", {name: [("cat", 0, 0, 10, 8)], "other one.jpg": []})
    rows = make(tmp_path)
    assert sorted(classes or [] for _, classes, _ in rows.values()) == [[], [1]]
    assert rows["other_one"][1] == []


def test_labelmes_paths_are_relative_to_its_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        photo(tmp_path / "images" / folder / "a.jpg")
        path = tmp_path / "export" / f"{folder}.json"
        path.parent.mkdir(exist_ok=True)
        shape = {"label": f"in {folder}", "points": corners(0, 0, 10, 8), "shape_type": "polygon"}
        path.write_text(json.dumps({"shapes": [shape], "imagePath": f"..\\images\\{folder}\\a.jpg"}))
    assert {key: classes for key, (_, classes, _) in make(tmp_path).items()} == {"one_a": [1], "two_a": [2]}


@pytest.mark.parametrize("tool", [coco, cvat])
def test_one_name_in_two_splits(tmp_path: Path, tool: Callable[..., None]) -> None:
    """The folder of COCO's file, or CVAT's subset, tells which image is meant."""
    shapes: dict[str, Shapes] = {"train": [("cat", 0, 0, 10, 8)], "val": []}
    texts = []
    for split, boxes in shapes.items():
        photo(tmp_path / "export" / split / "a.jpg")
        if tool is coco:
            coco(tmp_path / "export" / split, {"a.jpg": boxes})
        else:
            cvat(tmp_path / split, {"a.jpg": boxes}, subset=split)
            texts.append((tmp_path / split / "annotations.xml").read_text().removeprefix("<annotations>"))
    if tool is cvat:
        merged = "<annotations>" + "".join(text.removesuffix("</annotations>") for text in texts) + "</annotations>"
        (tmp_path / "export" / "annotations.xml").write_text(merged)
    (tmp_path / "images").symlink_to(tmp_path / "export")
    rows = make(tmp_path)
    classes = {key: found for key, (_, found, _) in rows.items()}
    assert classes == {"train_a": [1], "val_a": []}


def test_images_and_annotations_without_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "images" / "a.jpg")
    photo(tmp_path / "images" / "b.jpg")
    cvat(tmp_path / "export", {"a.jpg": BOXES, "gone.jpg": BOXES})
    with pytest.raises(DataError, match=r"1 image\(s\) that are not below --images: gone\.jpg; .*--skip-unmatched"):
        make(tmp_path)
    cvat(tmp_path / "export", {"a.jpg": BOXES})
    with pytest.raises(DataError, match=r"1 image\(s\) have no label in --annotations \(cvat\): b\.jpg; .*--unlabeled"):
        make(tmp_path)
    cvat(tmp_path / "export", {"a.jpg": BOXES, "gone.jpg": BOXES})
    rows = make(tmp_path, unlabeled=True, skip_unmatched=True)
    assert rows == {"a": ("train", [1, 2], True), "b": ("train", [], False)}
    assert "left out annotations of 1 image(s) that are not there: gone.jpg" in capsys.readouterr().out


def test_two_annotations_of_one_image_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    cvat(tmp_path / "export", {"a.jpg": BOXES, "more/a.jpg": BOXES})
    with pytest.raises(DataError, match=r"image 'a\.jpg', and .* image 'more/a\.jpg', are both of a\.jpg"):
        make(tmp_path)


def test_annotations_belong_to_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "images" / "a.jpg", (8, 10), exif=exif)
    cvat(tmp_path / "export", {"a.jpg": BOXES})
    make(tmp_path)
    assert np.array_equal(masks(tmp_path)["a"], expected())


def test_masks_are_scaled_as_their_images(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.png", (1000, 800))
    shape = {"label": "cat", "points": corners(400, 200, 1000, 800), "shape_type": "polygon"}
    (tmp_path / "export").mkdir()
    content = {"shapes": [shape], "imagePath": "a.png", "imageHeight": 800, "imageWidth": 1000}
    (tmp_path / "export" / "a.json").write_text(json.dumps(content))
    make(tmp_path, longest_side=10)
    assert np.array_equal(masks(tmp_path)["a"], expected(dog=0))


def test_image_labels(tmp_path: Path) -> None:
    """Tags join the shapes of an image; an image with tags alone has labels and no mask."""
    for name in "abc":
        photo(tmp_path / "images" / f"{name}.jpg")
    cvat(tmp_path / "export", {"a.jpg": BOXES[:1]}, '<tag label="cat"/><tag label="blurred"/>')
    polygons = (tmp_path / "export" / "annotations.xml").read_text().removesuffix("</annotations>")
    others = '<image name="b.jpg"><tag label="dog"/></image><image name="c.jpg"><tag label="blurred"/></image>'
    (tmp_path / "export" / "annotations.xml").write_text(f"{polygons}{others}</annotations>")
    rows = make(tmp_path, classes=["cat", "dog"])
    assert rows == {"a": ("train", [1, 2], True), "b": ("train", [2], False), "c": ("train", [], True)}


def test_an_export_of_tags_alone_gives_labels_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "images" / "a.jpg")
    photo(tmp_path / "images" / "b.jpg")
    cvat(tmp_path / "export", {"a.jpg": []}, '<tag label="wet"/>', subset="validation")
    cvat_text = (tmp_path / "export" / "annotations.xml").read_text().removesuffix("</annotations>")
    (tmp_path / "export" / "annotations.xml").write_text(f'{cvat_text}<image name="b.jpg"/></annotations>')
    assert make(tmp_path) == {"a": ("val", [1], False), "b": ("train", [], False)}


def test_options_go_before_splits_of_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "images" / "a.jpg")
    cvat(tmp_path / "export", {"a.jpg": BOXES}, subset="Test")
    (tmp_path / "val.txt").write_text("a.jpg\n")
    assert make(tmp_path, split={"val": tmp_path / "val.txt"})["a"][0] == "val"
    assert "its splits are left out" in capsys.readouterr().out


def test_a_table_of_labels_goes_before_the_shapes(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    photo(tmp_path / "images" / "b.jpg")
    (tmp_path / "labels.csv").write_text("image,labels\na.jpg,cat;dog\nb.jpg,dog\n")
    cvat(tmp_path / "export", {"a.jpg": BOXES[:1]})
    rows = make(tmp_path, labels=tmp_path / "labels.csv")
    assert rows == {"a": ("train", [1, 2], True), "b": ("train", [2], False)}
    assert np.array_equal(masks(tmp_path)["a"], np.pad(np.full((4, 6), 2), ((0, 4), (0, 4))))


def test_broken_annotations_are_named_and_left_out_with_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        photo(tmp_path / "images" / f"{name}.jpg")
    labelme(tmp_path / "export", {"a.jpg": BOXES, "b.jpg": [("cat", 3, 3, 3, 5)], "c.jpg": []})
    (tmp_path / "export" / "c.json").write_text('{"shapes": [')
    with pytest.raises(DataError, match="2 problem.*\n.*b.json.* shape 1 .*no area.*\n.*c.json is not JSON"):
        make(tmp_path)
    assert make(tmp_path, skip_damaged=True) == {"a": ("train", [1, 2], True)}
    assert "left out 2 damaged images" in capsys.readouterr().out


def test_masks_and_annotations_together_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    photo(tmp_path / "masks" / "a.png")
    cvat(tmp_path / "export", {"a.jpg": BOXES})
    with pytest.raises(DataError, match="--masks and --annotations both say"):
        make(tmp_path, masks=tmp_path / "masks", classes=["cat", "dog"])


def test_the_result_is_the_same_with_processes(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 2), 255, dtype=np.uint8)).save(buffer, "PNG")
    labelme(tmp_path / "export", {"a.jpg": BOXES})
    path = tmp_path / "export" / "a.json"
    mask = {"label": "cat", "points": [[0, 0], [1, 2]], "shape_type": "mask"}
    content = json.loads(path.read_text())
    content["shapes"].append(mask | {"mask": base64.b64encode(buffer.getvalue()).decode()})
    path.write_text(json.dumps(content))
    prints = set()
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        given = FolderInput(images=tmp_path / "images", annotations=tmp_path / "export")
        info = convert(given, Output(out, processes=processes, name="x", made_by="x"))
        prints.add(info.fingerprint)
    assert len(prints) == 1


def test_a_dry_run_says_what_was_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "images" / "a.jpg")
    cvat(tmp_path / "export", {"a.jpg": BOXES})
    path = tmp_path / "export" / "annotations.xml"
    path.write_text(path.read_text().replace("</image>", '<points label="nose" points="1,1"/></image>'))
    words = ["prepare", "folder", "--images", str(tmp_path / "images"), "--annotations", str(path), "--dry-run"]
    assert main([*words, "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "--annotations (cvat): 1 image(s), 2 shape(s)" in said
    assert "left out 1 points: annotations.xml, image 'a.jpg', shape 3" in said
    assert "2 shapes" in said
    assert "wrote nothing" in said
    assert main([*words, "--annotation-tool", "labelme", "--processes", "1"]) != 0
    assert "is not JSON" in capsys.readouterr().err
