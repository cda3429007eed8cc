"""A tiny folder in VOC's layout that tests change to their liking."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from slrnet.data.catalog import voc_palette

CAT, DOG, PERSON, VOID = 8, 12, 15, 255


class VocBuilder:
    """Writes images, masks, annotations and lists; every image is 12 wide and 8 high unless told otherwise."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / name).mkdir(parents=True)

    def image(self, key: str, size: tuple[int, int] = (12, 8)) -> Path:
        path = self.root / "JPEGImages" / f"{key}.jpg"
        Image.new("RGB", size, (len(key) * 20 % 256, 90, 30)).save(path)
        return path

    def mask(self, key: str, ids: Sequence[int], folder: str = "SegmentationClass", mode: str = "P") -> Path:
        path = self.root / folder / f"{key}.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(stripes(ids))
        if mode == "P":
            image.putpalette(voc_palette().tobytes())
        image.convert(mode).save(path) if mode not in ("P", "L") else image.save(path)
        return path

    def annotation(self, key: str, names: Sequence[str]) -> Path:
        (self.root / "Annotations").mkdir(exist_ok=True)
        path = self.root / "Annotations" / f"{key}.xml"
        objects = "".join(f"<object><name>{name}</name><part><name>head</name></part></object>" for name in names)
        path.write_text(f"<annotation>{objects}</annotation>")
        return path

    def split(self, name: str, keys: Sequence[str]) -> None:
        (self.root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(keys) + "\n")


def stripes(ids: Sequence[int], size: tuple[int, int] = (12, 8)) -> npt.NDArray[np.uint8]:
    """A mask (H, W) whose columns go through the ids from left to right."""
    width, height = size
    columns = np.array(ids, dtype=np.uint8)[np.arange(width) * len(ids) // width]
    return np.tile(columns, (height, 1))


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """Ids of an indexed PNG."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode in ("P", "L")
        return np.asarray(image)


@pytest.fixture
def voc(tmp_path: Path) -> VocBuilder:
    """Three training images (cat; cat and dog; person with void) and two of validation (dog; person)."""
    builder = VocBuilder(tmp_path / "VOCdevkit" / "VOC2012")
    masks = {"t1": [0, CAT], "t2": [CAT, 0, DOG], "t3": [0, VOID, PERSON, VOID], "v1": [0, DOG], "v2": [PERSON]}
    for key, ids in masks.items():
        builder.image(key)
        builder.mask(key, ids)
    builder.split("train", ["t1", "t2", "t3"])
    builder.split("val", ["v1", "v2"])
    return builder
