"""What the trainer, the predictors and the export ask of a network: views in, `Outputs` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slrnet.config import Precision
from slrnet.models.encoders import Encoder

__all__ = ["Network", "Normalize", "Outputs", "mixed_precision"]


@dataclass(frozen=True)
class Outputs:
    """What the network says of each view; lists have one entry per view. N images, K classes with the background."""

    logits: list[Tensor]
    """(N, K, h, w) mask logits, background first."""
    class_scores: list[Tensor]
    """(N, K - 1) pooled scores of the foreground classes, for a sigmoid; empty where the background is predicted."""
    auxiliary_logits: list[Tensor]
    """(N, K, h, w) mask logits of the auxiliary head; empty without atoms that stand for classes."""
    auxiliary_class_scores: list[Tensor]
    """(N, K - 1); as many as `auxiliary_logits`, but empty where the background is predicted."""
    codes: list[Tensor]
    """(N, K, h, w) codes of CVLR; empty without atoms that stand for classes."""


class Network(nn.Module):
    """A network that can be trained and asked for masks; its pretrained part is the submodule `encoder`.

    Attributes:
        encoder: its normalisation and stride say what images it takes.
        num_classes: K with the background.
    """

    encoder: Encoder
    num_classes: int

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        """Predicts masks.

        Args:
            views: per view (N, 3, H_v, W_v) images, normalised for the encoder (`encoder.mean`, `encoder.std`).
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Normalize:
    """The encoder's normalisation and stride: what images need before they enter the network."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    output_stride: int

    @classmethod
    def of(cls, encoder: Encoder) -> Normalize:
        """What an encoder needs."""
        return cls(encoder.mean, encoder.std, encoder.output_stride)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to the range that the encoder was trained on."""
        mean = images.new_tensor(self.mean).view(3, 1, 1)
        std = images.new_tensor(self.std).view(3, 1, 1)
        return (images - mean) / std


def mixed_precision(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a training's forward passes: autocast to bfloat16, or none.

    Args:
        precision: `train.precision`. `auto` is bfloat16 where the hardware multiplies matrices of it, as GPUs do from
            Ampere on, and CPUs with AMX.
        device: where the network is.
    """
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported()
    else:
        capable = device.type == "cpu" and _cpu_multiplies_bfloat16()
    wanted = precision == "bf16" or (precision == "auto" and capable)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _cpu_multiplies_bfloat16() -> bool:
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not tell
    return capabilities.get("amx_bf16", False)
