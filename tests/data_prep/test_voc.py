from __future__ import annotations

import csv
import io
import shutil
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import data_prep.voc
from data_prep.conversion import DamagedLeftOut, Output
from data_prep.shard_writer import verify
from data_prep.voc import VocFolder, _items, _sbd_keys, convert, read_list, train_aug_keys
from slrnet.cli.main import main
from slrnet.data.catalog import VOC_CLASSES, voc_palette
from slrnet.data.manifest import DataError, load_dataset
from tests.fixtures.shards import table_of

from .conftest import CAT, DOG, PERSON, VOID, VocBuilder, decode, stripes

LISTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "lists"


def _labels(folder: Path) -> dict[str, list[str]]:
    """Names of the image labels by key, from the manifest."""
    dataset = load_dataset(folder)
    return {
        row["key"]: [dataset.info.classes[label] for label in row["classes"]]
        for row in table_of(dataset.folder).to_pylist()
    }


def _subsets(folder: Path) -> dict[str, list[str]]:
    return {row["key"]: row["subsets"] for row in table_of(folder).to_pylist()}


def _file(folder: Path, name: str) -> bytes:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            if name in archive.getnames():
                content = archive.extractfile(name)
                assert content is not None
                return content.read()
    raise KeyError(name)


# What is made.


def test_splits_labels_and_classes(voc: VocBuilder, tmp_path: Path) -> None:
    info = convert(voc.root, Output(tmp_path / "out"))
    assert info.classes == VOC_CLASSES
    assert info.counts == {"train": 3, "val": 2}
    assert _labels(tmp_path / "out") == {
        "t1": ["cat"],
        "t2": ["cat", "dog"],
        "t3": ["person"],
        "v1": ["dog"],
        "v2": ["person"],
    }
    assert _subsets(tmp_path / "out") == {
        "t1": ["voc_train"],
        "t2": ["voc_train"],
        "t3": ["voc_train"],
        "v1": [],
        "v2": [],
    }
    assert verify(tmp_path / "out") == []


def test_files_are_copied_as_they_are(voc: VocBuilder, tmp_path: Path) -> None:
    convert(voc.root, Output(tmp_path / "out"))
    assert _file(tmp_path / "out", "t2.jpg") == (voc.root / "JPEGImages" / "t2.jpg").read_bytes()
    assert _file(tmp_path / "out", "t2.png") == (voc.root / "SegmentationClass" / "t2.png").read_bytes()


def test_image_labels_come_from_the_annotation_and_not_from_the_mask(voc: VocBuilder, tmp_path: Path) -> None:
    voc.annotation("t1", ["person", "cat", "person"])
    voc.annotation("t2", [])
    convert(voc.root, Output(tmp_path / "out"))
    labels = _labels(tmp_path / "out")
    assert labels["t1"] == ["cat", "person"]
    assert labels["t2"] == []
    assert labels["t3"] == ["person"]  # has no annotation


def test_subset_of_classes_gets_new_ids_and_keeps_names_and_colors(voc: VocBuilder, tmp_path: Path) -> None:
    voc.annotation("t1", ["cat", "person"])
    info = convert(voc.root, Output(tmp_path / "out"), classes=["dog", "cat"])
    assert info.classes == ("background", "cat", "dog")  # in the order of VOC's ids, whatever the order asked for
    assert info.palette == ((0, 0, 0), (64, 0, 0), (64, 0, 128))
    assert _labels(tmp_path / "out") == {"t1": ["cat"], "t2": ["cat", "dog"], "v1": ["dog"]}  # t3 and v2 are left out
    mask = _file(tmp_path / "out", "t2.png")
    np.testing.assert_array_equal(decode(mask), stripes([1, 0, 2]))
    with Image.open(io.BytesIO(mask)) as image:
        assert tuple(image.convert("RGB").getpixel((11, 0)) or ()) == (64, 0, 128)  # type: ignore[arg-type]


def test_pixels_of_other_classes_become_void(voc: VocBuilder, tmp_path: Path) -> None:
    voc.mask("t2", [PERSON, 0, DOG, VOID])
    convert(voc.root, Output(tmp_path / "out"), classes=["dog"])
    np.testing.assert_array_equal(decode(_file(tmp_path / "out", "t2.png")), stripes([VOID, 0, 1, VOID]))


