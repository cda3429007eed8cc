"""The auxiliary head's background, and class scores by hand, in loops and at saturation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slrnet.models.heads import AuxiliaryHead, class_scores
from slrnet.ops.maps import class_probs


def scores_in_loops(logits: Tensor, probs: Tensor, power: float, floor: float) -> list[list[float]]:
    """Normalised global weighted pooling with the focal mask penalty, pixel by pixel."""
    n_images, n_classes, height, width = logits.shape
    rows = []
    for n in range(n_images):
        row = []
        for k in range(1, n_classes):
            weighted = total = 0.0
            for y in range(height):
                for x in range(width):
                    weighted += float(logits[n, k, y, x]) * float(probs[n, k, y, x])
                    total += float(probs[n, k, y, x])
            mean = total / (height * width)
            row.append(weighted / (1 + total) + (1 - mean) ** power * math.log(floor + mean))
        rows.append(row)
    return rows


class TestAuxiliaryHead:
    @torch.no_grad()
    def test_the_background_may_be_predicted_like_any_class(self) -> None:
        head = AuxiliaryHead(4, num_classes=4, predict_background=True).eval()
        features = torch.randn(2, 4, 5, 6)
        assert torch.equal(head(features), head.classify(head.conv(features).relu()))
        assert head(features).shape == (2, 4, 5, 6)

    @torch.no_grad()
    def test_background_is_1_minus_the_largest_foreground(self) -> None:
        torch.manual_seed(0)
        head = AuxiliaryHead(4, num_classes=4).eval()
        features = torch.randn(2, 4, 5, 6)
        logits = head(features)
        assert logits.shape == (2, 4, 5, 6)
        foreground = head.classify(head.conv(features).relu())
        assert torch.equal(logits[:, 1:], foreground)
        for n in range(2):
            for y in range(5):
                for x in range(6):
                    expected = 1 - max(float(value) for value in foreground[n, :, y, x])
                    assert float(logits[n, 0, y, x]) == pytest.approx(expected, abs=1e-6)

    @torch.no_grad()
    def test_maps_that_are_channels_last_stay_so(self) -> None:
        features = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
        head = AuxiliaryHead(4, num_classes=4).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert head(features).is_contiguous(memory_format=torch.channels_last)

    def test_one_foreground_class(self) -> None:
        logits = AuxiliaryHead(4, num_classes=2).eval()(torch.randn(1, 4, 3, 3))
        assert torch.allclose(logits.sum(dim=1), torch.ones(1, 3, 3), atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_class_probs_are_the_softmax_and_channels_last(layout: torch.memory_format) -> None:
    logits = torch.randn(2, 4, 5, 6).contiguous(memory_format=layout)
    probs = class_probs(logits)
    torch.testing.assert_close(probs, logits.softmax(dim=1))
    assert probs.is_contiguous(memory_format=torch.channels_last)


class TestClassScores:
    def test_worked_by_hand(self) -> None:
        """Two pixels, logits 2 and 4 with probabilities 1/2 and 1/4: pooled (1 + 1) / 1.75, mean 3/8."""
        logits = torch.tensor([[[[9.0, 9.0]], [[2.0, 4.0]]]])
        probs = torch.tensor([[[[0.5, 0.75]], [[0.5, 0.25]]]])
        expected = 2 / 1.75 + 0.625**3 * math.log(0.385)
        assert class_scores(logits, probs).tolist() == [[pytest.approx(expected, rel=1e-6)]]

    @pytest.mark.parametrize(("power", "floor"), [(3.0, 0.01), (0.0, 0.5), (1.5, 1.0), (0.5, 0.01)])
    def test_equals_loops(self, power: float, floor: float) -> None:
        logits = 3 * torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
        probs = logits.softmax(dim=1)
        scores = class_scores(logits, probs, focal_power=power, focal_floor=floor)
        assert torch.allclose(scores, torch.tensor(scores_in_loops(logits, probs, power, floor)), atol=1e-5)

    def test_the_background_has_no_score_and_no_say(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, probs = torch.randn(2, 4, 3, 3, generator=generator), torch.rand(2, 4, 3, 3, generator=generator)
        scores = class_scores(logits, probs)
        assert scores.shape == (2, 3)
        logits[:, 0], probs[:, 0] = 99.0, 0.3
        assert torch.equal(class_scores(logits, probs), scores)

    def test_an_empty_mask_is_penalised_by_the_floor(self) -> None:
        logits, probs = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
        assert float(class_scores(logits, probs)) == pytest.approx(math.log(0.01), rel=1e-6)

    @pytest.mark.parametrize("power", [0.0, 0.5, 3.0])
    @pytest.mark.parametrize("height", [1e4, -1e4])
    def test_saturated_masks_have_finite_scores_and_gradients(self, power: float, height: float) -> None:
        """At 1e4 the class fills the image and the mean of its probabilities rounds to 1 (or a little above)."""
        logits = torch.zeros(1, 3, 37, 41)
        logits[:, 1] = height
        logits.requires_grad_()
        scores = class_scores(logits, logits.softmax(dim=1), focal_power=power)
        scores.sum().backward()  # type: ignore[no-untyped-call]
        assert bool(scores.isfinite().all())
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())
