"""The compiled cross-entropy: what it refuses, and bits that do not depend on threads or layout.

Its numbers are tested with `ops.cross_entropy`, which has the form that it must equal.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slrnet.cpu.compiled import compiled
from slrnet.cpu.cross_entropy import sums_and_gradients


@pytest.fixture(autouse=True)
def compiler() -> None:
    """Compiles here, and not in each process that collects the tests."""
    if compiled("cross_entropy") is None:
        pytest.skip("no C compiler")


def case(*, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, classes, 6, 7, generator=generator)
    return logits, torch.randint(0, classes, (2, 40, 50), generator=generator), torch.rand(2, 40, 50)


def test_the_same_to_the_bit_for_any_threads_and_layout() -> None:
    logits, labels, weights = case(classes=37)
    results = []
    for threads, layout in ((1, torch.contiguous_format), (3, torch.channels_last)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(sums_and_gradients(logits.contiguous(memory_format=layout), labels, weights))
        finally:
            torch.set_num_threads(before)
    one, three = results
    assert one is not None
    assert three is not None
    assert all(torch.equal(*pair) for pair in zip(one, three, strict=True))


@pytest.mark.parametrize("value", [-100.0, 100.0, math.nan, math.inf, -math.inf])
def test_refuses_what_exponentials_do_not_reach(value: float) -> None:
    logits, labels, weights = case()
    assert sums_and_gradients(logits, labels, weights) is not None
    logits[1, 4, 5, 6] = value
    assert sums_and_gradients(logits, labels, weights) is None


@pytest.mark.parametrize("small", [(4, 5), (3, 3)])
def test_the_widest_spread_that_is_taken_keeps_its_digits(small: tuple[int, int]) -> None:
    """Classes go from the largest logit to 79 below it and back between neighbours: ratios and sums at their ends."""
    generator = torch.Generator().manual_seed(0)
    logits = -79.0 * (torch.rand(2, 21, *small, generator=generator) > 0.5).float()
    logits[:, 0] = torch.where(logits.amax(dim=1) < 0, 0.0, logits[:, 0])
    labels, weights = torch.randint(0, 21, (2, 70, 33), generator=generator), torch.rand(2, 70, 33, generator=generator)
    done = sums_and_gradients(logits, labels, weights)
    exact = logits.double().requires_grad_()
    resized = F.interpolate(exact, (70, 33), mode="bilinear", align_corners=True)
    losses = (F.cross_entropy(resized, labels, reduction="none") * weights).sum(dim=(1, 2))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert done is not None
    assert exact.grad is not None
    torch.testing.assert_close(done[0].double(), losses.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(done[1].double(), exact.grad, rtol=0, atol=2e-6 * float(exact.grad.abs().max()))


def test_large_logits_that_are_near_each_other_are_taken() -> None:
    logits, labels, weights = case()
    plain = sums_and_gradients(logits, labels, weights)
    moved = sums_and_gradients(logits + 2.0**12, labels, weights)
    assert plain is not None
    assert moved is not None
    torch.testing.assert_close(moved[0], plain[0], rtol=1e-3, atol=0)  # 2^12 leaves logits three decimal places


def test_pixels_without_weight_add_nothing() -> None:
    logits, labels, weights = case()
    weights[0] = 0
    weights[1, :20] = 0
    done = sums_and_gradients(logits, labels, weights)
    assert done is not None
    losses, gradients = done
    assert losses[0] == 0
    assert losses[1] > 0
    assert not gradients[0].any()
    assert not gradients[1, :, :2].any()  # rows 0 and 1 of 6 reach no further than row 16 of 40
    assert gradients[1, :, 3:].any()


@pytest.mark.parametrize("label", [-1, 5, 255])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    logits, labels, weights = case()
    labels[1, 39, 49] = label
    with pytest.raises(IndexError, match="allowed are 0 to 4"):
        sums_and_gradients(logits, labels, weights)
