"""One step: views from a generator, un-warping, pseudo labels of a simple scene, a gradient for every parameter."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slrnet.config import Config, ModelConfig, ViewsConfig, config_from_dict
from slrnet.data.batch import Batch
from slrnet.losses.objective import Labels, Objective, objective
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.encoders import Encoder
from slrnet.models.network import Outputs
from slrnet.models.slrnet import SLRNet
from slrnet.ops.maps import resize
from slrnet.training import step as step_module
from slrnet.training.step import ViewsOfBatch, align, find_pseudo_rows, make_views, step_generator, step_losses
from slrnet.views.geometry import View, align_maps
from tests.fixtures.tiny_encoder import tiny_encoder

K = 3
PLAIN = Encoder(nn.Identity(), stages=(), channels=(3, 3), strides=(2, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def tiny_model(*, cvlr: bool = True, predict_background: bool = False, probe: bool = False, **options: Any) -> SLRNet:
    torch.manual_seed(0)
    return SLRNet(
        tiny_encoder().freeze(stages=1, batch_norm=False),
        ModelConfig(decoder_dim=8, skip_dim=3, aspp_dilations=(1, 2, 3)),
        num_classes=K,
        cvlr=CrossViewLowRank(8, dim=6, **options) if cvlr else None,
        predict_background=predict_background,
        probe=probe,
    )


def crops(n: int = 2, side: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)


class TestStepGenerator:
    def test_is_a_function_of_the_numbers(self) -> None:
        first, again = (torch.rand(4, generator=step_generator(1, 2, 3)) for _ in range(2))
        assert torch.equal(first, again)

    def test_every_number_and_its_place_counts(self) -> None:
        seen = {
            tuple(torch.randint(2**31, (2,), generator=step_generator(*numbers)).tolist())
            for numbers in [(a, b, c) for a in range(6) for b in range(6) for c in range(6)]
        }
        assert len(seen) == 216


class TestMakeViews:
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))

    def make(self, seed: int = 0, **options: Any) -> ViewsOfBatch:
        return make_views(self.images, ViewsConfig(**options), PLAIN, step_generator(seed))

    def test_the_generator_decides(self) -> None:
        (first, views, _), (again, same_views, _), (other, _, _) = self.make(0), self.make(0), self.make(1)
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
        for left, right in zip(views, same_views, strict=True):
            assert left.scale == right.scale
            assert left.flip is not None
            assert right.flip is not None
            assert torch.equal(left.flip, right.flip)
        assert not torch.equal(first[0], other[0])

    def test_sizes_follow_scales_and_stride(self) -> None:
        inputs, views, crops = self.make(scales=(1.0, 0.5, 1.5))
        assert crops is self.images
        assert [tuple(view.shape) for view in inputs] == [(3, 3, 24, 24), (3, 3, 12, 12), (3, 3, 36, 36)]
        assert [view.scale for view in views] == [1.0, 0.5, 1.5]

    def test_plain_views_are_the_images(self) -> None:
        off = {"flip": False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
        inputs, _, _ = self.make(scales=(1.0,), **off)
        assert torch.equal(inputs[0], self.images)

    def test_own_color(self) -> None:
        shared, _, crops = self.make(scales=(1.0, 1.0), flip=False, own_color=False)
        own, _, _ = self.make(scales=(1.0, 1.0), flip=False, own_color=True)
        assert torch.equal(shared[0], shared[1])
        assert torch.equal(crops, shared[0])
        assert not torch.equal(shared[0], self.images)
        assert not torch.allclose(own[0], own[1], atol=1e-3)

    def test_one_distortion_comes_before_the_views(self) -> None:
        (whole, half), _, crops = self.make(scales=(1.0, 0.5), flip=False, own_color=False)
        assert torch.equal(whole, crops)
        assert torch.equal(half, resize(crops, (12, 12)))

    @pytest.mark.parametrize(("side", "fitted", "truncated"), [(33, 17, 16), (35, 17, 17), (24, 12, 12), (41, 21, 20)])
    def test_sizes_fit_the_stride_or_are_truncated(self, side: int, fitted: int, truncated: int) -> None:
        images, encoder = torch.rand(1, 3, side, side), copy(PLAIN)
        encoder.size_step = 4
        for sizes, expected in (("fitted", fitted), ("truncated", truncated)):
            config = ViewsConfig(scales=(1.0, 0.5), sizes=sizes)  # type: ignore[arg-type]
            whole, half = make_views(images, config, encoder, step_generator(0)).inputs
            assert (whole.shape[-1], half.shape[-1]) == (side, expected)

    def test_normalisation_comes_last(self) -> None:
        constants: Any = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
        encoder = Encoder(nn.Identity(), stages=(), channels=(3, 3), strides=(2, 4), **constants)
        plain, _, _ = self.make(seed=5)
        inputs, _, _ = make_views(self.images, ViewsConfig(), encoder, step_generator(5))
        for view, raw in zip(inputs, plain, strict=True):
            for channel, (mean, std) in enumerate(zip(encoder.mean, encoder.std, strict=True)):
                assert torch.allclose(view[:, channel], (raw[:, channel] - mean) / std, atol=1e-6)


def outputs_of(maps: list[Tensor], *, cvlr: bool = True) -> Outputs:
    scores = [view.mean(dim=(2, 3))[:, 1:] for view in maps]
    return Outputs(maps, scores, [view + 1 for view in maps] if cvlr else [], [], maps if cvlr else [])


class TestAlign:
    def test_all_maps_come_back_to_the_largest_view(self) -> None:
        views = [View(0.5, torch.tensor([True, False])), View(1.0)]
        out = outputs_of([torch.rand(2, 3, 4, 4), torch.rand(2, 3, 6, 6)])
        aligned = align(out, views)
        for maps, own in (
            (aligned.logits, out.logits),
            (aligned.auxiliary_logits, out.auxiliary_logits),
            (aligned.codes, out.codes),
        ):
            expected = align_maps(own, views, size=(6, 6))
            assert all(torch.equal(left, right) for left, right in zip(maps, expected, strict=True))

    def test_probabilities_follow_the_unwarping_or_come_before_it(self) -> None:
        """Of one row of two pixels with logits (0, 4) and (0, -4), the middle is .5 or a half of .982 and .018 alike;
        with (0, 4) and (0, 0), it is the softmax of 2 or the mean of .982 and .5."""
        views, out = [View(1.0), View(0.5)], outputs_of([torch.rand(1, 2, 1, 3), torch.zeros(1, 2, 1, 2)])
        out.logits[1][0, 1, 0, 0] = 4.0
        late, early = align(out, views), align(out, views, unwarp="probs")
        assert late.unwarped_probs == []
        middle = [float(aligned.probs[1][0, 1, 0, 1]) for aligned in (late, early)]
        assert middle == pytest.approx([0.88079708, (0.98201379 + 0.5) / 2], abs=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(late.logits, early.logits, strict=True))

    def test_maps_of_the_first_view_alone(self) -> None:
        out = outputs_of([torch.rand(1, 3, 4, 4), torch.rand(1, 3, 2, 2)])
        aligned = align(replace(out, auxiliary_logits=out.auxiliary_logits[:1]), [View(1.0), View(0.5)])
        assert [view.shape for view in aligned.auxiliary_logits] == [(1, 3, 4, 4)]

    def test_scores_pass_and_missing_maps_stay_missing(self) -> None:
        out = outputs_of([torch.rand(1, 3, 4, 4), torch.rand(1, 3, 2, 2)], cvlr=False)
        aligned = align(out, [View(1.0), View(0.5)])
        assert aligned.class_scores is out.class_scores
        assert aligned.auxiliary_logits == []
        assert aligned.codes == []


def settings(**sections: Any) -> Config:
    """A configuration in which each class claims its surest pixels, so that random weights give complete labels."""
    sure = {"confidence_threshold": 0.95, "background_threshold": 0.95, "floor": 0.0}
    calibration = {"refine_stride": 2, "refine_iters": 2} | sure | sections.pop("calibration", {})
    return config_from_dict(
        {"data": {"crop_size": 32}, "model": {"output_stride": 8}, "calibration": calibration} | sections
    )


def losses_of(
    model: nn.Module,
    config: Config,
    *,
    pretraining: bool,
    seed: int = 0,
    labeler: SLRNet | None = None,
    **options: Any,
) -> Objective:
    torch.manual_seed(seed)  # dropout and gates
    batch = batch_of(**options)
    return step_losses(
        model,
        batch,
        config=config,
        encoder=PLAIN,
        generator=step_generator(seed),
        pseudo_rows=None if pretraining else find_pseudo_rows(batch),
        labeler=labeler,
    )


def batch_of(
    images: Tensor | None = None,
    image_labels: Tensor | None = None,
    masks: tuple[bool, bool] = (False, False),
    names: tuple[bool, bool] = (True, True),
) -> Batch:
    """Two crops; those with `masks` have a true one: class 2 on the left, a void column, background on the right."""
    images = crops() if images is None else images
    labels = torch.full((2, *images.shape[-2:]), 255, dtype=torch.uint8)
    for i, has in enumerate(masks):
        if has:
            labels[i, :, :10], labels[i, :, 11:] = 2, 0
    image_labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) if image_labels is None else image_labels
    return Batch(
        images=images,
        image_labels=image_labels * torch.tensor(names)[:, None],
        has_image_labels=torch.tensor(names),
        keys=("a", "b"),
        has_pixel_labels=torch.tensor(masks),
        pixel_labels=labels if any(masks) else None,
    )


SEMI = {
    "sss_image_labels": {"setting": "sss_image_labels", "data": {"crop_size": 32, "pixel_labeled_subset": "some"}},
    "sss": {"setting": "sss", "data": {"crop_size": 32, "pixel_labeled_subset": "some"}},
}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Labels]:
    """The labels that the objective gets, step by step."""
    labels: list[Labels] = []

    def keep(outputs: Any, of: Labels, **options: Any) -> Objective:
        labels.append(of)
        return objective(outputs, of, **options)

    monkeypatch.setattr(step_module, "objective", keep)
    return labels


class TestStepLosses:
    @pytest.mark.parametrize("pretraining", [True, False])
    @pytest.mark.parametrize("cvlr", [True, False])
    @pytest.mark.parametrize("scales", [[1.0], [1.0, 0.5], [0.5, 1.0, 1.0]])
    def test_every_trainable_parameter_gets_a_gradient(self, cvlr: bool, pretraining: bool, scales: Any) -> None:
        """Distributed training relies on it; frozen parameters get none."""
        model = tiny_model(cvlr=cvlr).train()
        result = losses_of(model, settings(views={"scales": scales}), pretraining=pretraining)
        result.total.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name

    @pytest.mark.parametrize("pretraining", [True, False])
    @pytest.mark.parametrize("options", [{"form": "released"}, {"num_iters": 3}, {"implementation": "reference"}])
    def test_every_form_of_cvlr_gets_a_gradient(self, options: dict[str, Any], pretraining: bool) -> None:
        model = tiny_model(**options).train()
        losses_of(model, settings(), pretraining=pretraining).total.backward()  # type: ignore[no-untyped-call]
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("pretraining", [True, False])
    def test_weights_of_zero_keep_every_gradient(self, pretraining: bool) -> None:
        model = tiny_model().train()
        config = settings(weights={"segmentation": 0, "consistency": 0, "auxiliary": 0})
        losses_of(model, config, pretraining=pretraining).total.backward()  # type: ignore[no-untyped-call]
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())

    def test_a_batch_without_any_usable_pseudo_label_is_finite(self) -> None:
        model = tiny_model().train()
        config = settings(calibration={"floor": 1.0})
        result = losses_of(model, config, pretraining=False)
        assert result.parts["segmentation"].item() == 0
        result.total.backward()  # type: ignore[no-untyped-call]
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())

    def test_images_without_classes(self) -> None:
        result = losses_of(tiny_model().train(), settings(), pretraining=False, image_labels=torch.zeros(2, 2))
        assert result.parts["mask_consistency"].item() == 0
        assert bool(result.total.isfinite())

    def test_segmentation_starts_after_pretraining(self) -> None:
        model = tiny_model().train()
        before, after = (losses_of(model, settings(), pretraining=flag).parts for flag in (True, False))
        assert set(after) - set(before) == {"segmentation"}
        assert after["segmentation"].item() > 0
        for name, value in before.items():
            assert after[name].item() == value.item()

    def test_another_network_makes_the_labels(self, kept: list[Labels]) -> None:
        """In evaluation mode, from the views in the crops' own colors; the other losses know nothing of it."""
        teacher, model = tiny_model().eval(), tiny_model().train()
        nn.init.normal_(teacher.mask_head.classify.weight)
        plain = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
        losses_of(teacher, settings(views=plain), pretraining=False)
        alone = losses_of(model, settings(), pretraining=False)
        config = settings(calibration={"source": "evaluation"})
        taught = losses_of(model, config, pretraining=False, labeler=teacher.train())
        expected, own, found = (labels.pseudo_labels for labels in kept)
        assert found is not None
        assert expected is not None
        assert found.equal(expected)
        assert own is not None
        assert not found.equal(own)
        for name in set(alone.parts) - {"segmentation"}:
            assert taught.parts[name].equal(alone.parts[name]), name
        taught.total.backward()  # type: ignore[no-untyped-call]
        assert teacher.training
        assert all(parameter.grad is None for parameter in teacher.parameters())

    @pytest.mark.parametrize("pretraining", [True, False])
    @pytest.mark.parametrize("supervision", ["mvmc", "cps", "kl"])
    @pytest.mark.parametrize("setting", [None, *SEMI])
    def test_a_probe_learns_in_every_setting(self, setting: str | None, supervision: str, pretraining: bool) -> None:
        """It changes no other part of the loss while pretraining; no gradient of its losses reaches another weight."""
        alone = setting == "sss"
        given: dict[str, Any] = SEMI[setting] if setting else {}
        options: dict[str, Any] = {"masks": (False, setting is not None), "pretraining": pretraining}
        options |= {"names": (False, False)} if alone else {}
        config = settings(**given, calibration={"supervision": supervision})
        model = tiny_model(predict_background=alone, probe=True).train()
        assert model.probe is not None
        nn.init.normal_(model.probe.classify.weight)  # at zero, all classes claim all places
        result = losses_of(model, config, **options)
        assert result.parts["probe"].item() > 0
        result.total.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        gradients = torch.autograd.grad(
            sum(part for name, part in losses_of(model, config, **options).parts.items() if name.startswith("probe")),
            [weight for weight in model.parameters() if weight.requires_grad],
            allow_unused=True,
        )
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        assert reached == {name for name in names if name.startswith("probe.")}
        assert ("probe_classification" in result.parts) == (not alone)
        if pretraining:
            without = losses_of(tiny_model(predict_background=alone).train(), config, **options)
            for name, part in without.parts.items():
                assert torch.equal(part, result.parts[name]), name

    def test_the_masks_of_a_probe_become_pseudo_labels(self, kept: list[Labels]) -> None:
        """A probe that sees class 1 everywhere, and a decoder that sees the background: pseudo labels show class 1."""
        model = tiny_model(probe=True).eval()
        assert model.probe is not None
        with torch.no_grad():
            assert model.probe.classify.bias is not None
            model.probe.classify.bias[1] = 9.0
            model.mask_head.classify.weight.zero_()
            model.mask_head.classify.bias.fill_(-9.0)  # type: ignore[union-attr]
        for fusion in ("logits", "probs"):
            losses_of(model, settings(calibration={"fusion": fusion, "floor": 0.5}), pretraining=False)
        for labels in kept:
            assert labels.seeds is None
            assert labels.pseudo_labels is not None
            assert set(labels.pseudo_labels.unique().tolist()) == {1}

    def test_seeds_come_from_the_mean_of_the_views_activations(self, kept: list[Labels]) -> None:
        model = tiny_model(probe=True).eval()
        assert model.probe is not None
        assert model.probe.activate is not None
        with torch.no_grad():
            model.probe.activate.bias.copy_(torch.tensor([2.0, 3.0]))  # type: ignore[union-attr]
        losses_of(model, settings(), pretraining=True, image_labels=torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        (labels,) = kept
        assert labels.seeds is not None
        assert set(labels.seeds[0].unique().tolist()) == {1}
        assert set(labels.seeds[1].unique().tolist()) == {255}, "no class is known"

    def test_cross_view_supervision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fig. 4 (right): the same labels for all views, those of the next view, or a view's own."""
        labels_of: dict[str, Labels] = {}
        divergence: dict[str, bool] = {}
        for supervision in ("mvmc", "cps", "kl"):

            def keep(outputs: Any, labels: Labels, *, name: str = supervision, **options: Any) -> Objective:
                labels_of[name], divergence[name] = labels, options["divergence"]
                return objective(outputs, labels, **options)

            monkeypatch.setattr(step_module, "objective", keep)
            config = settings(calibration={"supervision": supervision}, views={"scales": [1.0, 0.5, 1.0]})
            losses_of(tiny_model().eval(), config, pretraining=False)
        shared, crossed, own = (labels_of[name].pseudo_labels for name in ("mvmc", "cps", "kl"))
        assert shared is not None
        assert crossed is not None
        assert own is not None
        assert shared.shape == own.shape[1:] == crossed.shape[1:]
        assert crossed.equal(own.roll(-1, dims=0)), "view v learns from view v + 1, the last from the first"
        assert not crossed.equal(own), "the views differ"
        assert divergence == {"mvmc": False, "cps": False, "kl": True}

    def test_the_seeds_decide(self) -> None:
        model = tiny_model().train()
        first, again, other = (
            losses_of(model, settings(), pretraining=False, seed=seed).total.item() for seed in (0, 0, 1)
        )
        assert first == again
        assert first != other

    def test_memory_format_does_not_matter(self) -> None:
        model = tiny_model().eval()  # the order in which dropout draws does depend on it
        formats = (torch.contiguous_format, torch.channels_last)
        first, second = (
            losses_of(model, settings(), pretraining=False, images=crops().contiguous(memory_format=form))
            for form in formats
        )
        for name, value in first.parts.items():
            assert second.parts[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("cvlr", [True, False])
    def test_autocast(self, cvlr: bool) -> None:
        """Losses come out in float32, near those of full precision, and reach every parameter."""
        model = tiny_model(cvlr=cvlr).train()
        plain = losses_of(model, settings(), pretraining=True)
        with torch.autocast("cpu", torch.bfloat16):
            low = losses_of(model, settings(), pretraining=True)
            labeled = losses_of(model, settings(), pretraining=False)
        assert low.total.dtype == torch.float32
        for name, value in plain.parts.items():
            assert low.parts[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02)
        labeled.total.backward()  # type: ignore[no-untyped-call]
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


class TestKindsOfLabels:
    def test_pseudo_labels_are_made_where_there_is_no_mask(self) -> None:
        assert find_pseudo_rows(batch_of()).rows is None
        assert find_pseudo_rows(batch_of()).max_classes == 2
        mixed = find_pseudo_rows(batch_of(masks=(False, True)))
        assert mixed.rows is not None
        assert (mixed.rows.tolist(), mixed.max_classes) == ([0], 1)
        unknown = find_pseudo_rows(batch_of(masks=(False, True), names=(False, True)))
        assert unknown.max_classes == 2, "every class may appear"
        none = find_pseudo_rows(batch_of(masks=(True, True)))
        assert none.rows is not None
        assert (none.rows.tolist(), none.max_classes) == ([], 0)

    @pytest.mark.parametrize("setting", SEMI)
    @pytest.mark.parametrize("pretraining", [True, False])
    @pytest.mark.parametrize("masks", [(False, False), (False, True), (True, True)])
    @pytest.mark.parametrize("cvlr", [True, False])
    def test_every_parameter_gets_a_gradient_whatever_a_batch_lacks(
        self, setting: str, pretraining: bool, masks: tuple[bool, bool], cvlr: bool
    ) -> None:
        alone = setting == "sss"
        model = tiny_model(cvlr=cvlr, predict_background=alone).train()
        names = (False, False) if alone else (True, True)
        result = losses_of(model, settings(**SEMI[setting]), pretraining=pretraining, masks=masks, names=names)
        expected = {"mask_consistency", "pixel_segmentation"}
        expected |= {"code_consistency"} if cvlr else set()
        expected |= set() if alone else {"classification"}
        expected |= set() if pretraining else {"segmentation"}
        assert set(result.parts) == expected
        assert (result.parts["pixel_segmentation"].item() > 0) == any(masks)
        if not pretraining and all(masks):
            assert result.parts["segmentation"].item() == 0
        result.total.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name

    @pytest.mark.parametrize("form", ["paper", "released"])
    def test_masks_train_every_form_of_cvlr_without_image_labels(self, form: str) -> None:
        model = tiny_model(predict_background=True, form=form).train()
        options: dict[str, Any] = {"masks": (True, False), "names": (False, False)}
        losses_of(model, settings(**SEMI["sss"]), pretraining=True, **options).total.backward()  # type: ignore[no-untyped-call]
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())

    def test_classes_of_unlabeled_images_are_not_restricted(self) -> None:
        """Without image labels the pseudo labels of a half-red image may be of any class; with them only of theirs."""
        model = tiny_model(predict_background=True).train()
        config = settings(**SEMI["sss"])
        one = losses_of(model, config, pretraining=False, names=(False, False), masks=(True, False))
        assert one.parts["segmentation"].item() > 0
        none = losses_of(model, config, pretraining=False, masks=(True, False), image_labels=torch.zeros(2, 2))
        assert none.parts["segmentation"].item() == 0, "the background alone may be claimed, and weighs nothing"

    def test_the_masks_of_other_images_are_never_used(self) -> None:
        model = tiny_model().eval()
        config = settings(**SEMI["sss_image_labels"])
        batch = batch_of(masks=(True, False))
        assert batch.pixel_labels is not None
        batch.pixel_labels[1] = 1
        noisy, clean = (
            step_losses(
                model,
                of,
                config=config,
                encoder=PLAIN,
                generator=step_generator(0),
                pseudo_rows=find_pseudo_rows(of),
            )
            for of in (batch, batch_of(masks=(True, False)))
        )
        assert noisy.total.item() == clean.total.item()


def test_attention_of_a_mirrored_view_is_that_between_the_mirrored_places() -> None:
    attention = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    attention = attention + attention.mT
    view = View(scale=1.0, flip=torch.tensor([True, False]))
    out = step_module._to_crop(attention.unflatten(2, (2, 3)), view, attends=True)
    for n, mirrored in enumerate((True, False)):
        place = [3 * row + (2 - column if mirrored else column) for row in range(2) for column in range(3)]
        for one in range(6):
            for other in range(6):
                assert out[n, one, other // 3, other % 3] == attention[n, place[one], place[other]]
