"""Measures a checkpoint by a protocol, in this process or over the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slrnet.checkpoints.checkpoint import Checkpoint
from slrnet.data.batch import EvalSample
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError
from slrnet.data.readers import read_ahead
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import Quality, quality_metrics
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.launch.hand_out import Alive, Work, hand_out
from slrnet.launch.prediction import MaskJob, MaskPredictor, open_job
from slrnet.launch.train import LaunchOptions
from slrnet.storage.files import write_json
from slrnet.tracking.location import is_named, not_named
from slrnet.tracking.mlflow import MlflowTracker
from slrnet.tracking.protocol import RunHandle, metric_key
from slrnet.tracking.provenance import environment_tags
from slrnet.tracking.reader import find_run

__all__ = ["launch_evaluation", "measure", "track_figures", "training_run", "why_untracked"]

PART = 32
"""Images that a worker gets at a time."""


def launch_evaluation(job: MaskJob, options: LaunchOptions) -> dict[str, Any]:
    """Measures a checkpoint on one split; every image exactly once, and the same figure for any number of workers.

    Args:
        job: the checkpoint, the protocol, the data set and its split.
        options: workers; name and storage give the folder of the result.

    Returns:
        The content of `evaluation.json`, which is written into that folder: protocol, its settings, metrics, images,
        checkpoint, data fingerprint and commit; for `ms_crf` also the metrics of `ms`, as `before_crf`. The training's
        MLflow run gets the means as `SPLIT/miou_PROTOCOL` and so on, and `mlflow` says how to open it; `mlflow` is None
        if the run's store cannot be reached.

    Raises:
        ValueError: the split has no masks, or the cluster has too few resources.
        TrainingError: a worker failed.
    """
    (split,) = job.splits
    if not len(job.shards.split(split).with_masks):
        raise DataError(
            f"split {split!r} of {job.shards.location} has no masks to compare with; name another one with --split, or "
            "prepare the data with --masks"
        )
    counts = hand_out(_open, job.values() | {"split": split}, _parts(job, split, options), options)
    *before, quality = _total(counts)
    classes = job.shards.info.classes
    record = {
        "split": split,
        "images": quality.images,
        "metrics": quality_metrics("val", quality, classes),
        "before_crf": {plain.protocol: quality_metrics("val", plain, classes) for plain in before},
        "classes": classes,
        "environment": environment_tags(),
    }
    result: dict[str, Any] = job.describe() | record
    write_json(options.folder / "evaluation.json", result)
    figures = {
        metric_key(split, f"{name}_{protocol}"): metrics[f"val/{name}"]
        for protocol, metrics in ({result["protocol"]: result["metrics"]} | result["before_crf"]).items()
        for name in ("miou", "mfdr", "mfnr")
        if f"val/{name}" in metrics
    }
    return result | {"mlflow": track_figures(job.checkpoint, figures)}


def measure(predictor: MaskPredictor, samples: Iterable[EvalSample]) -> tuple[Quality, ...]:
    """Compares predicted masks with the true ones; skips images without a mask.

    Returns:
        The quality of each of the predictor's `names`: for `ms_crf` that of `ms` and then its own, else its own.
    """
    num_classes, images = predictor.inference.model.num_classes, 0
    matrices = {name: ConfusionMatrix(num_classes) for name in predictor.names}
    labeled = (sample for sample in samples if sample.pixel_labels is not None)
    for predicted in predictor(labeled):
        truth = predicted.sample.pixel_labels
        assert truth is not None
        for matrix, mask in zip(matrices.values(), predicted.masks, strict=True):
            matrix.update(torch.from_numpy(mask), truth)
        images += 1
    return tuple(Quality(matrix, name, images) for name, matrix in matrices.items())


def track_figures(checkpoint: Checkpoint, figures: Mapping[str, float]) -> str | None:
    """Adds figures, by MLflow key, to the MLflow run of the training that wrote a checkpoint.

    Returns:
        How to open the run; None if the store or the run cannot be reached.
    """
    handle = training_run(checkpoint)
    if handle is None:
        return None
    tracker = MlflowTracker(handle)
    tracker.log_metrics(figures, step=checkpoint.state.step)
    return handle.how_to_open() if tracker.flush() == 0 else None


def training_run(checkpoint: Checkpoint) -> RunHandle | None:
    """The MLflow run of the training that wrote a checkpoint; None if the store or the run cannot be reached."""
    return find_run(checkpoint.config.tracking.uri, _storage_of(checkpoint), checkpoint.state.run_id)


def why_untracked(checkpoint: Checkpoint) -> str:
    """Why `training_run` is None, for people."""
    uri = checkpoint.config.tracking.uri
    if not is_named(uri, _storage_of(checkpoint)):
        return not_named(uri)
    return "the store of the training cannot be reached, or does not have its run"


def _storage_of(checkpoint: Checkpoint) -> Path:
    return (checkpoint.path / "../../..").resolve()  # of storage/RUN/checkpoints/checkpoint-EPOCH


def _parts(job: MaskJob, split: str, options: LaunchOptions) -> list[range]:
    """The images of a split in parts that workers take in turn; as one part for this process alone."""
    images = job.shards.split(split).num_samples
    size = PART if options.num_workers != 0 else images
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def _open(values: dict[str, Any], process: Process, alive: Alive) -> Work:
    predictor, shards = open_job(values, process, alive)
    on_error = predictor.inference.config.data.on_error

    def work(parts: Iterable[range]) -> Iterator[tuple[Quality, ...]]:
        for part in parts:
            loader = EvalLoader(shards, split=values["split"], indices=part, on_error=on_error)
            yield measure(predictor, read_ahead(loader))

    return work


def _total(measured: Iterator[tuple[Quality, ...]]) -> tuple[Quality, ...]:
    """Adds up what was measured of the parts."""
    totals = next(measured)
    for qualities in measured:
        for total, quality in zip(totals, qualities, strict=True):
            total.matrix.merge(quality.matrix)
        totals = tuple(replace(t, images=t.images + q.images) for t, q in zip(totals, qualities, strict=True))
    return totals
