"""The cross-entropy's Triton kernel against PyTorch's operators, in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from slrnet.ops import cross_entropy_triton
from slrnet.ops.cross_entropy import by_operators


def case(
    small: tuple[int, int], large: tuple[int, int], classes: int, *, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2, classes, *small, generator=generator)
    labels = torch.randint(0, classes, (2, *large), generator=generator)
    weights = torch.rand(2, *large, generator=generator)
    weights[0, : large[0] // 2] = 0
    return logits, labels, weights


@pytest.mark.parametrize(
    ("small", "large", "classes", "scale"),
    [
        ((3, 4), (7, 9), 21, 200.0),
        ((5, 5), (5, 5), 2, 3.0),
        ((7, 9), (3, 4), 16, 3.0),
        pytest.param((2, 3), (11, 33), 5, 3.0, id="cells that programs share"),
    ],
)
@pytest.mark.slow
def test_equals_operators(small: tuple[int, int], large: tuple[int, int], classes: int, scale: float) -> None:
    arguments = case(small, large, classes, scale=scale)
    for own, expected in zip(
        cross_entropy_triton.sums_and_gradients(*arguments), by_operators(*arguments), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=2e-5, atol=2e-6 * float(expected.abs().max()))
        assert own.stride() == expected.stride()


def test_cells_of_many_pixels_are_shared() -> None:
    assert cross_entropy_triton.plan_of((2, 3), (11, 33))[1] > 1
    assert cross_entropy_triton.plan_of((41, 41), (321, 321)) == (128, 1)


def test_plans_hold_every_cell() -> None:
    olds, news = [(2, 2), (2, 40), (24, 24), (41, 41), (81, 7)], [(2, 2), (7, 96), (192, 192), (321, 321), (512, 33)]
    for old, new in itertools.product(olds, news):
        pixels, shared = cross_entropy_triton.plan_of(old, new)
        cells = [[min(y * (o - 1) // (n - 1), o - 2) for y in range(n)] for o, n in zip(old, new, strict=True)]
        largest = math.prod(max(Counter(side).values()) for side in cells)
        assert shared * pixels >= largest, (old, new)


def test_what_is_no_number_is_seen() -> None:
    logits, labels, weights = case((3, 4), (7, 9), 5)
    logits[1, 2, 1, 1] = math.nan
    losses, _ = cross_entropy_triton.sums_and_gradients(logits, labels, weights)
    assert losses[0].isfinite()
    assert losses[1].isnan()