def test_labels_file_replaces_vocs_classes(voc: VocBuilder, tmp_path: Path) -> None:
    names = ["background", *(f"thing{n}" for n in range(1, 16))]
    (voc.root / "labels.txt").write_text("\n".join(names) + "\n\n")
    info = convert(voc.root, Output(tmp_path / "out"))
    assert info.classes == tuple(names)
    assert _labels(tmp_path / "out")["t2"] == ["thing8", "thing12"]


def test_named_subsets_mark_their_images(voc: VocBuilder, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("t3\nv1\n")
    convert(voc.root, Output(tmp_path / "out", subsets={"some": tmp_path / "some.txt"}))
    assert _subsets(tmp_path / "out") == {
        "t1": ["voc_train"],
        "t2": ["voc_train"],
        "t3": ["some", "voc_train"],
        "v1": ["some"],
        "v2": [],
    }


def test_grey_masks_are_read_like_indexed_ones(voc: VocBuilder, tmp_path: Path) -> None:
    voc.mask("t1", [0, DOG], mode="L")
    convert(voc.root, Output(tmp_path / "out"))
    assert _labels(tmp_path / "out")["t1"] == ["dog"]


@pytest.mark.slow
def test_output_is_byte_identical_for_two_processes(voc: VocBuilder, tmp_path: Path) -> None:
    for processes in (1, 2):
        output = Output(tmp_path / str(processes), samples_per_shard=1, processes=processes)
        convert(voc.root, output, classes=["cat", "dog"])
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "2").iterdir())
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


# SBD and train_aug.


def _write_mat(folder: Path, key: str, ids: list[int]) -> None:
    """One of SBD's class masks: a struct GTcls with the mask, boundaries and the classes present."""
    folder.mkdir(parents=True, exist_ok=True)
    present = [[label] for label in sorted(set(ids) - {0})]
    content = {"Segmentation": stripes(ids), "Boundaries": np.zeros((20, 1)), "CategoriesPresent": present}
    savemat(folder / f"{key}.mat", {"GTcls": content})


def _with_sbd_mats(voc: VocBuilder, folder: Path) -> Path:
    """SBD's release with masks of one new image, one of VOC's train list and one of VOC's val list."""
    voc.image("s1")
    _write_mat(folder / "dataset" / "cls", "s1", [DOG, 0, PERSON])
    _write_mat(folder / "dataset" / "cls", "t1", [DOG])
    _write_mat(folder / "dataset" / "cls", "v1", [CAT])
    (folder / "dataset" / "train.txt").write_text("t1\nv1\n")
    (folder / "dataset" / "val.txt").write_text("s1\n")
    return folder


def test_sbd_release_adds_its_images_but_none_of_val(voc: VocBuilder, tmp_path: Path) -> None:
    sbd = _with_sbd_mats(voc, tmp_path / "sbd")
    info = convert(voc.root, Output(tmp_path / "out"), sbd=sbd)
    assert info.counts == {"train": 4, "val": 2}
    labels = _labels(tmp_path / "out")
    assert labels["s1"] == ["dog", "person"]
    assert labels["t1"] == ["cat"]  # the official mask goes before SBD's
    np.testing.assert_array_equal(decode(_file(tmp_path / "out", "s1.png")), stripes([DOG, 0, PERSON]))
    assert _subsets(tmp_path / "out")["s1"] == []
    assert _subsets(tmp_path / "out")["t1"] == ["voc_train"]


def test_sbd_masks_are_remapped_too(voc: VocBuilder, tmp_path: Path) -> None:
    sbd = _with_sbd_mats(voc, tmp_path / "sbd")
    convert(voc.root, Output(tmp_path / "out"), sbd=sbd, classes=["dog"])
    np.testing.assert_array_equal(decode(_file(tmp_path / "out", "s1.png")), stripes([1, 0, VOID]))


@pytest.mark.parametrize("inside", ["SegmentationClassAug", "."])
def test_sbd_as_png_folder(voc: VocBuilder, tmp_path: Path, inside: str) -> None:
    voc.image("s1")
    (tmp_path / "sbd" / inside).mkdir(parents=True)
    for key, ids in {"s1": [DOG], "v1": [CAT]}.items():
        shutil.move(voc.mask(key, ids, folder="Temporary"), tmp_path / "sbd" / inside / f"{key}.png")
    assert convert(voc.root, Output(tmp_path / "out"), sbd=tmp_path / "sbd").counts == {"train": 4, "val": 2}
    assert _labels(tmp_path / "out")["s1"] == ["dog"]
    assert _labels(tmp_path / "out")["v1"] == ["dog"]  # from SegmentationClass


