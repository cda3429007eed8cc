from __future__ import annotations

import numpy as np
import pytest

from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX, VOC_CLASSES, voc_ids, voc_palette


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
