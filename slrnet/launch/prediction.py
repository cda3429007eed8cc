"""What evaluation and pseudo labeling share: the masks of a checkpoint, predicted in the processes of a job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, check_classes, load_checkpoint, restore_network
from slrnet.config import Config, EvaluationConfig, config_from_dict
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.distributed.process import Process
from slrnet.evaluation.protocols import protocol_name
from slrnet.inference.crf import crf_masks, require_crf
from slrnet.inference.predictor import predict
from slrnet.models.network import Network

__all__ = ["Mask", "MaskPredictor", "PredictedMask", "check_prediction", "job_values", "open_job"]

Mask = npt.NDArray[np.uint8]
"""(H, W) class ids."""
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class PredictedMask(Generic[Sample]):
    """The mask of one image."""

    sample: Sample
    """What the caller gave with the image."""
    mask: Mask
    """(H, W) uint8 class ids."""
    confidence: npt.NDArray[np.float32]
    """(H, W) float32 in [0, 1], the share of the mask's class in each pixel's probabilities."""
    before_crf: Mask | None
    """The mask before the CRF; None for protocols without one."""


def check_prediction(checkpoint: Checkpoint, shards: ShardSet, splits: Sequence[str], config: Config) -> None:
    """Checks on the driver that a checkpoint can predict masks for a data set.

    Raises:
        ValueError: the checkpoint has other classes, a split is missing, or the CRF is not installed.
    """
    check_classes(checkpoint.state, shards.info.classes, data=shards.location)
    for split in splits:
        shards.split(split)
    if config.evaluation.protocol == "ms_crf":
        require_crf()


def job_values(checkpoint: Checkpoint, shards: ShardSet, config: Config) -> dict[str, Any]:
    """The plain values of a job, for `open_job`."""
    return {
        "config": config.model_dump(mode="json"),
        "checkpoint": str(checkpoint.path.resolve()),
        "data": shards.location,
    }


@dataclass(frozen=True, kw_only=True)
class MaskPredictor:
    """Predicts masks by the protocol of its settings."""

    model: Network
    """In evaluation mode, on the process's device."""
    config: Config
    """Settings, with the protocol in `evaluation` and `crf`."""
    process: Process
    """This rank."""
    crf_processes: int
    """Helper processes for the CRF, >= 1."""

    @property
    def settings(self) -> EvaluationConfig:
        """The settings of the protocol."""
        return self.config.evaluation_for(self.config.evaluation.protocol)

    def name(self, protocol: str = "") -> str:
        """The protocol's name with what deviates from its defaults; with `protocol` that of another one."""
        return protocol_name(self.settings, protocol or self.settings.protocol)

    def __call__(self, samples: Iterable[tuple[Sample, Tensor, Tensor]]) -> Iterator[PredictedMask[Sample]]:
        """Predicts masks, in the order of the samples.

        Args:
            samples: per image something that comes back with its mask, the (3, H, W) uint8 image, and its (K - 1,)
                image labels, which are used only where the protocol gates by them.
        """
        gated = self._gated_probs(samples)
        if self.settings.protocol != "ms_crf":
            for sample, _, probs in gated:
                yield PredictedMask(sample, *_most_probable(probs), None)
            return
        pictures = (
            ((sample, _most_probable(probs)[0]), image.permute(1, 2, 0).contiguous().numpy(), probs.cpu().numpy())
            for sample, image, probs in gated
        )
        for (sample, before), mask, confidence in crf_masks(pictures, self.config.crf, processes=self.crf_processes):
            yield PredictedMask(sample, mask, confidence, before)

    def _gated_probs(self, samples: Iterable[tuple[Sample, Tensor, Tensor]]) -> Iterator[tuple[Sample, Tensor, Tensor]]:
        device = self.process.device
        for sample, image, labels in samples:
            probs, _ = predict(self.model, image.to(device), self.config, self.settings.protocol, labels)
            yield sample, image, probs[0].float()


def open_job(values: dict[str, Any], process: Process) -> tuple[MaskPredictor, Checkpoint, ShardSet]:
    """Reads the checkpoint and the data set of `job_values` in a process of the job."""
    if process.device.type == "cpu":
        from slrnet.cpu.allocator import keep_memory

        keep_memory()
    checkpoint = load_checkpoint(values["checkpoint"])
    model = restore_network(checkpoint, process.device)
    predictor = MaskPredictor(
        model=model,
        config=config_from_dict(values["config"]),
        process=process,
        crf_processes=values["cpus"] or os.cpu_count() or 1,
    )
    return predictor, checkpoint, load_dataset(values["data"])


def _most_probable(probs: Tensor) -> tuple[Mask, npt.NDArray[np.float32]]:
    """The most probable class of each pixel (H, W), and its share of the pixel's probabilities (K, H, W)."""
    highest, mask = probs.max(dim=0)
    confidence = highest / probs.sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return mask.to(torch.uint8).cpu().numpy(), confidence.cpu().numpy()
