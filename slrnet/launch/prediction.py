"""What evaluation and pseudo labeling share: the masks of a checkpoint, predicted in the processes of a job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, check_classes, load_checkpoint, restore_network
from slrnet.checkpoints.run_store import location_of, on_this_machine
from slrnet.config import Config, config_from_dict
from slrnet.data.batch import EvalSample
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import gating_labels, protocol_name
from slrnet.inference.crf import crf_masks, require_crf
from slrnet.inference.forward import Inference

__all__ = ["Mask", "MaskJob", "MaskPredictor", "PredictedMask", "open_job"]

Mask = npt.NDArray[np.uint8]
"""(H, W) class ids."""


@dataclass(frozen=True)
class MaskJob:
    """The masks to predict: a checkpoint's, of some splits of a data set.

    Raises:
        ValueError: the checkpoint has other classes, a split is missing, or the CRF is not installed.
    """

    checkpoint: Checkpoint
    """The network; the processes read it again from its path, or from the object store that it was copied from."""
    config: Config
    """The checkpoint's settings, with the protocol to use in `evaluation` and `crf`."""
    shards: ShardSet
    """The data set; its classes must be the checkpoint's."""
    splits: tuple[str, ...]
    """Names of the splits."""

    def __post_init__(self) -> None:
        check_classes(self.checkpoint.state, self.shards.info.classes, data=self.shards.location)
        for split in self.splits:
            self.shards.split(split)
        if self.config.evaluation.protocol == "ms_crf":
            require_crf()

    def describe(self) -> dict[str, Any]:
        """What the masks depend on, besides the splits, as plain values."""
        settings = self.config.evaluation_for(self.config.evaluation.protocol)
        return {
            "checkpoint": location_of(self.checkpoint.path),
            "epoch": self.checkpoint.state.epoch,
            "data_fingerprint": self.shards.info.fingerprint,
            "protocol": protocol_name(settings, settings.protocol),
            "evaluation": settings.model_dump(mode="json"),
            "crf": self.config.crf.model_dump(mode="json") if settings.protocol == "ms_crf" else None,
        }

    def values(self) -> dict[str, Any]:
        """What `open_job` needs in the processes, as plain values."""
        place, config = location_of(self.checkpoint.path), self.config.model_dump(mode="json")
        return {"checkpoint": place, "config": config, "data": self.shards.location}


@dataclass(frozen=True)
class PredictedMask:
    """What is predicted of one image."""

    sample: EvalSample
    """The image."""
    masks: tuple[Mask, ...]
    """One for each of the predictor's `names`."""
    confidence: npt.NDArray[np.float32]
    """(H, W) float32 in [0, 1], the share of the last mask's class in each pixel's probabilities."""


@dataclass(frozen=True)
class MaskPredictor:
    """Predicts masks by the protocol of its settings."""

    inference: Inference
    """The network, and the settings with the protocol in `evaluation` and `crf`."""
    process: Process
    """This rank."""
    crf_processes: int
    """Helper processes for the CRF, >= 1."""
    alive: Callable[[], None] = lambda: None
    """Is called after each image."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the masks: the protocol's, and for `ms_crf` first that of the same masks before the CRF, `ms`."""
        protocol = self.inference.config.evaluation.protocol
        settings = self.inference.config.evaluation_for(protocol)
        return tuple(protocol_name(settings, name) for name in (("ms",) if protocol == "ms_crf" else ()) + (protocol,))

    def __call__(self, samples: Iterable[EvalSample]) -> Iterator[PredictedMask]:
        """Predicts masks, in the order of the samples.

        Raises:
            DataError: the protocol gates by image labels, and those of a sample are not known.
        """
        config, device = self.inference.config, self.process.device
        protocol = config.evaluation.protocol
        predicted = (
            (s, self.inference.predict(s.image.to(device), protocol, gating_labels(s, config))[0][0].float())
            for s in samples
        )
        if protocol != "ms_crf":
            for sample, probs in predicted:
                self.alive()
                mask, confidence = _most_probable(probs)
                yield PredictedMask(sample, (mask,), confidence)
            return
        pictures = (
            ((s, _most_probable(probs)[0]), s.image.permute(1, 2, 0).contiguous().numpy(), probs.cpu().numpy())
            for s, probs in predicted
        )
        refined = crf_masks(pictures, config.crf, processes=self.crf_processes)
        for (sample, before), mask, confidence in refined:
            self.alive()
            yield PredictedMask(sample, (before, mask), confidence)


def open_job(values: dict[str, Any], process: Process, alive: Callable[[], None]) -> tuple[MaskPredictor, ShardSet]:
    """Reads the checkpoint and the data set of a `MaskJob`, given its `values`, in one of its processes."""
    if process.device.type == "cpu":
        from slrnet.cpu.allocator import keep_memory

        keep_memory()
    checkpoint = load_checkpoint(on_this_machine(values["checkpoint"]))
    model = restore_network(checkpoint, process.device)
    inference = Inference(model, config_from_dict(values["config"]))
    predictor = MaskPredictor(inference, process, values["cpus"] or os.cpu_count() or 1, alive)
    return predictor, load_dataset(values["data"])


def _most_probable(probs: Tensor) -> tuple[Mask, npt.NDArray[np.float32]]:
    """The most probable class of each pixel (H, W), and its share of the pixel's probabilities (K, H, W)."""
    highest, mask = probs.max(dim=0)
    confidence = highest / probs.sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return mask.to(torch.uint8).cpu().numpy(), confidence.cpu().numpy()
