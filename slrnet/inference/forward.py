"""inference.forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slrnet.config import Config, EvaluationConfig
from slrnet.models.network import Network, Normalize, Outputs, mixed_precision
from slrnet.ops.maps import channels_last, resize

__all__ = ["fit_image", "gate", "network_outputs", "predict_single_scale"]


@torch.no_grad()
def predict_single_scale(
    model: Network, image: Tensor, normalize: Normalize, config: Config
) -> tuple[Tensor, Tensor | None]:
    """Predicts images with one view each.

    Args:
        model: in evaluation mode.
        image: (3, H, W) or (N, 3, H, W) uint8.
        normalize: of the encoder.
        config: of the run; the crop's size modulo the stride says which sizes the network is used to.

    Returns:
        (N, K, H, W) probabilities and (N, K - 1) class scores before the sigmoid; None where the network has none.
    """
    inputs = normalize(fit_image(image, config))
    outputs = network_outputs(model, [inputs], config)
    scores = outputs.class_scores[0] if outputs.class_scores else None
    return resize(outputs.logits[0].float().softmax(dim=1), image.shape[-2:]), scores


def gate(probs: Tensor, class_scores: Tensor | None, image_labels: Tensor, config: EvaluationConfig) -> Tensor:
    """Removes classes and weighs the background, as the protocol says.

    Args:
        probs: (N, K, H, W).
        class_scores: (N, K - 1) before the sigmoid; None where the network has none.
        image_labels: (K - 1,) the true ones; used only where the protocol says so.
        config: gating and background power.

    Raises:
        ValueError: the protocol gates by class scores, and the network has none.
    """
    if config.background_power != 1:
        probs = torch.cat([probs[:, :1] ** config.background_power, probs[:, 1:]], dim=1)
    if config.gating == "none":
        return probs
    if config.gating == "image_labels":
        keep = image_labels[None] > 0
    elif class_scores is None:
        raise ValueError("evaluation.gating is 'scores' and a network that predicts the background has none; use none")
    else:
        limit = class_scores.topk(min(config.gating_top, class_scores.shape[1]), dim=1).values[:, -1:]
        keep = (class_scores >= limit) & (class_scores.sigmoid() > config.gating_threshold)
    return torch.cat([probs[:, :1], probs[:, 1:] * keep[:, :, None, None]], dim=1)


def fit_image(image: Tensor, config: Config, scale: float = 1.0) -> Tensor:
    """Scales images to what the network is used to.

    Args:
        image: (3, H, W) or (N, 3, H, W) uint8.
        config: of the run.
        scale: beside `evaluation.scale`.

    Returns:
        (N, 3, H', W') in [0, 1]; its sides have the crop's remainder by the output stride.
    """
    stride = config.model.output_stride
    rest = config.data.crop_size % stride
    scale = scale * config.evaluation.scale
    size = [max(1, round((side * scale - rest) / stride)) * stride + rest for side in image.shape[-2:]]
    images = image[None] if image.ndim == 3 else image
    return resize(images.float() / 255, (size[0], size[1]))


def network_outputs(model: Network, views: Sequence[Tensor], config: Config) -> Outputs:
    """What a network gives for views when masks are measured or predicted, in `evaluation.precision`.

    Args:
        model: in evaluation mode.
        views: each (N, 3, H, W), normalised, on the model's device.
        config: of the run.
    """
    with mixed_precision(config.evaluation.precision, views[0].device):
        return model([channels_last(view) for view in views])  # type: ignore[no-any-return]
