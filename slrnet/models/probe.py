"""A linear probe: masks from the encoder's deepest features, place by place.

A decoder is large enough to learn every error of its own pseudo labels, and its context lets each place know what the
whole image shows. A linear classifier can do neither: it keeps what places with one label have in common, so the masks
that it makes are better than the labels that it learns from. Neither the paper nor the released code has one.

Its first labels are class activation maps (Zhou et al. 2016): a second linear layer, which learns image labels from the
mean over all places, says at each place how much that speaks for a class. No gradient flows to the encoder: where the
classifier taught it, features came to say at every place what the whole image shows (docs/results.md).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from slrnet.models.decoder import BATCH_NORM_MOMENTUM
from slrnet.ops.maps import widened

__all__ = ["Probe", "Probed"]


class Probed(NamedTuple):
    """What a probe says of a view."""

    logits: Tensor
    """(N, K, h, w) mask logits, background first."""
    activations: Tensor | None
    """(N, K - 1, h, w) class activation maps, whose mean is a class score for a sigmoid; None without image labels."""


class Probe(nn.Module):
    """Linear classifiers of places; no gradient flows to the features.

    Args:
        channels: C, of the features.
        num_classes: K with the background.
        image_labels: whether there are image labels to learn from.
    """

    def __init__(self, channels: int, *, num_classes: int, image_labels: bool) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm2d(channels, momentum=BATCH_NORM_MOMENTUM, affine=False)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        self.activate = nn.Conv2d(channels, num_classes - 1, 1) if image_labels else None
        for layer in (self.classify, self.activate):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Probed:
        """(N, C, h, w) features to masks and activations."""
        places = self.normalize(widened(features.detach()))
        activations = None if self.activate is None else widened(self.activate(places))
        return Probed(widened(self.classify(places)), activations)
