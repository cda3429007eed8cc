"""Multi-label classification loss (paper Eq. 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["classification_loss"]


def classification_loss(class_scores: Tensor, image_labels: Tensor) -> Tensor:
    """Binary cross-entropy of each class against the rest.

    Args:
        class_scores: (N, K - 1) scores before the sigmoid.
        image_labels: (N, K - 1) multi-hot.

    Returns:
        (N,) the mean over the classes for each image.
    """
    losses = F.binary_cross_entropy_with_logits(class_scores.float(), image_labels.float(), reduction="none")
    return losses.mean(dim=1)
