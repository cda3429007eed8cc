"""The decoder's parts against their formulas, frozen statistics, the gate's mean and its fixed shares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slrnet.models.decoder import (
    ASPP,
    GlobalCueInjection,
    MaskHead,
    SkipFusion,
    StochasticGate,
    complementary_dropout,
    conv_norm_relu,
)
from slrnet.ops.maps import resize

EPS = 1e-5  # of the batch norms


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(module: nn.Module, seed: int = 3) -> nn.Module:
    """Gives every parameter and running statistic a random value, so that none hides behind 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            if tensor.ndim == 4:
                tensor.sub_(0.6)
    return module


def normalised(maps: Tensor, norm: nn.Module) -> Tensor:
    """A batch norm in evaluation mode, as its formula."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.view(-1, 1, 1), norm.running_var.view(-1, 1, 1)
    out = (maps - mean) / (var + EPS).sqrt()
    return out * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1) if norm.affine else out


def block(maps: Tensor, layers: nn.Module, *, dilation: int = 1) -> Tensor:
    """Convolution, batch norm, ReLU of `conv_norm_relu`, with the convolution as a sum over kernel positions."""
    assert isinstance(layers, nn.Sequential)
    weight: Tensor = layers[0].weight  # type: ignore[assignment]
    reach = weight.shape[-1] // 2
    padded = F.pad(maps, [reach * dilation] * 4)
    height, width = maps.shape[-2:]
    out = torch.zeros(len(maps), len(weight), height, width)
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            part = padded[..., i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            out += torch.einsum("nchw,oc->nohw", part, weight[:, :, i, j])
    return normalised(out, layers[1]).clamp_min(0)


def test_resize_aligns_corners() -> None:
    maps = torch.tensor([[[[0.0, 1.0]]]])
    assert torch.allclose(resize(maps, (1, 5)), torch.tensor([[[[0.0, 0.25, 0.5, 0.75, 1.0]]]]))
    assert resize(maps, (1, 2)) is maps
    assert resize(maps, torch.Size([3, 2])).shape == (1, 1, 3, 2)


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (3, 5)])
def test_conv_norm_relu_keeps_the_size(kernel: int, dilation: int) -> None:
    layers = shake(conv_norm_relu(4, 3, kernel, dilation=dilation)).eval()
    maps = random_maps(2, 4, 5, 6)
    assert torch.allclose(layers(maps), block(maps, layers, dilation=dilation), atol=1e-5)


class TestASPP:
    def test_equals_its_formula(self) -> None:
        aspp = ASPP(4, dim=3, dilations=(1, 2, 5))
        shake(aspp).eval()
        maps = random_maps(2, 4, 6, 5)
        branches = [block(maps, layers, dilation=d) for layers, d in zip(aspp.branches, (1, 1, 2, 5), strict=True)]
        pooled = block(maps.mean(dim=(2, 3), keepdim=True), aspp.pooled).expand(-1, -1, 6, 5)
        assert torch.allclose(aspp(maps), block(torch.cat([*branches, pooled], dim=1), aspp.project), atol=1e-4)

    @pytest.mark.parametrize("call_train", [False, True])
    def test_statistics_are_frozen_and_affine_parameters_train(self, call_train: bool) -> None:
        aspp = ASPP(4, dim=3, dilations=(1, 2, 3), dropout=0.0)
        if call_train:
            assert aspp.train() is aspp
        assert aspp.training
        aspp(random_maps(2, 4, 6, 5) * 5 + 3).square().sum().backward()
        norms = [module for module in aspp.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 6
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert not norm.running_mean.any()
            assert bool((norm.running_var == 1).all())
            assert norm.weight.grad is not None
            assert norm.bias.grad is not None

    def test_one_image_with_one_pixel_trains(self) -> None:
        """Batch statistics of the pooled branch would not exist here."""
        assert ASPP(4, dim=3, dilations=(1, 2, 3))(random_maps(1, 4, 1, 1)).shape == (1, 3, 1, 1)

    def test_dropout_acts_in_training_only(self) -> None:
        aspp = ASPP(4, dim=8, dilations=(1, 2, 3), dropout=0.5)
        nn.init.ones_(aspp.project[1].bias)  # type: ignore[arg-type]
        maps = random_maps(1, 4, 6, 5)
        quiet = aspp.eval()(maps)
        torch.manual_seed(0)
        noisy = aspp.train()(maps)
        dropped = (noisy == 0) & (quiet > 0)
        assert bool(dropped.any())
        assert torch.allclose(noisy[~dropped], 2 * quiet[~dropped], atol=1e-5)


def test_skip_fusion_equals_its_formula() -> None:
    fusion = SkipFusion(4, skip_channels=5, skip_dim=2)
    shake(fusion).eval()
    deep, skip = random_maps(2, 4, 3, 3), random_maps(2, 5, 5, 7, seed=1)
    grown = F.interpolate(deep, (5, 7), mode="bilinear", align_corners=True)
    expected = block(torch.cat([grown, block(skip, fusion.project)], dim=1), fusion.fuse)
    fused, share = fusion(deep, skip)
    assert share is None
    assert torch.allclose(fused, expected, atol=1e-4)


def test_skip_share_is_that_of_the_fused_variance() -> None:
    fusion = SkipFusion(32, skip_channels=64, skip_dim=24, skip_share=0.3)
    deep, skip = 40 * random_maps(4, 32, 8, 8) + 7, random_maps(4, 64, 16, 16, seed=1)
    joined = torch.Tensor()

    def observe(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal joined
        (joined,) = inputs

    fusion.fuse.register_forward_pre_hook(observe)
    _, told = fusion(deep, skip)
    variance = joined.transpose(0, 1).flatten(1).var(dim=1, correction=0)
    assert variance[:32].mean().item() == pytest.approx(1, abs=0.01)
    share = (variance[32:].sum() / variance.sum()).item()
    assert share == pytest.approx(0.3, abs=0.03)
    assert told.item() == pytest.approx(share, abs=1e-5)


def test_without_a_share_nothing_is_added() -> None:
    """Then published weights fit."""
    names = {name.split(".")[0] for name in SkipFusion(4, skip_channels=5, skip_dim=2).state_dict()}
    assert names == {"project", "fuse"}


def test_global_cue_injection_equals_its_formula() -> None:
    injection = GlobalCueInjection(5, dim=3)
    shake(injection).eval()
    skip, deep = random_maps(2, 5, 4, 6), random_maps(2, 3, 2, 2, seed=1)
    described = block(deep, injection.describe)
    shallow = normalised(
        torch.einsum("nchw,oc->nohw", skip, injection.shallow[0].weight[:, :, 0, 0]),  # type: ignore[index]
        injection.shallow[1],
    )
    modulated = torch.empty(2, 3, 4, 6)
    for n in range(2):
        for c in range(3):
            scale, shift = described[n, c].max(), described[n, 3 + c].max()
            modulated[n, c] = (shallow[n, c] * (scale + 1) + shift).clamp_min(0)
    out = injection(skip, deep)
    assert out.shape == (2, 3, 4, 6)
    assert torch.allclose(out, block(modulated, injection.project), atol=1e-4)


class TestStochasticGate:
    deep = random_maps(2, 3, 4, 5)
    shallow = random_maps(2, 3, 4, 5, seed=1)

    def test_fixed_shares_outside_training(self) -> None:
        out = StochasticGate(0.3).eval()(self.deep, self.shallow)
        assert torch.allclose(out, 0.7 * self.deep + 0.3 * self.shallow, atol=1e-6)

    def test_each_element_is_shallow_or_centred_deep(self) -> None:
        torch.manual_seed(0)
        out = StochasticGate(0.3).train()(self.deep, self.shallow)
        centred = (self.deep - 0.3 * self.shallow) / 0.7
        is_shallow = torch.isclose(out, self.shallow, atol=1e-6)
        is_deep = torch.isclose(out, centred, atol=1e-6)
        assert bool((is_shallow ^ is_deep).all())
        assert 0.15 < float(is_shallow.float().mean()) < 0.45

    @pytest.mark.parametrize("rate", [0.3, 0.7])
    def test_mean_over_gates_is_deep(self, rate: float) -> None:
        torch.manual_seed(0)
        deep, shallow = torch.full((1, 1, 400, 400), 2.0), torch.full((1, 1, 400, 400), -1.0)
        out = StochasticGate(rate).train()(deep, shallow)
        # 160,000 gates: six standard errors of the mean of two values 3 / (1 - rate) apart.
        spread = 3 / (1 - rate) * (rate * (1 - rate)) ** 0.5
        assert abs(float(out.mean()) - 2.0) < 6 * spread / 400

    def test_rate_0_is_deep(self) -> None:
        assert torch.equal(StochasticGate(0.0).train()(self.deep, self.shallow), self.deep)

    @pytest.mark.parametrize("training", [True, False])
    def test_mixed_precision(self, training: bool) -> None:
        """Under autocast CVLR hands on float32 and the shallow branch bfloat16."""
        gate = StochasticGate(0.3).train(training)
        torch.manual_seed(0)
        mixed = gate(self.deep, self.shallow.bfloat16())
        torch.manual_seed(0)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, gate(self.deep, self.shallow.bfloat16().float()))


class TestMaskHead:
    def test_background_is_the_constant_1(self) -> None:
        head = MaskHead(4, num_classes=3)
        for training in (True, False):
            logits = head.train(training)(random_maps(2, 4, 5, 6))
            assert logits.shape == (2, 3, 5, 6)
            assert torch.equal(logits[:, 0], torch.ones(2, 5, 6))
        (logits[:, 0].sum() + logits[:, 1:].square().sum()).backward()
        assert all(parameter.grad is not None for parameter in head.parameters())

    def test_equals_its_formula(self) -> None:
        head = MaskHead(4, num_classes=3)
        shake(head).eval()
        maps = random_maps(2, 4, 5, 6)
        first, second = nn.Sequential(*head.convs[0]), nn.Sequential(*head.convs[2])  # type: ignore[misc]
        features = block(block(maps, first), second)
        foreground = torch.einsum("nchw,oc->nohw", features, head.classify.weight[:, :, 0, 0])
        assert head.classify.bias is not None
        assert torch.allclose(head(maps)[:, 1:], foreground + head.classify.bias.view(-1, 1, 1), atol=1e-4)

    def test_the_background_may_be_predicted_like_any_class(self) -> None:
        head = MaskHead(4, num_classes=3, predict_background=True).eval()
        maps = random_maps(2, 4, 5, 6)
        assert head(maps).shape == (2, 3, 5, 6)
        assert torch.equal(head(maps), head.classify(head.convs(maps)))
        assert head(maps)[:, 0].std() > 0

    def test_logits_are_float32_under_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert MaskHead(4, num_classes=3)(random_maps(2, 4, 5, 6)).dtype == torch.float32


def test_complementary_dropout_gives_each_channel_of_an_image_to_one_view_of_a_pair() -> None:
    torch.manual_seed(0)
    views = [torch.ones(64, 10, 2, 3), torch.ones(64, 10, 1, 1), torch.full((64, 10, 2, 2), 3.0)]
    first, second, alone = complementary_dropout(views, 0.5)
    assert alone is views[2]
    assert set(first.unique().tolist()) == {0.0, 1.0, 2.0}
    assert torch.equal(first[:, :, :1, :1] + second, torch.full((64, 10, 1, 1), 2.0))
    assert torch.equal(first, first[:, :, :1, :1].expand_as(first))
    split = (first != 1).flatten(1).all(dim=1)
    assert torch.equal(split, (first != 1).flatten(1).any(dim=1))
    assert 16 < int(split.sum()) < 48
    assert complementary_dropout(views, 0.0) == views