def test_segmentation_class_aug_within_the_root_is_found(voc: VocBuilder, tmp_path: Path) -> None:
    voc.image("s1")
    voc.mask("s1", [PERSON], folder="SegmentationClassAug")
    convert(voc.root, Output(tmp_path / "out"))
    assert _labels(tmp_path / "out")["s1"] == ["person"]


def test_train_aug_list_goes_before_the_rule(voc: VocBuilder, tmp_path: Path) -> None:
    voc.image("s1")
    voc.image("s2")
    voc.mask("s1", [PERSON], folder="SegmentationClassAug")
    voc.mask("s2", [PERSON], folder="SegmentationClassAug")
    voc.split("train_aug", ["/JPEGImages/t1.jpg /SegmentationClassAug/t1.png", "s2", ""])
    convert(voc.root, Output(tmp_path / "out"))
    assert _subsets(tmp_path / "out") == {"t1": ["voc_train"], "s2": [], "v1": [], "v2": []}


def test_training_on_validation_images_is_refused(voc: VocBuilder, tmp_path: Path) -> None:
    voc.split("train_aug", ["t1", "v2"])
    with pytest.raises(DataError, match=r"1 image\(s\) are both in the training list and in val.txt, such as \['v2'\]"):
        convert(voc.root, Output(tmp_path / "out"))


def test_rule_of_train_aug_on_small_lists() -> None:
    assert train_aug_keys(["b", "a"], ["v"], ["c", "a", "v"]) == ["a", "b", "c"]


@pytest.fixture(scope="module")
def lists() -> dict[str, list[str]]:
    if not LISTS.is_dir():
        pytest.skip("needs the lists in ../shared/data/lists, which are not part of the project")
    return {name: read_list(LISTS / f"voc2012_{name}.txt") for name in ("train", "val", "train_aug")}


def test_rule_of_train_aug_gives_the_published_list(lists: dict[str, list[str]]) -> None:
    # SBD has masks of VOC's train and val images as well as of others.
    sbd = {*lists["train_aug"], *lists["val"]}
    keys = train_aug_keys(lists["train"], lists["val"], sorted(sbd))
    assert len(keys) == 10_582
    assert keys == sorted(lists["train_aug"])


def test_incomplete_sbd_with_vocs_full_lists_is_refused(lists: dict[str, list[str]]) -> None:
    sbd = sorted({*lists["train_aug"], *lists["val"]} - set(lists["train"]))
    with pytest.raises(DataError, match=r"make 10581 images, not the 10582 of train_aug.*train_aug.txt"):
        train_aug_keys(lists["train"], lists["val"], sbd[1:] if sbd[0] not in lists["val"] else sbd[:-1])


# Folders as other tools make them.


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_masks_in_vocs_colors(voc: VocBuilder, tmp_path: Path, mode: str) -> None:
    path = voc.mask("t2", [CAT, 0, DOG, VOID])
    Image.open(path).convert(mode).save(path)
    convert(voc.root, Output(tmp_path / "out"))
    np.testing.assert_array_equal(decode(_file(tmp_path / "out", "t2.png")), stripes([CAT, 0, DOG, VOID]))
    assert _labels(tmp_path / "out")["t2"] == ["cat", "dog"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_labels_file_in_any_encoding(voc: VocBuilder, tmp_path: Path, encoding: str, end: str) -> None:
    names = ["background", *(f"größe {n}" for n in range(1, 16))]
    (voc.root / "labels.txt").write_bytes((end.join(names) + end).encode(encoding))
    voc.annotation("t1", ["größe 8"])
    assert convert(voc.root, Output(tmp_path / "out"), classes=["größe 8"]).classes == ("background", "größe 8")
    assert _labels(tmp_path / "out") == {"t1": ["größe 8"], "t2": ["größe 8"]}


@pytest.mark.parametrize(("present", "absent"), [("val", "train"), ("train", "val")])
def test_one_list_is_enough(
    voc: VocBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str], present: str, absent: str
) -> None:
    (voc.root / "ImageSets" / "Segmentation" / f"{absent}.txt").unlink()
    info = convert(voc.root, Output(tmp_path / "out"))
    assert info.counts == {present: 2 if present == "val" else 3}
    with pytest.raises(DataError, match=f"has no split '{absent}'; it has: {present}"):
        load_dataset(tmp_path / "out").split(absent)
    said = "train: 0 images (no train.txt: a data set to evaluate on, which no training takes); val: 2 images"
    assert (said in capsys.readouterr().out) is (present == "val")


