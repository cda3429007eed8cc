"""What the app shows of one image: mask, refined mask, pseudo label, class scores and code maps, for some settings.

The settings that are tried are T of CVLR, gamma, and the iterations of the refinement; all else is the checkpoint's.
What does not depend on a setting that changed is kept, so that gamma is answered without the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from slrnet.calibration.pseudo_labels import Calibrated, calibrate_views, make_pseudo_labels, to_class_ids
from slrnet.checkpoints.checkpoint import Checkpoint, restore_network
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.evaluation.masks import view_logits
from slrnet.inference.forward import fit_image, gate, predict_single_scale
from slrnet.inference.predictor import rgb_array
from slrnet.models.slrnet import SLRNet
from slrnet.ops.maps import resize
from slrnet.tools.codes import CodeMaps, classes_of, code_maps, most_used

__all__ = ["MAX_SIDE", "Controls", "Look", "Studio", "shrunk"]

MAX_SIDE = 640
"""Pixels of the longer side; larger images are scaled down, so that an answer takes about a second on a CPU."""

Mask = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What can be tried."""

    num_iters: int
    """T, >= 1; without meaning for a network without a low-rank module."""
    gamma: float
    """`calibration.confidence_threshold`, in [0, 1]."""
    refine_iters: int
    """`calibration.refine_iters`; 0: no refinement."""
    classes: tuple[str, ...] | None = None
    """Foreground classes that the pseudo label may show; None: those that the network's scores name."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is seen in an image of H x W pixels."""

    mask: Mask
    """(H, W) class ids by the protocol of the run's validation."""
    refined: Mask
    """(H, W) class ids of the fused masks of all views, refined."""
    pseudo_labels: Mask
    """(H, W) class ids, 255 where undecided."""
    classes: tuple[str, ...]
    """Foreground classes that the pseudo label may show."""
    scores: dict[str, float]
    """Sigmoids of the pooled scores by foreground class, highest first; empty where the network has none."""
    codes: dict[str, npt.NDArray[np.float32]]
    """(H', W') code maps in [0, 1] by the names of their atoms; empty without a low-rank module."""

    @property
    def coverage(self) -> float:
        """Share of the pixels that the pseudo label decides."""
        return float((self.pseudo_labels != IGNORE_INDEX).mean())


@dataclass(frozen=True)
class _Seen:
    """What the network says of an image with some T."""

    probs: Tensor
    scores: Tensor | None
    logits: tuple[Tensor, ...]
    images: Tensor
    codes: CodeMaps | None


@dataclass
class _Kept:
    """The last answers; an image is known by its array."""

    image: npt.NDArray[np.uint8] | None = None
    seen: dict[int, _Seen] = field(default_factory=dict)
    calibrated: dict[tuple[Any, ...], Calibrated] = field(default_factory=dict)


