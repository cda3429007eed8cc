"""The proof that nothing leaks: in no setting do weights depend on a label that is not granted, to the bit."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from data_prep.shard_writer import Sample
from slrnet.config import Config, apply_overrides
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.training.trainer import Trainer
from tests.fixtures.training import make_trainer

pytestmark = pytest.mark.slow  # whole trainings

Digest = Callable[[nn.Module | Mapping[str, Tensor]], str]
StartTrainer = Callable[..., Trainer]
WriteTiny = Callable[..., ShardSet]


def noise(sample: Sample, png: bytes) -> bytes:
    """A mask of the same size whose pixels are random ids."""
    rng = np.random.default_rng(zlib.crc32(sample.key.encode()))
    ids = rng.choice(np.array([0, 1, 2, 3, 255], dtype=np.uint8), (sample.height, sample.width))
    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG")
    return file.getvalue()


def only(split: str, mask_bytes: Callable[[Sample, bytes], bytes]) -> Callable[[Sample, bytes], bytes]:
    """Replaces the masks of one split."""
    return lambda sample, png: mask_bytes(sample, png) if sample.split == split else png


def ungranted(mask_bytes: Callable[[Sample, bytes], bytes]) -> Callable[[Sample, bytes], bytes]:
    """Replaces the masks of the training images that are not in the subset `pixels`."""
    return only("train", lambda sample, png: png if "pixels" in sample.subsets else mask_bytes(sample, png))


def other_labels(key: str, classes: tuple[int, ...]) -> tuple[int, ...]:
    """Image labels that have nothing to do with the image; they are of training images only."""
    return ((1,), (2,), (3,), (1, 2, 3))[zlib.crc32(key.encode()) % 4] if key.startswith("train") else classes


Weights = Callable[[Config, ShardSet], tuple[str, dict[str, float]]]


@pytest.fixture(scope="module")
def weights(digest: Digest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Trains, each configuration on each data set once: the weights' digest and the last epoch's figures."""

    @cache
    def train(config: Config, data: Path) -> tuple[str, dict[str, float]]:
        figures: dict[str, float] = {}
        trainer = make_trainer(config, load_dataset(data), tmp_path_factory.mktemp("run"))
        trainer.fit(report=figures.update)
        return digest(trainer.model), figures

    return lambda config, shards: train(config, shards.folder)


def masks(shards: ShardSet, split: str) -> dict[str, Tensor | None]:
    return {sample.key: sample.pixel_labels for sample in EvalLoader(shards, split=split)}


@pytest.fixture(scope="module")
def noisy_train(write_tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_tiny(tmp_path_factory.mktemp("leak") / "noisy-train", mask_bytes=only("train", noise))


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return apply_overrides(tiny_config, ["evaluation.panel_images=0"])


def test_only_the_masks_differ(tiny_data: ShardSet, noisy_train: ShardSet) -> None:
    true, noisy = masks(tiny_data, "train"), masks(noisy_train, "train")
    assert true.keys() == noisy.keys()
    for key in true:
        assert not true[key].equal(noisy[key])  # type: ignore[union-attr,arg-type]
    for one, other in zip(EvalLoader(tiny_data, split="train"), EvalLoader(noisy_train, split="train"), strict=True):
        assert one.image.equal(other.image)
        assert one.image_labels.equal(other.image_labels)


def test_training_masks_of_noise_change_no_weight(
    config: Config, tiny_data: ShardSet, noisy_train: ShardSet, weights: Weights
) -> None:
    true, figures = weights(config, tiny_data)
    noisy, noisy_figures = weights(config, noisy_train)
    assert noisy == true
    # The comparison would see a leak: what is measured against the masks does change, and so do the weights of a
    # training on other image labels or another seed (test_trainer).
    assert noisy_figures["pseudo_mask/miou"] != figures["pseudo_mask/miou"]
    assert noisy_figures["val/miou_ss"] == figures["val/miou_ss"]
    assert figures["train/epoch_loss_segmentation"] > 0


def test_training_masks_are_not_even_opened_where_nothing_is_measured(
    config: Config, tiny_data: ShardSet, write_tiny: WriteTiny, weights: Weights, tmp_path: Path
) -> None:
    config = apply_overrides(config, ["evaluation.pseudo_mask_images=0"])
    broken = write_tiny(tmp_path / "broken", mask_bytes=only("train", lambda sample, png: b"no PNG at all"))
    assert weights(config, broken)[0] == weights(config, tiny_data)[0]


def test_validation_masks_of_noise_change_no_weight(
    config: Config, tiny_data: ShardSet, write_tiny: WriteTiny, weights: Weights, tmp_path: Path
) -> None:
    noisy_val = write_tiny(tmp_path / "noisy-val", mask_bytes=only("val", noise))
    true, figures = weights(config, tiny_data)
    noisy, noisy_figures = weights(config, noisy_val)
    assert noisy == true
    assert noisy_figures["val/miou_ss"] != figures["val/miou_ss"]
    assert noisy_figures["pseudo_mask/miou"] == figures["pseudo_mask/miou"]


SEMI = {
    setting: (f"setting={setting}", "data.pixel_labeled_subset=pixels", "data.pixel_oversampling=2")
    for setting in ("sss_image_labels", "sss")
}


@pytest.fixture(scope="module")
def noisy_ungranted(write_tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_tiny(tmp_path_factory.mktemp("leak") / "noisy-ungranted", mask_bytes=ungranted(noise))


@pytest.fixture(scope="module")
def noisy_labels(write_tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("leak") / "noisy-labels"
    return write_tiny(folder, mask_bytes=ungranted(noise), image_labels=other_labels)


@pytest.mark.parametrize("setting", SEMI)
class TestSemiSupervised:
    """Five of nine training images grant no mask; with `sss` none grants image labels either."""

    def test_ungranted_labels_of_noise_change_no_weight(
        self,
        setting: str,
        config: Config,
        tiny_data: ShardSet,
        noisy_ungranted: ShardSet,
        noisy_labels: ShardSet,
        noisy_train: ShardSet,
        weights: Weights,
    ) -> None:
        config = apply_overrides(config, SEMI[setting])
        true, figures = weights(config, tiny_data)
        noisy, noisy_figures = weights(config, noisy_ungranted)
        assert noisy == true
        assert noisy_figures["pseudo_mask/miou"] != figures["pseudo_mask/miou"], "measured on ungranted images only"
        assert figures["train/epoch_loss_segmentation"] > 0
        assert figures["train/epoch_loss_pixel_segmentation"] > 0
        # What is granted does change the weights, so the comparison would see a leak.
        assert weights(config, noisy_train)[0] != true
        assert (weights(config, noisy_labels)[0] == true) == (setting == "sss")

    def test_ungranted_masks_are_not_even_opened_where_nothing_is_measured(
        self, setting: str, config: Config, write_tiny: WriteTiny, start_trainer: StartTrainer, tmp_path: Path
    ) -> None:
        config = apply_overrides(config, [*SEMI[setting], "evaluation.pseudo_mask_images=0"])
        broken = write_tiny(tmp_path / "broken", mask_bytes=ungranted(lambda sample, png: b"no PNG at all"))
        start_trainer(config, shards=broken).fit(report=lambda figures: None)
        damaged = write_tiny(tmp_path / "damaged", mask_bytes=only("train", lambda sample, png: b"no PNG at all"))
        with pytest.raises(DataError, match="the mask cannot be read"):
            start_trainer(config, shards=damaged).fit(report=lambda figures: None)
