"""COCO's layout: classes, overlaps, crowds, fractions, the piecewise reader, what is refused, and real images."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import data_prep.coco
from data_prep.coco import convert
from data_prep.conversion import Output
from data_prep.shard_writer import verify
from slrnet.cli.main import main
from slrnet.data.manifest import DataError, load_dataset
from tests.fixtures.shards import table_of

from .conftest import decode

pytest.importorskip("pycocotools", reason="needs the extra `coco`")

COCO128 = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"
WIDTH, HEIGHT = 20, 12
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}, {"id": 90, "name": "café"}]
Array = npt.NDArray[Any]


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    """A polygon around whole pixels."""
    return [left, top, right, top, right, bottom, left, bottom]


def runs(inside: Array) -> dict[str, Any]:
    """Run lengths as numbers, down the columns, as COCO's crowds have them."""
    flat = inside.astype(int).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(inside.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


class CocoBuilder:
    """Writes images and annotation files; every image is 20 wide and 12 high."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[str, dict[str, Any]] = {}
        (root / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (root / f"{split}2017").mkdir()
            self.content[split] = {"info": {"year": 2017}, "images": [], "annotations": [], "categories": CATEGORIES}

    def image(self, split: str, number: int, *annotations: dict[str, Any]) -> Path:
        name = f"{number:012}.jpg"
        content = self.content[split]
        content["images"].append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for annotation in annotations:
            shared = {"id": 1 + len(content["annotations"]), "image_id": number, "iscrowd": 0}
            content["annotations"].append(shared | annotation)
        path = self.root / f"{split}2017" / name
        Image.new("RGB", (WIDTH, HEIGHT), (number % 256, 90, 30)).save(path)
        return path

    def write(self) -> Path:
        for split, content in self.content.items():
            path = self.root / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        return self.root


@pytest.fixture
def coco(tmp_path: Path) -> CocoBuilder:
    """Three training images (ant under cat; café in a crowd; nothing) and one of validation (cat)."""
    builder = CocoBuilder(tmp_path / "coco")
    builder.image(
        "train",
        1,
        {"category_id": 7, "segmentation": [box(4, 2, 8, 6)]},
        {"category_id": 3, "segmentation": [box(2, 1, 12, 9)]},
    )
    crowd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    crowd[5:, 10:] = True
    builder.image(
        "train",
        2,
        {"category_id": 90, "segmentation": runs(crowd), "iscrowd": 1},
        {"category_id": 3, "segmentation": [box(0, 0, 4, 4), box(6, 0, 8, 4)]},
    )
    builder.image("train", 30)
    builder.image("val", 4, {"category_id": 7, "segmentation": [box(0, 0, 20, 6)]})
    return builder


def rows(folder: Path) -> dict[str, tuple[str, list[int], bool]]:
    return {row["key"]: (row["split"], row["classes"], row["has_mask"]) for row in table_of(folder).to_pylist()}


def files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    return found


def masks(folder: Path) -> dict[str, Array]:
    return {name.partition(".")[0]: decode(data) for name, data in files(folder).items() if name.endswith(".png")}


def test_classes_labels_and_masks(coco: CocoBuilder, tmp_path: Path) -> None:
    info = convert(coco.write(), Output(tmp_path / "out"))
    assert info.classes == ("background", "ant", "cat", "café")
    assert info.name == "coco2017"
    assert rows(tmp_path / "out") == {
        "000000000001": ("train", [1, 2], True),
        "000000000002": ("train", [1, 3], True),
        "000000000030": ("train", [], True),
        "000000000004": ("val", [2], True),
    }
    found = masks(tmp_path / "out")
    first = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    first[1:9, 2:12] = 1
    first[2:6, 4:8] = 2  # the smaller one is on top, though it comes first in the file
    np.testing.assert_array_equal(found["000000000001"], first)
    second = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    second[5:, 10:] = 255
    second[:4, :4] = second[:4, 6:8] = 1
    np.testing.assert_array_equal(found["000000000002"], second)
    assert not found["000000000030"].any()
    assert all(row["has_image_labels"] for row in table_of(tmp_path / "out").to_pylist() if row["split"] == "train")
    assert verify(tmp_path / "out") == []
    image = coco.root / "train2017" / "000000000001.jpg"
    assert files(tmp_path / "out")["000000000001.jpg"] == image.read_bytes()


def test_polygons_of_less_than_three_points_cover_nothing(coco: CocoBuilder, tmp_path: Path) -> None:
    coco.image("train", 5, {"category_id": 7, "segmentation": [[1, 1, 9, 9]]}, {"category_id": 3, "segmentation": []})
    convert(coco.write(), Output(tmp_path / "out"))
    assert not masks(tmp_path / "out")["000000000005"].any()
    assert rows(tmp_path / "out")["000000000005"] == ("train", [1, 2], True)


@pytest.mark.slow
def test_fraction_is_exact_seeded_and_of_train_alone(coco: CocoBuilder, tmp_path: Path) -> None:
    for number in range(100, 137):
        coco.image("train", number)
    root = coco.write()

    def drawn(out: str, fraction: float, **options: int) -> set[str]:
        convert(root, Output(tmp_path / out, **options), fraction=fraction)
        return {key for key, row in rows(tmp_path / out).items() if row[0] == "train"}

    half = drawn("a", 0.5)
    assert len(half) == 20
    assert drawn("b", 0.5, processes=2) == half
    assert drawn("c", 0.5, seed=1) != half
    assert drawn("d", 0.25) < half
    assert "000000000004" in rows(tmp_path / "d")


def test_subsets_and_the_folder_images(coco: CocoBuilder, tmp_path: Path) -> None:
    root = coco.write()
    (root / "images").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).rename(root / "images" / split)
    (tmp_path / "few.txt").write_text("train2017/000000000002.jpg\n000000000004\n")
    convert(root, Output(tmp_path / "out", subsets={"few": tmp_path / "few.txt"}))
    shards = load_dataset(tmp_path / "out")
    assert shards.split("train").keys.filter(shards.split("train").in_subset("few")).to_pylist() == ["000000000002"]


# Exports of annotation tools, and names of files.


def shape(number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": 1, "segmentation": [box(4, 2, 8, 6)]} | fields


def export(folder: Path, path: str, *names: str, **fields: Any) -> Path:
    """Writes an annotation file of images (20 wide, 12 high), each with a cat in columns 4 to 7 and rows 2 to 5."""
    images = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(names, start=1)
    ]
    annotations = [shape(number, image_id=number) for number in range(1, len(names) + 1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]} | fields
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps(content))
    return folder


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 90, 30)).save(path, **options)
    return path


def cat(columns: slice = slice(4, 8), lines: slice = slice(2, 6), shape: tuple[int, int] = (HEIGHT, WIDTH)) -> Array:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[lines, columns] = 1
    return mask


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("annotations/instances_{}.json", {"train2014": "train2014", "val2014": "images/val2014"}),
        ("annotations/instances_{}.json", {"Train": "images/Train", "Validation": "images", "Test": "Test"}),
        ("{}/_annotations.coco.json", {"train": "train", "valid": "valid", "test": "test"}),
        ("annotations/instances_{}.json", {"default": "images"}),
        ("annotations/instances_{}.json", {"default": "images/default"}),
        ("annotations/instances_{}.json", {"val": "."}),
        ("_annotations.coco.json", {"default": "."}),
    ],
)
def test_layouts_of_exports(tmp_path: Path, path: str, places: dict[str, str]) -> None:
    root = tmp_path / "export"
    for name, folder in places.items():
        export(root, path.format(name), f"{name} 1.jpg")
        picture(root / folder / f"{name} 1.jpg")
    convert(root, Output(tmp_path / "out"))
    splits = {"default": "train", "valid": "val"}
    expected = {
        f"{name}_1": (splits.get(name, name.lower().removesuffix("2014").replace("validation", "val")), [1], True)
        for name in places
    }
    assert rows(tmp_path / "out") == expected
    for mask in masks(tmp_path / "out").values():
        np.testing.assert_array_equal(mask, cat())


def test_one_file_with_its_images(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(40)]
    export(tmp_path, "my labels.json", *names)
    for name in names:
        picture(tmp_path / "photos" / name)
    given: dict[str, Any] = {"images": tmp_path / "photos", "json": tmp_path / "my labels.json"}
    convert(None, Output(tmp_path / "a"), **given)
    assert {row[0] for row in rows(tmp_path / "a").values()} == {"train"}
    convert(None, Output(tmp_path / "b"), **given, val_fraction=0.3)
    drawn = {key for key, row in rows(tmp_path / "b").items() if row[0] == "val"}
    assert 4 <= len(drawn) <= 20
    assert len(rows(tmp_path / "b")) == 40
    with pytest.raises(DataError, match="give --root .*, or --images and --json together"):
        convert(tmp_path, Output(tmp_path / "c"), **given)
    with pytest.raises(DataError, match="give --root .*, or --images and --json together"):
        convert(None, Output(tmp_path / "c"))


@pytest.mark.parametrize(
    ("name", "stored", "key"),
    [
        ("IMG_00_jpg.rf.0a1b2c.jpg", None, "IMG_00_jpg_rf_0a1b2c"),
        ("my photo 1.JPG", None, "my_photo_1"),
        ("a/b/c.jpg", None, "a_b_c"),
        ("a\\b\\c.jpg", "a/b/c.jpg", "a_b_c"),
        ("./c.png", "c.png", "c"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", "caf\u00e9"),
        ("photo", None, "photo"),
        ("images/c.jpg", "c.jpg", "images_c"),
    ],
)
def test_names_of_files(tmp_path: Path, name: str, stored: str | None, key: str) -> None:
    root = export(tmp_path / "cvat", "annotations/instances_default.json", name)
    picture(root / "images" / (stored or name), format="PNG" if name.endswith("png") else "JPEG")
    (tmp_path / "few.txt").write_text(f"{name}\r\n")
    convert(root, Output(tmp_path / "out", subsets={"few": tmp_path / "few.txt"}))
    assert list(rows(tmp_path / "out")) == [key]
    view = load_dataset(tmp_path / "out").split("train")
    assert view.keys.filter(view.in_subset("few")).to_pylist() == [key]
    np.testing.assert_array_equal(masks(tmp_path / "out")[key], cat())


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "..", "C:\\a.jpg", "a/../../b.jpg", "."])
def test_names_of_files_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    root = export(tmp_path / "cvat", "annotations/instances_default.json", name)
    picture(root / "images" / "a.jpg")
    with pytest.raises(DataError, match=r"has the image name .*; paths of files in .*images are allowed"):
        convert(root, Output(tmp_path / "out"))


def test_layouts_that_leave_a_choice_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = export(tmp_path / "cvat", "annotations/instances_train.json", "a.jpg", "b.jpg")
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(root / "images" / name)
    export(root, "annotations/instances_batch7.json", "a.jpg")
    convert(root, Output(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "instances_batch7.json: 'batch7' is none of train, training, default, val" in printed
    assert f"left out 1 images that no annotation file lists: {root / 'images' / 'c.jpg'}" in printed
    export(root, "annotations/instances_val.json", "a.jpg")
    with pytest.raises(DataError, match=r"images/a.jpg is in the splits 'train' and 'val'; keep one"):
        convert(root, Output(tmp_path / "again"))
    export(root, "annotations/instances_default.json", "a.jpg")
    with pytest.raises(
        DataError, match=r"instances_default.json and .*instances_train.json are both the split 'train'"
    ):
        convert(root, Output(tmp_path / "again"))
    root = export(tmp_path / "other", "annotations/instances_batch7.json", "a.jpg")
    with pytest.raises(DataError, match="none of the annotation files of .* is of train, val or test"):
        convert(root, Output(tmp_path / "again"))
    root = export(tmp_path / "twice", "annotations/instances_train.json", "a b.jpg", "a_b.jpg")
    picture(root / "images" / "a b.jpg")
    with pytest.raises(DataError, match=r"images/a b.jpg and .*images/a_b.jpg, which would both be 'a_b'; rename"):
        convert(root, Output(tmp_path / "again"))


def test_categories_of_roboflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its category 0 has the project's name and no annotations; the others have it as their supercategory."""
    categories = [
        {"id": 0, "name": "cat", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "cat"},
        {"id": 2, "name": "unused dog", "supercategory": "cat"},
    ]
    root = export(tmp_path / "robo", "train/_annotations.coco.json", "a.jpg", categories=categories)
    picture(root / "train" / "a.jpg")
    assert convert(root, Output(tmp_path / "a")).classes == ("background", "cat", "unused dog")
    assert "left out the category 'cat' (id 0): it has no annotations" in capsys.readouterr().out
    np.testing.assert_array_equal(masks(tmp_path / "a")["a"], cat())


def test_category_0_and_background(tmp_path: Path) -> None:
    categories: list[dict[str, Any]] = [{"id": 0, "name": "background"}, {"id": "1", "name": "cat"}]
    root = export(tmp_path / "c", "annotations/instances_default.json", "a.jpg", categories=categories)
    picture(root / "images" / "a.jpg")
    assert convert(root, Output(tmp_path / "a")).classes == ("background", "cat")
    shapes = [shape(category_id=0, iscrowd=0), shape(2, segmentation=[box(0, 0, 2, 2)])]
    export(root, "annotations/instances_default.json", "a.jpg", categories=categories, annotations=shapes)
    with pytest.raises(
        DataError, match="has annotations of a category 'background', which is what no annotation covers"
    ):
        convert(root, Output(tmp_path / "b"))
    categories[0]["name"] = "dog"
    export(root, "annotations/instances_default.json", "a.jpg", categories=categories, annotations=shapes)
    assert convert(root, Output(tmp_path / "b")).classes == ("background", "dog", "cat")
    np.testing.assert_array_equal(masks(tmp_path / "b")["a"], cat() + 2 * cat(slice(0, 2), slice(0, 2)))
    categories[0]["name"] = "cat"
    export(root, "annotations/instances_default.json", "a.jpg", categories=categories, annotations=shapes)
    with pytest.raises(DataError, match=r"has 2 categories, \['cat'\] more than once"):
        convert(root, Output(tmp_path / "c2"))


def test_boxes_alone_give_labels_and_no_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [shape(image_id=1), shape(2, image_id=1, segmentation=[], bbox=[1, 1, 5, 5]), shape(3, image_id=2)]
    root = export(tmp_path / "c", "annotations/instances_default.json", "a.jpg", "b.jpg", annotations=boxes)
    for name in ("a.jpg", "b.jpg"):
        picture(root / "images" / name)
    convert(root, Output(tmp_path / "out"))
    assert rows(tmp_path / "out") == {"a": ("train", [1], False), "b": ("train", [1], True)}
    assert "1 images have boxes without polygons or run lengths: they get image labels and no mask" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("size", "orientation", "given", "found"),
    [
        ((12, 20), 6, "auto", "upright"),
        ((12, 20), 8, "stored", "upright"),  # the size tells
        ((20, 12), 6, "auto", "stored"),
        ((20, 12), 6, "upright", "stored"),
        ((20, 12), 1, "upright", "stored"),
        ((20, 12), 3, "auto", None),
        ((20, 12), 3, "upright", "upright"),
        ((20, 12), 2, "stored", "stored"),
        ((20, 12), 99, "auto", "stored"),
    ],
)
def test_images_that_exif_data_turn(
    tmp_path: Path, size: tuple[int, int], orientation: int, given: Any, found: str | None
) -> None:
    root = export(tmp_path / "c", "annotations/instances_default.json", "a.jpg")
    content = json.loads((root / "annotations/instances_default.json").read_text())
    content["images"][0] |= {"width": size[0], "height": size[1]}
    (root / "annotations/instances_default.json").write_text(json.dumps(content))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((12, 20, 3), dtype=np.uint8)
    pixels[:6] = 255  # the upper half as stored
    (root / "images").mkdir()
    Image.fromarray(pixels).save(root / "images" / "a.jpg", exif=exif)
    if found is None:
        with pytest.raises(
            DataError, match=r"a.jpg is turned by its EXIF data \(orientation 3\).*; choose with --orien"
        ):
            convert(root, Output(tmp_path / "out"), orientation=given)
        return
    convert(root, Output(tmp_path / "out"), orientation=given)
    np.testing.assert_array_equal(masks(tmp_path / "out")["a"], cat(shape=size[::-1]))
    image = Image.open(io.BytesIO(files(tmp_path / "out")["a.jpg"]))
    assert image.size == size
    shown = np.asarray(image.convert("L")).astype(int)
    upper, right = shown[: size[1] // 2].mean(), shown[:, size[0] // 2 :].mean()
    bright = {
        "stored": upper,
        "upright": 255 - upper if orientation == 3 else {6: right, 8: 255 - right}.get(orientation),
    }
    assert bright[found] > 250


def test_damaged_annotations_cost_their_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        shape(1, segmentation=[[0, 0, float("nan"), 0, 5, 5]]),
        shape(2, image_id=2, segmentation={"size": [HEIGHT, WIDTH], "counts": "PPPP"}),
        shape(3, image_id=3),
        shape(4, image_id=4, segmentation=[[0, 0, 1e9, 1e9, 5, 5]]),
    ]
    names = [f"{number}.jpg" for number in range(1, 5)]
    root = export(tmp_path / "c", "annotations/instances_default.json", *names, annotations=bad)
    for name in names:
        picture(root / "images" / name)
    with pytest.raises(
        DataError, match=r"3 problem\(s\) in (.*\n)*.*annotation 1 of image 1 \(20x12 pixels\) has a polygon"
    ):
        convert(root, Output(tmp_path / "out"))
    convert(root, Output(tmp_path / "out", skip_damaged=True))
    assert rows(tmp_path / "out") == {"3": ("train", [1], True)}
    assert "left out 3 damaged images, 1 remain" in capsys.readouterr().out