def test_no_list_at_all(voc: VocBuilder, tmp_path: Path) -> None:
    lists = voc.root / "ImageSets" / "Segmentation"
    (lists / "val.txt").unlink()
    (lists / "train.txt").rename(lists / "trainval.txt")
    _refused(voc, tmp_path / "out", r"has neither train.txt nor val.txt, only \['trainval.txt'\]; name the lists so")
    (lists / "trainval.txt").rename(lists / "default.txt")
    assert convert(voc.root, Output(tmp_path / "out")).counts == {"train": 3}


def test_lists_of_any_form(voc: VocBuilder, tmp_path: Path) -> None:
    for old, new in {"t1": "IMG_1.rf.0a", "t2": "my photo 1", "t3": "cafe\u0301"}.items():
        (voc.root / "JPEGImages" / f"{old}.jpg").rename(voc.root / "JPEGImages" / f"{new}.jpg")
        (voc.root / "SegmentationClass" / f"{old}.png").rename(voc.root / "SegmentationClass" / f"{new}.png")
    text = "JPEGImages\\IMG_1.rf.0a.jpg\r\nmy photo 1\r\n\r\ncaf\u00e9 1\r\n"
    (voc.root / "ImageSets" / "Segmentation" / "train.txt").write_bytes(text.encode("utf-16"))
    voc.split("val", ["JPEGImages/v1.jpg SegmentationClass/v1.png", "v2  1"])
    (tmp_path / "some.txt").write_bytes("my photo 1.jpg\r\nv1\r\n".encode("utf-8-sig"))
    convert(voc.root, Output(tmp_path / "out", subsets={"some": tmp_path / "some.txt"}))
    assert _labels(tmp_path / "out") == {
        "IMG_1_rf_0a": ["cat"],
        "my_photo_1": ["cat", "dog"],
        "caf\u00e9": ["person"],
        "v1": ["dog"],
        "v2": ["person"],
    }
    assert _subsets(tmp_path / "out")["my_photo_1"] == ["some", "voc_train"]


def test_images_of_other_suffixes(voc: VocBuilder, tmp_path: Path) -> None:
    images = voc.root / "JPEGImages"
    (images / "t1.jpg").rename(images / "t1.JPG")
    Image.new("RGB", (12, 8)).save(images / "t2.png")
    (images / "t2.jpg").unlink()
    convert(voc.root, Output(tmp_path / "out"))
    assert _file(tmp_path / "out", "t1.jpg") == (images / "t1.JPG").read_bytes()
    assert Image.open(io.BytesIO(_file(tmp_path / "out", "t2.jpg"))).size == (12, 8)


# Refusals: each names file, value and remedy, and nothing is written.


def _refused(voc: VocBuilder, out: Path, message: str, **options: Any) -> None:
    shared = {name: options.pop(name) for name in ("subsets", "shards") if name in options}
    with pytest.raises(DataError, match=message):
        convert(voc.root, Output(out, **shared), **options)
    assert not out.exists()
    assert not list(out.parent.glob("*.partial"))


def test_masks_in_other_colors(voc: VocBuilder, tmp_path: Path) -> None:
    path = voc.mask("t1", [0, CAT])
    pixels = np.array(Image.open(path).convert("RGB"))
    pixels[3, 4] = (1, 2, 3)
    Image.fromarray(pixels).save(path)
    message = r"SegmentationClass/t1.png has 1 pixel.* that the palette lacks, first #010203 at row 3, .*; take"
    _refused(voc, tmp_path / "out", message)
    Image.new("RGBA", (12, 8)).save(path)
    _refused(voc, tmp_path / "out", r"t1.png has transparent pixels")


def test_ids_outside_the_classes(voc: VocBuilder, tmp_path: Path) -> None:
    voc.mask("t1", [0, 21, 33])
    _refused(voc, tmp_path / "out", r"t1.png has ids \[21, 33\]; allowed are 0 to 20 and 255 \(void\)")


def test_mask_and_image_of_different_size(voc: VocBuilder, tmp_path: Path) -> None:
    voc.image("v1", size=(12, 9))
    _refused(voc, tmp_path / "out", r"v1.png is 12x8 pixels, its image v1.jpg 12x9")


