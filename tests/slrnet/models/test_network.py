"""Precision of the network and the normalization of its images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slrnet.models.encoders import Encoder
from slrnet.models.network import autocast_dtype, mixed_precision


@pytest.mark.parametrize(
    ("precision", "capabilities", "enabled"),
    [
        ("auto", {"amx_bf16": True}, True),
        ("auto", {"amx_bf16": False, "avx512_bf16": True}, False),
        ("auto", {}, False),
        ("fp32", {"amx_bf16": True}, False),
        ("bf16", {}, True),
    ],
)
def test_precision_follows_the_processor(
    precision: str, capabilities: dict[str, bool], enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with mixed_precision(precision, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == enabled
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), None),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_precision_is_what_the_gpu_itself_computes(
    capability: tuple[int, int], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # PyTorch counts emulation
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype("auto", torch.device("cuda:1")) == dtype
    assert autocast_dtype("fp16", torch.device("cuda:1")) == torch.float16


def test_precision_of_a_release_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    with mixed_precision("auto", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def test_normalization_is_the_encoders() -> None:
    constants: Any = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    encoder = Encoder(nn.Identity(), stages=(), channels=(3, 3), strides=(2, 4), **constants)
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for channel, values in enumerate(encoder.normalize(images).unbind(1)):
        expected = (images[:, channel] - (0.1, 0.2, 0.3)[channel]) / (0.5, 0.25, 2.0)[channel]
        torch.testing.assert_close(values, expected)
