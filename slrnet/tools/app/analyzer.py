"""Computes what the app shows of an image: mask, refined mask, pseudo label, class scores, and code maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from slrnet.calibration.pseudo_labels import Calibrated, calibrate_views, make_pseudo_labels, to_class_ids
from slrnet.checkpoints.checkpoint import Checkpoint, restore_network
from slrnet.data.catalog import IGNORE_INDEX, mask_palette
from slrnet.data.depth import Depth
from slrnet.data.manifest import DATASET_FILE, load_dataset
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.inference.forward import Inference, gate
from slrnet.inference.predictor import rgb_array
from slrnet.models.slrnet import SLRNet
from slrnet.ops.maps import resize
from slrnet.storage.remote import is_remote
from slrnet.tools.codes import code_maps, iterations

__all__ = ["MAX_SIDE", "Analysis", "Analyzer", "Controls", "example_images", "shrink"]

MAX_SIDE = 640
"""Pixels of the longer side; larger images are scaled down, so that an answer takes about a second on a CPU."""

Mask = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Settings to try; all others are the checkpoint's."""

    num_iters: int
    """T, >= 1; ignored by a network without a low-rank module."""
    gamma: float
    """`calibration.confidence_threshold`, in [0, 1]."""
    refine_iters: int
    """`calibration.refine_iters`; 0: no refinement."""
    classes: tuple[str, ...] | None = None
    """Foreground classes that the pseudo label may show; None for those with high class scores."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Masks, scores, and codes of an image of H x W pixels."""

    mask: Mask
    """(H, W) class ids, by the protocol of the run's validation."""
    refined: Mask
    """(H, W) class ids of the fused masks of all views, refined."""
    pseudo_labels: Mask
    """(H, W) class ids, 255 where undecided."""
    classes: tuple[str, ...]
    """Foreground classes that the pseudo label may show."""
    scores: dict[str, float]
    """Sigmoids of the pooled scores by foreground class, highest first; empty if the network has none."""
    codes: dict[str, npt.NDArray[np.float32]]
    """(H', W') code maps in [0, 1] by the names of their atoms; empty without a low-rank module."""

    @property
    def coverage(self) -> float:
        """Share of the pixels that the pseudo label decides."""
        return float((self.pseudo_labels != IGNORE_INDEX).mean())


class _Predictions(NamedTuple):
    """What the network says of an image with some T, before gating and calibration."""

    probs: Tensor
    class_scores: Tensor | None
    masks: Sequence[Tensor]
    images: Tensor
    features: Tensor | None
    codes: dict[str, npt.NDArray[np.float32]]
    scores: dict[str, float]


