"""Class names, keys and colors that data sets share: PASCAL VOC's classes, VOC's palette, and the void id."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "BACKGROUND",
    "IGNORE_INDEX",
    "VOC_CLASSES",
    "class_keys",
    "mask_palette",
    "voc_ids",
    "voc_palette",
]

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


_KEY_LENGTH = 100
"""Characters of a class's name that its key keeps: MLflow allows 250 for a key with all its levels."""


def class_keys(classes: Sequence[str]) -> tuple[str, ...]:
    """Keys for the K classes of a data set in the names of metrics: letters, digits and `_ - .` or spaces, all ASCII.

    Accents go, a slash becomes `-`, other characters become `_`, and a name is cut after 100 characters. A name without
    a letter or digit left becomes `class`. A class's id is appended to such a key, and to one that an earlier class has
    already but for upper and lower case, because some tracking databases ignore case. A name that is a key as it is
    keeps it before others get it. The same names in the same order always give the same keys.
    """
    plain = [_plain_key(name) for name in classes]
    kept = {key.casefold(): place for place, key in reversed([*enumerate(plain)]) if key}
    kept |= {key.casefold(): place for place, key in reversed([*enumerate(plain)]) if key and key == classes[place]}
    taken, keys = set(kept), list[str]()
    for place, key in enumerate(plain):
        if kept.get(key.casefold()) != place:
            key = f"{key or 'class'}_{place}"
            while key.casefold() in taken:
                key += "_"
            taken.add(key.casefold())
        keys.append(key)
    return tuple(keys)


def _plain_key(name: str) -> str:
    letters = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    key = re.sub(r"[^A-Za-z0-9_\-. ]", "_", letters.replace("/", "-"))[:_KEY_LENGTH].strip()
    return key if re.search(r"[A-Za-z0-9]", key) else ""


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


def mask_palette(colors: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.uint8]:
    """Colors for a mask image, (256, 3) uint8 RGB by id: those of the classes, and VOC's for all other ids."""
    palette = voc_palette()
    palette[: len(colors)] = np.reshape(colors, (-1, 3))
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
