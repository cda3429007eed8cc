"""Parameter groups, rates and schedule, by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from slrnet.config import Config, ModelConfig, OptimConfig
from slrnet.models.encoders import build_encoder
from slrnet.models.slrnet import build_network
from slrnet.training.optim import (
    WeightAverage,
    build_optimizer,
    clip_gradients,
    parameter_groups,
    rate_factor,
    set_rate,
)
from tests.fixtures import small_encoders  # noqa: F401, registers the small models

CONFIG = OptimConfig(
    lr=0.01, reference_batch_size=16, new_lr_factor=10.0, bias_lr_factor=2.0, momentum=0.9, weight_decay=0.01
)


class Network(nn.Module):
    """An encoder with a frozen part, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Linear(1, 1))
        self.encoder[0].requires_grad_(False)
        self.encoder_like = nn.Linear(1, 1)


def test_four_groups_with_rates_1_2_10_20_and_no_decay_of_biases() -> None:
    network = Network()
    groups = parameter_groups(network, CONFIG, batch_size=16)
    expected = [
        ([network.encoder[1].weight, network.encoder[2].weight], 0.01, 0.01),
        ([network.encoder[1].bias, network.encoder[2].bias], 0.02, 0.0),
        ([network.encoder_like.weight], 0.1, 0.01),
        ([network.encoder_like.bias], 0.2, 0.0),
    ]
    assert len(groups) == 4
    for group, (members, rate, decay) in zip(groups, expected, strict=True):
        assert [id(member) for member in group["params"]] == [id(member) for member in members]
        assert group["lr"] == pytest.approx(rate)
        assert group["weight_decay"] == decay


def test_adamw_decays_matrices_alone_and_early_blocks_change_less() -> None:
    """Four blocks: the rate halves with each block before the last; patches and positions are of the first one."""
    model = ModelConfig(encoder="timm:small_dinov2", encoder_weights="none", output_stride=16, frozen_stages=0)
    network = nn.ModuleDict({"encoder": build_encoder(model), "head": nn.Linear(2, 2)})
    config = OptimConfig(name="adamw", lr=0.01, layer_decay=0.5, bias_lr_factor=1.0, weight_decay=0.05)
    groups = parameter_groups(network, config, batch_size=16)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    weights = dict(network.named_parameters())
    assert len(found) == len(weights)
    for name, expected in {
        "encoder.backbone.model.pos_embed": (0.00125, 0.0),
        "encoder.backbone.model.cls_token": (0.00125, 0.0),
        "encoder.backbone.model.reg_token": (0.00125, 0.0),
        "encoder.backbone.model.patch_embed.proj.weight": (0.00125, 0.05),
        "encoder.backbone.model.blocks.1.norm1.weight": (0.0025, 0.0),
        "encoder.backbone.model.blocks.2.attn.qkv.weight": (0.005, 0.05),
        "encoder.backbone.model.blocks.2.ls1.gamma": (0.005, 0.0),
        "encoder.backbone.model.blocks.3.mlp.fc1.bias": (0.01, 0.0),
        "encoder.backbone.model.norm.weight": (0.01, 0.0),
        "encoder.pyramid.skip.1.weight": (0.1, 0.05),
        "head.bias": (0.1, 0.0),
    }.items():
        assert found[id(weights[name])] == pytest.approx(expected), name
    assert groups[0]["lr"] == pytest.approx(0.01), "the rate that is logged is that of the last stage"


def test_two_steps_of_adamw_by_hand() -> None:
    network = nn.ModuleDict({"encoder": nn.Linear(1, 1, bias=False)})
    nn.init.constant_(network["encoder"].weight, 1.0)
    config = OptimConfig(name="adamw", lr=0.01, momentum=0.9, beta2=0.99, weight_decay=0.1)
    optimizer = build_optimizer(network, config, batch_size=16)
    weight, first, second = 1.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -0.25), 1):
        network["encoder"].weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        weight -= 0.01 * 0.1 * weight
        weight -= 0.01 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.99**step)) + 1e-8)
        assert network["encoder"].weight.item() == pytest.approx(weight, abs=1e-7)


def test_long_gradients_are_scaled_together_and_ones_that_are_not_finite_stay() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for gradients, expected in (((3.0, 4.0), (1.5, 2.0)), ((0.3, 0.4), (0.3, 0.4)), ((math.inf, 4.0), (math.inf, 4.0))):
        for parameter, gradient in zip(parameters, gradients, strict=False):
            parameter.grad = torch.tensor([gradient])
        clip_gradients(parameters, largest=2.5)
        assert [p.grad.item() for p in parameters if p.grad is not None] == pytest.approx(expected, rel=1e-5)


def test_the_rate_warms_up_linearly() -> None:
    factors = [rate_factor(step, pretrain_steps=2, total_steps=6, warmup_steps=4) for step in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 0.5 + math.sqrt(0.125), 0.5])


@pytest.mark.parametrize(("batch", "factor"), [(4, 0.25), (16, 1.0), (128, 8.0)])
def test_rates_are_proportional_to_the_global_batch(batch: int, factor: float) -> None:
    rates = [group["lr"] for group in parameter_groups(Network(), CONFIG, batch_size=batch)]
    assert rates == pytest.approx([0.01 * factor, 0.02 * factor, 0.1 * factor, 0.2 * factor])


