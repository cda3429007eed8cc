"""Balanced cross-entropy against pixel-by-pixel sums, the rule for incomplete labels, and images without labels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from slrnet.cpu import cross_entropy as cross_entropy_cpu
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.losses import segmentation
from slrnet.losses.segmentation import WeighedLabels, balanced_cross_entropy, weighted_cross_entropy
from slrnet.ops.maps import resize

VOID = IGNORE_INDEX


def loss_in_loops(logits: Tensor, labels: Tensor, image_labels: Tensor | None) -> list[float]:
    """The rule for each image; logits (N, K, H, W) of the labels' size."""
    losses = []
    for n, image in enumerate(labels.tolist()):
        pixels = [(y, x, k) for y, row in enumerate(image) for x, k in enumerate(row)]
        count: dict[int, int] = {}
        for _, _, k in pixels:
            if k != VOID:
                count[k] = count.get(k, 0) + 1
        total, loss = sum(count.values()), 0.0
        for y, x, k in pixels:
            if k != VOID:
                scores = [float(score) for score in logits[n, :, y, x]]
                entropy = math.log(sum(math.exp(score) for score in scores)) - scores[k]
                loss += (total - count[k]) / (1 + total) * entropy
        if image_labels is not None and len(count) != int(image_labels[n].sum()) + 1:
            loss = 0.0
        losses.append(loss / len(pixels))
    return losses


def random_case(n: int, k: int, height: int, width: int, *, seed: int, void: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < void] = VOID
    return 2 * torch.randn(n, k, height, width, generator=generator, dtype=torch.float32), labels


def test_worked_by_hand() -> None:
    """Four pixels: 0, 0, 1, void; total 3, weights (3 - 2) / 4 and (3 - 1) / 4, equal logits: log 2 each."""
    labels = torch.tensor([[[0, 0], [1, VOID]]])
    loss = balanced_cross_entropy(torch.zeros(1, 2, 2, 2), labels)
    assert loss.tolist() == [pytest.approx((0.25 + 0.25 + 0.5) * math.log(2) / 4, abs=1e-6)]


