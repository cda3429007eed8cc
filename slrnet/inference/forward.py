"""Predicts whole images with a network: one view, several scales, all views of the run; gates classes.

Validation, pseudo labels, the predictor, and the app build on it. Large images are in `tiles`, the dense CRF in `crf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slrnet.config import Config, EvaluationConfig, Protocol
from slrnet.models.network import Network, Outputs, mixed_precision
from slrnet.ops.maps import class_probs, resize
from slrnet.views.geometry import View, align_maps, apply_view, largest_size

__all__ = ["Inference", "ViewMasks", "gate"]

_LARGE = 2**18
"""Pixels above which a CPU takes an image and its mirror image in turn: hardly slower, with half of the memory."""


class ViewMasks(NamedTuple):
    """The masks of images in all views of a run."""

    masks: Sequence[Tensor]
    """Per view (N, K, h, w)."""
    images: Tensor
    """(N, 3, H', W') in [0, 1], the images as the network saw them."""
    features: Tensor | None
    """`Outputs.features` of view 1, if `calibration.feature_share` needs them."""


@dataclass(frozen=True)
class Inference:
    """A network in evaluation mode with the settings of its run.

    Its methods take images as (3, H, W) or (N, 3, H, W) uint8 on the network's device. Predictions are (N, K, H, W)
    probabilities, background first, and (N, K - 1) class scores before the sigmoid, or None if the network has none.
    """

    model: Network
    config: Config

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.model.parameters()).device

    def fit(self, image: Tensor, scale: float = 1.0) -> Tensor:
        """Scales images by `evaluation.scale` times `scale`, as `evaluation.resizing` says.

        Returns:
            (N, 3, H', W') in [0, 1]. Of fitted images, H' and W' modulo the encoder's `size_step` equal the training
            crop's side modulo it.
        """
        scale = scale * self.config.evaluation.scale
        images = image[None] if image.ndim == 3 else image
        if self.config.evaluation.resizing == "released":
            height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
            return _resize_bytes(images, (height, width)).float() / 255
        stride = self.model.encoder.size_step
        rest = self.config.data.crop_size % stride
        height, width = (max(1, round((side * scale - rest) / stride)) * stride + rest for side in image.shape[-2:])
        return resize(images.float() / 255, (height, width))

    @torch.no_grad()
    def run(self, views: Sequence[Tensor]) -> Outputs:
        """Normalizes views, each (N, 3, H_v, W_v) in [0, 1], and runs the network in `evaluation.precision`."""
        with mixed_precision(self.config.evaluation.precision, views[0].device):
            return self.model([self.model.encoder.normalize(view) for view in views])  # type: ignore[no-any-return]

    def single_scale(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts images with one view each."""
        images = self.fit(image)
        outputs = self.run([images])
        scores = outputs.class_scores[0] if outputs.class_scores else None
        return self._at_size_of(image, outputs.logits[0].float().softmax(dim=1), images), scores

    @torch.no_grad()
    def multi_scale(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Averages probabilities and class scores over `evaluation.scales` and the mirror images.

        An image and its mirror image go through the network as one batch; large ones on a CPU one after the other.
        """
        scales = self.config.evaluation.scales
        probs, scores = torch.zeros((), device=image.device), []
        for scale in scales:
            upright = self.fit(image, scale)
            both = torch.cat([upright, upright.flip(-1)])
            alone = both.device.type == "cpu" and both.shape[-2] * both.shape[-1] > _LARGE
            outputs = [self.run([part]) for part in both.split(1 if alone else len(both))]
            logits = torch.cat([part.logits[0] for part in outputs])
            straight, mirrored = logits.float().softmax(dim=1).chunk(2)
            maps = self._at_size_of(image, (straight + mirrored.flip(-1)) / (2 * len(scales)), upright)
            probs = probs + maps
            for views in zip(*(part.class_scores for part in outputs), strict=True):
                scores.append(torch.stack(torch.cat(views).float().chunk(2)).mean(dim=0))
        return probs, torch.stack(scores).mean(dim=0) if scores else None

    def _at_size_of(self, image: Tensor, probs: Tensor, images: Tensor) -> Tensor:
        """Resizes probabilities to the image's size; the released code, by way of that of the network's input."""
        if self.config.evaluation.resizing == "released":
            probs = resize(probs, images.shape[-2:])
        return resize(probs, image.shape[-2:])

    def predict(
        self, image: Tensor, protocol: Protocol, image_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predicts images by a protocol, gating included; the CRF of `ms_crf` is up to the caller.

        `ss` takes one scale, `ms` and `ms_crf` several scales and mirror images. `image_labels`, (K - 1,) or
        (N, K - 1) true image labels, are used only if `evaluation.gating` is `image_labels`.

        Raises:
            ValueError: see `gate`.
        """
        probs, scores = (self.single_scale if protocol == "ss" else self.multi_scale)(image)
        return gate(probs, scores, image_labels, self.config.evaluation_for(protocol)), scores

    @torch.no_grad()
    def view_masks(self, image: Tensor) -> ViewMasks:
        """Computes the masks of images in all views of the run, aligned; no flip, no color distortion.

        Returns:
            The masks, logits or probabilities as `calibration.fusion` averages them.
        """
        images, settings = self.fit(image), self.config.views
        views = [View(scale=scale, flip=None) for scale in settings.scales]
        stride = self.model.encoder.size_step if settings.sizes == "fitted" else None
        outputs = self.run([apply_view(images, view, stride=stride) for view in views])
        fuse_probs, unwarp_probs = self.config.calibration.fusion == "probs", settings.unwarp == "probs"
        masks = outputs.masks_to_fuse("probs" if fuse_probs and unwarp_probs else "logits")
        aligned = align_maps(masks, views, size=largest_size(masks))
        aligned = [class_probs(view) for view in aligned] if fuse_probs and not unwarp_probs else aligned
        guided = self.config.calibration.feature_share > 0
        return ViewMasks(aligned, images, outputs.features[0].float() if guided else None)


def _resize_bytes(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (N, 3, H, W) uint8 bicubically with antialiasing; on the CPU, which has Pillow's arithmetic for bytes."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images.cpu(), size=size, mode="bicubic", antialias=True).to(images.device)


def gate(probs: Tensor, class_scores: Tensor | None, image_labels: Tensor | None, config: EvaluationConfig) -> Tensor:
    """Weighs the background, and sets the probabilities of classes that the protocol rules out to 0.

    Args:
        probs: (N, K, H, W) probabilities, background first.
        class_scores: (N, K - 1) class scores before the sigmoid; None if the network has none.
        image_labels: (K - 1,) or (N, K - 1) true image labels; needed only if `config.gating` is `image_labels`.
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
        keep = torch.atleast_2d(image_labels).to(probs.device) > 0
    elif class_scores is None:
        raise ValueError("evaluation.gating is 'scores' and a network that predicts the background has none; use none")
    else:
        limit = class_scores.topk(min(config.gating_top, class_scores.shape[1]), dim=1).values[:, -1:]
        keep = (class_scores >= limit) & (class_scores.sigmoid() > config.gating_threshold)
    return torch.cat([probs[:, :1], probs[:, 1:] * keep[:, :, None, None]], dim=1)
