"""The evaluation loader on tiny shards: whole images, each once and in order, compared with their checksums."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from slrnet.data.catalog import voc_palette
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import SCHEMA, DataError, ShardSet, load_dataset, save_dataset
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.data.tars import tar_end, tar_members
from tests.fixtures.shards import shards_of

from .conftest import NUM_TRAIN, NUM_VAL, classes_of


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_sample_once_in_order(data: ShardSet, world_size: int) -> None:
    keys, sizes = [], []
    for rank in range(world_size):
        loader = EvalLoader(data, split="train", rank=rank, world_size=world_size)
        samples = list(loader)
        assert len(samples) == len(loader)
        keys += [sample.key for sample in samples]
        sizes.append(len(samples))
    assert keys == [data.split("train").key(i) for i in range(NUM_TRAIN)]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_leaves_a_damaged_sample_out_and_reports_it_to_its_rank(copy: ShardSet) -> None:
    split = copy.split("val")
    with shards_of(split)[0].path.open("r+b") as file:
        file.write(bytes(512))
    keys, skipped = [], []
    for rank in range(2):
        loader = EvalLoader(copy, split="val", rank=rank, world_size=2, on_error="skip")
        keys += [sample.key for sample in loader]
        skipped += [(rank, sample.key) for sample in loader.skipped]
    assert keys == [split.key(i) for i in range(1, NUM_VAL)]
    assert skipped == [(0, split.key(0))]


def test_evaluation_samples_are_whole(data: ShardSet) -> None:
    for sample in EvalLoader(data, split="train"):
        number = int(sample.key.removeprefix("train_"))
        assert sample.image.shape == (3, 16 + number % 2, 20 + number % 3)
        assert sample.image.dtype == torch.uint8
        assert sample.image_labels.tolist() == [float(c in classes_of(number)) for c in (1, 2, 3)]
        if number % 3 == 0:
            assert sample.pixel_labels is None
        else:
            assert sample.pixel_labels is not None
            assert sample.pixel_labels.shape == sample.image.shape[-2:]
            assert sample.pixel_labels.unique().tolist() == [number % 4]


def test_evaluation_of_chosen_samples(data: ShardSet) -> None:
    split = data.split("train")
    chosen = choose_subset(split, 9, seed=0)
    keys = []
    for rank in range(2):
        loader = EvalLoader(data, split="train", indices=chosen, rank=rank, world_size=2)
        keys += [sample.key for sample in loader]
    assert keys == [split.key(i) for i in chosen]
    assert list(EvalLoader(data, split="train", indices=[])) == []
    with pytest.raises(ValueError, match="indices run from 1 to 23; split 'train' has the samples 0 to 22"):
        EvalLoader(data, split="train", indices=[1, 23])


def test_evaluation_compares_the_checksum(copy: ShardSet) -> None:
    """A changed byte that no decoder minds."""
    entry = shards_of(copy.split("val"))[1]
    with entry.path.open("r+b") as file:
        end = int(entry.offsets[0] + entry.sizes[0])
        file.seek(end - 512)  # the JSON file's only block
        file.write(b" ")
    with pytest.raises(
        DataError, match=r"shard .*val-000001.tar: sample 'val_\d': its files have the sha256 .*--verify"
    ):
        list(EvalLoader(copy, split="val"))
    loader = EvalLoader(copy, split="val", on_error="skip")
    assert len(list(loader)) == NUM_VAL - 1
    assert [skipped.shard for skipped in loader.skipped] == ["val-000001.tar"]


def _one_sample(folder: Path, *members: tuple[str, bytes]) -> ShardSet:
    """A stranger's data set of a sample of 8 x 8 pixels, whose checksum is of the last member of each name."""
    data = b"".join(tar_members({name: content}) for name, content in members)
    (folder / "train-000000.tar").write_bytes(data + tar_end(len(data)))
    row: dict[str, Any] = {"key": "a", "split": "train", "subsets": [], "shard": "train-000000.tar", "offset": 0}
    row |= {"width": 8, "height": 8, "classes": [1], "has_mask": True, "has_image_labels": True, "bytes": len(data)}
    row["sha256"] = hashlib.sha256(b"".join(dict(members).values())).hexdigest()
    table = pa.Table.from_pylist([row], schema=SCHEMA)
    save_dataset(folder, [table], name="x", classes=("background", "cat"), palette=voc_palette(), made_by="x")
    return load_dataset(folder)


def _image(kind: str, value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB" if kind == "JPEG" else "L", (8, 8), value).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("double", ["a.jpg", "a.png"])
def test_a_sample_with_two_files_of_one_name_is_not_taken(double: str, tmp_path: Path) -> None:
    """What is verified would not be what is trained on."""
    members = {"a.jpg": _image("JPEG", 9), "a.png": _image("PNG", 1)}
    shards = _one_sample(tmp_path, (double, members[double]), *members.items())
    message = f"'{double}' is twice in its place in the tar"
    with pytest.raises(DataError, match=message):
        list(EvalLoader(shards, split="train"))
    index = SampleIndex(shard_set=shards, split=shards.split("train"))
    with ShardFiles(index) as files, pytest.raises(DataError, match=message):
        files.locate(0, masks=False)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_ids_of_masks_are_classes_or_void(value: int, tmp_path: Path) -> None:
    shards = _one_sample(tmp_path, ("a.jpg", _image("JPEG", 9)), ("a.png", _image("PNG", value)))
    (sample,) = EvalLoader(shards, split="train")
    assert sample.pixel_labels is not None
    assert sample.pixel_labels.unique().tolist() == [value]


def test_an_id_beyond_the_classes_names_the_sample(tmp_path: Path) -> None:
    shards = _one_sample(tmp_path, ("a.jpg", _image("JPEG", 9)), ("a.png", _image("PNG", 2)))
    with pytest.raises(DataError, match=r"sample 'a': the mask has the id 2; allowed are 0 to 1, and 255 for void"):
        list(EvalLoader(shards, split="train"))


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_shard_that_is_no_file_is_refused_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    shards = _one_sample(tmp_path, ("a.jpg", _image("JPEG", 9)), ("a.png", _image("PNG", 1)))
    (tmp_path / "train-000000.tar").unlink()
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / "train-000000.tar")
    with pytest.raises(DataError, match="the shard cannot be opened"):
        list(EvalLoader(shards, split="train"))
