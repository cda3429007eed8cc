"""Binary cross-entropy over classes, by hand and in loops."""

from __future__ import annotations

import math

import pytest
import torch

from slrnet.losses.objective import classification_loss


def test_worked_by_hand() -> None:
    """Scores 0 (absent) and 2 (present): log 2 and log(1 + exp(-2)), their mean."""
    loss = classification_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0, 1]]))
    assert loss.tolist() == [pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2, abs=1e-6)]


def test_equals_loops_and_the_multi_label_soft_margin_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4, 5, generator=generator)
    labels = torch.randint(0, 2, (4, 5), generator=generator)
    losses = classification_loss(scores, labels)
    for n in range(4):
        terms = []
        for k in range(5):
            prob = 1 / (1 + math.exp(-float(scores[n, k])))
            terms.append(-math.log(prob if labels[n, k] else 1 - prob))
        assert float(losses[n]) == pytest.approx(sum(terms) / 5, abs=1e-5)
    released = torch.nn.functional.multilabel_soft_margin_loss(scores, labels.float(), reduction="none")
    assert torch.allclose(losses, released, atol=1e-6)


def test_large_scores_stay_finite() -> None:
    scores = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = classification_loss(scores, torch.tensor([[0, 1]]))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.tolist() == [1e4]
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.5, -0.5]]


def test_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = classification_loss(torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([[0, 1]]))
    assert loss.dtype == torch.float32
