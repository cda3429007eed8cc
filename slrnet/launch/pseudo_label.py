"""Pseudo masks for a data set, written as a data set: what a network says takes the place of the masks.

The new folder has the shards of the old one, sample by sample in the same order. In the splits that are labelled,
KEY.png is the predicted mask, void (255) where the confidence is below `inference.void_below`, and the sample belongs
to the named subset `pseudo_labeled`; its image and its image labels stay. KEY.json has an entry `pseudo_label`: the
protocol, `confidence` (the chosen class's share of a pixel's probabilities, mean over all pixels), `class_confidence`
(the same per class of the mask) and `coverage` (share of the pixels that are not void). Other splits are taken over as
they are, so that the folder is a whole data set: to train on the one and validate on the other.

True masks are read to be compared with, and for nothing else. A shard appears when all its samples are done, and a job
that was killed goes on with those that are missing; each is a function of its samples alone, so the folder has the same
bytes however often the job was stopped and over however many workers it was spread (of equally many threads: with other
numbers the network's sums may differ in their last bits). `pseudo_labels.json` says how the masks were made and how
good they are.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, check_classes, load_checkpoint, restore_network
from slrnet.config import Config, config_from_dict
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.images import encode_mask
from slrnet.data.manifest import SCHEMA, DataError, ShardSet, SplitView, load_dataset, save_dataset
from slrnet.data.samples import ShardFiles, index_split
from slrnet.data.tars import ShardWriter
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import Quality, quality_metrics
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.evaluation.protocols import protocol_name
from slrnet.inference.crf import crf_masks, require_crf
from slrnet.inference.forward import gate
from slrnet.inference.predictor import predict
from slrnet.launch.evaluation import track_figures
from slrnet.launch.train import LaunchOptions, Report, run_job
from slrnet.models.network import Network, Normalize
from slrnet.storage.files import sha256_of, write_json, written_whole
from slrnet.tracking.mlflow import environment_tags, metric_key

__all__ = ["RECORD", "SUBSET", "launch_pseudo_labels", "read_record"]

SUBSET = "pseudo_labeled"
"""Named subset of the samples whose mask is a predicted one."""
RECORD = "pseudo_labels.json"
"""File that says how the masks of a folder were made and how good they are."""

WORK = ".work"
"""Folder within the unfinished one for what is of no use once all is done."""
Job = dict[str, Any]
Mask = npt.NDArray[np.uint8]


def launch_pseudo_labels(
    checkpoint: Checkpoint,
    shards: ShardSet,
    *,
    splits: Sequence[str],
    config: Config,
    out: Path,
    num_workers: int | None = 0,
    cpus_per_worker: int | None = None,
) -> dict[str, Any]:
    """Labels splits of a data set with a network's masks; goes on where an earlier call was stopped.

    Args:
        checkpoint: the network; the workers read it again from its path.
        shards: the data set; its classes must be the checkpoint's.
        splits: to label; the others are taken over.
        config: the checkpoint's, with the protocol to use in `evaluation` and `crf`, and `inference.void_below`.
        out: folder to make. Until it is whole, the work lies beside it in `.NAME.partial`.
        num_workers: Ray workers; 0 works in this process; None: one per GPU of the cluster, else 1.
        cpus_per_worker: CPU cores per worker; None: an equal share.

    Returns:
        The content of `pseudo_labels.json`, and under `mlflow` how to open the training's run, which gets the figures
        as `pseudo_label/SPLIT/miou_PROTOCOL` and so on; None where it is out of reach.

    Raises:
        ValueError: the checkpoint is of other classes, there is no such split, the protocol gates by image labels that
            samples lack, the CRF is not installed, `out` or the unfinished work is of something else, or the cluster
            has less than was asked for.
        TrainingError: a worker failed.
    """
    _check(checkpoint, shards, splits, config)
    job = _describe(checkpoint, shards, splits, config)
    out = out.expanduser().resolve()
    finished = read_record(out)
    if finished is None:
        _check_free(out)
        partial = _open_partial(out, job)
        remaining = [
            (split, entry.name)
            for split in sorted(splits)
            for entry in shards.split(split).shards
            if _finished(partial, entry.name) is None
        ]
        values = {"config": config.model_dump(mode="json"), "folder": str(partial), "remaining": remaining}
        values |= {"checkpoint": str(checkpoint.path.resolve()), "data": shards.location}
        options = LaunchOptions(name=WORK, storage=partial, num_workers=num_workers, cpus_per_worker=cpus_per_worker)
        if remaining:
            run_job(_label, values, options)
        finished = _assemble(partial, shards, job)
        partial.rename(out)
    elif finished["job"] != job:
        raise ValueError(f"{out} holds other pseudo masks ({_differences(finished['job'], job)}); choose another --out")
    shutil.rmtree(out / WORK, ignore_errors=True)
    figures = {
        metric_key("pseudo_label", split, f"{name}_{protocol}"): value
        for split, protocols in finished["quality"].items()
        for protocol, found in protocols.items()
        for name, value in found["metrics"].items()
        if "/" not in name
    }
    return finished | {"mlflow": track_figures(checkpoint, figures)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's `pseudo_labels.json`; None where it has none.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / RECORD} cannot be read: {error}; make the pseudo masks anew") from None
    return record


# On the driver.


def _check(checkpoint: Checkpoint, shards: ShardSet, splits: Sequence[str], config: Config) -> None:
    check_classes(checkpoint.state, shards.info.classes, data=shards.location)
    if config.evaluation.protocol == "ms_crf":
        require_crf()
    for split in splits:
        view = shards.split(split)
        without = int((~view.has_image_labels).sum())
        if config.evaluation.gating == "image_labels" and without:
            raise DataError(
                f"evaluation.gating is image_labels, but the image labels of {without} of {view.num_samples} samples "
                f"of split {split!r} are not known; use gating none or scores"
            )


def _describe(checkpoint: Checkpoint, shards: ShardSet, splits: Sequence[str], config: Config) -> Job:
    """All that the masks depend on: what two runs must share to be one job."""
    crf = config.evaluation.protocol == "ms_crf"
    settings = config.evaluation_for(config.evaluation.protocol)
    return {
        "checkpoint": str(checkpoint.path.resolve()),
        "epoch": checkpoint.state.epoch,
        "step": checkpoint.state.step,
        "data": shards.location,
        "data_fingerprint": shards.info.fingerprint,
        "splits": sorted(splits),
        "protocol": protocol_name(settings, settings.protocol),
        "evaluation": settings.model_dump(mode="json"),
        "crf": config.crf.model_dump(mode="json") if crf else None,
        "void_below": config.inference.void_below,
    }


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no pseudo masks; choose another --out, or remove it first")


def _open_partial(out: Path, job: Job) -> Path:
    """The folder of unfinished work, new or that of an earlier run of the same job."""
    partial = out.with_name(f".{out.name}.partial")
    file = partial / WORK / "job.json"
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_json(file, job)
        return partial
    if earlier != job:
        raise ValueError(
            f"{partial} holds the unfinished work of another job ({_differences(earlier, job)}); finish that one, "
            f"remove it (rm -r {shlex.quote(str(partial))}), or choose another --out"
        )
    return partial


def _differences(earlier: Job, job: Job) -> str:
    names = [name for name in job if earlier.get(name) != job[name]]
    return "; ".join(f"{name} {earlier.get(name)!r}, now {job[name]!r}" for name in names)[:400]


def _finished(partial: Path, shard: str) -> dict[str, Any] | None:
    """What is known of a shard that is done and whole; None where it has to be made."""
    try:
        note: dict[str, Any] = json.loads(_note_path(partial / shard).read_text(encoding="utf-8"))
        digest = sha256_of(partial / shard)
    except (OSError, ValueError):
        return None
    return note if note["sha256"] == digest else None


def _note_path(shard: Path) -> Path:
    return shard.parent / WORK / f"{shard.name}.json"


def _assemble(partial: Path, shards: ShardSet, job: Job) -> dict[str, Any]:
    """Makes the folder of finished shards a data set; returns its record."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    quality: dict[str, Any] = {}
    for split in shards.splits:
        view = shards.split(split)
        if split in job["splits"]:
            notes = [_checked(partial, entry.name, view, entry.first, entry.num_samples) for entry in view.shards]
            quality[split] = _total_quality(notes, shards.info.classes)
            parts = [note["columns"] for note in notes]
        else:
            for entry in view.shards:
                with written_whole(partial / entry.name) as incoming:
                    shutil.copyfile(shards.path_of(entry), incoming)
            parts = [view.shard_rows(place).to_pydict() for place in range(len(view.shards))]
        for name in SCHEMA.names:
            columns[name] += [value for part in parts for value in part[name]]
    for leftover in partial.glob(".incoming.*"):
        leftover.unlink()
    save_dataset(
        partial,
        columns,
        name=f"{shards.info.name}-pseudo",
        classes=shards.info.classes,
        palette=shards.info.palette_array(),
        made_by=_command(job),
    )
    record = {"job": job, "quality": quality, "environment": environment_tags()}
    write_json(partial / RECORD, record)
    return record


