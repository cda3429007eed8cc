"""The objective: named loss parts of a step and their weighted sum (paper Sec. 4, "Implementation Details")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from slrnet.config import LossConfig, WeightsConfig
from slrnet.losses.classification import classification_loss
from slrnet.losses.consistency import code_consistency, mask_consistency
from slrnet.losses.segmentation import balanced_cross_entropy

__all__ = ["AlignedOutputs", "Objective", "objective"]


@dataclass(frozen=True)
class AlignedOutputs:
    """The network's outputs with all maps un-warped to the frame and size of the first view; lists are per view."""

    logits: list[Tensor]
    """(N, K, h, w) mask logits."""
    auxiliary_logits: list[Tensor]
    """(N, K, h, w) mask logits of the auxiliary head; empty without CVLR."""
    codes: list[Tensor]
    """(N, k, h, w) codes of CVLR; empty without CVLR."""
    class_scores: list[Tensor]
    """(N, K - 1)."""
    auxiliary_class_scores: list[Tensor]
    """(N, K - 1); empty without CVLR."""


@dataclass(frozen=True)
class Objective:
    """The total to minimise and its parts before weighting; scalars with a graph."""

    total: Tensor
    parts: dict[str, Tensor]


def objective(
    outputs: AlignedOutputs,
    pseudo_labels: Tensor | None,
    image_labels: Tensor,
    *,
    weights: WeightsConfig,
    losses: LossConfig,
) -> Objective:
    """Adds up the loss parts of a batch.

    Args:
        outputs: of the network, un-warped.
        pseudo_labels: (N, H, W) int64, 255 for void, or None while pretraining: then no segmentation loss exists.
        image_labels: (N, K - 1) multi-hot.
        weights: of the parts.
        losses: which quantities the consistency terms compare.

    Returns:
        Parts `classification` (Eq. 2) and `segmentation` (Eq. 1), each the sum over the views plus the auxiliary
        head's mean over the views times its weight, `mask_consistency` (Eq. 4) and `code_consistency` (Eq. 9); each a
        mean over the images.
    """
    parts = {
        "classification": _with_auxiliary(
            [classification_loss(scores, image_labels) for scores in outputs.class_scores],
            [classification_loss(scores, image_labels) for scores in outputs.auxiliary_class_scores],
            weights.auxiliary,
        ),
        "mask_consistency": mask_consistency(outputs.logits, image_labels, compare=losses.mask_consistency).mean(),
    }
    if outputs.codes:
        parts["code_consistency"] = code_consistency(outputs.codes, compare=losses.code_consistency).mean()
    if pseudo_labels is not None:
        parts["segmentation"] = _with_auxiliary(
            [balanced_cross_entropy(view, pseudo_labels, image_labels=image_labels) for view in outputs.logits],
            [
                balanced_cross_entropy(view, pseudo_labels, image_labels=image_labels)
                for view in outputs.auxiliary_logits
            ],
            weights.auxiliary,
        )
    factors = {
        "classification": weights.classification,
        "mask_consistency": weights.consistency,
        "code_consistency": weights.consistency,
        "segmentation": weights.segmentation,
    }
    total = sum((part * factors[name] for name, part in parts.items()), parts["classification"].new_zeros(()))
    return Objective(total, parts)


def _with_auxiliary(main: Sequence[Tensor], auxiliary: Sequence[Tensor], weight: float) -> Tensor:
    total = sum((view.mean() for view in main), main[0].new_zeros(()))
    if auxiliary:
        total = total + weight * sum((view.mean() for view in auxiliary), main[0].new_zeros(())) / len(auxiliary)
    return total
