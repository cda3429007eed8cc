"""The auxiliary head and the pooled class scores.

The auxiliary head gives the first codes of CVLR and has losses of its own (paper Sec. 3.3, "Latent Space
Regularization"). Its background logit is 1 minus the largest foreground logit, as in the released code; the paper does
not state it. In the setting of pixel labels and unlabeled images, the head predicts the background itself.

Class scores are normalized global weighted pooling with the focal mask penalty (Araslanov and Roth 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slrnet.models.decoder import conv_norm_relu
from slrnet.ops.maps import widened

__all__ = ["AuxiliaryHead", "class_scores"]


class AuxiliaryHead(nn.Module):
    """Two convolutions that predict masks from the features that go into CVLR.

    Args:
        dim: channels of the features.
        num_classes: K with the background.
        dropout: dropout probability before the classifier.
        predict_background: the classifier also predicts the background's logit.
    """

    def __init__(self, dim: int, *, num_classes: int, dropout: float = 0.5, predict_background: bool = False) -> None:
        super().__init__()
        self.predict_background = predict_background
        self.conv = conv_norm_relu(dim, dim, 3)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(dim, num_classes - (not predict_background), 1)

    def forward(self, features: Tensor) -> Tensor:
        """(N, dim, h, w) features to (N, K, h, w) logits, background first."""
        foreground = widened(self.classify(self.dropout(self.conv(features))))
        if self.predict_background:
            return foreground
        # Concatenation along the last dimension keeps the result channels last.
        last = foreground.movedim(1, -1)
        return torch.cat([1 - last.amax(dim=-1, keepdim=True), last], dim=-1).movedim(-1, 1)


def class_scores(logits: Tensor, probs: Tensor, *, focal_power: float = 3.0, focal_floor: float = 0.01) -> Tensor:
    """Pools masks into class scores: sum(logit prob) / (1 + sum prob) + (1 - m)^p log(c + m), m the mean probability.

    Args:
        logits: (N, K, H, W), background at channel 0.
        probs: (N, K, H, W), softmax of the logits over K.
        focal_power: p >= 0.
        focal_floor: c > 0.

    Returns:
        (N, K - 1) scores of the foreground classes, for a sigmoid.
    """
    # Classes last keep gradients channels last. Dropping the background after the sums needs no map of zeros for its
    # gradient.
    logits, probs = widened(logits.movedim(1, -1)), widened(probs.movedim(1, -1))
    mass = probs.sum(dim=(1, 2))[:, 1:]
    pooled = (logits * probs).sum(dim=(1, 2))[:, 1:] / (1 + mass)
    mean = mass / probs[0, ..., 0].numel()
    # The mean of a class that fills the image may round to 1 or more, where powers below 1 have no finite gradient.
    rest = (1 - mean).clamp_min(torch.finfo(mean.dtype).eps)
    return pooled + torch.pow(rest, focal_power) * torch.log(focal_floor + mean)
