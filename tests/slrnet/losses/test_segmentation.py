"""Balanced cross-entropy against pixel-by-pixel sums, the rule for incomplete labels, and images without labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.losses.segmentation import balanced_cross_entropy, weigh
from slrnet.ops.cross_entropy import resized_cross_entropy
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
    weighed = weigh(labels, 3, image_labels=classes, checked=torch.tensor([True, False, True]))
    out = resized_cross_entropy(logits, weighed.labels, weighed.weights)
    assert weighed.complete.tolist() == [False, True, True]
    assert out.tolist() == pytest.approx([0.0, alone[1].item(), alone[2].item()], rel=1e-6)


@pytest.mark.parametrize(("power", "expected"), [(1.0, [0.25, 0.5]), (0.5, [0.5, 0.5**0.5]), (0.0, [1.0, 1.0])])
def test_the_power_softens_the_balance(power: float, expected: list[float]) -> None:
    """Pixels 0, 0, 1, void: the classes weigh 1/4 and 2/4."""
    labels = torch.tensor([[[0, 0], [1, VOID]]])
    weights = weigh(labels, 2, power=power).weights.flatten().tolist()
    assert weights == pytest.approx([expected[0], expected[0], expected[1], 0.0])


@pytest.mark.parametrize(
    ("validity", "expected"),
    [
        ("whole_image", [[0, 0, 0], [0.25, 0.25, 0.5]]),
        ("present_classes", [[0, 0, 0.5], [0.25, 0.25, 0.5]]),
        ("soft", [[1 / 6, 1 / 6, 1 / 3], [0.25, 0.25, 0.5]]),
    ],
)
def test_what_counts_of_a_label_that_misses_a_class(validity: Any, expected: list[list[float]]) -> None:
    """Pixels 0, 0, 1 twice; the first image shows two of its three classes, the second both of its two."""
    labels = torch.tensor([[[0, 0, 1]], [[0, 0, 1]]])
    weighed = weigh(labels, 3, image_labels=torch.tensor([[1, 1], [1, 0]]), validity=validity)
    assert torch.allclose(weighed.weights[:, 0], torch.tensor(expected))
    assert weighed.complete.tolist() == [False, True]


def test_plain_images_weigh_all_classes_alike() -> None:
    """Four pixels: 0, 0, 1, void; each of three costs log 2 at equal logits, and a single class counts too."""
    labels = torch.tensor([[[0, 0], [1, VOID]], [[0, 0], [1, VOID]], [[0, 0], [0, 0]]])
    weighed = weigh(labels, 2, plain=torch.tensor([True, False, True]))
    loss = resized_cross_entropy(torch.zeros(3, 2, 2, 2), weighed.labels, weighed.weights)
    assert loss.tolist() == pytest.approx([3 * math.log(2) / 4, math.log(2) / 4, math.log(2)], abs=1e-6)
    void = torch.full((1, 2, 2), VOID)
    assert not weigh(void, 2, plain=torch.tensor([True])).weights.any()