@given(
    n=st.integers(1, 3),
    k=st.integers(1, 5),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    void=st.sampled_from([0.0, 0.3, 0.9, 1.1]),
    granted=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equals_loops(n: int, k: int, height: int, width: int, void: float, granted: bool, seed: int) -> None:
    logits, labels = random_case(n, k, height, width, seed=seed, void=void)
    image_labels = None
    if granted:
        image_labels = torch.randint(0, 2, (n, k - 1), generator=torch.Generator().manual_seed(seed))
    loss = balanced_cross_entropy(logits, labels, image_labels=image_labels)
    assert loss.tolist() == pytest.approx(loss_in_loops(logits, labels, image_labels), abs=1e-5)


def test_logits_are_resized_to_the_labels() -> None:
    logits, _ = random_case(2, 3, 3, 4, seed=0)
    _, labels = random_case(2, 3, 7, 9, seed=1)
    loss = balanced_cross_entropy(logits, labels)
    assert loss.tolist() == pytest.approx(loss_in_loops(resize(logits, (7, 9)), labels, None), abs=1e-5)


@pytest.fixture
def operators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLRNET_KERNELS", "off")


SIZES = [((3, 4), (7, 9)), ((5, 5), (5, 5)), ((1, 4), (6, 1)), ((7, 9), (3, 4)), ((2, 3), (23, 65))]


@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize("part", [(1, 1), (100, 3), (2**20, 2), (2**20, 24)])
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.usefixtures("operators_alone")
def test_equals_resizing_and_then_comparing(
    small: tuple[int, int], large: tuple[int, int], part: tuple[int, int], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient, worked on by rows, by images and all at once, are those of PyTorch's own operators."""
    monkeypatch.setattr(segmentation, "_PART", {"cpu": part})
    assert_equals_resized(small, large, classes=4, scale=scale)


@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize("classes", [2, 16, 21, 201])
@pytest.mark.parametrize("scale", [1.0, 8.0, 200.0])
def test_the_kernel_equals_resizing_and_then_comparing(
    small: tuple[int, int], large: tuple[int, int], classes: int, scale: float
) -> None:
    """It leaves maps of one row, and logits that are too far from each other, to the operators."""
    assert_equals_resized(small, large, classes=classes, scale=scale)


def assert_equals_resized(small: tuple[int, int], large: tuple[int, int], *, classes: int, scale: float) -> None:
    logits = scale * random_case(3, classes, *small, seed=0)[0]
    _, labels = random_case(3, classes, *large, seed=1)
    labels[2, : large[0] // 2] = VOID
    gradients = []
    for one in (balanced_cross_entropy, resized_cross_entropy):
        own = logits.clone().requires_grad_()
        loss = one(own, labels)
        (loss * torch.tensor([1.0, -2.0, 0.5])).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append((loss.detach(), own.grad))
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-6, rtol=2e-5)


def test_kernels_are_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> None:
        raise AssertionError("the kernel is used")

    logits, labels = random_case(2, 3, 4, 4, seed=0)
    monkeypatch.setattr(cross_entropy_cpu, "available", lambda: True)
    monkeypatch.setattr(cross_entropy_cpu, "resized_cross_entropy", refuse)
    with pytest.raises(AssertionError, match="the kernel is used"):
        balanced_cross_entropy(logits, labels)
    monkeypatch.setenv("SLRNET_KERNELS", "off")
    assert balanced_cross_entropy(logits, labels).isfinite().all()
    monkeypatch.setenv("SLRNET_KERNELS", "no")
    with pytest.raises(ValueError, match="SLRNET_KERNELS is 'no'; allowed are 'on' .* and 'off'"):
        balanced_cross_entropy(logits, labels)


def test_logits_that_are_no_numbers_give_no_number() -> None:
    """The trainer finds a diverged network by its loss."""
    logits, labels = random_case(2, 3, 4, 4, seed=0)
    for value in (math.nan, math.inf):
        logits[0, 1, 2, 2] = value
        loss = balanced_cross_entropy(logits, labels)
        assert math.isnan(loss[0])
        assert math.isfinite(loss[1])


def test_tensors_without_memory_and_compilers_see_one_operator() -> None:
    logits, labels = random_case(2, 3, 4, 4, seed=0)
    with FakeTensorMode() as mode:
        own = mode.from_tensor(logits).requires_grad_()
        loss = weighted_cross_entropy(own, WeighedLabels(mode.from_tensor(labels), torch.ones(2, 4, 4)))
        loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.shape == (2,)
    assert own.grad is not None
    arguments = (logits, labels.clamp_max(2), torch.ones(2, 4, 4))
    torch.library.opcheck(segmentation._sums_and_slopes, arguments)


@pytest.mark.usefixtures("operators_alone")
def test_images_that_weigh_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' losses and gradients stay what they are."""
    monkeypatch.setattr(segmentation, "_PART", {"cpu": (1, 1)})
    logits, labels = random_case(3, 4, 5, 6, seed=0)
    labels[1] = VOID
    results = []
    for leave_out in (True, False):
        if not leave_out:
            monkeypatch.setattr(segmentation, "_known_to_weigh_nothing", lambda weights: False)
        parts = [part for part, _ in segmentation._parts((labels != VOID).float(), 4, 5)]
        assert {part.start for part in parts} == ({0, 2} if leave_out else {0, 1, 2})
        own = logits.clone().requires_grad_()
        loss = balanced_cross_entropy(own, labels)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), own.grad))
    for left_out, computed in zip(*results, strict=True):
        assert torch.equal(left_out, computed)


def resized_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The same with a map of all classes at the labels' resolution."""
    losses = F.cross_entropy(resize(logits, labels.shape[-2:]), labels, ignore_index=VOID, reduction="none")
    weights = torch.zeros_like(losses)
    for image, weight in zip(labels, weights, strict=True):
        total = (image != VOID).sum()
        for k in range(logits.shape[1]):
            weight[image == k] = (total - (image == k).sum()) / (1 + total)
    return (losses * weights).flatten(1).mean(dim=1)


