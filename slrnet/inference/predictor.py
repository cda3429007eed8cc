"""Predicts masks by a protocol: one scale or several, gating, dense CRF. `slrnet.load` returns a `Predictor`."""

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
from slrnet.models.network import Network
from slrnet.ops.maps import resize

__all__ = ["Prediction", "Predictor", "predict", "predict_multi_scale", "rgb_array"]

_LARGE = 2**18
"""Pixels above which a CPU takes an image and its mirror image in turn: hardly slower, with half of the memory."""


@dataclass(frozen=True)
class Prediction:
    """Mask, probabilities, and class scores of one image of H x W pixels."""

    mask: npt.NDArray[np.uint8]
    """(H, W) class ids."""
    probs: npt.NDArray[np.float32] | None
    """(K, H, W) in [0, 1], background first, after gating and CRF. None for an image that was cut into tiles, because
    they would take gigabytes."""
    class_scores: npt.NDArray[np.float32] | None
    """(K - 1,) sigmoids of the pooled scores of the foreground classes, the highest over all tiles. None in setting
    `sss`, which has no scores."""


class Predictor:
    """Predicts images of any mode and size.

    Args:
        model: the network, in evaluation mode, on the device that predicts.
        config: settings of the run that trained the network.
        classes: names of the K classes, background first.
        protocol: `ss`, `ms` or `ms_crf`; None for `config.evaluation.protocol`.

    Raises:
        ValueError: the protocol is unknown, the extra for `ms_crf` is missing, or the settings gate by true image
            labels.
    """

    def __init__(
        self, model: Network, *, config: Config, classes: tuple[str, ...], protocol: Protocol | None = None
    ) -> None:
        self.config = config
        self.protocol: Protocol = protocol or config.evaluation.protocol
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {protocol!r}; allowed are {', '.join(PROTOCOLS)}")
        if self.protocol == "ms_crf":
            require_crf()
        if config.evaluation.gating == "image_labels":
            raise ValueError(
                "the checkpoint's evaluation.gating is image_labels, and an image to predict has none; "
                "train or save it with gating none or scores"
            )
        self.classes = classes
        self.device = next(model.parameters()).device
        self._model = model

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> Prediction:
        """Predicts one image.

        Args:
            image: a PIL image of any mode, turned upright by its EXIF data, or (H, W, 3) uint8. An image of more than
                `inference.tile_above` pixels is predicted in overlapping tiles.

        Raises:
            ValueError: the array has another shape or type.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Image.Image | npt.NDArray[np.uint8]]) -> list[Prediction]:
        """Predicts images; those of one size go through the network together.

        Args:
            images: the images, as in `__call__`.

        Raises:
            ValueError: an array has another shape or type.
        """
        pixels = [rgb_array(image) for image in images]
        predictions: dict[int, Prediction] = {}
        for size in dict.fromkeys(image.shape for image in pixels):
            places = [place for place, image in enumerate(pixels) if image.shape == size]
            if size[0] * size[1] > self.config.inference.tile_above:
                predictions |= {place: self._predict_tiles(pixels[place]) for place in places}
            else:
                maps, scores = self._predict([pixels[place] for place in places])
                for i, place in enumerate(places):
                    mask = maps[i].argmax(axis=0).astype(np.uint8)
                    predictions[place] = Prediction(mask, maps[i], None if scores is None else scores[i])
        return [predictions[place] for place in range(len(pixels))]

    def _predict(
        self, images: Sequence[npt.NDArray[np.uint8]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Returns probabilities (N, K, H, W) by the whole protocol, and sigmoids of the scores (N, K - 1)."""
        tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(self.device)
        probs, scores = predict(self._model, tensor, self.config, self.protocol)
        maps = probs.float().cpu().numpy()
        if self.protocol == "ms_crf":
            maps = np.stack([dense_crf(image, own, self.config.crf) for image, own in zip(images, maps, strict=True)])
        return maps, None if scores is None else scores.sigmoid().float().cpu().numpy()

    def _predict_tiles(self, image: npt.NDArray[np.uint8]) -> Prediction:
        """Predicts tile by tile; each goes through the whole protocol, gating and CRF included."""
        scores: list[npt.NDArray[np.float32]] = []

        def predict_tile(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            maps, tile_scores = self._predict([np.ascontiguousarray(tile)])
            scores.extend([] if tile_scores is None else tile_scores)
            return np.asarray(maps[0])

        size, overlap = self.config.inference.tile_size, self.config.inference.tile_overlap
        mask = predict_tiles(image, predict_tile, num_classes=len(self.classes), tile=size, overlap=overlap)
        return Prediction(mask, None, np.stack(scores).max(axis=0) if scores else None)


def predict(
    model: Network, image: Tensor, config: Config, protocol: Protocol, image_labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Predicts images by a protocol up to the gating; the CRF of `ms_crf` is up to the caller.

    Args:
        model: the network, in evaluation mode.
        image: (3, H, W) or (N, 3, H, W) uint8, on the model's device.
        config: the run's settings.
        protocol: `ss` for one scale, `ms` or `ms_crf` for several scales and mirror images.
        image_labels: (K - 1,) true image labels; used only if `evaluation.gating` is `image_labels`.

    Returns:
        (N, K, H, W) gated probabilities, and (N, K - 1) class scores before the sigmoid or None if the network has
        none.

    Raises:
        ValueError: see `gate`.
    """
    probs, scores = (predict_single_scale if protocol == "ss" else predict_multi_scale)(model, image, config)
    return gate(probs, scores, image_labels, config.evaluation_for(protocol)), scores


@torch.no_grad()
def predict_multi_scale(model: Network, image: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """Averages probabilities and class scores over `evaluation.scales` and the mirror images.

    An image and its mirror image go through the network as one batch; large ones on a CPU one after the other.

    Args:
        model: the network, in evaluation mode.
        image: (3, H, W) or (N, 3, H, W) uint8, on the model's device.
        config: the run's settings.

    Returns:
        (N, K, H, W) probabilities, and (N, K - 1) class scores before the sigmoid or None if the network has none.
    """
    scales = config.evaluation.scales
    probs: Tensor | None = None
    scores = []
    for scale in scales:
        upright = fit_image(image, config, scale)
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
    """Converts an image to (H, W, 3) uint8.

    Args:
        image: a PIL image of any mode, or (H, W, 3) uint8, which comes back unchanged. The EXIF orientation is applied,
            transparent parts become white, and 16-bit gray is scaled to 8 bit.

    Raises:
        ValueError: the array has another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"the image is an array of shape {image.shape} and type {image.dtype}; (H, W, 3) uint8 is needed, "
                "or a PIL image"
            )
        return image
    return np.asarray(upright_rgb(image)).copy()
