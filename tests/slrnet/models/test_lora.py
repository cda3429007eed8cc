"""Low-rank corrections against the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slrnet.config import ModelConfig
from slrnet.models.encoders import build_encoder
from slrnet.models.lora import LowRankLinear
from tests.fixtures import small_encoders  # noqa: F401, registers the small models


def test_starts_as_the_layer_and_computes_the_corrected_matrix() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 7)
    layer = LowRankLinear(plain, rank=2)
    x = torch.randn(3, 4, 5)
    assert torch.equal(layer(x), plain(x))
    nn.init.normal_(layer.lora_up)
    expected = x @ (plain.weight + layer.lora_up @ layer.lora_down).T + plain.bias
    torch.testing.assert_close(layer(x), expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_down", "lora_up"]


@pytest.mark.parametrize(
    ("name", "layers"), [("small_dinov2", 2 * 4), ("small_eva02", 2 * 3), ("small_swin", 4 + 4 + 2)]
)
def test_trains_the_corrections_of_stages_that_are_not_frozen(name: str, layers: int) -> None:
    """Two of four blocks, four layers each; EVA-02 leaves out queries, keys and values; Swin also merges patches."""
    options = {"encoder": f"timm:{name}", "encoder_weights": "none", "output_stride": 16, "frozen_stages": 2}
    encoder = build_encoder(ModelConfig(**options, lora_rank=2))  # type: ignore[arg-type]
    features = encoder.train()(torch.randn(1, 3, 2 * encoder.size_step, encoder.size_step))
    (features.deep.square().sum() + features.skip.square().sum()).backward()
    trained = {key: p for key, p in encoder.named_parameters() if p.requires_grad and not key.startswith("pyramid")}
    assert all(".lora_" in key for key in trained)
    assert len(trained) == 2 * layers
    assert all(p.grad is not None for p in trained.values())
    assert not any(f"blocks.{block}." in key for key in trained for block in (0, 1) if name != "small_swin")
    plain = build_encoder(ModelConfig(**options))  # type: ignore[arg-type]
    assert plain.state_dict().keys() <= encoder.state_dict().keys()


def test_an_encoder_without_linear_layers_is_refused() -> None:
    options = {"encoder": "timm:test_resnet", "encoder_weights": "none", "output_stride": 16}
    with pytest.raises(ValueError, match="lora_rank 2 corrects linear layers, .* have none; use a vision transformer"):
        build_encoder(ModelConfig(**options, lora_rank=2))  # type: ignore[arg-type]