class Analyzer:
    """A checkpoint's network with controls; it answers one call at a time.

    Attributes:
        classes: names of the K classes, background first.
        depth: how images of more than 8 bits are scaled, as they were for the training.
        palette: (256, 3) uint8 RGB by id.
        has_codes: whether the network has a low-rank module.
        defaults: the checkpoint's own settings.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None) -> None:
        self.config, self.classes = checkpoint.config, checkpoint.state.classes
        self.depth = Depth.parse(checkpoint.state.depth)
        self.palette = mask_palette(checkpoint.state.palette)
        self._inference = Inference(restore_network(checkpoint, device), self.config)
        model, calibration, num_iters = self._inference.model, self.config.calibration, self.config.cvlr.num_iters
        self._module = model.cvlr if isinstance(model, SLRNet) else None
        self.has_codes = self._module is not None
        gamma, refine_iters = calibration.confidence_threshold, calibration.refine_iters
        self.defaults = Controls(num_iters=num_iters, gamma=gamma, refine_iters=refine_iters)
        self._lock = Lock()
        self._image: npt.NDArray[np.uint8] | None = None
        self._predictions: dict[int, _Predictions] = {}
        self._calibrated: dict[tuple[Any, ...], Calibrated] = {}

    def analyze(self, image: npt.NDArray[np.uint8], controls: Controls) -> Analysis:
        """Analyzes an image (H, W, 3) uint8; see `shrink`.

        What does not depend on a changed control comes from the last call, if `image` is the same, unchanged array: a
        new gamma does not need the network.

        Raises:
            ValueError: T is below 1, or gamma outside [0, 1].
        """
        with self._lock, torch.no_grad():
            if self._image is not image:
                self._image, self._predictions, self._calibrated = image, {}, {}
            if controls.num_iters not in self._predictions:
                self._predictions[controls.num_iters] = self._predict(image, controls.num_iters)
            predictions = self._predictions[controls.num_iters]
            classes = self._likely_classes(predictions.scores) if controls.classes is None else controls.classes
            labels = torch.tensor([[float(name in classes) for name in self.classes[1:]]]).to(self._inference.device)
            calibrated = self._calibrate(predictions, labels, controls)
            size = (image.shape[0], image.shape[1])
            settings = self.config.calibration.model_copy(update={"confidence_threshold": controls.gamma})
            gated = gate(predictions.probs, predictions.class_scores, labels[0], self.config.evaluation)
            refined = to_class_ids(resize(calibrated.refined, size).argmax(dim=1), calibrated.classes)
            return Analysis(
                mask=gated[0].argmax(dim=0).cpu().numpy(),
                refined=refined[0].cpu().numpy(),
                pseudo_labels=make_pseudo_labels(calibrated, settings, size=size)[0].cpu().numpy(),
                classes=classes,
                scores=predictions.scores,
                codes=predictions.codes,
            )

    def _predict(self, image: npt.NDArray[np.uint8], num_iters: int) -> _Predictions:
        pixels, codes = torch.from_numpy(image).permute(2, 0, 1).contiguous().to(self._inference.device), {}
        with nullcontext() if self._module is None else iterations(self._module, num_iters):
            probs, class_scores = self._inference.single_scale(pixels)
            views = self._inference.view_masks(pixels)
            if self._module is not None:
                maps = code_maps(self._inference, image)
                codes = {title: maps.codes[num_iters][atom] for atom, title in maps.choose_atoms(self.classes).items()}
        scores = {}
        if class_scores is not None:
            pairs = zip(self.classes[1:], class_scores[0].float().sigmoid().tolist(), strict=True)
            scores = dict(sorted(pairs, key=lambda pair: -pair[1]))
        return _Predictions(probs, class_scores, *views, codes, scores)

    def _calibrate(self, predictions: _Predictions, labels: Tensor, controls: Controls) -> Calibrated:
        key = (controls.num_iters, controls.refine_iters, tuple(labels[0].tolist()))
        if key not in self._calibrated:
            settings = self.config.calibration.model_copy(update={"refine_iters": controls.refine_iters})
            self._calibrated[key] = calibrate_views(
                predictions.masks,
                predictions.images,
                labels,
                settings,
                max_classes=int(labels.sum()),
                features=predictions.features,
            )
        return self._calibrated[key]

    def _likely_classes(self, scores: dict[str, float]) -> tuple[str, ...]:
        """The classes that gating by scores keeps, or else the best one; all classes without scores."""
        if not scores:
            return self.classes[1:]
        settings = self.config.evaluation
        best = list(scores)[: settings.gating_top]
        return tuple(name for name in best if scores[name] > settings.gating_threshold) or (best[0],)


def example_images(checkpoint: Checkpoint, number: int = 4) -> dict[str, npt.NDArray[np.uint8]]:
    """The first validation images of a training's data by key, as from `shrink`; none if the data are not here."""
    path, split = checkpoint.config.data.path, checkpoint.config.data.val_split
    if is_remote(path) or not (Path(path) / DATASET_FILE).is_file():
        return {}
    shards = load_dataset(path)
    if split not in shards.splits:
        return {}
    view, images = shards.split(split), {}
    index = SampleIndex(shard_set=shards, split=view)
    with ShardFiles(index) as files:
        for place in range(min(number, view.num_samples)):
            with index.naming(place):
                contents = files.contents(files.locate(place, masks=False))
                pixels = index.decode(view.row(place), contents).permute(1, 2, 0).contiguous().numpy()
            images[view.key(place)] = shrink(Image.fromarray(pixels))
    return images


def shrink(image: Image.Image, depth: Depth | None = None) -> npt.NDArray[np.uint8]:
    """Turns an image of any mode upright and scales it down to `MAX_SIDE` pixels a side; returns (H, W, 3) uint8.

    `depth` scales more than 8 bits; an image that it does not fit raises `DataError`.
    """
    picture = Image.fromarray(rgb_array(image, depth))
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(picture).copy()
