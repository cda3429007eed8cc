"""Measures a checkpoint by a protocol, in this process or over the workers of a Ray cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, check_classes, load_checkpoint, restore_network
from slrnet.config import Config, config_from_dict
from slrnet.data.batch import EvalSample
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.data.shards import EvalLoader
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import Quality, count_masks, quality_metrics
from slrnet.evaluation.metrics import ConfusionMatrix, merge_over_ranks
from slrnet.evaluation.protocols import gating_labels, protocol_name
from slrnet.inference.crf import crf_masks, require_crf
from slrnet.inference.forward import gate
from slrnet.inference.predictor import predict
from slrnet.launch.train import LaunchOptions, Report, run_job
from slrnet.models.network import Network, Normalize
from slrnet.storage.files import write_json
from slrnet.tracking.mlflow import RunHandle, Tracker, environment_tags, find_run, metric_key

__all__ = ["launch_evaluation", "measure", "track_figures", "training_run"]


def launch_evaluation(
    checkpoint: Checkpoint, shards: ShardSet, *, split: str, config: Config, options: LaunchOptions
) -> dict[str, Any]:
    """Measures a checkpoint on a split; every image exactly once, and the same figure for any number of workers.

    Args:
        checkpoint: to measure; the workers read it again from its path.
        shards: the data set; its classes must be the checkpoint's.
        split: of the data set.
        config: the checkpoint's, with the protocol to use in `evaluation` and `crf`.
        options: workers; name and storage give the folder of the result.

    Returns:
        The content of `evaluation.json`, which is written into that folder: protocol, its settings, figures, images,
        checkpoint, data fingerprint and commit; of `ms_crf` under `before_crf` also the figures of `ms`. Where the
        store of the training's MLflow run can be reached, the run gets the means as `SPLIT/miou_PROTOCOL` and so on,
        and `mlflow` says how to open it; else that is None.

    Raises:
        ValueError: the checkpoint is of other classes, there is no such split, the CRF is not installed, or the
            cluster has less than was asked for.
        TrainingError: a worker failed.
    """
    check_classes(checkpoint.state, shards.info.classes, data=shards.location)
    shards.split(split)
    if config.evaluation.protocol == "ms_crf":
        require_crf()
    folder = options.storage / options.name
    values = {
        "config": config.model_dump(mode="json"),
        "checkpoint": str(checkpoint.path.resolve()),
        "data": shards.location,
        "split": split,
        "result": str(folder / "evaluation.json"),
    }
    run_job(_evaluate, values, options)
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    figures = {
        metric_key(split, f"{name}_{protocol}"): metrics[f"val/{name}"]
        for protocol, metrics in ({result["protocol"]: result["metrics"]} | result["before_crf"]).items()
        for name in ("miou", "mfdr", "mfnr")
        if f"val/{name}" in metrics
    }
    return result | {"mlflow": track_figures(checkpoint, figures)}


def measure(
    model: Network, loader: EvalLoader, *, config: Config, normalize: Normalize, process: Process, crf_processes: int
) -> tuple[Quality, ...]:
    """Compares masks predicted by the configured protocol with true ones, over all ranks.

    Returns the protocol's figures; of `ms_crf` then those of the same masks before the CRF, which are those of `ms`.

    Args:
        model: in evaluation mode.
        loader: this rank's share of the images; those without a mask are passed over.
        config: of the run.
        normalize: of the encoder.
        process: every rank must call this.
        crf_processes: helpers for the CRF, >= 1; used by `ms_crf` only.
    """
    protocol = config.evaluation.protocol
    settings = config.evaluation_for(protocol)
    name = protocol_name(settings, protocol)
    gated = _gated_probs(model, loader, config=config, normalize=normalize, process=process)
    count = partial(count_masks, num_classes=model.num_classes, protocol=name, process=process)
    if protocol != "ms_crf":
        return (count((sample, probs.argmax(dim=0).cpu()) for sample, probs in gated),)
    plain = ConfusionMatrix(model.num_classes)

    def pictures() -> Iterator[tuple[EvalSample, npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
        for sample, probs in gated:
            assert sample.pixel_labels is not None
            plain.update(probs.argmax(dim=0).cpu(), sample.pixel_labels)
            yield sample, _pixels(sample), probs.cpu().numpy()

    refined = crf_masks(pictures(), config.crf, processes=crf_processes)
    quality = count((sample, torch.from_numpy(mask)) for sample, mask, _ in refined)
    before = Quality(merge_over_ranks(plain, process), protocol_name(settings, "ms"), quality.images)
    return quality, before


def track_figures(checkpoint: Checkpoint, figures: Mapping[str, float]) -> str | None:
    """Adds figures to the MLflow run of the training that a checkpoint is of, where its store can be reached.

    Args:
        checkpoint: of the run.
        figures: values by key.

    Returns:
        How to open the run, or None where the store or the run is out of reach.
    """
    handle = training_run(checkpoint)
    if handle is None:
        return None
    tracker = Tracker(handle)
    tracker.log_metrics(figures, step=checkpoint.state.step)
    return handle.how_to_open() if tracker.flush() == 0 else None


def training_run(checkpoint: Checkpoint) -> RunHandle | None:
    """The MLflow run of the training that a checkpoint is of; None where the store or the run is out of reach."""
    storage = checkpoint.path.resolve().parents[2]  # storage/RUN/checkpoints/checkpoint-EPOCH
    return find_run(checkpoint.config.tracking.uri, storage, checkpoint.state.run_id)


def _gated_probs(
    model: Network, loader: EvalLoader, *, config: Config, normalize: Normalize, process: Process
) -> Iterator[tuple[EvalSample, Tensor]]:
    """Images with a true mask and their (K, H, W) probabilities."""
    protocol = config.evaluation.protocol
    settings = config.evaluation_for(protocol)
    for sample in loader:
        if sample.pixel_labels is not None:
            probs, scores = predict(model, sample.image.to(process.device), normalize, config, protocol)
            yield sample, gate(probs, scores, gating_labels(sample, config).to(process.device), settings)[0]


def _pixels(sample: EvalSample) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = sample.image.permute(1, 2, 0).contiguous().numpy()
    return pixels


def _evaluate(values: dict[str, Any], process: Process, report: Report) -> None:
    config = config_from_dict(values["config"])
    checkpoint = load_checkpoint(values["checkpoint"])
    shards = load_dataset(values["data"])
    if process.device.type == "cpu":
        from slrnet.cpu.allocator import keep_memory

        keep_memory()
    model, normalize = restore_network(checkpoint, process.device)
    loader = EvalLoader(
        shards, split=values["split"], rank=process.rank, world_size=process.world_size, on_error=config.data.on_error
    )
    quality, *before = measure(
        model,
        loader,
        config=config,
        normalize=normalize,
        process=process,
        crf_processes=values["cpus"] or os.cpu_count() or 1,
    )
    metrics = quality_metrics("val", quality, shards.info.classes)
    report(metrics)
    if process.is_main:
        record = {
            "protocol": quality.protocol,
            "evaluation": config.evaluation_for(config.evaluation.protocol).model_dump(mode="json"),
            "crf": config.crf.model_dump(mode="json") if config.evaluation.protocol == "ms_crf" else None,
            "split": values["split"],
            "images": quality.images,
            "metrics": metrics,
            "before_crf": {found.protocol: quality_metrics("val", found, shards.info.classes) for found in before},
            "classes": shards.info.classes,
            "checkpoint": values["checkpoint"],
            "epoch": checkpoint.state.epoch,
            "data_fingerprint": shards.info.fingerprint,
            "environment": environment_tags(),
        }
        write_json(Path(values["result"]), record)
