"""Which labels each setting grants, which samples are drawn how often, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slrnet.config import DataConfig
from slrnet.data.manifest import DataError, ShardSet, SplitView
from slrnet.data.sample_set import SampleSet
from slrnet.data.supervision import Supervision, plan_supervision

WriteTiny = Callable[..., ShardSet]


def granted(split: SplitView, which: SampleSet) -> set[str]:
    return {split.key(int(i)) for i in which.array}


def draws(split: SplitView, found: Supervision) -> list[dict[str, float]]:
    return [
        {
            split.key(int(i)): float(n)
            for i, n in zip(pool.samples.array, np.broadcast_to(pool.draws, len(pool.samples)), strict=True)
        }
        for pool in found.pools
    ]


@pytest.fixture(scope="module")
def split(tiny_data: ShardSet) -> SplitView:
    return tiny_data.split("train")


MASKS = {f"train_{i}" for i in range(4)}
ALL = {f"train_{i}" for i in range(9)}


def plan(split: SplitView, setting: Any, **data: Any) -> Supervision:
    return plan_supervision(split, DataConfig(**data), setting)


def test_image_labels(split: SplitView) -> None:
    found = plan(split, "wsss")
    assert not len(found.pixel_labels)
    assert granted(split, found.image_labels) == granted(split, found.members) == ALL
    assert draws(split, found) == [dict.fromkeys(ALL, 1.0)]
    assert found.describe() == "training images: 9 with image labels; 9 draws per epoch"


def test_pixel_and_image_labels(split: SplitView) -> None:
    found = plan(split, "sss_image_labels", pixel_labeled_subset="pixels", pixel_oversampling=3)
    assert granted(split, found.pixel_labels) == MASKS
    assert granted(split, found.image_labels) == ALL
    assert draws(split, found) == [dict.fromkeys(MASKS, 3.0), dict.fromkeys(ALL - MASKS, 1.0)]
    assert found.draws == 17
    assert "4 with pixel labels, 5 with image labels; 17 draws per epoch, 70.6 % of them" in found.describe()


def test_pixel_labels_and_unlabeled_images(split: SplitView) -> None:
    found = plan(split, "sss", pixel_labeled_subset="pixels")
    assert granted(split, found.pixel_labels) == MASKS
    assert not len(found.image_labels)
    assert draws(split, found) == [dict.fromkeys(MASKS, 5.0), dict.fromkeys(ALL - MASKS, 1.0)]
    assert "4 with pixel labels, 5 with no labels" in found.describe()


def test_masks_alone(split: SplitView) -> None:
    found = plan(split, "sss", pixel_labeled_subset="pixels", train_subset="pixels")
    assert granted(split, found.members) == MASKS
    assert draws(split, found) == [dict.fromkeys(MASKS, 5.0)]


def test_a_subset_to_train_on(split: SplitView) -> None:
    found = plan(split, "wsss", train_subset="pixels")
    assert granted(split, found.members) == MASKS
    assert draws(split, found) == [dict.fromkeys(MASKS, 1.0)]


def test_balanced_classes_keep_the_length_of_the_epoch(split: SplitView) -> None:
    found = plan(split, "sss_image_labels", pixel_labeled_subset="pixels", class_balance=1.0)
    assert [pool.total for pool in found.pools] == [20, 5]
    assert len(set(np.asarray(found.pools[1].draws).tolist())) > 1


def test_unlabeled_images_among_others(write_tiny: WriteTiny, tmp_path: Path) -> None:
    mixed = write_tiny(tmp_path / "mixed", image_labels=lambda key, classes: None if key == "train_8" else classes)
    split = mixed.split("train")
    found = plan(split, "sss_image_labels", pixel_labeled_subset="pixels")
    assert granted(split, found.image_labels) == ALL - {"train_8"}
    assert "4 with pixel labels, 4 with image labels, 1 with no labels" in found.describe()
    nothing = write_tiny(tmp_path / "nothing", image_labels=lambda key, classes: None).split("train")
    with pytest.raises(DataError, match="has image labels, and setting 'wsss' needs them"):
        plan(nothing, "wsss")


def test_pretraining_on_labeled_images_alone(split: SplitView, write_tiny: WriteTiny, tmp_path: Path) -> None:
    settings = DataConfig(pixel_labeled_subset="pixels", pixel_oversampling=3, pretrain_on="labeled")
    found = plan_supervision(split, settings, "sss", pretrain_epochs=2)
    (first,) = found.pools_in(0)
    assert found.pools_in(1) == (first,)
    assert found.pools_in(2) is found.pools
    assert {split.key(int(sample)) for sample in first.samples.array} == MASKS
    assert first.total == found.draws == 17  # an epoch is as long as the others
    assert "epochs 1 to 2 draw labeled images alone" in found.describe()
    # Where every image has a label, and without pretraining, all epochs are alike.
    assert plan_supervision(split, settings, "sss_image_labels", pretrain_epochs=2).first_epochs == 0
    assert plan_supervision(split, settings, "sss", pretrain_epochs=0).first_epochs == 0
    # Of the others, those with image labels stay, in the ratio that they had to the masks.
    mixed = write_tiny(tmp_path / "mixed", image_labels=lambda key, classes: None if key >= "train_6" else classes)
    rest = plan_supervision(mixed.split("train"), settings, "sss_image_labels", pretrain_epochs=1)
    assert [len(pool.samples) for pool in rest.pools_in(0)] == [4, 2]
    assert [pool.total for pool in rest.pools_in(0)] == [15, 2]  # 12 and 2 of 14, times 17 / 14


def test_refusals(split: SplitView, write_tiny: WriteTiny, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="no subset 'other'; it has: few, pixels; `slrnet prepare` makes one with --subset"
    ):
        plan(split, "sss", pixel_labeled_subset="other")
    with pytest.raises(DataError, match="no subset 'other'"):
        plan(split, "wsss", train_subset="other")
    with pytest.raises(DataError, match="'pixels' and data.train_subset 'few' .* have no sample in common"):
        plan(split, "sss", pixel_labeled_subset="pixels", train_subset="few")
    without = write_tiny(
        tmp_path / "without", mask_bytes=lambda sample, png: None if sample.key == "train_2" else png
    ).split("train")
    with pytest.raises(DataError, match="1 of 4 samples of subset 'pixels' .* have no mask, for instance 'train_2'"):
        plan(without, "sss", pixel_labeled_subset="pixels")
    assert plan(without, "wsss").draws == 9