# Refusals: each names file, value and remedy, and nothing is written.


def refused(coco: CocoBuilder, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        convert(coco.write(), Output(out), **options)
    assert not out.exists()


def test_options_and_folders(coco: CocoBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    refused(coco, out, r"--fraction is 1.5; allowed are shares above 0", fraction=1.5)
    refused(coco, out, r"has no annotations of 2014, only .*instances_train2017.json", year=2014)
    refused(coco, out, r"--val-fraction draws from train, but there are validation images", val_fraction=0.5)
    with pytest.raises(
        DataError,
        match=r"has no annotations/instances_train2017.json or the like .*, and no train/_annotations.coco.json",
    ):
        convert(tmp_path, Output(out))
    (coco.root / "annotations" / "instances_train2014.json").write_text("{}")
    refused(coco, out, "has annotations of both years; choose with --year")
    (coco.root / "annotations" / "instances_train2014.json").unlink()
    (coco.root / "val2017").rename(coco.root / "val")
    refused(coco, out, "has no folder val2017 with images")
    monkeypatch.setattr(data_prep.coco, "find_spec", lambda _: None)
    refused(coco, out, r"needs? pycocotools, which is not installed; run `pip install 'slrnet\[coco\]'`")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"segmentation": {"size": [9, 9], "counts": [81]}},
            r"annotation 2 of image 1 \(20x12 pixels\) has run lengths fo",
        ),
        ({"segmentation": None}, "has the segmentation None"),
        ({"category_id": 5}, r"annotations of the categories \[5\], which it does not list"),
        ({"image_id": 77}, r"annotations of the images \[77\], which it does not list"),
    ],
)
def test_annotations_that_cannot_be_used(
    coco: CocoBuilder, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    coco.content["train"]["annotations"][1] |= change
    refused(coco, tmp_path / "out", message)


def test_images_that_do_not_fit(coco: CocoBuilder, tmp_path: Path) -> None:
    path = coco.root / "train2017" / "000000000030.jpg"
    Image.new("RGB", (WIDTH, 13)).save(path)
    refused(coco, tmp_path / "out", r"030.jpg is 20x13 pixels, instances_train2017.json says 20x12")
    path.unlink()
    refused(coco, tmp_path / "out", r"030.jpg is missing.*(\n.*)*--skip-damaged")
    coco.content["train"]["images"][2]["file_name"] = "../30.jpg"
    refused(coco, tmp_path / "out", r"has the image name '../30.jpg'")
    coco.content["train"]["images"].pop()
    coco.content["val"]["categories"] = CATEGORIES[:2]
    refused(coco, tmp_path / "out", "have different categories; take both from one release")


def test_damaged_images_can_be_left_out_by_name(
    coco: CocoBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco.root / "train2017" / "000000000030.jpg").write_bytes(b"<html>404</html>")
    convert(coco.write(), Output(tmp_path / "out", skip_damaged=True))
    assert set(rows(tmp_path / "out")) == {"000000000001", "000000000002", "000000000004"}
    printed = capsys.readouterr()
    assert "left out: " in printed.err
    assert "000000000030.jpg cannot be read" in printed.err
    assert "left out 1 damaged images, 3 remain" in printed.out


# Command line.


def test_command_makes_shards_that_its_own_record_makes_again(coco: CocoBuilder, tmp_path: Path) -> None:
    root = coco.write()
    (tmp_path / "few.txt").write_text("000000000002\n000000000001\n000000000030\n")

    def run(*words: str) -> int:
        return main(["prepare", "coco", *words, "--processes", "1"])

    options = ["--fraction", "0.9", "--subset", f"few={tmp_path / 'few.txt'}", "--shards", "1", "--seed", "3"]
    assert run("--root", str(root), "--out", str(tmp_path / "first"), *options) == 0
    program, script, *recorded = shlex.split(load_dataset(tmp_path / "first").info.made_by)
    assert (program, script) == ("python", "data_prep/coco.py")
    assert run(*recorded, "--out", str(tmp_path / "second")) == 0
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()
    assert run("--out", str(tmp_path / "third")) == 2


# Photographs.


@pytest.mark.slow
def test_128_photographs_have_the_pixels_that_pycocotools_decodes(tmp_path: Path) -> None:
    """Where one annotation claims a pixel it has that class, where none does the background, else the smallest's."""
    if not COCO128.is_dir():
        pytest.skip("needs the photographs in ../shared/data/coco128, which are not part of the project")
    from pycocotools.coco import COCO

    info = convert(COCO128, Output(tmp_path / "out", processes=2))
    assert info.counts == {"train": 100, "val": 28}
    assert info.num_classes == 81
    labels, made = rows(tmp_path / "out"), masks(tmp_path / "out")
    overlaps = pixels = 0
    for split in ("train", "val"):
        index = COCO(str(COCO128 / "annotations" / f"instances_{split}2017.json"))
        class_of = {category: n for n, category in enumerate(sorted(index.cats), start=1)}
        for image in index.imgs.values():
            annotations = index.imgToAnns[image["id"]]
            claims = np.zeros((len(annotations) + 1, image["height"], image["width"]), dtype=bool)
            for n, annotation in enumerate(annotations):
                claims[n] = index.annToMask(annotation)
            areas = claims.sum(axis=(1, 2))
            ids = np.array([class_of[annotation["category_id"]] for annotation in annotations] + [0])
            claims[-1] = True  # the background claims every pixel, and is larger than all
            areas[-1] = claims[-1].size + 1
            smallest = np.where(claims, areas[:, None, None], areas[-1] + 1).argmin(axis=0)
            key = image["file_name"].partition(".")[0]
            np.testing.assert_array_equal(made[key], ids[smallest], err_msg=key)
            assert labels[key] == (split, sorted(set(ids.tolist()) - {0}), True)
            overlaps += int((claims[:-1].sum(axis=0) > 1).sum())
            pixels += made[key].size
    assert pixels == sum(mask.size for mask in made.values())
    assert 0 < overlaps < 0.1 * pixels
