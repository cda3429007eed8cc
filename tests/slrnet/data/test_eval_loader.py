"""The evaluation loader on tiny shards: whole images, each once and in order, compared with their checksums."""

from __future__ import annotations

import pytest
import torch

from slrnet.data.epoch_plan import choose_subset
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet
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
