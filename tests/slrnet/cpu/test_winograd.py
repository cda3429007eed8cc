"""Convolutions by Winograd's minimal filtering against the direct ones that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slrnet.config import Config, ModelConfig
from slrnet.cpu import speed_up, winograd
from slrnet.cpu.winograd import WinogradConv2d
from slrnet.models.slrnet import build_network


def convolution(inputs: int = 24, outputs: int = 40, *, rate: int = 1, bias: bool = False) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate, bias=bias).double()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the fast form for the smallest maps too."""
    monkeypatch.setattr(winograd, "_GAIN", 0.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (5, 30), (1, 1)])
@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_direct_convolution(
    rate: int, size: tuple[int, int], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = convolution(rate=rate, bias=True)
    maps = torch.randn(3, 24, *size, dtype=torch.float64)
    maps = maps.contiguous(memory_format=torch.channels_last) if channels_last else maps
    fast = WinogradConv2d(conv)
    with torch.no_grad():
        assert torch.allclose(fast(maps), conv(maps), atol=1e-12)
        # In parts: of one row of tiles each, and of one image each.
        monkeypatch.setattr(winograd, "_FEW_TILES", 1)
        for values in (1, 36 * 40 * 100):
            monkeypatch.setattr(winograd, "_BUFFER", values)
            assert torch.allclose(fast(maps), conv(maps), atol=1e-12)


@pytest.mark.parametrize("channels", [64, 512])
def test_rounding_stays_small_in_single_precision(channels: int) -> None:
    conv = convolution(channels, 64, rate=2).float()
    maps = torch.randn(1, channels, 40, 40)
    fast = WinogradConv2d(conv)
    assert fast._pays(maps) is False  # a gradient could be wanted
    with torch.no_grad():
        assert fast._pays(maps)
        exact = convolution(channels, 64, rate=2)(maps.double())
        assert (fast(maps) - exact).abs().max() < 2e-5 * exact.abs().max()


def test_gradients_are_those_of_the_direct_convolution() -> None:
    conv = convolution()
    maps = torch.randn(1, 24, 16, 16, dtype=torch.float64, requires_grad=True)
    plain, fast = conv(maps), WinogradConv2d(conv)(maps)
    assert torch.equal(plain, fast)
    assert fast.grad_fn is not None


@pytest.mark.usefixtures("always")
def test_filters_follow_the_weights() -> None:
    conv = convolution()
    fast = WinogradConv2d(conv).eval()
    maps = torch.randn(1, 24, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        fast(maps)
        conv.weight.mul_(2)
        assert torch.allclose(fast(maps), conv(maps), atol=1e-12)
        fast.load_state_dict({"weight": torch.randn_like(conv.weight)})
        assert torch.allclose(fast(maps), conv(maps), atol=1e-12)
        other = copy.deepcopy(fast)
        other.weight.zero_()
        assert other(maps).abs().max() == 0
    assert fast._filters is not None
    assert fast.train()._filters is None


def test_small_maps_and_wide_dilations_stay_direct() -> None:
    with torch.no_grad():
        assert WinogradConv2d(convolution(256, 256))._pays(torch.empty(1, 256, 32, 32))
        assert not WinogradConv2d(convolution(256, 256, rate=12))._pays(torch.empty(1, 256, 13, 13))
        assert not WinogradConv2d(convolution(3, 8))._pays(torch.empty(1, 3, 64, 64))
        assert not WinogradConv2d(convolution(256, 256))._pays(torch.empty(1, 256, 32, 32, dtype=torch.bfloat16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not WinogradConv2d(convolution(256, 256))._pays(torch.empty(1, 256, 32, 32))


def test_only_convolutions_that_fit_are_replaced() -> None:
    kept = [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2)),
    ]
    for conv in kept:
        holder = nn.Sequential(conv)
        speed_up(holder)
        assert holder[0] is conv
    holder = nn.Sequential(convolution(), nn.Conv2d(4, 4, 3, padding="same", dilation=2))
    weight = holder[0].weight
    speed_up(holder)
    assert all(isinstance(conv, WinogradConv2d) for conv in holder)
    assert holder[0].weight is weight


@pytest.mark.slow
def test_a_network_predicts_the_same() -> None:
    model = ModelConfig(encoder="wide_resnet38", encoder_weights="none", decoder_dim=64, skip_dim=16)
    torch.manual_seed(0)
    network = speed_up(build_network(Config(model=model), num_classes=4).eval())
    images = torch.randn(1, 3, 72, 88)
    direct = network([images]).logits[0].detach().softmax(dim=1)  # a gradient could be wanted
    with torch.no_grad():
        fast = network([images]).logits[0].softmax(dim=1)
    used = [conv for conv in network.modules() if isinstance(conv, WinogradConv2d) and conv._filters is not None]
    assert len(used) > 10
    assert not torch.equal(direct, fast)
    assert torch.allclose(direct, fast, atol=1e-5)
