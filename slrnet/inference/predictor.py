"""Predicts masks by a protocol: one scale or several, gating, dense CRF. `slrnet.load` returns a `Predictor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from slrnet.config import PROTOCOLS, Config, Protocol
from slrnet.data.catalog import mask_palette
from slrnet.data.depth import Depth
from slrnet.data.images import rgb_pixels, upright_rgb
from slrnet.inference.crf import dense_crf, require_crf
from slrnet.inference.forward import Inference
from slrnet.inference.tiles import predict_tiles
from slrnet.models.network import Network

__all__ = ["Prediction", "Predictor", "rgb_array"]


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
        depth: how images of more than 8 bits are scaled, as they were for the training; without they are refused.
        colors: RGB colors of the classes, 0 to 255; those that it lacks are VOC's.

    Raises:
        ValueError: the protocol is unknown, the extra for `ms_crf` is missing, or the settings gate by true image
            labels.
    """

    def __init__(
        self,
        model: Network,
        *,
        config: Config,
        classes: tuple[str, ...],
        protocol: Protocol | None = None,
        depth: Depth | None = None,
        colors: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self.depth, self.palette = depth or Depth(), mask_palette(colors)
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
        self.inference = Inference(model, config)

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> Prediction:
        """Predicts one image.

        Args:
            image: a PIL image of any mode, turned upright by its EXIF data, or (H, W, 3) uint8. An image of more than
                `inference.tile_above` pixels is predicted in overlapping tiles.

        Raises:
            ValueError: the array has another shape or type, or the image more than 8 bits that no depth scales.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Image.Image | npt.NDArray[np.uint8]]) -> list[Prediction]:
        """Predicts images, as `__call__` does; those of one size go through the network together."""
        pixels = [rgb_array(image, self.depth) for image in images]
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
        tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(self.inference.device)
        probs, scores = self.inference.predict(tensor, self.protocol)
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


def rgb_array(image: Image.Image | npt.NDArray[np.uint8], depth: Depth | None = None) -> npt.NDArray[np.uint8]:
    """Converts an image to (H, W, 3) uint8.

    Args:
        image: a PIL image of any mode, or (H, W, 3) uint8, which comes back unchanged. The EXIF orientation is applied,
            and transparent parts become white.
        depth: how more than 8 bits are scaled.

    Raises:
        ValueError: the array has another shape or type, or the image more than 8 bits that no depth scales.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"the image is an array of shape {image.shape} and type {image.dtype}; (H, W, 3) uint8 is needed, "
                "or a PIL image"
            )
        return image
    return rgb_pixels(upright_rgb(image, depth))
