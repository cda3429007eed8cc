"""SLRNet on a tiny backbone: any views, what depends on what, precision, and the road from the configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slrnet.models.slrnet as module_under_test
from slrnet.config import Config, CvlrConfig, DataConfig, ModelConfig, ViewsConfig
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.encoders import Encoder
from slrnet.models.heads import class_scores
from slrnet.models.slrnet import SLRNet, build_network
from slrnet.ops.maps import class_probs
from slrnet.recipes import RECIPES
from tests.fixtures.tiny_encoder import tiny_encoder

K = 4


def tiny_model(
    *,
    cvlr: bool = True,
    seed: int = 0,
    predict_background: bool = False,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> SLRNet:
    torch.manual_seed(seed)
    module = CrossViewLowRank(8, dim=6, **options) if cvlr else None
    if module is not None:
        module.project_out.reset_parameters()  # it starts at zero, where views would not meet
    return SLRNet(
        tiny_encoder(),
        ModelConfig(decoder_dim=8, skip_dim=3, aspp_dilations=(1, 2, 3), **(settings or {})),
        num_classes=K,
        cvlr=module,
        predict_background=predict_background,
    )


def images(*sides: int, n: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, side, side + 4, generator=generator) for side in sides]


@pytest.mark.parametrize(
    "name", sorted({of.model.encoder for of in (recipe() for recipe in RECIPES.values()) if of.cvlr.enabled})
)
@pytest.mark.slow
def test_shallow_features_have_their_share_of_what_is_fused_whatever_the_encoder(name: str) -> None:
    config = ModelConfig(
        encoder=name, encoder_weights="none", output_stride=16, decoder_dim=32, skip_dim=8, dropout=0.0
    )
    torch.manual_seed(0)
    shares, side = {}, 112 if name.startswith("timm:vit_") else 64  # whole patches of 14 and 16
    for share in (0.0, 0.33):
        of = {"model": config.model_copy(update={"skip_share": share}), "views": ViewsConfig(scales=(1.0, 1.0))}
        model = build_network(Config(data=DataConfig(crop_size=side), **of), num_classes=3)
        shares[share] = model([torch.rand(2, 3, side, side)]).figures["skip_share"].item()
    assert 0.1 < shares[0.33] < 0.5
    assert shares[0.33] != pytest.approx(shares[0.0], rel=0.05)
    assert not model.eval()([torch.rand(1, 3, side, side)]).figures


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cvlr", [True, False])
@pytest.mark.parametrize("sides", [(17,), (17, 9), (16, 24, 8, 16)])
def test_any_number_of_views_of_any_size(sides: tuple[int, ...], cvlr: bool, training: bool) -> None:
    out = tiny_model(cvlr=cvlr).train(training)(images(*sides))
    sizes = [(2, K, -(-side // 2), -(-(side + 4) // 2)) for side in sides]
    assert [tuple(view.shape) for view in out.logits] == sizes
    assert [tuple(view.shape) for view in out.class_scores] == [(2, K - 1)] * len(sides)
    assert [tuple(view.shape) for view in out.codes] == (sizes if cvlr else [])
    assert [tuple(view.shape) for view in out.auxiliary_logits] == (sizes if cvlr else [])
    assert [tuple(view.shape) for view in out.auxiliary_class_scores] == ([(2, K - 1)] * len(sides) if cvlr else [])
    assert all(bool((view[:, 0] == 1).all()) for view in out.logits)
    assert all(torch.allclose(view.sum(dim=1), torch.ones(()), atol=1e-5) for view in out.codes)


def test_scores_are_pooled_from_the_masks() -> None:
    model = tiny_model().eval()
    model.focal_power, model.focal_floor = 2.0, 0.1
    out = model(images(17, 9))
    for logits, scores in ((out.logits, out.class_scores), (out.auxiliary_logits, out.auxiliary_class_scores)):
        for view, view_scores in zip(logits, scores, strict=True):
            expected = class_scores(view, class_probs(view), focal_power=2.0, focal_floor=0.1)
            assert torch.equal(view_scores, expected)


def test_views_meet_in_cvlr_only() -> None:
    first, second, other = *images(17, 9), images(9)[0] + 1
    for cvlr in (True, False):
        model = tiny_model(cvlr=cvlr).eval()
        same = torch.allclose(model([first, second]).logits[0], model([first, other]).logits[0], atol=1e-5)
        assert same != cvlr


def test_the_order_of_views_only_orders_the_outputs() -> None:
    model, (first, second) = tiny_model().eval(), images(17, 9)
    one, two = model([first, second]), model([second, first])
    assert torch.allclose(one.logits[0], two.logits[1], atol=1e-5)
    assert torch.allclose(one.codes[1], two.codes[0], atol=1e-5)


def test_images_of_a_batch_do_not_mix_in_evaluation() -> None:
    model, views = tiny_model().eval(), images(17, 9)
    alone = model([view[1:] for view in views])
    assert torch.allclose(alone.logits[0], model(views).logits[0][1:], atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"form": "released"}, {"implementation": "reference"}])
def test_autocast(options: dict[str, Any], training: bool) -> None:
    """The convolutions run in bfloat16; what losses and calibration see is float32."""
    model = tiny_model(**options).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images(17, 9))
        total = sum(view.square().mean() for view in (*out.logits, *out.codes, *out.class_scores))
    for view in (*out.logits, *out.auxiliary_logits, *out.codes, *out.class_scores, *out.auxiliary_class_scores):
        assert view.dtype == torch.float32
    total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    if not training:
        plain = model(images(17, 9))
        assert torch.allclose(out.logits[0], plain.logits[0], atol=0.3)
        assert not torch.equal(out.logits[0], plain.logits[0])


def test_training_mode_leaves_the_aspp_statistics_alone() -> None:
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(images(17, 9))
    changed = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("aspp.") for name in changed)


@pytest.mark.parametrize(("start", "zero"), [("zero", True), ("default", False)])
def test_new_convolutions_start_with_or_without_bias(start: str, zero: bool) -> None:
    model = tiny_model(settings={"bias_start": start})
    for part in (model.auxiliary_head, model.mask_head):
        assert part is not None
        assert part.classify.bias is not None
        assert bool(part.classify.bias.any()) != zero
        assert float(part.classify.bias.detach().abs().max()) <= 8**-0.5  # uniform up to 1 / sqrt(inputs)


def test_the_auxiliary_head_may_see_the_first_view_alone() -> None:
    """Then the second view changes neither its outputs nor the statistics of its batch norm."""
    first, second, other = images(17, 9, 9)
    seen = []
    for views in ([first, second], [first, other * 5 + 1]):
        model = tiny_model(settings={"auxiliary_views": "first"}, form="released")
        assert model.auxiliary_head is not None
        out = model.train()(views)
        assert (len(out.logits), len(out.class_scores), len(out.codes)) == (2, 2, 2)
        assert (len(out.auxiliary_logits), len(out.auxiliary_class_scores)) == (1, 1)
        seen.append((out.auxiliary_logits[0], model.auxiliary_head.conv[1].running_mean))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_build_network_passes_every_setting_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelConfig] = []

    def fake_build(config: ModelConfig) -> Encoder:
        asked.append(config)
        return tiny_encoder()

    monkeypatch.setattr(module_under_test, "build_encoder", fake_build)
    model_config = ModelConfig(
        encoder="resnet50",
        encoder_weights="none",
        output_stride=16,
        frozen_stages=2,
        freeze_batch_norm=False,
        decoder_dim=12,
        skip_dim=7,
        aspp_dilations=(2, 4, 6),
        dropout=0.2,
        gate_rate=0.4,
        focal_power=2.0,
        focal_floor=0.2,
    )
    cvlr = CvlrConfig(dim=5, num_iters=3, temperature=0.5, form="released", implementation="reference")
    config = Config(model=model_config, cvlr=cvlr)
    model = build_network(config, num_classes=6)
    assert asked == [model_config]
    assert model.cvlr is not None
    assert (model.cvlr.num_iters, model.cvlr.temperature, model.cvlr.form) == (3, 0.5, "released")
    assert model.cvlr.implementation == "reference"
    assert model.cvlr.project_in.weight.shape == (5, 12)
    assert [branch[0].dilation[0] for branch in model.aspp.branches] == [1, 2, 4, 6]  # type: ignore[index]
    assert model.fusion.project[0].weight.shape[:2] == (7, 5)
    assert (model.gate.rate, model.focal_power, model.focal_floor) == (0.4, 2.0, 0.2)
    dropped = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert sorted(dropped) == [0.04, 0.2, 0.2, 0.2]
    centered = build_network(Config(model=model_config, cvlr=CvlrConfig(centered=True)), num_classes=6).cvlr
    assert centered is not None
    assert (centered.centered, model.cvlr.centered) == (True, False)
    assert model.num_classes == 6
    assert model(images(17)).logits[0].shape[1] == 6
    without = Config(model=model_config, cvlr=CvlrConfig(enabled=False))
    assert build_network(without, num_classes=6).auxiliary_head is None
    semi = {"setting": "sss", "data": DataConfig(pixel_labeled_subset="some")}
    alone = build_network(config.model_copy(update=semi), num_classes=6)
    assert alone.auxiliary_head is not None
    assert [head.classify.out_channels for head in (alone.mask_head, alone.auxiliary_head)] == [6, 6]
    assert [head.classify.out_channels for head in (model.mask_head, model.auxiliary_head)] == [5, 5]  # type: ignore[union-attr]


def test_a_network_that_predicts_the_background_has_no_class_scores() -> None:
    model = tiny_model(predict_background=True).train()
    out = model(images(17, 9))
    assert out.class_scores == out.auxiliary_class_scores == []
    assert [tuple(view.shape[:2]) for view in (*out.logits, *out.auxiliary_logits, *out.codes)] == [(2, K)] * 6
    sum(view.square().mean() for view in (*out.logits, *out.auxiliary_logits)).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
