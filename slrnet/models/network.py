"""What the trainer, the predictors and the export ask of a network: views in, `Outputs` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from slrnet.models.encoders import Encoder

__all__ = ["Network", "Outputs"]


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
