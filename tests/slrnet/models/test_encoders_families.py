"""A small random model of each family goes through what a run does; docs/encoders.md has the table that comes of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slrnet.config import Config, apply_overrides
from slrnet.inference.forward import Inference
from slrnet.models.network import Network
from slrnet.models.slrnet import build_network
from slrnet.training.optim import build_optimizer
from tests.fixtures.small_encoders import FAMILIES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "encoders.md"
SETTINGS = ("model.encoder_weights=none", "model.output_stride=16", "model.skip_stride=4", "model.decoder_dim=8")
SETTINGS += ("model.skip_dim=4", "cvlr.dim=8", "model.aspp_dilations=1,2,3", "optim.name=adamw", "model.dropout=0.0")


def _config(name: str, *changes: str) -> Config:
    crop = 70 if name in ("small_dinov2", "small_eva02") else 64
    return apply_overrides(Config(), [f"model.encoder=timm:{name}", f"data.crop_size={crop}", *SETTINGS, *changes])


def _step(model: Network, optimizer: torch.optim.Optimizer, views: list[Tensor]) -> set[str]:
    """One step on a fixed sum of outputs; returns the names of trained weights without gradient."""
    torch.manual_seed(1)
    optimizer.zero_grad()
    outputs = model.train()(views)
    sum(value.square().mean() for value in [*outputs.logits, *outputs.auxiliary_logits, *outputs.codes]).backward()  # type: ignore[union-attr]
    optimizer.step()
    return {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}


@pytest.mark.parametrize("name", FAMILIES.values())
def test_plain_transformers_alone_have_attention(name: str) -> None:
    changes = ("calibration.feature_share=0.5", "calibration.feature_source=attention")
    config = _config(name, "model.frozen_stages=all", *changes)
    if name not in ("small_vit", "small_dinov2", "small_dinov3", "small_clip", "small_siglip", "small_eva02"):
        with pytest.raises(ValueError, match=r"'attention' needs a plain vision transformer .* or set it to 'tokens'"):
            build_network(config, num_classes=3)
        return
    image = torch.randint(0, 256, (3, 70, 51), dtype=torch.uint8)
    masks = Inference(build_network(config, num_classes=3).eval(), config).view_masks(image)
    assert masks.features is not None
    rows, columns = masks.features.shape[2:]
    assert masks.features.shape[1] == rows * columns


@pytest.mark.parametrize(("family", "name"), FAMILIES.items())
def test_a_family_trains_resumes_freezes_and_predicts(family: str, name: str) -> None:
    torch.manual_seed(0)
    config = _config(name, "model.frozen_stages=0")
    model = build_network(config, num_classes=3)
    encoder = model.encoder
    crop = config.data.crop_size
    views = [torch.rand(2, 3, side, side) for side in (crop, -(-crop // 2 // encoder.size_step) * encoder.size_step)]
    optimizer = build_optimizer(model, config.optim, batch_size=16)
    assert _step(model, optimizer, views) == set(), "every trained weight takes part in a step"
    again = build_network(config, num_classes=3)
    again.load_state_dict(model.state_dict())
    resumed = build_optimizer(again, config.optim, batch_size=16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, rates in ((model, optimizer), (again, resumed)):
        _step(network, rates, views)
    states = model.state_dict(), again.state_dict()
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    encoder.freeze(stages="all", batch_norm=True)
    assert {key.split(".")[0] for key, p in encoder.named_parameters() if p.requires_grad} <= {"pyramid"}
    image = torch.randint(0, 256, (3, 70, 51), dtype=torch.uint8)
    probs, _ = Inference(model.eval(), config).predict(image, "ms")
    assert probs.shape == (1, 3, 70, 51)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(1, 70, 51))
    learned = any(True for _ in encoder.pyramid.parameters())
    plain = learned and len(set(encoder.strides)) > 1 and encoder.size_step < 32
    cells = [
        f"multiples of {encoder.size_step}" + (", or one more" if encoder.one_more else ""),
        "learned pyramid" if learned else "dilation",
        "blocks" if plain else "stages",
    ]
    expected = f"| {family} | {' | '.join(cells)} | yes | yes | yes | yes |"
    assert expected in PAGE.read_text(encoding="utf-8"), f"docs/encoders.md lacks the row {expected}"
