"""Masks for images: several scales and their mirror images, gating by class scores, dense CRF; `slrnet.load`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from slrnet.config import PROTOCOLS, Config, Protocol
from slrnet.data.images import upright_rgb
from slrnet.inference.crf import dense_crf, require_crf
from slrnet.inference.forward import fit_image, gate, network_outputs, predict_single_scale
from slrnet.inference.tiles import predict_tiles
from slrnet.models.network import Network, Normalize
from slrnet.ops.maps import resize

__all__ = ["Prediction", "Predictor", "predict", "predict_multi_scale", "rgb_array"]

_LARGE = 2**18
"""Pixels of an image above which CPUs take it and its mirror image in turn: hardly slower, with half of the maps."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image of H x W pixels."""

    mask: npt.NDArray[np.uint8]
    """(H, W) class ids."""
    probs: npt.NDArray[np.float32] | None
    """(K, H, W) in [0, 1], background first; after gating and CRF, where there are any. None for an image that was cut
    into tiles: they would take gigabytes."""
    class_scores: npt.NDArray[np.float32] | None
    """(K - 1,) sigmoids of the pooled scores of the foreground classes; of tiles the highest. None in setting `sss`,
    which has none."""


class Predictor:
    """A network that takes images as people have them.

    Args:
        model: the network, in evaluation mode, on the device that predicts.
        config: of the run that trained it.
        classes: names of the K classes, background first.
        protocol: `ss`, `ms` or `ms_crf`; None for what the configuration says.

    Raises:
        ValueError: an unknown protocol, `ms_crf` without its extra, or a configuration that gates by true image labels.
    """

    def __init__(
        self, model: Network, *, config: Config, classes: tuple[str, ...], protocol: Protocol | None = None
    ) -> None:
        self.config = config
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
        self.classes = classes
        self.device = next(model.parameters()).device
        self._model, self._normalize = model, Normalize.of(model.encoder)

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> Prediction:
        """Predicts one image.

        Args:
            image: a PIL image of any mode, turned upright if its EXIF data say so, or (H, W, 3) uint8. Above
                `inference.tile_above` pixels it is predicted in overlapping tiles.

        Raises:
            ValueError: an array of another shape or type.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Image.Image | npt.NDArray[np.uint8]]) -> list[Prediction]:
        """Predicts images; those of one size go through the network together.

        Args:
            images: see `__call__`.

        Returns:
            Their predictions in order.

        Raises:
            ValueError: an array of another shape or type.
        """
        pixels = [rgb_array(image) for image in images]
        found: dict[int, Prediction] = {}
        for size in dict.fromkeys(image.shape for image in pixels):
            places = [place for place, image in enumerate(pixels) if image.shape == size]
            if size[0] * size[1] > self.config.inference.tile_above:
                found |= {place: self._predict_tiles(pixels[place]) for place in places}
            else:
                maps, scores = self._predict([pixels[place] for place in places])
                for i, place in enumerate(places):
                    mask = maps[i].argmax(axis=0).astype(np.uint8)
                    found[place] = Prediction(mask, maps[i], None if scores is None else scores[i])
        return [found[place] for place in range(len(pixels))]

    def _predict(
        self, images: Sequence[npt.NDArray[np.uint8]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Probabilities (N, K, H, W) by the whole protocol and sigmoids of scores (N, K - 1) of images of one size."""
        tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(self.device)
        probs, scores = predict(self._model, tensor, self._normalize, self.config, self.protocol)
        settings = self.config.evaluation_for(self.protocol)
        gated = gate(probs, scores, probs.new_zeros(len(self.classes) - 1), settings)
        maps = gated.float().cpu().numpy()
        if self.protocol == "ms_crf":
            maps = np.stack([dense_crf(image, own, self.config.crf) for image, own in zip(images, maps, strict=True)])
        return maps, None if scores is None else scores.sigmoid().float().cpu().numpy()

    def _predict_tiles(self, image: npt.NDArray[np.uint8]) -> Prediction:
        """Each tile goes through the whole protocol, gating and CRF included."""
        scores: list[npt.NDArray[np.float32]] = []

        def predict_tile(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            maps, tile_scores = self._predict([np.ascontiguousarray(tile)])
            scores.extend([] if tile_scores is None else tile_scores)
            probs: npt.NDArray[np.float32] = maps[0]
            return probs

        settings = self.config.inference
        mask = predict_tiles(
            image,
            predict_tile,
            num_classes=len(self.classes),
            tile=settings.tile_size,
            overlap=settings.tile_overlap,
        )
        return Prediction(mask, None, np.stack(scores).max(axis=0) if scores else None)


def predict(
    model: Network, image: Tensor, normalize: Normalize, config: Config, protocol: Protocol
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (N, K, H, W) and class scores (N, K - 1) before the sigmoid, by the protocol less gating and CRF.

    The scores are None where the network has none.

    Args:
        model: in evaluation mode.
        image: (3, H, W) or (N, 3, H, W) uint8 on the model's device.
        normalize: of the encoder.
        config: of the run.
        protocol: `ms_crf` is as `ms` here.
    """
    if protocol == "ss":
        return predict_single_scale(model, image, normalize, config)
    return predict_multi_scale(model, image, normalize, config)


@torch.no_grad()
def predict_multi_scale(
    model: Network, image: Tensor, normalize: Normalize, config: Config
) -> tuple[Tensor, Tensor | None]:
    """Mean probabilities and class scores over `evaluation.scales` and their mirror images.

    Images and their mirror images go through the network as one batch; large ones on CPUs each by itself.

    Args:
        model: in evaluation mode.
        image: (3, H, W) or (N, 3, H, W) uint8 on the model's device.
        normalize: of the encoder.
        config: of the run.

    Returns:
        (N, K, H, W) probabilities and (N, K - 1) class scores before the sigmoid; None where the network has none.
    """
    scales = config.evaluation.scales
    probs: Tensor | None = None
    scores = []
    for scale in scales:
        upright = normalize(fit_image(image, config, scale))
        both = torch.cat([upright, upright.flip(-1)])
        alone = both.device.type == "cpu" and both.shape[-2] * both.shape[-1] > _LARGE
        outputs = [network_outputs(model, [part], config) for part in both.split(1 if alone else len(both))]
        logits = torch.cat([part.logits[0] for part in outputs])
        straight, mirrored = logits.float().softmax(dim=1).chunk(2)
        maps = resize((straight + mirrored.flip(-1)) / (2 * len(scales)), image.shape[-2:])
        probs = maps if probs is None else probs + maps
        for views in zip(*(part.class_scores for part in outputs), strict=True):
            scores.append(torch.stack(torch.cat(views).float().chunk(2)).mean(dim=0))
    assert probs is not None
    return probs, torch.stack(scores).mean(dim=0) if scores else None


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
