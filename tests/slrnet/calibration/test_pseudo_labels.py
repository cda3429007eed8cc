"""Thresholds by hand, classes that may not appear, and Eq. 3 as written against the released average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slrnet.calibration.pseudo_labels import (
    Calibrated,
    calibrate_views,
    make_pseudo_labels,
    possible_classes,
    seed_labels,
    threshold,
    to_class_ids,
)
from slrnet.calibration.refine import refine
from slrnet.config import CalibrationConfig
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.ops.maps import resize

VOID = IGNORE_INDEX


def labels_of(*rows: list[float], **options: float) -> list[int]:
    """Labels of one image whose masks are single rows of pixels."""
    settings = {"confidence_threshold": 0.6, "background_threshold": 0.7, "floor": 0.2} | options
    return threshold(torch.tensor([[list(row)] for row in rows]).unsqueeze(0), **settings)[0, 0].tolist()  # type: ignore[no-any-return]


def threshold_in_loops(probs: Tensor, gamma: float, background: float, floor: float) -> Tensor:
    n_images, n_classes, height, width = probs.shape
    labels = torch.full((n_images, height, width), VOID)
    for n in range(n_images):
        limits = [max(probs[n, k].max().item() * (gamma if k else background), floor) for k in range(n_classes)]
        for y in range(height):
            for x in range(width):
                claims = [k for k in range(n_classes) if probs[n, k, y, x].item() > limits[k]]
                if len(claims) == 1:
                    labels[n, y, x] = claims[0]
    return labels


def test_seeds_by_shares_of_the_largest_activation() -> None:
    """Above .4 of the maximum the class, all below .15 background; classes that the image lacks do not count."""
    row = torch.tensor([[10.0, 4.5, 3.5, 1.6, 1.4, -8.0], [-1.0, -1.0, 2.0, -1.0, -1.0, -1.0]])
    activations = row.view(1, 2, 1, 6).expand(4, -1, -1, -1)
    labels = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]])
    assert seed_labels([activations], labels)[:, 0].tolist() == [
        [1, 1, VOID, VOID, 0, 0],
        [1, 1, 2, VOID, 0, 0],
        [0, 0, 2, 0, 0, 0],
        [VOID] * 6,
    ]


class TestThreshold:
    def test_share_of_the_maximum(self) -> None:
        """Foreground 0.5 of 0.8 at most: the limit is 0.4, and 0.40 itself is not above it."""
        row = [0.8, 0.375, 0.4, 0.41]
        assert labels_of([0.0] * 4, row, confidence_threshold=0.5) == [1, VOID, VOID, 1]

    def test_is_strict(self) -> None:
        assert labels_of([0.5, 0.25, 0.0], [0.0, 0.0, 0.0], background_threshold=0.5, floor=0.0) == [0, VOID, VOID]
        assert labels_of([0.0, 0.0], [0.25, 0.2501], floor=0.25) == [VOID, 1]
        assert labels_of([0.5, 0.5], [0.0, 0.0], background_threshold=1.0) == [VOID, VOID]

    def test_the_floor_silences_weak_classes(self) -> None:
        assert labels_of([0.0, 0.0], [0.19, 0.1]) == [VOID, VOID]
        assert labels_of([0.0, 0.0], [0.19, 0.1], floor=0.1) == [1, VOID]

    def test_the_background_has_its_own_share(self) -> None:
        """Limits 0.7 and 0.6 for maxima of 1: 0.65 is enough for the foreground only."""
        assert labels_of([1.0, 0.65, 0.0, 0.0], [0.0, 0.0, 1.0, 0.65]) == [0, VOID, 1, 1]

    def test_several_claims_are_void(self) -> None:
        assert labels_of([0.5, 0.1], [0.45, 0.45], [0.1, 0.45]) == [VOID, VOID]

    def test_each_image_has_its_own_maximum(self) -> None:
        probs = torch.tensor([0.9, 0.3, 0.3, 0.3]).view(2, 1, 1, 2)
        probs = torch.cat([torch.zeros_like(probs), probs], dim=1)
        assert threshold(probs, confidence_threshold=0.6, background_threshold=0.7, floor=0.2).flatten().tolist() == [
            1,
            VOID,
            1,
            1,
        ]

    @given(
        k=st.integers(1, 5),
        gamma=st.floats(0, 1),
        background=st.floats(0, 1),
        floor=st.floats(0, 1),
        seed=st.integers(0, 100),
    )
    @settings(max_examples=40, deadline=None)
    def test_equals_loops(self, k: int, gamma: float, background: float, floor: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        probs = (2 * torch.randn(2, k, 3, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
        out = threshold(probs, confidence_threshold=gamma, background_threshold=background, floor=floor)
        assert out.dtype == torch.int64
        assert torch.equal(out, threshold_in_loops(probs, gamma, background, floor))

    @pytest.mark.parametrize("name", ["confidence_threshold", "background_threshold", "floor"])
    @pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
    def test_mistakes_are_named(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            labels_of([0.5], [0.5], **{name: value})


class TestClassesOfChannels:
    def classes(self, image_labels: Tensor, max_classes: int) -> list[list[int]]:
        n, k = image_labels.shape
        logits, images = torch.zeros(n, k + 1, 1, 1), torch.zeros(n, 3, 1, 1)
        calibrated = calibrate_views([logits], images, image_labels, CalibrationConfig(), max_classes=max_classes)
        return calibrated.classes.tolist()  # type: ignore[no-any-return]

    def test_by_hand(self) -> None:
        image_labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
        assert self.classes(image_labels, 3) == [[0, 2, 4, -1], [0, -1, -1, -1], [0, 1, 2, 3]]

    def test_images_without_classes(self) -> None:
        assert self.classes(torch.zeros(2, 4), 0) == [[0], [0]]

    def test_dropping_a_class_is_refused(self) -> None:
        with pytest.raises(ValueError, match="has 3 classes and max_classes is 2"):
            self.classes(torch.tensor([[1, 1, 1], [1, 0, 0]]), 2)


def test_images_with_unknown_labels_may_show_any_class() -> None:
    possible = possible_classes(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([True, False]))
    assert possible.tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_channels_become_class_ids() -> None:
    classes = torch.tensor([[0, 2, 4], [0, 3, -1]])
    labels = torch.tensor([[[0, 1], [2, VOID]], [[1, 1], [0, VOID]]])
    assert to_class_ids(labels, classes).tolist() == [[[0, 2], [4, VOID]], [[3, 3], [0, VOID]]]


def test_normalized_masks_by_hand() -> None:
    """Maxima .8, .4 and .2 of a row of four pixels. Shares of the foreground: 1, .6, .05, .55 and .1, 1, .09, .6."""
    probs = torch.tensor([[0.1, 0.8, 0.5, 0.3], [0.4, 0.24, 0.02, 0.22], [0.02, 0.2, 0.018, 0.12]]).view(1, 3, 1, 4)
    options = {"confidence_threshold": 0.5, "background_threshold": 0.7}
    for floor, expected in ((0.1, [1, VOID, 0, VOID]), (0.05, [1, VOID, VOID, VOID])):
        assert threshold(probs, **options, floor=floor, rule="normalized").tolist() == [[expected]]
    absent = torch.cat([probs[:, :2], torch.zeros(1, 1, 1, 4)], dim=1)  # an image without class 2
    assert threshold(absent, **options, floor=0.1, rule="normalized").tolist() == [[[1, 1, 0, 1]]]


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestCalibrate:
    images = torch.rand(3, 3, 7, 9, generator=torch.Generator().manual_seed(5))
    image_labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    views = (random_logits(3, 5, 4, 5), random_logits(3, 5, 4, 5, seed=1), random_logits(3, 5, 4, 5, seed=2))

    def run(self, views: Sequence[Tensor] = views, **options: Any) -> Calibrated:
        config = CalibrationConfig(refine_stride=1, **options)
        return calibrate_views(views, self.images, self.image_labels, config, max_classes=2)

    @pytest.mark.parametrize("fusion", ["logits", "probs"])
    def test_equals_the_fusion_of_all_classes(self, fusion: Any) -> None:
        """Leaving classes out saves work and changes nothing for those that stay: softmax runs over all K."""
        masks = self.views if fusion == "logits" else [view.softmax(dim=1) for view in self.views]
        fused = self.run(masks, fusion=fusion, refine_iters=2)
        if fusion == "logits":
            probs = torch.softmax((self.views[0] + self.views[1] + self.views[2]) / 3, dim=1)
        else:
            probs = (self.views[0].softmax(1) + self.views[1].softmax(1) + self.views[2].softmax(1)) / 3
        raw = resize(probs, (7, 9))
        refined = refine(self.images, raw, num_iters=2)
        assert fused.classes.tolist() == [[0, 2, 4], [0, -1, -1], [0, 1, -1]]
        for n, row in enumerate(fused.classes.tolist()):
            for channel, k in enumerate(row):
                expected_raw = raw[n, k] if k >= 0 else torch.zeros(7, 9)
                expected = refined[n, k] if k >= 0 else torch.zeros(7, 9)
                assert torch.allclose(fused.raw[n, channel], expected_raw, atol=1e-6)
                assert torch.allclose(fused.refined[n, channel], expected, atol=1e-6)

    def test_fusions_differ_where_views_disagree(self) -> None:
        """Logits 0 against (4, -4): the mean logit 2 against -2 gives 0.982, the mean probability 0.750."""
        views = [torch.zeros(1, 2, 1, 1), torch.tensor([4.0, -4.0]).view(1, 2, 1, 1)]
        values = {}
        for fusion in ("logits", "probs"):
            config = CalibrationConfig(fusion=fusion)  # type: ignore[arg-type]
            masks = views if fusion == "logits" else [view.softmax(dim=1) for view in views]
            out = calibrate_views(masks, torch.zeros(1, 3, 1, 1), torch.ones(1, 1), config, max_classes=1)
            values[fusion] = float(out.raw[0, 0])
        assert values["logits"] == pytest.approx(0.98201379, abs=1e-6)
        assert values["probs"] == pytest.approx(0.5 * (0.5 + 0.99966465), abs=1e-6)

    def test_views_may_weigh_differently(self) -> None:
        """Weights 1, 0 and 3: a quarter of the first view and three of the third; of one view all."""
        masks = [view.softmax(dim=1) for view in self.views]
        for views, fusion in ((self.views, "logits"), (masks, "probs")):
            fused = self.run(views, fusion=fusion, refine_iters=0, view_weights=(1.0, 0.0, 3.0)).raw
            expected = self.run([views[0] / 4 + views[2] * 3 / 4], fusion=fusion, refine_iters=0).raw
            assert torch.allclose(fused, expected, atol=1e-6)
        alone = self.run(view_weights=(0.0, 2.0, 0.0)).refined
        assert torch.allclose(alone, self.run(self.views[1:2]).refined, atol=1e-6)

    def test_peaks_are_divided_by_a_power_of_themselves(self) -> None:
        """Background .9 and .2, class 1 .09 and .04: by the roots of .9 and .09, so .3 and .1333 of class 1."""
        probs = torch.tensor([[0.9, 0.2], [0.09, 0.04], [0.0, 0.0]]).view(1, 3, 1, 2)
        config = CalibrationConfig(fusion="probs", peak_power=0.5, refine_stride=1, refine_iters=0)
        out = calibrate_views([probs], torch.rand(1, 3, 1, 2), torch.tensor([[1, 0]]), config, max_classes=2)
        assert out.refined[0, 0, 0].tolist() == pytest.approx([0.9**0.5, 0.2 / 0.9**0.5])
        assert out.refined[0, 1, 0].tolist() == pytest.approx([0.3, 0.04 / 0.3])
        assert out.refined[0, 2, 0].tolist() == [0.0, 0.0]  # a channel that no class uses
        assert out.raw[0, 1, 0].tolist() == pytest.approx([0.09, 0.04])
        options = {"confidence_threshold": 0.5, "background_threshold": 0.7, "floor": 0.2}
        assert threshold(out.refined, **options).tolist() == [[[VOID, VOID]]]  # both claim the first pixel
        assert threshold(out.raw, **options).tolist() == [[[0, VOID]]]

    def test_absent_classes_never_appear(self) -> None:
        fused = self.run()
        for gamma in (0.0, 0.5, 0.9):
            channels = threshold(fused.refined, confidence_threshold=gamma, background_threshold=gamma, floor=0.0)
            labels = to_class_ids(channels, fused.classes)
            for n, row in enumerate(self.image_labels):
                allowed = {0, VOID} | {k + 1 for k in range(4) if row[k]}
                assert set(labels[n].flatten().tolist()) <= allowed

    def test_images_without_classes(self) -> None:
        config = CalibrationConfig(refine_stride=1, refine_iters=1)
        out = calibrate_views(self.views, self.images, torch.zeros(3, 4), config, max_classes=0)
        assert out.raw.shape == (3, 1, 7, 9)
        labels = threshold(out.refined, confidence_threshold=0.6, background_threshold=0.7, floor=0.0)
        assert set(to_class_ids(labels, out.classes).flatten().tolist()) == {0, VOID}

    def test_the_background_gets_its_power_before_refinement(self) -> None:
        """Probabilities .5, .2 and .3 become .5^3 = .125, .2 and .3; refinement spreads those, not their sources."""
        probs = torch.tensor([0.5, 0.2, 0.3]).view(1, 3, 1, 1).expand(1, 3, 4, 4).clone()
        config = CalibrationConfig(fusion="probs", background_power=3.0, refine_stride=1, refine_iters=1)
        out = calibrate_views([probs], torch.rand(1, 3, 4, 4), torch.ones(1, 2), config, max_classes=2)
        for maps in (out.raw, out.refined):
            assert maps[0, :, 1, 2].tolist() == pytest.approx([0.125, 0.2, 0.3], abs=1e-6)
        labels = threshold(out.raw, confidence_threshold=0.9, background_threshold=0.9, floor=0.25)
        assert labels.unique().tolist() == [2]

    def test_one_view_and_no_refinement(self) -> None:
        out = self.run(self.views[:1], refine_iters=0)
        assert torch.equal(out.raw, out.refined)
        assert torch.allclose(out.raw[0, 1], resize(self.views[0].softmax(1), (7, 9))[0, 2], atol=1e-6)

    def test_no_gradient_and_float32_under_autocast(self) -> None:
        views = [view.clone().requires_grad_() for view in self.views]
        with torch.autocast("cpu", torch.bfloat16):
            out = self.run(views, refine_iters=2)
        assert not out.refined.requires_grad
        assert out.refined.dtype == torch.float32
        assert torch.equal(out.refined, self.run(refine_iters=2).refined)

    def test_settings_of_the_refinement_are_used(self) -> None:
        assert not torch.equal(self.run(refine_iters=1).refined, self.run(refine_iters=2).refined)
        assert not torch.equal(self.run(refine_dilations=(1,)).refined, self.run(refine_dilations=(2,)).refined)
        scaled = self.run(refine_dilations=(2, 4), refine_side=16).refined  # 7 x 9 pixels: half of both
        assert torch.equal(scaled, self.run(refine_dilations=(1, 2)).refined)


class TestSceneOfTwoHalves:
    """A red left half (class 2) on a grey background, logits that are right but blurred over the edge."""

    def scene(self) -> tuple[list[Tensor], Tensor]:
        images = torch.full((1, 3, 32, 32), 0.5)
        images[:, 0, :, :16], images[:, 1:, :, :16] = 0.9, 0.1
        place = torch.linspace(-1, 1, 16).expand(1, 16, 16)
        logits = torch.stack([2 + 4 * place, torch.full_like(place, 3.0), 2 - 4 * place], dim=1)
        return [logits, logits[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2)], images

    def labels(self, image_labels: list[int], **options: Any) -> Tensor:
        logits, images = self.scene()
        config = CalibrationConfig(refine_stride=2, refine_dilations=(1, 2), **options)
        calibrated = calibrate_views(
            logits, images, torch.tensor([image_labels]), config, max_classes=sum(image_labels)
        )
        assert calibrated.refined.shape[-2:] == (16, 16)
        return make_pseudo_labels(calibrated, config, size=(32, 32))

    def test_both_halves_are_labeled_and_the_edge_is_sharp(self) -> None:
        labels = self.labels([0, 1])
        assert labels.shape == (1, 32, 32)
        assert set(labels[..., :13].flatten().tolist()) == {2}
        assert set(labels[..., 19:].flatten().tolist()) == {0}
        assert set(labels.flatten().tolist()) <= {0, 2, 255}

    def test_refinement_does_it(self) -> None:
        decided = [int((self.labels([0, 1], refine_iters=iters) != 255).sum()) for iters in (0, 10)]
        assert decided[1] > decided[0]

    def test_absent_classes_never_appear(self) -> None:
        assert set(self.labels([1, 0], floor=0.0).flatten().tolist()) <= {0, 1, 255}
        assert set(self.labels([0, 0]).flatten().tolist()) <= {0, 255}

    def test_every_threshold_is_used(self) -> None:
        base = self.labels([0, 1], refine_iters=1)
        for option in ("confidence_threshold", "background_threshold", "floor"):
            assert not torch.equal(self.labels([0, 1], refine_iters=1, **{option: 0.97}), base)

    def test_sizes_that_the_stride_does_not_divide(self) -> None:
        logits, _ = self.scene()
        config = CalibrationConfig(refine_stride=4)
        calibrated = calibrate_views(logits, torch.rand(1, 3, 33, 30), torch.tensor([[0, 1]]), config, max_classes=1)
        assert calibrated.refined.shape[-2:] == (9, 8)
        assert make_pseudo_labels(calibrated, config, size=(33, 30)).shape == (1, 33, 30)
