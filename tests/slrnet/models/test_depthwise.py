"""Depthwise convolutions against the plain ones that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slrnet.models.depthwise import DepthwiseConv2d, use_fast_depthwise
from slrnet.models.encoders import build_encoder


def depthwise(channels: int = 6, *, kernel: int = 3, rate: int = 2, bias: bool = False) -> nn.Conv2d:
    torch.manual_seed(0)
    padding = rate * (kernel // 2)
    return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=rate, groups=channels, bias=bias).double()


@pytest.mark.parametrize("size", [(20, 20), (17, 15), (13, 22), (1, 1)])
@pytest.mark.parametrize(("kernel", "rate"), [(3, 2), (5, 2), (3, 4), (5, 3)])
def test_equals_the_dilated_convolution(kernel: int, rate: int, size: tuple[int, int]) -> None:
    conv = depthwise(kernel=kernel, rate=rate, bias=True)
    maps = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    inputs = [maps, *conv.parameters()]
    plain, interleaved = conv(maps), DepthwiseConv2d(conv)(maps)
    assert torch.allclose(plain, interleaved, atol=1e-12)
    weight = torch.randn_like(plain)
    for left, right in zip(
        torch.autograd.grad(plain, inputs, weight), torch.autograd.grad(interleaved, inputs, weight), strict=True
    ):
        assert torch.allclose(left, right, atol=1e-12)


def test_only_convolutions_that_qualify_are_replaced() -> None:
    kept = [
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
        nn.Conv2d(4, 4, (3, 2), padding=2, dilation=2, groups=4),
    ]
    for conv in kept:
        holder = nn.Sequential(conv)
        use_fast_depthwise(holder)
        assert holder[0] is conv
    holder = nn.Sequential(depthwise())
    weight = holder[0].weight
    use_fast_depthwise(holder)
    assert isinstance(holder[0], DepthwiseConv2d)
    assert holder[0].weight is weight


def test_an_encoder_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("efficientnet_lite0", weights="none", output_stride=8).eval()
    assert sum(isinstance(module, DepthwiseConv2d) for module in encoder.modules()) >= 4
    images = torch.randn(1, 3, 168, 136)
    interleaved = encoder(images).deep
    monkeypatch.setattr(DepthwiseConv2d, "forward", nn.Conv2d.forward)
    plain = encoder(images).deep
    assert torch.allclose(plain, interleaved, atol=1e-5 * float(plain.detach().abs().max()))