def test_every_trainable_weight_of_the_network_is_in_one_group(tiny_config: Config) -> None:
    model = build_network(tiny_config, num_classes=4)
    optimizer = build_optimizer(model, CONFIG, batch_size=16)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert any(not parameter.requires_grad for parameter in model.parameters())
    pretrained = {id(parameter) for parameter in model.encoder.parameters()}
    for group in optimizer.param_groups:
        assert len({id(parameter) in pretrained for parameter in group["params"]}) == 1


def test_empty_groups_are_left_out() -> None:
    network = nn.ModuleDict({"encoder": nn.Linear(1, 1).requires_grad_(False), "head": nn.Linear(1, 1, bias=False)})
    optimizer = build_optimizer(network, CONFIG, batch_size=16)
    assert [group["base_lr"] for group in optimizer.param_groups] == pytest.approx([0.1])


def test_two_steps_of_nesterov_by_hand() -> None:
    network = nn.ModuleDict({"encoder": nn.Linear(1, 1)})
    layer = network["encoder"]
    nn.init.constant_(layer.weight, 1.0)
    nn.init.constant_(layer.bias, 1.0)
    optimizer = build_optimizer(network, CONFIG, batch_size=16)

    def step() -> tuple[float, float]:
        layer.weight.grad, layer.bias.grad = torch.full((1, 1), 0.5), torch.full((1,), 0.5)
        optimizer.step()
        return layer.weight.item(), layer.bias.item()

    # Weight: gradient 0.5 + 0.01 x 1 = 0.51, look-ahead 0.51 (1 + 0.9) = 0.969, rate 0.01.
    # Bias: no decay, look-ahead 0.5 x 1.9 = 0.95, rate 0.02.
    assert step() == pytest.approx((1 - 0.00969, 1 - 0.019), abs=1e-7)
    # Then the gradients are 0.5 + 0.01 x 0.99031 = 0.5099031 and 0.5, their running sums 0.9 x 0.51 + 0.5099031 =
    # 0.9689031 and 0.95, and the look-aheads 0.5099031 + 0.9 x 0.9689031 = 1.38191589 and 0.5 + 0.855 = 1.355.
    assert step() == pytest.approx((0.99031 - 0.0138191589, 0.981 - 0.0271), abs=1e-7)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1.0), (3, 1.0), (4, 1.0), (6, (1 + math.sqrt(0.5)) / 2), (8, 0.5), (10, (1 - math.sqrt(0.5)) / 2), (12, 0.0)],
)
def test_constant_and_then_half_a_cosine(step: int, expected: float) -> None:
    assert rate_factor(step, pretrain_steps=4, total_steps=12) == pytest.approx(expected)


def test_the_released_cosine_has_one_epoch_more_than_the_training() -> None:
    """Of 30 epochs of 7 steps, 6 keep the rate; PyTorch's schedule of 25 epochs then takes 24 of them."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25 * 7)
    for step in range(6 * 7, 30 * 7):
        expected = optimizer.param_groups[0]["lr"]
        assert rate_factor(step, pretrain_steps=6 * 7, total_steps=(6 + 25) * 7) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_the_rate_never_rises() -> None:
    factors = [rate_factor(step, pretrain_steps=0, total_steps=50) for step in range(51)]
    assert factors[0] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(factors))


def test_set_rate_is_relative_to_the_full_rate_however_often_it_is_called() -> None:
    optimizer = build_optimizer(Network(), CONFIG, batch_size=16)
    for factor in (0.5, 0.5, 0.25):
        set_rate(optimizer, factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([factor * rate for rate in (0.01, 0.02, 0.1, 0.2)])


def test_the_average_takes_in_each_step_by_the_warmed_up_decay() -> None:
    """Step n keeps min(decay, (n - 1) / (n + 9)) of the old average; counters are copied."""
    network = Network()
    average = WeightAverage(network, 0.15)  # type: ignore[arg-type]
    expected = [math.nan] * 2
    for step, kept in enumerate((0, 1 / 11, 0.15, 0.15), 1):
        values = [float(step**2), float(7 - step)]
        with torch.no_grad():
            network.encoder_like.weight.fill_(values[0])
            network.encoder[1].running_var.fill_(values[1])  # type: ignore[operator, union-attr]
            network.encoder[1].num_batches_tracked.fill_(step)  # type: ignore[operator, union-attr]
        average.update(network, step)  # type: ignore[arg-type]
        expected = [
            new if not kept else kept * old + (1 - kept) * new for old, new in zip(expected, values, strict=True)
        ]
        state = average.model.state_dict()
        found = [float(state[name]) for name in ("encoder_like.weight", "encoder.1.running_var")]
        assert found == pytest.approx(expected, rel=1e-6)
        assert state["encoder.1.num_batches_tracked"] == step
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_a_fused_step_that_is_left_out_changes_nothing_and_the_others_equal_plain_ones() -> None:
    """The first one too, after which PyTorch alone would take uninitialized memory for the momentum."""
    torch.manual_seed(0)
    plain = Network()
    fused = copy.deepcopy(plain)
    optimizers = [build_optimizer(network, CONFIG, batch_size=16, fused=network is fused) for network in (plain, fused)]
    for found in (1.0, 0.0, 1.0, 0.0):
        for parameters in zip(plain.parameters(), fused.parameters(), strict=True):
            gradient = torch.rand_like(parameters[0])
            for parameter in parameters:
                parameter.grad = gradient * (1 if found == 0 else math.inf)
        optimizers[1].found_inf = torch.tensor(found)  # type: ignore[attr-defined]
        for optimizer in optimizers[found > 0 :]:
            optimizer.step()
        for left, right in zip(plain.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(left, right)
