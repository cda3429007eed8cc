"""The interface of every network: views in, `Outputs` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from slrnet.config import TrainPrecision
from slrnet.models.encoders import Encoder
from slrnet.ops.maps import class_probs

__all__ = ["Network", "Outputs", "autocast_dtype", "mixed_precision"]


@dataclass(frozen=True)
class Outputs:
    """A network's predictions; each list has one entry per view. N images, K classes with the background."""

    logits: list[Tensor]
    """(N, K, h, w) mask logits, background first."""
    class_scores: list[Tensor]
    """(N, K - 1) pooled scores of the foreground classes, for a sigmoid; empty if the heads predict the background."""
    auxiliary_logits: list[Tensor]
    """(N, K, h, w) mask logits of the auxiliary head; empty without CVLR or if its atoms stand for no class."""
    auxiliary_class_scores: list[Tensor]
    """(N, K - 1) pooled scores of the auxiliary head; empty if the heads predict the background."""
    codes: list[Tensor]
    """(N, K, h, w) codes of CVLR; empty if there are no auxiliary logits."""
    unwarped_probs: list[Tensor] = field(default_factory=list)
    """(N, K, h, w) probabilities, un-warped after the softmax; empty unless `views.unwarp` asks for them."""
    probe_logits: list[Tensor] = field(default_factory=list)
    """(N, K, h, w) mask logits of the linear probe, background first; empty without one."""
    probe_activations: list[Tensor] = field(default_factory=list)
    """(N, K - 1, h, w) class activation maps of the probe; empty without one, or without image labels."""
    features: list[Tensor] = field(default_factory=list)
    """(N, C, h, w) the encoder's deepest features, or (N, h w, h, w) its attention, as `calibration.feature_source`
    says, without gradient; empty if the network does not tell."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to show as curves, by name; none outside training."""

    @property
    def probs(self) -> list[Tensor]:
        """(N, K, h, w) probabilities: those un-warped after the softmax if there are any, else the logits' softmax."""
        return self.unwarped_probs or [class_probs(view) for view in self.logits]

    def masks_to_fuse(self, fusion: Literal["logits", "probs"]) -> list[Tensor]:
        """The masks that become pseudo labels, as `calibration.fusion` averages them: the probe's if there is one."""
        if self.probe_logits:
            return self.probe_logits if fusion == "logits" else [class_probs(view) for view in self.probe_logits]
        return self.logits if fusion == "logits" else self.probs


class Network(nn.Module):
    """A network that trains on views and predicts their masks.

    Attributes:
        encoder: the pretrained part; its normalization and stride say what images it takes.
        num_classes: K with the background.
    """

    encoder: Encoder
    num_classes: int

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        """Predicts the masks of views: (N, 3, H_v, W_v) images each, from `encoder.normalize`."""
        raise NotImplementedError

    def regions(self) -> list[nn.Module]:
        """Modules from tensors to tensors that make up most of a step; `train.compile` compiles each."""
        raise NotImplementedError


def autocast_dtype(precision: TrainPrecision, device: torch.device) -> torch.dtype | None:
    """The dtype that a forward pass is cast to; None for that of the weights.

    Args:
        precision: `fp32`, `fp64`, `bf16`, `fp16`, or `auto`: what the hardware itself computes fast. That is bfloat16
            on GPUs from Ampere on (PyTorch emulates it on older ones) and CPUs with AMX, float16 on Volta and Turing.
        device: the network's device.
    """
    if precision != "auto":
        return {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else None
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older releases
    return torch.bfloat16 if device.type == "cpu" and capabilities.get("amx_bf16", False) else None


def mixed_precision(precision: TrainPrecision, device: torch.device) -> torch.autocast:
    """Autocast for a forward pass, or a context without effect; see `autocast_dtype`."""
    dtype = autocast_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
