from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX, VOC_CLASSES, class_keys, voc_ids, voc_palette
from slrnet.tracking.protocol import clean_key


def test_voc_classes_have_vocs_ids() -> None:
    assert len(VOC_CLASSES) == 21
    assert VOC_CLASSES[0] == BACKGROUND
    assert [VOC_CLASSES.index(name) for name in ("aeroplane", "cat", "dog", "person", "tvmonitor")] == [
        1,
        8,
        12,
        15,
        20,
    ]


def test_palette_has_the_colours_that_voc_publishes() -> None:
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    published = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        4: (0, 0, 128),
        7: (128, 128, 128),
        8: (64, 0, 0),
        12: (64, 0, 128),
        15: (192, 128, 128),
        20: (0, 64, 128),
        IGNORE_INDEX: (224, 224, 192),
    }
    assert {label: tuple(palette[label].tolist()) for label in published} == published


def test_palette_tells_all_ids_apart() -> None:
    assert len(np.unique(voc_palette(), axis=0)) == 256


def test_ids_of_vocs_classes() -> None:
    table = voc_ids(("background", "tvmonitor", "cat"))
    assert table[[0, 1, 2, 3, 255]].tolist() == [0, 20, 8, 255, 255]
    with pytest.raises(ValueError, match=r"zebra: no class of PASCAL VOC; it has background, aeroplane"):
        voc_ids(("background", "zebra"))


NAMES = {
    "other scripts": (("background", "猫", "狗", "Hund"), ("background", "class_1", "class_2", "Hund")),
    "a name that is another's key": (("background", "猫", "class_1"), ("background", "class_1_", "class_1")),
    "letter case": (("background", "Cat", "cat", "Background"), ("background", "Cat", "cat_2", "Background_3")),
    "accents": (("background", "café", "cafe", "cafè"), ("background", "cafe_1", "cafe", "cafe_3")),
    "punctuation": (("background", "a?b", "a!b", "a_b", "a b"), ("background", "a_b_1", "a_b_2", "a_b", "a b")),
    "slashes and paths": (("background", "a/b", "a-b", "../x"), ("background", "a-b_1", "a-b", "..-x")),
    "signs alone": (("background", "🐶", "..", " "), ("background", "class_1", "class_2", "class_3")),
    "same beginning": (("background", 120 * "x", 120 * "x" + "y"), ("background", 100 * "x", 100 * "x" + "_2")),
}


@pytest.mark.parametrize(("classes", "keys"), NAMES.values(), ids=NAMES)
def test_class_keys_tell_all_classes_apart(classes: tuple[str, ...], keys: tuple[str, ...]) -> None:
    assert class_keys(classes) == keys


def test_plain_names_are_their_own_keys() -> None:
    assert class_keys((*VOC_CLASSES, "traffic light", "T-shirt", "v1.5")) == (
        *VOC_CLASSES,
        "traffic light",
        "T-shirt",
        "v1.5",
    )


@given(st.lists(st.text(max_size=120), min_size=2, max_size=6, unique=True))
def test_mlflow_takes_every_class_key(classes: list[str]) -> None:
    keys = class_keys(classes)
    assert len({key.casefold() for key in keys}) == len(classes)
    assert all(re.fullmatch(r"[A-Za-z0-9_\-. ]{1,120}", key) for key in keys)
    assert [clean_key(f"pseudo_mask/iou/{key}") for key in keys] == [f"pseudo_mask/iou/{key}" for key in keys]
