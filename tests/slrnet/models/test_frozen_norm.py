from __future__ import annotations

import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from slrnet.models.frozen_norm import FrozenBatchNorm2d, freeze_batch_norms


def _norm(channels: int, seed: int = 0, kind: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    norm = kind(channels, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(channels, generator=generator))
        norm.running_mean.copy_(torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm


def _images(channels: int, seed: int = 1) -> Tensor:
    return torch.randn(2, channels, 5, 4, generator=torch.Generator().manual_seed(seed))


def test_values_by_hand() -> None:
    norm = nn.BatchNorm2d(1, eps=1.0)
    with torch.no_grad():
        norm.running_mean.fill_(1.0)
        norm.running_var.fill_(3.0)
        norm.weight.fill_(6.0)
        norm.bias.fill_(0.5)
    x = torch.tensor([[[[5.0, 1.0]]]], requires_grad=True)
    y = FrozenBatchNorm2d(norm)(x)
    y.backward(torch.tensor([[[[1.0, 10.0]]]]))
    assert y.flatten().tolist() == pytest.approx([12.5, 0.5])  # (5 - 1) / sqrt(3 + 1) * 6 + 0.5
    assert x.grad is not None
    assert x.grad.flatten().tolist() == pytest.approx([3.0, 30.0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_equals_batch_norm_in_evaluation_mode(kind: type[nn.BatchNorm2d], memory_format: torch.memory_format) -> None:
    plain = _norm(3, kind=kind).eval()
    frozen = FrozenBatchNorm2d(copy.deepcopy(plain))
    inputs = [_images(3).to(memory_format=memory_format).requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((plain, frozen), inputs, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*outputs)
    assert outputs[1].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert kind is nn.BatchNorm2d or outputs[1].min() == 0.0


def test_gradient_and_second_derivative() -> None:
    frozen = FrozenBatchNorm2d(_norm(2)).double()
    x = _images(2).double().requires_grad_()
    assert torch.autograd.gradcheck(frozen, (x,))
    assert torch.autograd.gradgradcheck(lambda x: frozen(x).pow(2), (x,))


def test_keeps_one_factor_per_channel_for_the_backward_pass() -> None:
    kept: list[int] = []
    frozen = FrozenBatchNorm2d(_norm(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        frozen(_images(3).requires_grad_())
    assert kept == [3]


def test_bfloat16_input_keeps_its_dtype_and_its_gradients() -> None:
    frozen = FrozenBatchNorm2d(_norm(3))
    x = _images(3).bfloat16().requires_grad_()
    y = frozen(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), frozen(x.float()), rtol=2**-7, atol=2**-7)


def test_freezing_a_network_keeps_names_values_and_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), _norm(4), nn.Sequential(nn.ReLU(), _norm(4, seed=2)))
    network.eval()
    before = copy.deepcopy(network.state_dict())
    expected = network(_images(3))
    freeze_batch_norms(network)
    assert torch.equal(network.train()(_images(3)), expected)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == ["0.weight", "0.bias"]
    assert all(not module.training for module in network.modules() if isinstance(module, nn.BatchNorm2d))


def test_other_batch_norms_are_fixed_as_they_are() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm1d(3))
    freeze_batch_norms(network)
    assert [type(module) for module in network] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert not any(module.training for module in network)
    assert not any(parameter.requires_grad for parameter in network.parameters())
