"""One pass of a network over whole images: fit their size, predict one view, gate classes.

Validation, pseudo labels, the predictor, and the app build on these functions. Several scales and mirror images are in
`slrnet.inference.predictor`, large images in `tiles`, the dense CRF in `crf`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slrnet.config import Config, EvaluationConfig
from slrnet.models.network import Network, Normalize, Outputs, mixed_precision
from slrnet.ops.maps import channels_last, resize

__all__ = ["fit_image", "gate", "network_outputs", "predict_single_scale"]


@torch.no_grad()
def predict_single_scale(model: Network, image: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """Predicts images with one view each.

    Args:
        model: the network, in evaluation mode.
        image: (3, H, W) or (N, 3, H, W) uint8, on the model's device.
        config: the run's settings.

    Returns:
        (N, K, H, W) probabilities, and (N, K - 1) class scores before the sigmoid or None if the network has none.
    """
    outputs = network_outputs(model, [fit_image(image, config)], config)
    scores = outputs.class_scores[0] if outputs.class_scores else None
    return resize(outputs.logits[0].float().softmax(dim=1), image.shape[-2:]), scores


def gate(probs: Tensor, class_scores: Tensor | None, image_labels: Tensor | None, config: EvaluationConfig) -> Tensor:
    """Weighs the background, and sets the probabilities of classes that the protocol rules out to 0.

    Args:
        probs: (N, K, H, W) probabilities, background first.
        class_scores: (N, K - 1) class scores before the sigmoid; None if the network has none.
        image_labels: (K - 1,) true image labels; needed only if `config.gating` is `image_labels`.
        config: the gating and the background's power.

    Returns:
        (N, K, H, W); they no longer sum to 1.

    Raises:
        ValueError: the protocol gates by class scores or image labels, and there are none.
    """
    if config.background_power != 1:
        probs = torch.cat([probs[:, :1] ** config.background_power, probs[:, 1:]], dim=1)
    if config.gating == "none":
        return probs
    if config.gating == "image_labels":
        if image_labels is None:
            raise ValueError("evaluation.gating is 'image_labels', and there are none; use none or scores")
        keep = image_labels[None].to(probs.device) > 0
    elif class_scores is None:
        raise ValueError("evaluation.gating is 'scores' and a network that predicts the background has none; use none")
    else:
        limit = class_scores.topk(min(config.gating_top, class_scores.shape[1]), dim=1).values[:, -1:]
        keep = (class_scores >= limit) & (class_scores.sigmoid() > config.gating_threshold)
    return torch.cat([probs[:, :1], probs[:, 1:] * keep[:, :, None, None]], dim=1)


def fit_image(image: Tensor, config: Config, scale: float = 1.0) -> Tensor:
    """Scales images to a size like those that the network was trained on.

    Args:
        image: (3, H, W) or (N, 3, H, W) uint8.
        config: the run's settings.
        scale: factor on top of `evaluation.scale`.

    Returns:
        (N, 3, H', W') in [0, 1]. H' and W' modulo the output stride equal the training crop's side modulo the stride.
    """
    stride = config.model.output_stride
    rest = config.data.crop_size % stride
    scale = scale * config.evaluation.scale
    size = [max(1, round((side * scale - rest) / stride)) * stride + rest for side in image.shape[-2:]]
    images = image[None] if image.ndim == 3 else image
    return resize(images.float() / 255, (size[0], size[1]))


def network_outputs(model: Network, views: Sequence[Tensor], config: Config) -> Outputs:
    """Normalizes views for the encoder and runs the network on them in `evaluation.precision`.

    Args:
        model: the network, in evaluation mode.
        views: per view (N, 3, H, W) in [0, 1], on the model's device.
        config: the run's settings.
    """
    normalize = Normalize.of(model.encoder)
    with mixed_precision(config.evaluation.precision, views[0].device):
        return model([channels_last(normalize(view)) for view in views])  # type: ignore[no-any-return]
