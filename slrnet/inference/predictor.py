"""Masks for images: several scales and their mirror images, gating by class scores, dense CRF; `slrnet.load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from slrnet.config import Config
from slrnet.data.images import upright_rgb
from slrnet.inference.crf import dense_crf, require_crf
from slrnet.models.decoder import resize
from slrnet.models.slrnet import SLRNet
from slrnet.training.checkpoint import Checkpoint, restore_model
from slrnet.training.evaluate import as_model, fit_image, gate, predict_single_scale
from slrnet.training.step import Normalise

__all__ = ["Prediction", "Predictor", "predict", "predict_multi_scale", "rgb_array"]

Protocol = Literal["ss", "ms", "ms_crf"]
PROTOCOLS: tuple[Protocol, ...] = ("ss", "ms", "ms_crf")


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image of H x W pixels."""

    mask: npt.NDArray[np.uint8]
    """(H, W) class ids."""
    probs: npt.NDArray[np.float32]
    """(K, H, W) in [0, 1], background first; after gating and CRF, where there are any."""
    class_scores: npt.NDArray[np.float32]
    """(K - 1,) sigmoids of the pooled scores of the foreground classes."""


class Predictor:
    """A network that takes images as people have them.

    Args:
        checkpoint: weights and configuration.
        protocol: `ss`, `ms` or `ms_crf`; None for what the checkpoint's configuration says.
        device: for the network; None: a GPU where there is one.

    Attributes:
        classes: names of the K classes, background first.

    Raises:
        ValueError: an unknown protocol, `ms_crf` without its extra, or a configuration that gates by true image labels.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, protocol: Protocol | None = None, device: torch.device | str | None = None
    ) -> None:
        self.config = checkpoint.config
        self.protocol: Protocol = protocol or self.config.evaluation.protocol
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {protocol!r}; allowed are {', '.join(PROTOCOLS)}")
        if self.protocol == "ms_crf":
            require_crf()
        if self.config.evaluation.gating == "image_labels":
            raise ValueError(
                "the checkpoint's evaluation.gating is image_labels, and an image to predict has none; "
                "train or save it with gating none or scores"
            )
        self.classes = checkpoint.state.classes
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = restore_model(checkpoint).to(self.device).eval()
        encoder = self._model.encoder
        self._normalise = Normalise(encoder.mean, encoder.std, encoder.output_stride)

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> Prediction:
        """Predicts one image.

        Args:
            image: a PIL image of any mode, turned upright if its EXIF data say so, or (H, W, 3) uint8.

        Raises:
            ValueError: an array of another shape or type.
        """
        pixels = rgb_array(image)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(self.device)
        probs, scores = predict(self._model, tensor, self._normalise, self.config, self.protocol)
        gated = gate(probs, scores, scores.new_zeros(scores.shape[1]), self.config.evaluation)
        maps = gated[0].float().cpu().numpy()
        if self.protocol == "ms_crf":
            maps = dense_crf(pixels, maps, self.config.crf)
        return Prediction(
            mask=maps.argmax(axis=0).astype(np.uint8),
            probs=maps,
            class_scores=scores[0].sigmoid().float().cpu().numpy(),
        )


def predict(
    model: SLRNet, image: Tensor, normalise: Normalise, config: Config, protocol: Protocol
) -> tuple[Tensor, Tensor]:
    """Probabilities (1, K, H, W) and class scores (1, K - 1) before the sigmoid, by the protocol less gating and CRF.

    Args:
        model: in evaluation mode.
        image: (3, H, W) uint8 on the model's device.
        normalise: of the encoder.
        config: of the run.
        protocol: `ms_crf` is as `ms` here.
    """
    if protocol == "ss":
        return predict_single_scale(model, image, normalise, config)
    return predict_multi_scale(model, image, normalise, config)


@torch.no_grad()
def predict_multi_scale(model: SLRNet, image: Tensor, normalise: Normalise, config: Config) -> tuple[Tensor, Tensor]:
    """Mean probabilities and class scores over `evaluation.scales` and their mirror images.

    An image and its mirror image go through the network as one batch.

    Args:
        model: in evaluation mode.
        image: (3, H, W) uint8 on the model's device.
        normalise: of the encoder.
        config: of the run.

    Returns:
        (1, K, H, W) probabilities and (1, K - 1) class scores before the sigmoid.
    """
    scales = config.evaluation.scales
    probs: Tensor | None = None
    scores = []
    for scale in scales:
        upright = normalise(fit_image(image, config, scale))
        outputs = model([as_model(torch.cat([upright, upright.flip(-1)]))])
        straight, mirrored = outputs.logits[0].float().softmax(dim=1).chunk(2)
        maps = resize((straight + mirrored.flip(-1)) / (2 * len(scales)), image.shape[-2:])
        probs = maps if probs is None else probs + maps
        scores.append(outputs.class_scores[0].mean(dim=0, keepdim=True))
    assert probs is not None
    return probs, torch.stack(scores).mean(dim=0)


def rgb_array(image: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image as people have them.

    Args:
        image: a PIL image: EXIF orientation is applied, transparent parts become white, 16-bit grey is scaled to 8 bit,
            other modes are converted; or (H, W, 3) uint8, which comes back as it is.

    Raises:
        ValueError: an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"the image is an array of shape {image.shape} and type {image.dtype}; (H, W, 3) uint8 is needed, "
                "or a PIL image"
            )
        return image
    return np.asarray(upright_rgb(image)).copy()
