"""Depthwise convolutions against the plain ones that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from slrnet.config import ModelConfig
from slrnet.cpu import depthwise, speed_up
from slrnet.cpu.depthwise import DepthwiseConv2d
from slrnet.models.encoders import build_encoder


def conv_of(channels: int = 6, *, kernel: int = 3, rate: int = 1, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    torch.manual_seed(0)
    padding = rate * (kernel // 2)
    options = {"padding": padding, "dilation": rate, "stride": stride, "groups": channels, "bias": bias}
    return nn.Conv2d(channels, channels, kernel, **options).double()  # type: ignore[arg-type]


def values_and_gradients(form: nn.Module, maps: Tensor) -> list[Tensor]:
    leaf = maps.clone().requires_grad_()
    out = form(leaf)
    slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *form.parameters()], slopes)]


@pytest.mark.parametrize("size", [(17, 15), (5, 3), (1, 1)])
@pytest.mark.parametrize(("kernel", "rate"), [(3, 1), (5, 1), (3, 2), (5, 2), (3, 4), (5, 3)])
def test_equals_the_convolution(kernel: int, rate: int, size: tuple[int, int]) -> None:
    conv = conv_of(kernel=kernel, rate=rate, bias=True)
    maps = torch.randn(2, 6, *size, dtype=torch.float64)
    for theirs, ours in zip(
        values_and_gradients(conv, maps), values_and_gradients(DepthwiseConv2d(conv), maps), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(13, 8), (40, 36)])
@pytest.mark.parametrize("options", [{}, {"rate": 2}, {"kernel": 5}, {"kernel": 5, "rate": 2}, {"stride": 2}])
def test_half_precision_is_near_the_full_one(options: dict[str, Any], size: tuple[int, int]) -> None:
    conv = conv_of(**options, bias=True).float()
    maps = torch.randn(2, 6, *size)
    exact = values_and_gradients(conv, maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = values_and_gradients(DepthwiseConv2d(conv), maps)
    assert ours[0].dtype == torch.bfloat16
    assert [one.dtype for one in ours[1:]] == [torch.float32] * (len(ours) - 1)
    for one, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.float(), right, rtol=0, atol=2e-2 * float(right.abs().max()))


@pytest.mark.parametrize("kind", [Conv2dSame, nn.Conv2d])
def test_strided_ones_pad_as_before(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    conv = kind(4, 4, 5, stride=2, groups=4)
    maps = torch.randn(1, 4, 11, 14)
    exact = values_and_gradients(conv, maps)
    holder = nn.Sequential(conv)
    speed_up(holder)
    assert isinstance(holder[0], DepthwiseConv2d)
    for one, right in zip(values_and_gradients(holder, maps), exact, strict=True):
        torch.testing.assert_close(one, right)


def test_only_what_is_asked_for_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = DepthwiseConv2d(conv_of()).requires_grad_(False)
    maps = torch.randn(1, 6, 4, 5, dtype=torch.float64).requires_grad_()
    monkeypatch.setattr(depthwise, "conv2d_weight", None)
    monkeypatch.setattr(depthwise, "_by_maps", None)
    assert torch.autograd.gradcheck(conv, maps)
    monkeypatch.undo()
    monkeypatch.setattr(depthwise, "conv2d_input", None)
    conv.requires_grad_(True)
    conv(maps.detach()).sum().backward()
    assert conv.weight.grad is not None


def test_only_convolutions_that_qualify_are_replaced() -> None:
    kept = [
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
        nn.Conv2d(4, 4, (3, 2), padding=2, dilation=2, groups=4),
    ]
    for conv in kept:
        holder = nn.Sequential(conv)
        speed_up(holder)
        assert holder[0] is conv
    for conv in (conv_of(), conv_of(rate=2), conv_of(stride=2)):
        holder = nn.Sequential(conv)
        speed_up(holder)
        assert isinstance(holder[0], DepthwiseConv2d)
        assert holder[0].weight is conv.weight


def test_an_encoder_gives_the_same_features() -> None:
    encoder = build_encoder(ModelConfig(encoder="efficientnet_lite0", encoder_weights="none")).eval()
    images = torch.randn(1, 3, 168, 136)
    plain = encoder(images).deep
    assert speed_up(encoder) is encoder
    assert sum(isinstance(module, DepthwiseConv2d) for module in encoder.modules()) == 16
    assert torch.allclose(plain, encoder(images).deep, atol=1e-5 * float(plain.detach().abs().max()))
