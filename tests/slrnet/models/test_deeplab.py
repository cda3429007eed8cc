"""DeepLabV3+: the library's network on our encoders."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from slrnet.config import ConfigError, ModelConfig, apply_overrides
from slrnet.models import deeplab
from slrnet.models.deeplab import DeepLabV3Plus
from slrnet.models.encoders import build_encoder
from slrnet.models.slrnet import build_network
from slrnet.recipes import get_recipe, voc_distill_lite

smp = pytest.importorskip("segmentation_models_pytorch", reason="the extra `distill` is not installed")


def test_is_the_librarys_decoder_on_our_encoder() -> None:
    """The encoder alone differs: timm dilates the first block of the last stage less than the library does."""
    torch.manual_seed(0)
    config = ModelConfig(
        encoder="efficientnet_lite0", output_stride=16, decoder_dim=16, aspp_dilations=(6, 12, 18), dropout=0.0
    )
    encoder = build_encoder(config)
    ours = DeepLabV3Plus(encoder, config, num_classes=7).eval()
    theirs = smp.DeepLabV3Plus(
        "timm-tf_efficientnet_lite0",
        encoder_weights=None,
        encoder_output_stride=16,
        decoder_channels=16,
        decoder_atrous_rates=(6, 12, 18),
        classes=7,
    ).eval()
    theirs.decoder.load_state_dict(ours.decoder.state_dict())
    theirs.segmentation_head[0].load_state_dict(ours.head[0].state_dict())
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        out = ours([images])
        full = torch.nn.functional.interpolate(out.logits[0], size=(96, 64), mode="bilinear", align_corners=True)
        features = [images, *encoder.backbone(images)]  # the library counts the image as the first level
        assert [len(images[0, 0]) // level.shape[-2] for level in features] == [1, 2, 4, 8, 16, 16]
        assert [level.shape[1] for level in features[2:]] == [*theirs.encoder.out_channels[2:]]
        torch.testing.assert_close(full, theirs.segmentation_head(theirs.decoder(features)), atol=1e-4, rtol=1e-4)
    assert out.logits[0].shape == (2, 7, 24, 16)
    assert not out.class_scores + out.codes + out.auxiliary_logits


def test_the_recipe_builds_it_frozen_as_it_says() -> None:
    config = apply_overrides(voc_distill_lite(), ["model.encoder_weights=none"])
    model = build_network(config, num_classes=4)
    assert isinstance(model, DeepLabV3Plus)
    model.train()
    assert not any(parameter.requires_grad for parameter in model.encoder.backbone.conv_stem.parameters())
    norms = [module for module in model.decoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)


def test_gradients_reach_every_trainable_weight() -> None:
    config = apply_overrides(voc_distill_lite(), ["model.encoder_weights=none", "model.decoder_dim=8"])
    model = build_network(config, num_classes=4).train()
    model([torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)]).logits[0].square().mean().backward()
    lacking = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert lacking == []


def refused(output_stride: Literal[16, 32]) -> None:
    config = ModelConfig(encoder="efficientnet_lite0", encoder_weights="none", output_stride=output_stride)
    DeepLabV3Plus(build_encoder(config), config, num_classes=3)


class TestRefusals:
    def test_strides(self) -> None:
        with pytest.raises(ValueError, match="DeepLabV3\\+ needs the last one at stride 8 or 16 and one at 4"):
            refused(output_stride=32)

    def test_settings(self) -> None:
        with pytest.raises(ConfigError, match="neither class scores nor CVLR; use setting=sss"):
            apply_overrides(get_recipe("voc_wsss"), ["model.architecture=deeplabv3plus"])
        with pytest.raises(ConfigError, match="cvlr.enabled=false"):
            apply_overrides(voc_distill_lite(), ["cvlr.enabled=true"])
        with pytest.raises(ConfigError, match="multiple of model.output_stride 16, not 193; use 192 or 208"):
            apply_overrides(voc_distill_lite(), ["data.crop_size=193"])

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deeplab, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install 'slrnet\[distill\]'"):
            refused(output_stride=16)
