"""Class names and colors that data sets share: PASCAL VOC's classes, VOC's palette, and the void id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["BACKGROUND", "IGNORE_INDEX", "VOC_CLASSES", "voc_ids", "voc_palette"]

IGNORE_INDEX = 255
"""Id of void pixels: undecided, or not labeled. Never a class."""

BACKGROUND = "background"
"""Name of class 0 in every data set."""

_VOC_OBJECTS = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
VOC_CLASSES: tuple[str, ...] = (BACKGROUND, *_VOC_OBJECTS.split())
"""The 21 classes of PASCAL VOC, background first; the place in the tuple is the id in VOC's masks."""


def voc_palette() -> npt.NDArray[np.uint8]:
    """Colors of PASCAL VOC's masks, (256, 3) uint8 RGB by id.

    The bits of an id, lowest three first, go to red, green and blue in turn, from the highest bit of the color down, so
    that neighboring ids get distant colors: 0 is black, 1 is (128, 0, 0), void (255) is (224, 224, 192).
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for channel in range(3):
        for digit in range(8):
            bit = (ids >> (3 * digit + channel)) & 1
            palette[:, channel] |= (bit << (7 - digit)).astype(np.uint8)
    return palette


def voc_ids(classes: Sequence[str]) -> npt.NDArray[np.uint8]:
    """VOC's ids for the K classes of a data set, background first: (256,) uint8, void (255) beyond the classes.

    Raises:
        ValueError: a class is none of VOC's.
    """
    unknown = [name for name in classes if name not in VOC_CLASSES]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no class of PASCAL VOC; it has {', '.join(VOC_CLASSES)}")
    table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
    table[: len(classes)] = [VOC_CLASSES.index(name) for name in classes]
    return table
