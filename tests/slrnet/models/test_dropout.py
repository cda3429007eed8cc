"""Dropout after ReLU against PyTorch's two modules: values, gradients, what is dropped and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slrnet.models.dropout import RectifiedDropout, RectifiedDropout2d

KINDS = [(RectifiedDropout, nn.Dropout), (RectifiedDropout2d, nn.Dropout2d)]


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
@pytest.mark.parametrize(("p", "training"), [(0.4, True), (0.4, False), (0.0, True), (1.0, True)])
def test_it_is_what_the_two_modules_do(
    ours: type[nn.Module], theirs: type[nn.Module], p: float, training: bool
) -> None:
    """Outputs and gradients to the bit, with the same draws."""
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
