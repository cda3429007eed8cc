"""Folders in VOC's layout, read back by the script that takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.conversion import Output
from data_prep.voc import convert
from slrnet.data.catalog import voc_palette
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.data.voc_folder import write_voc_folder


def masks(shards: ShardSet, split: str) -> dict[str, bytes]:
    return {
        sample.key: sample.image.numpy().tobytes() + sample.pixel_labels.numpy().tobytes()
        for sample in EvalLoader(shards, split=split)
        if sample.pixel_labels is not None
    }


def test_a_folder_gives_the_same_data_set_again(tiny_data: ShardSet, tmp_path: Path) -> None:
    write_voc_folder(tiny_data, tmp_path / "voc", splits=("train", "val"))
    assert (tmp_path / "voc" / "labels.txt").read_text().split() == list(tiny_data.info.classes)
    convert(tmp_path / "voc", Output(tmp_path / "again"))
    again = load_dataset(tmp_path / "again")
    assert again.info.classes == tiny_data.info.classes
    for split in ("train", "val"):
        assert masks(again, split) == masks(tiny_data, split)
    assert not list(tmp_path.glob(".*"))


def test_voc_classes_get_their_own_ids(write_tiny: Callable[..., ShardSet], tmp_path: Path) -> None:
    classes = ("background", "cow", "cat", "person")
    shards = write_tiny(tmp_path / "shards", num_train=4, num_val=4, shards=2, classes=classes)
    write_voc_folder(shards, tmp_path / "voc", splits=("val",))
    assert not (tmp_path / "voc" / "labels.txt").exists()
    for sample in EvalLoader(shards, split="val"):
        assert sample.pixel_labels is not None
        with Image.open(tmp_path / "voc" / "SegmentationClass" / f"{sample.key}.png") as image:
            assert np.array_equal(np.array(image.getpalette("RGB")).reshape(-1, 3), voc_palette())
            found = np.asarray(image)
        table = np.array([0, 10, 8, 15, *[255] * 252])
        np.testing.assert_array_equal(found, table[sample.pixel_labels.numpy()])
    listed = (tmp_path / "voc" / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    assert listed == sorted(masks(shards, "val"))


def test_a_folder_that_holds_something_is_refused(tiny_data: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "mine").write_text("x")
    with pytest.raises(DataError, match="exists; give another folder"):
        write_voc_folder(tiny_data, tmp_path / "voc", splits=("val",))
    assert (tmp_path / "voc" / "mine").exists()