def test_half_precision_logits_get_a_gradient_of_their_type() -> None:
    logits, labels = random_case(2, 3, 4, 4, seed=0)
    own = logits.bfloat16().requires_grad_()
    loss = balanced_cross_entropy(own, labels)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert own.grad is not None
    assert own.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, balanced_cross_entropy(own.detach().float(), labels))


@pytest.mark.parametrize(
    ("labels", "classes", "counts"),
    [
        ([[0, 1]], [1, 0], True),
        ([[0, 2]], [1, 0], True),  # the rule compares numbers of classes only
        ([[1, 1]], [1, 0], False),  # no background
        ([[0, 0]], [1, 0], False),  # no object
        ([[0, 1]], [1, 1], False),  # one of two objects
        ([[0, 1, 2]], [1, 0], False),  # more than the image has
        ([[0, 1, VOID]], [1, 0], True),
    ],
)
def test_images_that_miss_a_class_count_zero(labels: list[list[int]], classes: list[int], counts: bool) -> None:
    logits, _ = random_case(1, 3, 1, len(labels[0]), seed=0)
    logits.requires_grad_()
    loss = balanced_cross_entropy(logits, torch.tensor([labels]), image_labels=torch.tensor([classes]))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert (loss.item() > 0) == counts
    assert logits.grad is not None
    assert bool(logits.grad.any()) == counts


@pytest.mark.parametrize("image_labels", [None, torch.tensor([[1, 0], [1, 0]])])
def test_all_void_is_zero_with_a_graph(image_labels: Tensor | None) -> None:
    logits, labels = random_case(2, 3, 3, 3, seed=0, void=0.0)
    labels[0] = VOID
    logits.requires_grad_()
    loss = balanced_cross_entropy(logits, labels, image_labels=image_labels)
    assert loss[0].item() == 0
    loss[0].backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_single_class_weighs_nothing() -> None:
    """(total - its pixels) is 0: an image of background alone teaches nothing."""
    logits, labels = random_case(1, 3, 3, 3, seed=0, void=0.0)
    assert float(balanced_cross_entropy(logits, torch.zeros_like(labels), image_labels=torch.zeros(1, 2))) == 0


def test_void_pixels_have_no_gradient() -> None:
    logits, labels = random_case(1, 3, 4, 4, seed=2)
    logits.requires_grad_()
    balanced_cross_entropy(logits, labels).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    moved = logits.grad.abs().sum(dim=1) > 0
    assert torch.equal(moved, labels != VOID)


def test_low_precision_logits_are_raised() -> None:
    logits, labels = random_case(1, 3, 4, 4, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = balanced_cross_entropy(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, balanced_cross_entropy(logits.bfloat16().float(), labels))


def test_only_checked_images_need_all_their_classes() -> None:
    logits, _ = random_case(3, 3, 1, 2, seed=0)
    labels = torch.tensor([[[0, 1]]] * 3)
    classes = torch.tensor([[1, 1], [1, 1], [1, 0]])
    alone = balanced_cross_entropy(logits, labels)
    out = balanced_cross_entropy(logits, labels, image_labels=classes, checked=torch.tensor([True, False, True]))
    assert out.tolist() == [0.0, alone[1].item(), alone[2].item()]


def test_plain_images_weigh_all_classes_alike() -> None:
    """Four pixels: 0, 0, 1, void; each of three costs log 2 at equal logits, and a single class counts too."""
    labels = torch.tensor([[[0, 0], [1, VOID]], [[0, 0], [1, VOID]], [[0, 0], [0, 0]]])
    loss = balanced_cross_entropy(torch.zeros(3, 2, 2, 2), labels, plain=torch.tensor([True, False, True]))
    assert loss.tolist() == pytest.approx([3 * math.log(2) / 4, math.log(2) / 4, math.log(2)], abs=1e-6)
    void = torch.full((1, 2, 2), VOID)
    assert balanced_cross_entropy(torch.zeros(1, 2, 2, 2), void, plain=torch.tensor([True])).tolist() == [0.0]