def test_missing_image(voc: VocBuilder, tmp_path: Path) -> None:
    (voc.root / "JPEGImages" / "t2.jpg").unlink()
    _refused(voc, tmp_path / "out", r"JPEGImages/t2.jpg is missing; fetch it again, or drop it from the list")


def test_missing_mask(voc: VocBuilder, tmp_path: Path) -> None:
    (voc.root / "SegmentationClass" / "t2.png").unlink()
    _refused(voc, tmp_path / "out", r"no mask of 't2': neither .*SegmentationClass/t2.png; give SBD's masks with --sbd")


def test_truncated_image(voc: VocBuilder, tmp_path: Path) -> None:
    path = voc.root / "JPEGImages" / "t2.jpg"
    Image.effect_noise((200, 200), 80).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DamagedLeftOut, match=r"t2.jpg cannot be read: .*truncated.*fetch it again") as left_out:
        convert(voc.root, Output(tmp_path / "out"))
    assert left_out.value.info.counts == load_dataset(tmp_path / "out").info.counts == {"train": 2, "val": 2}


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClass"])
def test_unreadable_files(voc: VocBuilder, tmp_path: Path, folder: str) -> None:
    (path,) = (voc.root / folder).glob("t3.*")
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(DamagedLeftOut, match=rf"{folder}/{path.name} cannot be read.*fetch it again"):
        convert(voc.root, Output(tmp_path / "out"))


def test_image_that_is_no_jpeg_becomes_one(voc: VocBuilder, tmp_path: Path) -> None:
    Image.new("RGB", (12, 8), (9, 200, 9)).save(voc.root / "JPEGImages" / "t1.jpg", format="PNG")
    convert(voc.root, Output(tmp_path / "out"))
    with Image.open(io.BytesIO(_file(tmp_path / "out", "t1.jpg"))) as image:
        assert (image.format, image.size) == ("JPEG", (12, 8))
        assert np.abs(np.asarray(image).astype(int) - (9, 200, 9)).max() <= 3


def test_names_that_become_one_key(voc: VocBuilder, tmp_path: Path) -> None:
    for name in ("t.4", "t 4"):
        voc.image(name)
        voc.mask(name, [CAT])
    voc.split("train", ["t1", "t.4", "t 4"])
    _refused(voc, tmp_path / "out", r"key 't_4' occurs twice in split 'train'")


def test_more_shards_than_samples(voc: VocBuilder, tmp_path: Path) -> None:
    _refused(voc, tmp_path / "out", r"split 'val' has 2 samples, fewer than the 3 shards", shards=3)


def test_damaged_mat_file(voc: VocBuilder, tmp_path: Path) -> None:
    sbd = _with_sbd_mats(voc, tmp_path / "sbd")
    savemat(sbd / "dataset" / "cls" / "s1.mat", {"other": 1})
    _refused(voc, tmp_path / "out", r"s1.mat cannot be read as one of SBD's class masks", sbd=sbd)
    (sbd / "dataset" / "cls" / "s1.mat").write_bytes(b"garbage")
    _refused(voc, tmp_path / "out", r"s1.mat cannot be read as one of SBD's class masks", sbd=sbd)


def test_annotation_with_an_unknown_class_or_no_xml(voc: VocBuilder, tmp_path: Path) -> None:
    path = voc.annotation("t1", ["cat", "unicorn"])
    _refused(voc, tmp_path / "out", r"t1.xml names the classes \['unicorn'\]")
    path.write_text("<annotation><object>")
    _refused(voc, tmp_path / "out", r"t1.xml is not readable XML")


def test_all_problems_are_reported_at_once(voc: VocBuilder, tmp_path: Path) -> None:
    (voc.root / "JPEGImages" / "t1.jpg").unlink()
    voc.mask("v2", [99])
    with pytest.raises(DataError) as caught:
        convert(voc.root, Output(tmp_path / "out"))
    assert str(caught.value).startswith("2 problem(s) in ")
    assert "t1.jpg is missing" in str(caught.value)
    assert "v2.png has ids [99]" in str(caught.value)


def test_unknown_classes(voc: VocBuilder, tmp_path: Path) -> None:
    _refused(
        voc, tmp_path / "out", r"--classes has \['cats'\]; the classes of this folder are aeroplane", classes=["cats"]
    )
    _refused(voc, tmp_path / "out", r"--classes is empty", classes=[])


