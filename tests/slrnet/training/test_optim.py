"""Parameter groups, rates and schedule, by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from slrnet.config import Config, OptimConfig
from slrnet.models.slrnet import build_network
from slrnet.training.optim import WeightAverage, build_optimizer, parameter_groups, rate_factor, set_rate

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
