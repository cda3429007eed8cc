"""The confusion matrix: figures worked out by hand, undecided and void pixels, merging, classes that do not occur."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slrnet.evaluation.metrics import ConfusionMatrix

VOID = 255
# Ten labeled pixels and one void. Class 0: 4 pixels, 3 hit, 1 taken for 1. Class 1: 4 pixels, 2 hit, 1 taken for 0,
# 1 undecided. Class 2: 2 pixels, 1 hit, 1 taken for 1.
TRUE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, VOID])
PREDICTED = torch.tensor([0, 0, 0, 1, 1, 1, 0, VOID, 2, 1, 2])


def filled(predictions: Tensor, targets: Tensor, num_classes: int = 3) -> ConfusionMatrix:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(predictions, targets)
    return matrix


class TestWorkedByHand:
    matrix = filled(PREDICTED, TRUE)

    def test_counts(self) -> None:
        assert self.matrix.counts.tolist() == [[3, 1, 0, 0], [1, 2, 0, 1], [0, 1, 1, 0]]

    def test_iou(self) -> None:
        """Class 0: 3 / (4 + 4 - 3); class 1: 2 / (4 + 4 - 2); class 2: 1 / (1 + 2 - 1)."""
        assert self.matrix.iou().tolist() == pytest.approx([3 / 5, 2 / 6, 1 / 2])
        assert self.matrix.miou() == pytest.approx((3 / 5 + 2 / 6 + 1 / 2) / 3)

    def test_false_discovery(self) -> None:
        """Class 1 is predicted four times, twice rightly; class 2 once, rightly."""
        assert self.matrix.fdr().tolist() == pytest.approx([1 / 4, 2 / 4, 0])
        assert self.matrix.mfdr() == pytest.approx((2 / 4 + 0) / 2)

    def test_false_negatives(self) -> None:
        """The undecided pixel of class 1 is missed, and no class's false positive."""
        assert self.matrix.fnr().tolist() == pytest.approx([1 / 4, 2 / 4, 1 / 2])
        assert self.matrix.mfnr() == pytest.approx((2 / 4 + 1 / 2) / 2)

    def test_coverage(self) -> None:
        assert self.matrix.coverage() == pytest.approx(9 / 10)


@given(n=st.integers(1, 40), num_classes=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_equals_sets_of_pixels(n: int, num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = (torch.randint(0, num_classes + 1, (n,), generator=generator) for _ in range(2))
    predictions[predictions == num_classes], targets[targets == num_classes] = VOID, VOID
    matrix = filled(predictions, targets, num_classes)
    labeled = [(p, t) for p, t in zip(predictions.tolist(), targets.tolist(), strict=True) if t != VOID]
    for k in range(num_classes):
        hits = sum(p == k and t == k for p, t in labeled)
        false = sum(p == k and t != k for p, t in labeled)
        missed = sum(p != k and t == k for p, t in labeled)
        for value, above, below in (
            (matrix.iou()[k], hits, hits + false + missed),
            (matrix.fdr()[k], false, hits + false),
            (matrix.fnr()[k], missed, hits + missed),
        ):
            assert float(value) == pytest.approx(above / below if below else float("nan"), nan_ok=True)


def test_means_leave_out_classes_that_do_not_occur() -> None:
    """Class 2 of four is neither true nor predicted; class 3 is predicted once and never true."""
    matrix = filled(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1]), num_classes=4)
    assert matrix.iou().tolist() == pytest.approx([1, 1 / 2, float("nan"), 0], nan_ok=True)
    assert matrix.miou() == pytest.approx(0.5)
    assert matrix.mfdr() == pytest.approx((0 + 1) / 2)
    assert matrix.mfnr() == pytest.approx(1 / 2)


def test_nothing_measured_is_nan() -> None:
    for matrix in (ConfusionMatrix(3), filled(torch.tensor([1, 2]), torch.tensor([VOID, VOID]))):
        for value in (matrix.miou(), matrix.mfdr(), matrix.mfnr(), matrix.coverage()):
            assert math.isnan(value)


def test_undecided_everywhere() -> None:
    matrix = filled(torch.full((4,), VOID), torch.tensor([0, 1, 1, 2]))
    assert (matrix.miou(), matrix.mfnr(), matrix.coverage()) == (0, 1, 0)
    assert math.isnan(matrix.mfdr())


def test_updates_and_merging_add_up() -> None:
    whole, parts, other = filled(PREDICTED, TRUE), ConfusionMatrix(3), ConfusionMatrix(3)
    parts.update(PREDICTED[:3], TRUE[:3])
    parts.update(PREDICTED[3:5], TRUE[3:5])
    other.update(PREDICTED[5:], TRUE[5:])
    parts.merge(other)
    assert torch.equal(parts.counts, whole.counts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_shape_and_integer_type(dtype: torch.dtype) -> None:
    matrix = filled(PREDICTED[:10].to(dtype).view(1, 2, 5), TRUE[:10].to(dtype).view(1, 2, 5))
    assert torch.equal(matrix.counts, filled(PREDICTED, TRUE).counts)


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([0, 3], [0, 1], "predictions hold the id 3; allowed are 0 to 2 and 255"),
        ([0, 1], [0, 254], "targets hold the id 254"),
        ([0, -1], [0, 1], "predictions hold the id -1"),
        ([0, 1], [-2, 1], "targets hold the id -2"),
        ([0, 1, 1], [0, 1], r"\(3,\) and targets \(2,\) differ in shape"),
    ],
)
def test_mistakes_are_named(predictions: list[int], targets: list[int], message: str) -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(torch.tensor(predictions), torch.tensor(targets))
    assert not matrix.counts.any()


def test_matrices_of_different_classes_are_not_merged() -> None:
    with pytest.raises(ValueError, match="of 4 classes to one of 3"):
        ConfusionMatrix(3).merge(ConfusionMatrix(4))
