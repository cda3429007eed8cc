"""Image by image: scores are those of the confusion matrix, choices are by IoU, gamma's curve is the labels'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slrnet.checkpoints.checkpoint import Checkpoint
from slrnet.config import Config
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.supervision import plan_supervision
from slrnet.distributed.process import Process
from slrnet.evaluation.examine import (
    Bins,
    EvaluationTarget,
    ImageScore,
    choose_by_iou,
    examine,
    read_examples,
    sweep_gamma,
)
from slrnet.evaluation.masks import evaluate_masks, measure_pseudo_masks, pseudo_mask_subset
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.inference.forward import Inference


@pytest.fixture(scope="module")
def target(checkpoint: Checkpoint, tiny_data: ShardSet) -> EvaluationTarget:
    return EvaluationTarget.of(checkpoint, tiny_data, "cpu")


def score(key: str, iou: float, main: int) -> ImageScore:
    pixels = np.zeros(4, dtype=np.int64)
    pixels[0], pixels[main] = 50, 9
    return ImageScore(0, key, np.array([iou, np.nan, np.nan, iou]), pixels)


class TestExamine:
    def test_its_matrix_is_that_of_the_trainings_validation(
        self, target: EvaluationTarget, tiny_data: ShardSet, tiny_config: Config
    ) -> None:
        found = examine(target, "val")
        samples = EvalLoader(tiny_data, split="val")
        quality = evaluate_masks(Inference(target.inference.model, tiny_config), samples, process=Process())
        torch.testing.assert_close(found.matrix.counts, quality.matrix.counts)
        assert found.protocol == quality.protocol
        assert len(found.scores) == quality.images == 5
        pixels = quality.matrix.counts.sum()
        assert found.confidence.pixels.sum() == pixels
        assert found.confidence.right.sum() == quality.matrix.counts.diagonal().sum()

    def test_each_image_has_its_own_score(self, target: EvaluationTarget) -> None:
        scores = examine(target, "val").scores
        for example, one in zip(read_examples(target, "val", scores[::-1]), scores[::-1], strict=True):
            matrix = ConfusionMatrix(4)
            matrix.update(torch.from_numpy(example.mask), torch.from_numpy(example.truth))
            assert example.key == one.key
            assert example.image.shape == (*example.mask.shape, 3)
            mean = np.nanmean(matrix.iou()[1:].numpy())
            assert one.foreground_iou == pytest.approx(mean) == pytest.approx(example.foreground_iou)

    def test_at_most_so_many(self, target: EvaluationTarget) -> None:
        assert len(examine(target, "val", at_most=2).scores) == 2

    def test_without_masks_it_says_so(self, checkpoint: Checkpoint, write_tiny: Any, tmp_path: Path) -> None:
        bare = write_tiny(tmp_path / "bare", mask_bytes=lambda sample, png: None)
        with pytest.raises(DataError, match="no image with a mask"):
            examine(EvaluationTarget.of(checkpoint, bare, "cpu"), "val")
        with pytest.raises(DataError, match="no training image"):
            sweep_gamma(EvaluationTarget.of(checkpoint, bare, "cpu"))


class TestChoice:
    SCORES = (score("a", 0.9, 1), score("b", 0.8, 1), score("c", 0.5, 2), score("d", 0.1, 3), score("e", 0.2, 3))

    def test_best_and_worst_by_iou_with_every_class_before_any_again(self) -> None:
        assert [one.key for one in choose_by_iou(self.SCORES, 3, hardest=False)] == ["a", "c", "e"]
        assert [one.key for one in choose_by_iou(self.SCORES, 4, hardest=False)] == ["a", "b", "c", "e"]
        assert [one.key for one in choose_by_iou(self.SCORES, 2, hardest=True)] == ["d", "c"]

    def test_images_without_foreground_or_without_any_class_are_passed_over(self) -> None:
        void = ImageScore(0, "void", np.full(4, np.nan), np.zeros(4, dtype=np.int64))
        empty = ImageScore(0, "empty", np.array([1.0, np.nan, np.nan, np.nan]), np.array([9, 0, 0, 0]))
        assert np.isnan(void.foreground_iou)
        assert choose_by_iou([void, empty, self.SCORES[0]], 3, hardest=True) == [self.SCORES[0]]


def test_bins_by_hand() -> None:
    bins = Bins()
    bins.update(torch.tensor([0.05, 0.95, 1.0, 0.91]), torch.tensor([False, True, True, False]))
    assert bins.pixels.tolist() == [1, *[0] * 8, 3]
    assert bins.points() == [pytest.approx((0.05, 0.0)), pytest.approx((2.86 / 3, 2 / 3))]
    assert bins.error() == pytest.approx((0.05 + 0.86) / 4)
    assert np.isnan(Bins().error())


def test_at_the_runs_gamma_the_sweep_is_what_the_training_measures(
    target: EvaluationTarget, tiny_data: ShardSet, tiny_config: Config
) -> None:
    sweep = sweep_gamma(target)
    view = tiny_data.split("train")
    chosen = pseudo_mask_subset(view, plan_supervision(view, tiny_config.data, tiny_config.setting), tiny_config)
    samples = EvalLoader(tiny_data, split="train", indices=chosen)
    inference = Inference(target.inference.model, tiny_config)
    dense, kept = measure_pseudo_masks(inference, samples, process=Process(), show=lambda masks: None)
    counts = kept.matrix.counts
    place = sweep.gammas.index(tiny_config.calibration.confidence_threshold)
    assert sweep.images == len(chosen) == 3
    assert sweep.protocol == dense.protocol
    assert sweep.fidelity[place] == pytest.approx(float(counts.diagonal()[1:].sum() / counts[:, 1:4].sum()))
    assert sweep.completeness[place] == pytest.approx(float(counts.diagonal()[1:].sum() / counts[1:].sum()))
    assert sweep.confidence.pixels.sum() == dense.matrix.counts[:, 1:4].sum()
    assert list(sweep.gammas) == sorted(sweep.gammas)