def _checked(partial: Path, shard: str, view: SplitView, first: int, count: int) -> dict[str, Any]:
    """A finished shard's notes, after its samples have been compared with the manifest: each exactly once."""
    note = _finished(partial, shard)
    keys = [view.key(index) for index in range(first, first + count)]
    if note is None or note["columns"]["key"] != keys:
        raise DataError(
            f"shard {partial / shard} does not hold the {count} samples of the data set's {shard}, each once; remove "
            "it and start the job again"
        )
    return note


def _total_quality(notes: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> dict[str, Any]:
    """Per protocol the figures of all shards together; empty where no sample has a true mask."""
    images = sum(note["images"] for note in notes)
    found: dict[str, Any] = {}
    for protocol in dict.fromkeys(name for note in notes for name in note["counts"]) if images else ():
        matrix = ConfusionMatrix(len(classes))
        for note in notes:
            if protocol in note["counts"]:
                matrix.counts += torch.tensor(note["counts"][protocol])
        metrics = quality_metrics("pseudo_mask", Quality(matrix, protocol, images), classes)
        values = {name.removeprefix("pseudo_mask/"): value for name, value in metrics.items()}
        found[protocol] = {"images": images, "metrics": values | {"coverage": matrix.coverage()}}
    return found


def _command(job: Job) -> str:
    evaluation = job["evaluation"]
    named = ("scales", "scale", "gating_threshold", "gating_top", "background_power")
    settings = {f"evaluation.{name}": evaluation[name] for name in named}
    settings |= {f"crf.{name}": value for name, value in (job["crf"] or {}).items() if value is not None}
    settings["inference.void_below"] = job["void_below"]
    arguments = {
        "--checkpoint": job["checkpoint"],
        "--data": job["data"],
        "--splits": ",".join(job["splits"]),
        "--protocol": evaluation["protocol"],
        "--gating": evaluation["gating"],
    }
    words = [word for name, value in arguments.items() for word in (name, value)]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return shlex.join(["python", "ray_jobs/pseudo_label.py", *words])


# On the workers.


@dataclass(frozen=True)
class _Source:
    """A sample on its way: where it goes, what it consists of, and its mask before the CRF, where there is one."""

    split: str
    shard: str
    row: Mapping[str, Any]
    files: dict[str, bytes]
    truth: Tensor | None
    plain: Mask | None


@dataclass
class _Tally:
    """Counts of a shard by protocol."""

    num_classes: int
    matrices: dict[str, ConfusionMatrix] = field(default_factory=dict)
    images: int = 0

    def add(self, truth: Tensor | None, masks: Mapping[str, Mask]) -> None:
        for name, mask in masks.items():
            matrix = self.matrices.setdefault(name, ConfusionMatrix(self.num_classes))
            if truth is not None:
                matrix.update(torch.from_numpy(mask), truth)
        self.images += truth is not None


def _label(values: dict[str, Any], process: Process, report: Report) -> None:
    config = config_from_dict(values["config"])
    shards = load_dataset(values["data"])
    if process.device.type == "cpu":
        from slrnet.cpu.allocator import keep_memory

        keep_memory()
    network = restore_network(load_checkpoint(values["checkpoint"]), process.device)
    mine = values["remaining"][process.rank :: process.world_size]
    predicted = _predict_all(*network, shards, mine, config, process)
    if config.evaluation.protocol == "ms_crf":
        masks: Iterable[tuple[_Source, Mask, npt.NDArray[np.float32]]] = crf_masks(
            predicted, config.crf, processes=values["cpus"] or os.cpu_count() or 1
        )
    else:
        masks = ((source, *_choose(probs)) for source, _, probs in predicted)
    palette = shards.info.palette_array()
    sizes = {
        entry.name: entry.num_samples for split in {split for split, _ in mine} for entry in shards.split(split).shards
    }
    stream = iter(masks)
    for _, shard in mine:
        members = islice(stream, sizes[shard])  # no sample of the next shard is asked for before this one is done
        count = _write_shard(Path(values["folder"]) / shard, members, config, shards.info.classes, palette)
        print(f"{shard}: {count} masks", flush=True)
    report({})


def _predict_all(
    model: Network,
    normalize: Normalize,
    shards: ShardSet,
    remaining: Sequence[tuple[str, str]],
    config: Config,
    process: Process,
) -> Iterator[tuple[_Source, npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """The samples of some shards, in order, with image (H, W, 3) and probabilities (K, H, W) after gating."""
    protocol = config.evaluation.protocol
    views = {split: shards.split(split) for split in {split for split, _ in remaining}}
    indices = {split: index_split(shards, view, on_error="stop", checksums=True) for split, view in views.items()}
    for split, shard in remaining:
        index = indices[split]
        place = views[split].shard_names.index(shard).as_py()
        samples = range(int(index.firsts[place]), int(index.firsts[place + 1]))
        rows = views[split].shard_rows(place).to_pylist()
        with ShardFiles(index) as reader:
            for sample, row in zip(samples, rows, strict=True):
                files, image, truth = reader.load(sample)
                probs, scores = predict(model, image.to(process.device), normalize, config, protocol)
                labels = index.image_labels([views[split].row(sample)])[0].to(process.device)
                maps = gate(probs, scores, labels, config.evaluation_for(protocol))[0].float().cpu().numpy()
                plain = _choose(maps)[0] if protocol == "ms_crf" and truth is not None else None
                pixels = image.permute(1, 2, 0).contiguous().numpy()
                yield _Source(split, shard, row, files, truth, plain), pixels, maps


def _choose(probs: npt.NDArray[np.float32]) -> tuple[Mask, npt.NDArray[np.float32]]:
    """The most probable class of each pixel, and its share of the pixel's probabilities."""
    total = np.maximum(probs.sum(axis=0), np.finfo(np.float32).tiny)
    return probs.argmax(axis=0).astype(np.uint8), probs.max(axis=0) / total


def _write_shard(
    path: Path,
    members: Iterable[tuple[_Source, Mask, npt.NDArray[np.float32]]],
    config: Config,
    classes: tuple[str, ...],
    palette: npt.NDArray[np.uint8],
) -> int:
    """Writes a shard and then its notes, each whole or not at all; returns the number of samples."""
    protocol = config.evaluation.protocol
    settings, void_below = config.evaluation_for(protocol), config.inference.void_below
    name = protocol_name(settings, protocol)
    tally = _Tally(len(classes))
    with written_whole(path) as incoming:
        with incoming.open("wb") as file, ShardWriter(file, path.name) as shard:
            for source, mask, confidence in members:
                kept = np.where(confidence < void_below, np.uint8(IGNORE_INDEX), mask)
                notes = {"protocol": name, "void_below": void_below, **_confidences(mask, confidence, kept, classes)}
                _add(shard, source, encode_mask(kept, palette), {"pseudo_label": notes})
                masks = {} if source.plain is None else {protocol_name(settings, "ms"): source.plain}
                tally.add(source.truth, masks | {name: mask, f"{name}, void below {void_below:g}": kept})
        digest = sha256_of(incoming)
    counts = {protocol: matrix.counts.tolist() for protocol, matrix in tally.matrices.items()}
    note = {"sha256": digest, "columns": shard.columns, "counts": counts, "images": tally.images}
    write_json(_note_path(path), note)
    return len(shard.columns["key"])


def _confidences(
    mask: Mask, confidence: npt.NDArray[np.float32], kept: Mask, classes: tuple[str, ...]
) -> dict[str, Any]:
    present = np.unique(mask)
    return {
        "confidence": round(float(confidence.mean(dtype=np.float64)), 4),
        "class_confidence": {
            classes[label]: round(float(confidence[mask == label].mean(dtype=np.float64)), 4) for label in present
        },
        "coverage": round(float((kept != IGNORE_INDEX).mean()), 4),
    }


def _add(shard: ShardWriter, source: _Source, mask: bytes, notes: Mapping[str, Any]) -> None:
    row = source.row
    shard.add(
        key=row["key"],
        split=source.split,
        subsets=sorted({*row["subsets"], SUBSET}),
        size=(row["width"], row["height"]),
        classes=row["classes"] if row["has_image_labels"] else None,
        image=source.files["jpg"],
        mask=mask,
        notes=notes,
    )
