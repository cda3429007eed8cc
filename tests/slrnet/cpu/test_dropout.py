"""Dropout after ReLU against PyTorch's two modules: values, gradients, what is dropped and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slrnet.cpu import dropout
from slrnet.cpu.dropout import RectifiedDropout, RectifiedDropout2d, draw_kept

KINDS = [(RectifiedDropout, nn.Dropout), (RectifiedDropout2d, nn.Dropout2d)]


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
@pytest.mark.parametrize(("p", "training"), [(0.4, True), (0.4, False), (0.0, True), (1.0, True)])
def test_it_is_what_the_two_modules_do(
    ours: type[nn.Module], theirs: type[nn.Module], p: float, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients to the bit, with the same draws: PyTorch's, as on other devices."""
    monkeypatch.setattr(dropout, "_four_at_once", lambda like: False)
    results = []
    for one in (ours(p).train(training), nn.Sequential(nn.ReLU(), theirs(p)).train(training)):
        x = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(1)
        out = one(x * 1)
        (out**2).sum().backward()
        results.append((out.detach(), x.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=0)
    dropped = (results[0][0] == 0) & (x > 0)
    assert bool(dropped.any()) == bool(p and training)


def test_one_map_is_kept() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 3, 4, 4).requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = RectifiedDropout(0.5)(x)
        F.conv2d(out, torch.ones(1, 3, 1, 1))
    assert {tensor.data_ptr() for tensor in kept if tensor.shape == x.shape} == {out.data_ptr()}


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.75, 1.0, 1 - 1e-6])
def test_as_many_are_kept_as_asked_for(probability: float) -> None:
    like = torch.empty(4, 25, 50, 50, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    kept = draw_kept(like, probability)
    assert kept.dtype == like.dtype
    assert kept.stride() == like.stride()
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    if probability in (0, 1):
        assert kept.mean(dtype=torch.float32) == probability
    flat = kept.float().permute(0, 2, 3, 1).flatten()
    spread = (probability * (1 - probability)) ** 0.5
    assert abs(float(flat.mean()) - probability) <= 4 * spread / 500
    for apart in (1, 2, 3, 4, 8):  # neighbours come from one draw
        both = float((flat[apart:] * flat[:-apart]).mean())
        assert abs(both - probability**2) <= 5 * spread / 500


def test_draws_follow_the_generator() -> None:
    like = torch.empty(2, 3, 5, 7)
    torch.manual_seed(3)
    first, second = draw_kept(like, 0.5), draw_kept(like, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, draw_kept(like, 0.5))
    assert not torch.equal(first, second)
