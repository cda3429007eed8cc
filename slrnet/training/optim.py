"""SGD with Nesterov momentum, its four parameter groups and learning rate schedule, and an average of the weights.

The groups are those of the released code: pretrained weights, pretrained biases, new weights, new biases, with rates 1,
2, 10 and 20 times the base rate and no decay of biases.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from slrnet.config import OptimConfig
from slrnet.models.network import Network

__all__ = ["WeightAverage", "build_optimizer", "parameter_groups", "rate_factor", "set_rate"]


def parameter_groups(model: nn.Module, config: OptimConfig, *, batch_size: int) -> list[dict[str, Any]]:
    """Sorts the trainable parameters of an `SLRNet` into four groups with their rates.

    The pretrained part is the submodule `encoder`. All rates are proportional to the size of the global batch; those of
    the settings are for `config.reference_batch_size`.
    """
    base = config.lr * batch_size / config.reference_batch_size
    factors = {(False, False): 1.0, (False, True): config.bias_lr_factor}
    factors |= {(True, bias): factors[False, bias] * config.new_lr_factor for bias in (False, True)}
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {kind: [] for kind in factors}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[not name.startswith("encoder."), name.endswith("bias")].append(parameter)
    return [
        {"params": members[kind], "lr": base * factor, "weight_decay": 0.0 if kind[1] else config.weight_decay}
        for kind, factor in factors.items()
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, *, batch_size: int, fused: bool = False) -> torch.optim.SGD:
    """SGD over `parameter_groups`; each group keeps its full rate as `base_lr`.

    If `fused`, one kernel updates many weights, and leaves all of them unchanged where the optimizer's attribute
    `found_inf`, a float32 tensor on their device, is not 0: the host need not wait for that decision.
    """
    groups = parameter_groups(model, config, batch_size=batch_size)
    for group in groups:
        group["base_lr"] = group["lr"]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=True, fused=fused or None)
    if fused:  # if it left out the first step, PyTorch would take uninitialized memory for the momentum
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def rate_factor(step: int, *, pretrain_steps: int, total_steps: int) -> float:
    """Share of the full rate at a step: 1 while pretraining, then half a cosine that reaches 0 at `total_steps`."""
    if step < pretrain_steps:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - pretrain_steps) / (total_steps - pretrain_steps)))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to `factor` times its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class WeightAverage:
    """Exponential moving average of a network's weights and buffers over optimizer steps (Tarvainen and Valpola 2017).

    The decay warms up, so that the average covers about the last tenth of the steps so far or fewer. It is a function
    of the step alone, so a resumed training needs nothing but the average.

    Args:
        model: the network that trains.
        decay: largest share of the old average that a step keeps, in (0, 1).
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: Network, step: int) -> None:
        """Takes in the weights after optimizer step `step`, from 1; the first step's become the average."""
        decay = min(self.decay, (step - 1) / (step + 9))
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([own for own, _ in floats], [new for _, new in floats], 1 - decay)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)