def test_classes_that_no_image_shows(voc: VocBuilder, tmp_path: Path) -> None:
    _refused(voc, tmp_path / "out", "no sample to write; check the list files and --classes", classes=["sofa"])


def test_damaged_images_can_be_left_out_by_name(
    voc: VocBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (voc.root / "JPEGImages" / "t2.jpg").write_bytes(b"<html>404</html>")
    voc.mask("t1", [99])
    info = convert(voc.root, Output(tmp_path / "out", skip_damaged=True))
    assert info.counts == {"train": 1, "val": 2}
    assert info.made_by.endswith("--skip-damaged")
    printed = capsys.readouterr().err
    assert "left out: " in printed
    assert "t2.jpg cannot be read" in printed
    assert "t1.png has ids [99]" in printed


def test_subset_with_strange_images(voc: VocBuilder, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("t1\nt9\n")
    subsets = {"some": tmp_path / "some.txt"}
    _refused(voc, tmp_path / "out", r"lists 1 image\(s\) that are in no split, such as \['t9'\]", subsets=subsets)


def test_folder_that_is_not_voc(voc: VocBuilder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder JPEGImages; --root is the folder VOC2012 within VOCdevkit"):
        convert(voc.root.parent, Output(tmp_path / "out"))


def test_sbd_folder_without_masks(voc: VocBuilder, tmp_path: Path) -> None:
    (tmp_path / "sbd").mkdir()
    _refused(voc, tmp_path / "out", "sbd holds no masks of SBD; it must hold", sbd=tmp_path / "sbd")


def test_labels_file_without_background(voc: VocBuilder, tmp_path: Path) -> None:
    (voc.root / "labels.txt").write_text("cat\ndog\n")
    _refused(voc, tmp_path / "out", r"labels.txt has 2 names .*'background' first")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a\nb -1\n", r"line 2: 'b -1' has more than an image id"),
        (None, "cannot read the list of images"),
    ],
)
def test_list_files_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_list(path)


# Command line.


def _main(*words: str) -> int:
    return main(["prepare", "voc", *words, "--processes", "1"])


def test_command_makes_shards_that_its_own_record_makes_again(voc: VocBuilder, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("t2\n")
    options = ["--classes", "cat,dog", "--subset", f"some={tmp_path / 'some.txt'}", "--shards", "1", "--seed", "3"]
    assert _main("--root", str(voc.root), "--out", str(tmp_path / "first"), *options) == 0
    first = load_dataset(tmp_path / "first")
    program, script, *recorded = first.info.made_by.split()
    assert (program, script) == ("python", "data_prep/voc.py")
    assert _main(*recorded, "--out", str(tmp_path / "second")) == 0
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_command_refuses_bad_options(voc: VocBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for words, message in (
        (["--subset", "half"], "--subset 'half' is not NAME=LISTFILE"),
        (["--subset", "voc_train=x"], "--subset voc_train is taken"),
        (["--classes", "cats"], "--classes has ['cats']"),
    ):
        assert _main("--root", str(voc.root), *out, *words) == 2
        assert message in capsys.readouterr().err
    assert _main(*out) == 2
    assert "--root is missing" in capsys.readouterr().err


def test_download_goes_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(root: str, **options: Any) -> None:
        assert options == {"year": "2012", "image_set": "train", "download": True}
        raise URLError(f"no network for {root}")

    # Stands in for the real one, whose import alone takes seconds.
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(VOCSegmentation=fetch))
    root = tmp_path / "VOCdevkit" / "VOC2012"
    words = ["--out", str(tmp_path / "out"), "--download"]
    assert _main("--root", str(root), *words) == 2
    text = capsys.readouterr().err
    assert f"no network for {tmp_path}>" in text
    assert "fetch VOCtrainval_11-May-2012.tar by hand" in text
    assert _main("--root", str(tmp_path / "elsewhere"), *words) == 2
    assert "must end in that" in capsys.readouterr().err


def test_download_leaves_a_folder_that_is_there(
    voc: VocBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_prep.voc, "convert", lambda *_, **__: load_dataset(tmp_path / "done").info)
    convert(voc.root, Output(tmp_path / "done"))
    assert _main("--root", str(voc.root), "--out", str(tmp_path / "out"), "--download") == 0
    assert "nothing to download" in capsys.readouterr().out


# Photographs.


def test_photographs(voc6: Path, tmp_path: Path) -> None:
    """Six real images: labels as published, sizes as in the files, masks remapped value for value."""
    root = tmp_path / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / name).symlink_to(voc6 / name)
    chosen = {}
    for split in ("train_aug", "train", "val"):
        chosen[split] = read_list(voc6 / "ImageSets" / "Segmentation" / f"{split}.txt")[:3]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(chosen[split]))
    names = ["cat", "cow", "dog", "horse", "person", "sheep"]
    info = convert(root, Output(tmp_path / "out"), classes=names)
    assert info.classes == ("background", *names)
    assert info.counts == {"train": 3, "val": 3}
    with (LISTS / "voc2012_image_labels.csv").open() as file:
        published = {
            row["image_id"]: [int(label) for label in row["class_ids"].split()] for row in csv.DictReader(file)
        }
    new_ids = np.full(256, VOID, dtype=np.uint8)
    new_ids[[0, 8, 10, 12, 13, 15, 17]] = range(7)
    for row in table_of(tmp_path / "out").to_pylist():
        key = row["key"]
        assert row["classes"] == [int(new_ids[label]) for label in published[key]]
        with Image.open(voc6 / "JPEGImages" / f"{key}.jpg") as image:
            assert (row["width"], row["height"]) == image.size
        with Image.open(voc6 / "SegmentationClass" / f"{key}.png") as image:
            np.testing.assert_array_equal(decode(_file(tmp_path / "out", f"{key}.png")), new_ids[np.asarray(image)])
    colors = voc_palette()[[0, 8, 10, 12, 13, 15, 17]]
    np.testing.assert_array_equal(info.palette, colors)


