"""A tiny data set of the loaders' tests, noise and masks, and a copy of it that a test may damage."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.shard_writer import Sample, write_dataset
from slrnet.data.catalog import voc_palette
from slrnet.data.manifest import ShardSet, load_dataset

NUM_TRAIN, NUM_SHARDS, NUM_VAL = 23, 5, 7
COUNTS = (4, 5, 4, 5, 5)


def classes_of(number: int) -> tuple[int, ...]:
    return tuple(c for c in (1, 2, 3) if number % (c + 1) == 0)


def encode(sample: Sample) -> tuple[bytes, bytes | None]:
    """Noise whose grey level tells the samples apart; every third sample has no mask, the others their number."""
    rng = np.random.default_rng(sample.source)
    pixels = rng.integers(0, 256, (sample.height, sample.width, 3), dtype=np.uint8)
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(image, "JPEG", quality=90)
    Image.fromarray(np.full((sample.height, sample.width), sample.source % 4, dtype=np.uint8)).save(mask, "PNG")
    return image.getvalue(), None if sample.source % 3 == 0 else mask.getvalue()


def encode_masks_of_noise(sample: Sample) -> tuple[bytes, bytes | None]:
    image, mask = encode(sample)
    return image, None if mask is None else np.random.default_rng(99).bytes(700 + sample.source)


def write_shards(folder: Path, encode: Callable[[Sample], tuple[bytes, bytes | None]]) -> ShardSet:
    def samples(split: str, n: int) -> list[Sample]:
        return [
            Sample(
                key=f"{split}_{i}", split=split, width=20 + i % 3, height=16 + i % 2, classes=classes_of(i), source=i
            )
            for i in range(n)
        ]

    write_dataset(
        folder,
        samples("train", NUM_TRAIN) + samples("val", NUM_VAL),
        encode,
        name="tiny",
        classes=("background", "a", "b", "c"),
        palette=voc_palette(),
        made_by="python data_prep/tiny.py --root here",
        shards=NUM_SHARDS,
    )
    return load_dataset(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("tiny") / "shards", encode)


@pytest.fixture
def copy(data: ShardSet, tmp_path: Path) -> ShardSet:
    """The same data set in a folder that a test may damage."""
    shutil.copytree(data.folder, tmp_path / "copy")
    return load_dataset(tmp_path / "copy")
