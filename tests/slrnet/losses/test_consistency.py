"""Consistency of masks and codes by hand, over pairs of views, for one view, as logits and as probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slrnet.losses.consistency import code_consistency, mask_consistency, mask_divergence


def random_views(count: int, n: int = 2, k: int = 4, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, k, 3, 5, generator=generator) for _ in range(count)]


def pairs_in_loops(views: list[Tensor], counted: Callable[[int, int], bool], start: int) -> list[float]:
    """Sum over unordered pairs of the mean over channels from `start` on; channels not `counted` add 0."""
    n_images, n_channels, height, width = views[0].shape
    totals = []
    for n in range(n_images):
        total = 0.0
        for u in range(len(views)):
            for v in range(u + 1, len(views)):
                distance = 0.0
                for k in range(start, n_channels):
                    if counted(n, k):
                        distance += float((views[u][n, k] - views[v][n, k]).abs().sum())
                total += distance / ((n_channels - start) * height * width)
        totals.append(total)
    return totals


class TestMaskConsistency:
    image_labels = torch.tensor([[1, 0, 1], [0, 0, 1]])

    @pytest.mark.parametrize("count", [2, 3, 4])
    @pytest.mark.parametrize("compare", ["logits", "probs"])
    def test_equals_loops(self, count: int, compare: Any) -> None:
        views = random_views(count)
        compared = [view.softmax(dim=1) for view in views] if compare == "probs" else views
        expected = pairs_in_loops(compared, lambda n, k: bool(self.image_labels[n, k - 1]), start=1)
        out = mask_consistency(compared, self.image_labels)
        assert out.tolist() == pytest.approx(expected, abs=1e-5)

    def test_worked_by_hand(self) -> None:
        """Foreground logits 1 and 3 against 4 and 3 over two classes of which one is present: (3 + 0) / 2."""
        first = torch.tensor([7.0, 1.0, 3.0]).view(1, 3, 1, 1)
        second = torch.tensor([0.0, 4.0, 9.0]).view(1, 3, 1, 1)
        assert mask_consistency([first, second], torch.tensor([[1, 0]])).item() == pytest.approx(1.5)
        odds = [math.exp(value) for value in (7, 1, 3, 0, 4, 9)]
        expected = abs(odds[1] / sum(odds[:3]) - odds[4] / sum(odds[3:])) / 2
        probs = mask_consistency([first.softmax(1), second.softmax(1)], torch.tensor([[1, 0]]))
        assert probs.tolist() == [pytest.approx(expected, abs=1e-6)]

    def test_background_and_absent_classes_have_no_say(self) -> None:
        views = [view.requires_grad_() for view in random_views(2)]
        mask_consistency(views, self.image_labels).sum().backward()  # type: ignore[no-untyped-call]
        for view in views:
            assert view.grad is not None
            moved = view.grad.flatten(2).abs().sum(dim=2) > 0
            assert moved.tolist() == [[False, True, False, True], [False, False, False, True]]

    @pytest.mark.parametrize("compare", ["logits", "probs"])
    def test_all_classes_and_the_background_where_labels_are_unknown(self, compare: Any) -> None:
        """The second image is unlabeled: a mean over its K = 4 classes."""
        views = random_views(3)
        compared = [view.softmax(dim=1) for view in views] if compare == "probs" else views
        known = pairs_in_loops(compared, lambda n, k: bool(self.image_labels[n, k - 1]), start=1)[0]
        unknown = pairs_in_loops(compared, lambda n, k: True, start=0)[1]
        labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
        some = {"has_image_labels": torch.tensor([True, False])}
        assert mask_consistency(compared, labels, **some).tolist() == pytest.approx([known, unknown], abs=1e-5)
        alone = pairs_in_loops(compared, lambda n, k: True, start=1)[1]  # a mean over the K - 1 = 3 foreground classes
        out = mask_consistency(compared, labels, **some, background=False)
        assert out.tolist() == pytest.approx([known, alone], abs=1e-5)
        assert alone != pytest.approx(unknown, rel=1e-3)

    def test_images_without_classes_are_zero(self) -> None:
        assert mask_consistency(random_views(2), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


class TestCodeConsistency:
    @pytest.mark.parametrize("count", [2, 3])
    def test_equals_loops(self, count: int) -> None:
        views = [view.softmax(dim=1) for view in random_views(count)]
        expected = pairs_in_loops(views, lambda n, k: True, start=0)
        assert code_consistency(views).tolist() == pytest.approx(expected, abs=1e-6)

    def test_worked_by_hand(self) -> None:
        """Codes (.6, .4) and (.3, .7): .3 + .3 over two atoms; of the maxima alone .6 + .7."""
        first, second = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1), torch.tensor([0.3, 0.7]).view(1, 2, 1, 1)
        assert code_consistency([first, second]).tolist() == [pytest.approx(0.3, abs=1e-6)]
        assert code_consistency([first, second], compare="maximum").tolist() == [pytest.approx(0.65, abs=1e-6)]

    def test_maximum_keeps_ties(self) -> None:
        tied, other = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1), torch.tensor([0.8, 0.2]).view(1, 2, 1, 1)
        assert code_consistency([tied, other], compare="maximum").tolist() == [pytest.approx((0.3 + 0.5) / 2)]

    def test_maximum_sends_gradient_to_maxima_only(self) -> None:
        views = [view.softmax(dim=1).requires_grad_() for view in random_views(2)]
        code_consistency(views, compare="maximum").sum().backward()  # type: ignore[no-untyped-call]
        for view in views:
            assert view.grad is not None
            assert torch.equal(view.grad != 0, view == view.amax(dim=1, keepdim=True))


class TestMaskDivergence:
    @pytest.mark.parametrize("views", [2, 3])
    def test_equals_a_slow_loop(self, views: int) -> None:
        masks = random_views(views)
        expected = torch.zeros(len(masks[0]))
        for i in range(views):
            for j in range(i):
                for p, q in ((masks[i], masks[j]), (masks[j], masks[i])):
                    p, q = p.softmax(dim=1), q.softmax(dim=1)
                    expected += 0.5 * (p * (p / q).log()).sum(dim=1).mean(dim=(1, 2))
        assert torch.allclose(mask_divergence(masks), expected, atol=1e-6)

    def test_by_hand(self) -> None:
        first, second = torch.tensor([[0.5, 0.5], [0.8, 0.2]]).log().view(2, 1, 2, 1, 1)
        assert mask_divergence([first, second]).item() == pytest.approx(0.3 * torch.tensor(4.0).log().item() / 2)

    def test_equal_masks_and_a_single_one_give_zero_with_a_graph(self) -> None:
        masks = random_views(1)[0].requires_grad_()
        assert mask_divergence([masks, masks]).tolist() == [0.0] * len(masks)
        total = mask_divergence([masks])
        assert total.tolist() == [0.0] * len(masks)
        total.sum().backward()  # type: ignore[no-untyped-call]
        assert masks.grad is not None


@pytest.mark.parametrize("k", [4, 21])
def test_by_vocs_number_of_classes_more_absent_classes_change_nothing(k: int) -> None:
    """Sums over classes by 20, by 21 with the background, and by 21 atoms: a mean for VOC alone."""
    some, none = random_views(2), [torch.zeros(2, k - 4, 3, 5)] * 2
    views = [torch.cat([view, more], dim=1) for view, more in zip(some, none, strict=True)]
    labels = torch.cat([torch.tensor([[1, 0, 1], [0, 0, 0]]), torch.zeros(2, k - 4)], dim=1)
    known = torch.tensor([True, False])
    distances = (some[0] - some[1]).abs().mean(dim=(2, 3))
    found = mask_consistency(views, labels, has_image_labels=known, divisor="voc").tolist()
    assert found == pytest.approx([float(distances[0, [1, 3]].sum()) / 20, float(distances[1].sum()) / 21])
    assert code_consistency(views, divisor="voc").tolist() == pytest.approx((distances.sum(dim=1) / 21).tolist())
    if k == 21:
        assert found == mask_consistency(views, labels, has_image_labels=known).tolist()
        assert code_consistency(views, divisor="voc").equal(code_consistency(views))


@pytest.mark.parametrize("height", [1.0, 1e30])
def test_one_view_is_exactly_zero_with_a_graph(height: float) -> None:
    masks, codes = (view.mul(height).requires_grad_() for view in random_views(2))
    total = mask_consistency([masks], torch.ones(2, 3)) + code_consistency([codes])
    assert total.tolist() == [0.0, 0.0]
    total.sum().backward()  # type: ignore[no-untyped-call]
    for view in (masks, codes):
        assert view.grad is not None
        assert not view.grad.any()
