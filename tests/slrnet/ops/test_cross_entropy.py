"""Cross-entropy of resized logits against PyTorch's own on resized maps, by the kernel and by operators."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from slrnet.ops.cross_entropy import resized_cross_entropy, sums_and_gradients
from slrnet.ops.maps import resize


def random_case(
    n: int, k: int, small: tuple[int, int], large: tuple[int, int], *, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(n, k, *small, generator=generator)
    weights = torch.rand(n, *large, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.3] = 0
    return logits, torch.randint(0, k, (n, *large), generator=generator), weights


def over_resized_maps(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The same with a map of all classes at the labels' resolution."""
    losses = F.cross_entropy(resize(logits, labels.shape[-2:]), labels, reduction="none")
    return (losses * weights).flatten(1).mean(dim=1)


def assert_equals_resized(small: tuple[int, int], large: tuple[int, int], *, classes: int, scale: float) -> None:
    logits, labels, weights = random_case(3, classes, small, large, scale=scale)
    weights[2, : large[0] // 2] = 0
    gradients = []
    for form in (resized_cross_entropy, over_resized_maps):
        own = logits.clone().requires_grad_()
        loss = form(own, labels, weights)
        (loss * torch.tensor([1.0, -2.0, 0.5])).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append((loss.detach(), own.grad))
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-6, rtol=2e-5)


@pytest.fixture
def operators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRNET_KERNELS", "off")


SIZES = [((3, 4), (7, 9)), ((5, 5), (5, 5)), ((1, 4), (6, 1)), ((7, 9), (3, 4)), ((2, 3), (23, 65))]


@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize("scale", [2.0, 400.0])
@pytest.mark.usefixtures("operators_alone")
def test_operators_equal_resizing_and_then_comparing(
    small: tuple[int, int], large: tuple[int, int], scale: float
) -> None:
    assert_equals_resized(small, large, classes=4, scale=scale)


@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize(("classes", "scale"), [(2, 2.0), (16, 400.0), (21, 16.0), (201, 2.0)])
def test_the_kernel_equals_resizing_and_then_comparing(
    small: tuple[int, int], large: tuple[int, int], classes: int, scale: float
) -> None:
    """It leaves maps of one row, and logits that are too far from each other, to the operators."""
    assert_equals_resized(small, large, classes=classes, scale=scale)


def test_kernels_are_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> None:
        raise AssertionError("the kernel is used")

    case = random_case(2, 3, (4, 4), (4, 4))
    monkeypatch.setattr("slrnet.cpu.cross_entropy.sums_and_gradients", refuse)
    with pytest.raises(AssertionError, match="the kernel is used"):
        resized_cross_entropy(*case)
    monkeypatch.setenv("SLRNET_KERNELS", "off")
    assert resized_cross_entropy(*case).isfinite().all()
    monkeypatch.setenv("SLRNET_KERNELS", "no")
    with pytest.raises(ValueError, match="SLRNET_KERNELS is 'no'; allowed are 'on' .* and 'off'"):
        resized_cross_entropy(*case)


def test_logits_that_are_no_numbers_give_no_number() -> None:
    """The trainer finds a diverged network by its loss."""
    logits, labels, weights = random_case(2, 3, (4, 4), (4, 4))
    for value in (math.nan, math.inf):
        logits[0, 1, 2, 2] = value
        loss = resized_cross_entropy(logits, labels, torch.ones_like(weights))
        assert math.isnan(loss[0])
        assert math.isfinite(loss[1])


def test_tensors_without_memory_and_compilers_see_one_operator() -> None:
    logits, labels, weights = random_case(2, 3, (4, 4), (4, 4))
    with FakeTensorMode() as mode:
        own = mode.from_tensor(logits).requires_grad_()
        loss = resized_cross_entropy(own, mode.from_tensor(labels), mode.from_tensor(weights))
        loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.shape == (2,)
    assert own.grad is not None
    torch.library.opcheck(sums_and_gradients, (logits, labels, weights))


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_images_that_weigh_nothing_change_no_other(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRNET_KERNELS", kernels)
    logits, labels, weights = random_case(3, 4, (5, 6), (15, 16))
    weights[1] = 0
    own = logits.clone().requires_grad_()
    loss = resized_cross_entropy(own, labels, weights)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    assert loss[1] == 0
    assert not own.grad[1].any()
    others = logits[[0, 2]].requires_grad_()
    alone = resized_cross_entropy(others, labels[[0, 2]], weights[[0, 2]])
    alone.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss[[0, 2]], alone)
    torch.testing.assert_close(own.grad[[0, 2]], others.grad)
