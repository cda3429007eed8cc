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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data_prep.coco
from data_prep.coco import _elements, _JsonReader, class_mask, convert, read_annotations
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


def test_all_forms_of_segmentations_cover_the_same_pixels() -> None:
    from pycocotools import mask as coco_mask

    inside = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    inside[3:8, 5:11] = 1
    packed = coco_mask.encode(np.asfortranarray(inside))
    packed["counts"] = packed["counts"].decode()
    forms = ([box(5, 3, 11, 8)], [box(5, 3, 8, 8), box(8, 3, 11, 8)], runs(inside), packed)
    for form in forms:
        mask = class_mask([{"id": 1, "category_id": 4, "segmentation": form}], HEIGHT, WIDTH, {4: 9})
        np.testing.assert_array_equal(mask, 9 * inside)


def test_crowds_follow_the_rule_of_areas_and_ties_the_rule_of_ids() -> None:
    def annotation(number: int, category: int, polygon: list[float], crowd: int = 0) -> dict[str, Any]:
        return {"id": number, "category_id": category, "segmentation": [polygon], "iscrowd": crowd}

    whole, half = box(0, 0, 20, 12), box(0, 0, 10, 12)
    small_crowd = class_mask([annotation(1, 4, whole), annotation(2, 4, half, crowd=1)], HEIGHT, WIDTH, {4: 1})
    assert (small_crowd[:, :10] == 255).all()
    assert (small_crowd[:, 10:] == 1).all()
    large_crowd = class_mask([annotation(1, 4, whole, crowd=1), annotation(2, 4, half)], HEIGHT, WIDTH, {4: 1})
    assert (large_crowd[:, :10] == 1).all()
    tie = [annotation(5, 4, half), annotation(2, 6, half)]
    assert (class_mask(tie, HEIGHT, WIDTH, {4: 1, 6: 2})[:, :10] == 1).all()


def test_polygons_of_less_than_three_points_cover_nothing(coco: CocoBuilder, tmp_path: Path) -> None:
    coco.image("train", 5, {"category_id": 7, "segmentation": [[1, 1, 9, 9]]}, {"category_id": 3, "segmentation": []})
    convert(coco.write(), Output(tmp_path / "out"))
    assert not masks(tmp_path / "out")["000000000005"].any()
    assert rows(tmp_path / "out")["000000000005"] == ("train", [1, 2], True)


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


# The reader of annotation files.


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, min_size=1, max_size=4), st.integers(1, 40), st.sampled_from([None, 2]))
def test_piecewise_reading_equals_reading_the_whole(content: dict[str, Any], chunk: int, indent: int | None) -> None:
    data = json.dumps(content, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_JsonReader, "CHUNK", chunk)
        found = list(_elements(io.BytesIO(data)))
    expected = [(name, value) for name, values in content.items() if isinstance(values, list) for value in values]
    assert len(found) == len(expected)
    for (name, start, length, _), (_, value) in zip(found, expected, strict=True):
        assert json.loads(data[start : start + length].decode("utf-8", "surrogatepass")) == value
        assert name.encode("latin-1").decode("utf-8", "surrogatepass") in content


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": 1 2}', '{"images": [{}', '{"images": [{"id": 1}]}', '{"annotations": [1]}', '{"a": [1x]}'],
)
def test_files_that_are_no_annotations_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"instances.json is no file of COCO's instance annotations .*fetch it again"):
        read_annotations(path)


# Refusals: each names file, value and remedy, and nothing is written.


def refused(coco: CocoBuilder, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        convert(coco.write(), Output(out), **options)
    assert not out.exists()


def test_options_and_folders(coco: CocoBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    refused(coco, out, r"--fraction is 1.5; allowed are shares above 0", fraction=1.5)
    refused(coco, out, r"cannot read .*instances_train2014.json", year=2014)
    with pytest.raises(DataError, match="has no annotations/instances_train2014.json or"):
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
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"annotation 2 of image 1 has a segmentation that is nei"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [81]}}, "neither polygons nor run lengths of a 20x12"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "neither polygons"),
        ({"segmentation": [["a"] * 6]}, "neither polygons"),
        ({"segmentation": None}, "neither polygons"),
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
