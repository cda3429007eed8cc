"""SGD and AdamW, their parameter groups, the schedule of the learning rate, and an average of the weights.

The groups of SGD are those of the released code: pretrained weights, pretrained biases, new weights, new biases, with
rates 1, 2, 10 and 20 times the base rate and no decay of biases. AdamW decays no norms, positions and tokens either.
With layer-wise decay of the rate, each encoder stage has groups of its own (Bao et al. 2022).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from slrnet.config import OptimConfig
from slrnet.models.network import Network

__all__ = ["WeightAverage", "build_optimizer", "clip_gradients", "parameter_groups", "rate_factor", "set_rate"]

_UNDECAYED = ("pos_embed", "token", "relative_position_bias_table")
"""Parts of the names of positions and tokens, in timm's models."""


class _Kind(NamedTuple):
    """What the parameters of a group have in common; groups are in this order."""

    new: bool
    bias: bool
    undecayed: bool
    distance: int
    """Encoder stages between the parameter's and the last one; 0 without layer-wise decay."""


def parameter_groups(model: nn.Module, config: OptimConfig, *, batch_size: int) -> list[dict[str, Any]]:
    """Sorts the trainable parameters of a network into groups with their rates.

    The pretrained part is the submodule `encoder` without its pyramid and low-rank corrections. All rates are
    proportional to the size of the global batch; those of the settings are for `config.reference_batch_size`.
    """
    base = config.lr * batch_size / config.reference_batch_size
    members: dict[_Kind, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(_kind_of(name, parameter, model, config), []).append(parameter)
    return [
        {
            "params": members[kind],
            "lr": base * _factor(kind, config),
            "weight_decay": 0.0 if kind.undecayed else config.weight_decay,
        }
        for kind in sorted(members)
    ]


def _kind_of(name: str, parameter: nn.Parameter, model: nn.Module, config: OptimConfig) -> _Kind:
    new, bias = not name.startswith("encoder.") or name.startswith("encoder.pyramid."), name.endswith("bias")
    new = new or ".lora_" in name
    special = parameter.ndim <= 1 or any(word in name.rpartition(".")[2] for word in _UNDECAYED)
    encoder: Any = model.get_submodule("encoder")
    distance = 0 if new or config.layer_decay == 1 else encoder.stages_after(name.removeprefix("encoder.backbone."))
    return _Kind(new, bias, bias if config.name == "sgd" else special, distance)


def _factor(kind: _Kind, config: OptimConfig) -> float:
    factor = config.layer_decay**kind.distance
    factor *= config.bias_lr_factor if kind.bias else 1.0
    return factor * (config.new_lr_factor if kind.new else 1.0)


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, batch_size: int, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`; each group keeps its full rate as `base_lr`.

    If `fused`, one kernel updates many weights, and leaves all of them unchanged where the optimizer's attribute
    `found_inf`, a float32 tensor on their device, is not 0: the host need not wait for that decision.
    """
    groups = parameter_groups(model, config, batch_size=batch_size)
    for group in groups:
        group["base_lr"] = group["lr"]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=(config.momentum, config.beta2), fused=fused or None)
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=True, fused=fused or None)
    if fused:  # if it left out the first step, PyTorch would take uninitialized memory for the momentum
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def clip_gradients(parameters: Iterable[nn.Parameter], *, largest: float) -> None:
    """Scales gradients down, in place, if their common norm is larger; ones that are not finite stay as they are."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, torch.where(norm.isfinite(), norm, 0.0))


def rate_factor(step: int, *, pretrain_steps: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Share of the full rate at a step: 1 while pretraining, then half a cosine that reaches 0 at `total_steps`.

    Over the first `warmup_steps` steps, all of that grows linearly from 1 / `warmup_steps`.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if step < pretrain_steps:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * (step - pretrain_steps) / (total_steps - pretrain_steps)))


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
