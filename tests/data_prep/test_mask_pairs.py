"""Which mask belongs to which image."""

from __future__ import annotations

import unicodedata

import pytest

from data_prep.mask_pairs import masks_among, pair_masks


def pairs(images: list[str], masks: list[str]) -> tuple[dict[str, str], list[str]]:
    found, strangers = pair_masks({image: image for image in images}, masks)
    return found, strangers


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a/b.v2.jpg", "a/b.v2.png"),
        ("a.jpg", "a.PNG"),
        ("a.jpg", "a.tif"),
        ("a.jpg", "a.jpg.png"),
        ("a.jpg", "a_mask.png"),
        ("a.jpg", "a-mask.PNG"),
        ("a.jpg", "a.mask.png"),
        ("a.jpg", "aMask.png"),
        ("a.jpg", "a_seg.png"),
        ("a.jpg", "mask_a.png"),
        ("a.jpg", "a_segmentation.bmp"),
        ("a.jpg", "a.jpg_mask.png"),
        ("image_7.jpg", "mask_7.png"),
        ("7_sat.jpg", "7_mask.png"),
        ("x_000019_leftImg8bit.png", "x_000019_gtFine_labelIds.png"),
        ("IMG_1.jpg", "img_1.png"),
        ("IMG_1.jpg", "IMG-1.png"),
        ("train/a.jpg", "a.png"),
        ("train/images/a.jpg", "train/masks/a.png"),
        ("a.jpg", "deep/a_mask.png"),
        (unicodedata.normalize("NFD", "caf\u00e9.jpg"), unicodedata.normalize("NFC", "caf\u00e9.png")),
    ],
)
def test_one_mask_of_one_image(image: str, mask: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = {"other.jpg": "other.png", "IMG_2.jpg": "IMG_2.png"}
    found, strangers = pairs([image, *others], [mask, *others.values()])
    assert found == {image: mask, **others}
    assert strangers == []
    said = capsys.readouterr().out
    assert (f"{mask} for {image}" in said) == (mask != "a/b.v2.png")


@pytest.mark.parametrize(
    ("images", "masks", "left"),
    [
        (["a.jpg"], ["a.png", "a_mask.png"], ["a_mask.png"]),
        (["a.jpg"], ["a.tif", "a.bmp"], ["a.bmp", "a.tif"]),
        (["cats/1.jpg", "dogs/1.jpg"], ["1.png"], ["1.png"]),
        (["cats/1.jpg", "dogs/1.jpg"], ["cats/1.png", "birds/1.png"], ["birds/1.png"]),
        (["A.jpg", "a.jpg"], ["a_Mask.png", "A_mask.png", "a.png"], ["a_Mask.png"]),
        (["a.jpg"], ["b.png"], ["b.png"]),
        (["a.jpg"], ["a_0.png", "a_1.png"], ["a_0.png", "a_1.png"]),
    ],
)
def test_what_could_be_wrong_is_left(images: list[str], masks: list[str], left: list[str]) -> None:
    found, strangers = pairs(images, masks)
    assert strangers == left
    assert sorted([*found.values(), *left]) == sorted(masks)


def test_masks_beside_their_images() -> None:
    paths = ["a.jpg", "a.png", "b.png", "b_mask.png", "c_image.png", "c_mask.png", "d.png", "gas_mask.png", "e.tif"]
    assert masks_among(paths) == {"a.png", "b_mask.png", "c_mask.png"}
    folders = ["train/images/a.png", "train/masks/a.png", "val/images/a.jpg", "val/masks/a_mask.png", "masks/b.jpg"]
    assert masks_among(folders) == {"train/masks/a.png", "val/masks/a_mask.png"}
    images = {path: path for path in folders if "images" in path}
    found, strangers = pair_masks(images, sorted(masks_among(folders)))
    assert found == dict(zip(images, ("train/masks/a.png", "val/masks/a_mask.png"), strict=True))
    assert not strangers
