"""Convolutions that leave the padding out against PyTorch's: values, gradients, and where which form is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slrnet.cpu import few_taps
from slrnet.cpu.few_taps import FewTapsConv2d


def conv_of(rate: int, *, bias: bool = False, dtype: torch.dtype = torch.float64) -> FewTapsConv2d:
    torch.manual_seed(0)
    return FewTapsConv2d(nn.Conv2d(3, 4, 3, padding=rate, dilation=rate, bias=bias, dtype=dtype))


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (4, 9)])
@pytest.mark.parametrize(("rate", "bias"), [(1, True), (2, False), (6, True), (20, False)])
def test_equals_the_convolution(size: tuple[int, int], rate: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_taps, "_MOST_TAPS", 1.0)
    conv = conv_of(rate, bias=bias)
    results = []
    for form in (conv, lambda x: F.conv2d(x, conv.weight, conv.bias, padding=rate, dilation=rate)):
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = form(x)
        assert ("FewTaps" in str(_history(out))) == (form is conv)
        conv.zero_grad()
        (out**2).sum().backward()
        results.append([out.detach(), x.grad, *(parameter.grad.clone() for parameter in conv.parameters())])  # type: ignore[union-attr]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def _history(out: Tensor) -> list[object]:
    """The last three operations: the convolution, its turn to channels first, and the bias."""
    functions: list[object] = [out.grad_fn]
    for _ in range(2):
        functions += [earlier for function in functions for earlier, _ in getattr(function, "next_functions", ())]
    return functions


def test_only_what_is_asked_for_has_a_gradient() -> None:
    conv = conv_of(6).requires_grad_(False)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(conv, x)
    conv.requires_grad_(True)
    conv(x.detach()).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize(("size", "rate", "few"), [(41, 36, True), (41, 12, True), (81, 12, False), (41, 1, False)])
def test_it_is_taken_where_the_padding_is_large(size: int, rate: int, few: bool) -> None:
    conv, x = conv_of(rate, dtype=torch.float32), torch.zeros(1, 3, size, size)
    assert conv._few_taps(x) == few
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv._few_taps(x) == few
    with torch.autocast("cpu", dtype=torch.float16):
        assert not conv._few_taps(x)


@pytest.mark.parametrize(("channels", "rate", "taken"), [(2048, 4, True), (2048, 1, False), (1024, 4, False)])
def test_in_half_precision_it_is_taken_for_many_channels(channels: int, rate: int, taken: bool) -> None:
    conv = FewTapsConv2d(nn.Conv2d(channels, 2, 3, padding=rate, dilation=rate))
    x = torch.zeros(1, channels, 30, 30)
    assert not conv._few_taps(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv._few_taps(x) == taken


def test_half_precision_is_near_the_full_one() -> None:
    conv = conv_of(4, bias=True, dtype=torch.float32)
    x = torch.randn(2, 3, 7, 9)
    results = []
    for autocast in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = conv(leaf)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        results.append([out.float(), *torch.autograd.grad(out.float().square().sum(), [leaf, *conv.parameters()])])
    for full, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=2e-2 * float(full.detach().abs().max()))