LISTED_BUT_NOT_IN_THE_MASK = {
    "bicycle": "2008_008232",
    "boat": "2008_002709",
    "bottle": "2010_003643",
    "bus": "2008_005168",
    "car": "2008_004827 2008_007163 2008_008322 2011_001080",
    "car cow": "2010_001112",
    "chair": "2008_005365 2010_000244 2010_001012 2010_001385 2010_003032 2010_004002",
    "chair person": "2010_001305",
    "chair pottedplant": "2010_002303",
    "chair sofa": "2008_001550",
    "chair tvmonitor": "2008_002638",
    "dog": "2010_000327 2010_004030",
    "person": (
        "2008_000119 2008_003447 2008_004545 2008_004629 2008_008121 2010_000461 2010_000838 2010_001076 2010_002449 "
        "2010_002771 2010_003321 2010_003351"
    ),
    "sofa": (
        "2008_001816 2008_003286 2008_003430 2008_003521 2008_005652 2008_005979 2010_002789 2010_003569 2010_004327 "
        "2010_004425 2010_005794 2010_005847 2010_005948 2010_006079 2011_000981"
    ),
}
"""Classes that the published labels name and the mask of the same image does not show: 48 of voc6's 1,381 images."""


def test_labels_of_all_photographs_equal_the_published_ones_but_for_these(voc6: Path) -> None:
    folder = VocFolder.find(voc6, sbd=None, classes=None)
    items = _items(folder)
    train_aug = {item.key for item in items if item.split == "train"}
    # The rule, from the lists of VOC and the masks there are, gives the list that lies in the folder.
    official = {split: read_list(folder.list_file(split)) for split in ("train", "val")}
    assert train_aug == set(train_aug_keys(official["train"], official["val"], _sbd_keys(folder)))
    with (LISTS / "voc2012_image_labels.csv").open() as file:
        published = {
            row["image_id"]: {int(label) for label in row["class_ids"].split()} for row in csv.DictReader(file)
        }
    differences: dict[str, str] = {}
    for item in items:
        computed = set(folder.scan(item).classes or ())
        assert computed <= published[item.key], item.key
        for label in sorted(published[item.key] - computed):
            differences[item.key] = f"{differences.get(item.key, '')} {VOC_CLASSES[label]}".strip()
    expected = {key: names for names, keys in LISTED_BUT_NOT_IN_THE_MASK.items() for key in keys.split()}
    assert differences == expected
    assert (len(items), len(differences)) == (1381, 48)


def test_published_labels_cover_the_published_lists(lists: dict[str, list[str]]) -> None:
    with (LISTS / "voc2012_image_labels.csv").open() as file:
        labeled = {row["image_id"] for row in csv.DictReader(file)}
    assert labeled == {*lists["train_aug"], *lists["val"]}