class Studio:
    """A checkpoint's network with controls; one question at a time.

    Args:
        checkpoint: to look at.
        device: for the network; None: a GPU where there is one.

    Attributes:
        classes: names of the K classes, background first.
        has_codes: whether the network has a low-rank module.
        usual: the checkpoint's own settings.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None) -> None:
        self.config = checkpoint.config
        self.classes = checkpoint.state.classes
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model, self._normalize = restore_network(checkpoint, self._device)
        self._module = self._model.cvlr if isinstance(self._model, SLRNet) else None
        self.has_codes = self._module is not None
        calibration = self.config.calibration
        self.usual = Controls(
            num_iters=self.config.cvlr.num_iters,
            gamma=calibration.confidence_threshold,
            refine_iters=calibration.refine_iters,
        )
        self._kept, self._lock = _Kept(), Lock()

    def look(self, image: npt.NDArray[np.uint8], controls: Controls) -> Look:
        """Looks at an image.

        Args:
            image: (H, W, 3) uint8, not changed between calls; see `shrunk`.
            controls: what to try.

        Raises:
            ValueError: T below 1, or gamma outside [0, 1].
        """
        with self._lock, torch.no_grad():
            if self._kept.image is not image:
                self._kept = _Kept(image)
            if controls.num_iters not in self._kept.seen:
                self._kept.seen[controls.num_iters] = self._see(image, controls.num_iters)
            seen = self._kept.seen[controls.num_iters]
            named = self._named(seen) if controls.classes is None else controls.classes
            return self._answer(seen, controls, named, size=(image.shape[0], image.shape[1]))

    def _answer(self, seen: _Seen, controls: Controls, named: tuple[str, ...], *, size: tuple[int, int]) -> Look:
        labels = torch.tensor([[float(name in named) for name in self.classes[1:]]], device=self._device)
        calibrated = self._calibrated(seen, labels, controls, named)
        calibration = self.config.calibration.model_copy(update={"confidence_threshold": controls.gamma})
        fused = resize(calibrated.refined, size).argmax(dim=1)
        return Look(
            mask=gate(seen.probs, seen.scores, labels[0], self.config.evaluation)[0].argmax(dim=0).cpu().numpy(),
            refined=to_class_ids(fused, calibrated.classes)[0].cpu().numpy(),
            pseudo_labels=make_pseudo_labels(calibrated, calibration, size=size)[0].cpu().numpy(),
            classes=named,
            scores=self._scores(seen),
            codes=self._codes(seen, controls.num_iters),
        )

    def _see(self, image: npt.NDArray[np.uint8], num_iters: int) -> _Seen:
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous().to(self._device)
        trained = None if self._module is None else self._module.num_iters
        try:
            if self._module is not None:
                self._module.num_iters = num_iters
            probs, scores = predict_single_scale(self._model, pixels, self._normalize, self.config)
            logits, images = view_logits(self._model, pixels, config=self.config, normalize=self._normalize)
            codes = None
            if isinstance(self._model, SLRNet) and self._module is not None:
                codes = code_maps(self._model, fit_image(pixels, self.config), self._normalize, [num_iters])
        finally:
            if self._module is not None and trained is not None:
                self._module.num_iters = trained
        return _Seen(probs, scores, tuple(logits), images, codes)

    def _calibrated(self, seen: _Seen, labels: Tensor, controls: Controls, named: tuple[str, ...]) -> Calibrated:
        key = (controls.num_iters, controls.refine_iters, named)
        if key not in self._kept.calibrated:
            settings = self.config.calibration.model_copy(update={"refine_iters": controls.refine_iters})
            self._kept.calibrated[key] = calibrate_views(
                seen.logits, seen.images, labels, settings, max_classes=int(labels.sum())
            )
        return self._kept.calibrated[key]

    def _named(self, seen: _Seen) -> tuple[str, ...]:
        """The classes that the scores name, as gating by scores keeps them, or the best; all without scores."""
        scores, settings = self._scores(seen), self.config.evaluation
        if not scores:
            return self.classes[1:]
        best = list(scores)[: settings.gating_top]
        return tuple(name for name in best if scores[name] > settings.gating_threshold) or (best[0],)

    def _scores(self, seen: _Seen) -> dict[str, float]:
        if seen.scores is None:
            return {}
        values = seen.scores[0].float().sigmoid().cpu().tolist()
        return dict(sorted(zip(self.classes[1:], values, strict=True), key=lambda pair: -pair[1]))

    def _codes(self, seen: _Seen, num_iters: int) -> dict[str, npt.NDArray[np.float32]]:
        if seen.codes is None or self._module is None:
            return {}
        named = self._module.class_codes
        atoms = classes_of(seen.codes, self.classes, None) if named else most_used(seen.codes)
        maps = seen.codes.codes[num_iters]
        return {self.classes[atom] if named else f"atom {atom}": maps[atom] for atom in atoms}


def shrunk(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image as people have them, turned upright, neither side above `MAX_SIDE` pixels."""
    pixels = rgb_array(image)
    share = MAX_SIDE / max(pixels.shape[:2])
    if share >= 1:
        return pixels
    height, width = (max(1, round(side * share)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)).copy()
