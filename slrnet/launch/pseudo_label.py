"""Pseudo labels for a data set, written as a data set whose masks are a network's predictions.

The new folder has the shards of the old one, sample by sample in the same order. In the labeled splits, KEY.png is the
predicted mask, void (255) where the confidence is below `inference.void_below`, and the sample belongs to the named
subset `pseudo_labeled`; its image and image labels stay. KEY.json has an entry `pseudo_label`: the protocol,
`confidence` (the share of the chosen class in a pixel's probabilities, mean over all pixels), `class_confidence` (the
same per class of the mask) and `coverage` (share of the pixels that are not void). Other splits are copied.

True masks only serve to measure the predicted ones. A shard appears when all its samples are done, and a killed job
continues with the missing shards. Each shard depends on its own samples only, so the folder has the same bytes however
often the job was stopped and however many workers it ran on, with the same number of threads. `pseudo_labels.json` says
how the masks were made and how good they are.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.checkpoints.run_store import on_this_machine
from slrnet.config import Config
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DATASET_FILE, SCHEMA, DataError, ShardSet, SplitView, load_dataset, save_dataset
from slrnet.data.readers import read_ahead
from slrnet.data.tars import ShardWriter
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import Quality, quality_metrics
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.launch.cluster import WorkerRequest
from slrnet.launch.evaluation import track_figures
from slrnet.launch.hand_out import Alive, Work, hand_out
from slrnet.launch.prediction import Mask, MaskJob, MaskPredictor, PredictedMask, open_job
from slrnet.models.deeplab import require_deeplab
from slrnet.storage.files import UNFINISHED, flush, read_json, sha256_of, write_json, written_whole
from slrnet.storage.folders import flush_folder, mark_folder, remove_folder
from slrnet.storage.lease import LEASE, beside, owned
from slrnet.storage.remote import (
    RemoteError,
    cached,
    copy_to,
    files_in,
    filesystem_of,
    is_remote,
    open_cached,
    patiently,
)
from slrnet.storage.shown import say
from slrnet.tracking.protocol import metric_key
from slrnet.tracking.provenance import environment_tags

__all__ = ["RECORD", "SUBSET", "check_distillation", "launch_pseudo_labels", "read_record"]

SUBSET = "pseudo_labeled"
"""Named subset of the samples with a predicted mask."""
RECORD = "pseudo_labels.json"
"""File that says how the masks of a folder were made and how good they are."""

COPYING = "pseudo_labels.incomplete.json"
"""File in an object store while the data set is copied there."""
WORK = ".work"
"""Folder inside the unfinished one for files that are deleted at the end."""
IN_PROCESS = WorkerRequest(num_workers=0)
"""Without Ray."""


def launch_pseudo_labels(job: MaskJob, out: Path | str, *, request: WorkerRequest = IN_PROCESS) -> dict[str, Any]:
    """Labels splits of a data set with a network's masks; resumes where an earlier call stopped.

    Args:
        job: the checkpoint, its settings with the protocol and `inference.void_below`, the data set, and the splits to
            label; the other splits are copied.
        out: folder to create. Until it is complete, the work is kept beside it in `.NAME.partial`. A location in an
            object store gets the complete data set; until then the work is kept in this machine's cache.
        request: the workers; each takes a shard at a time.

    Returns:
        The content of `pseudo_labels.json`, whose `left_out` names the samples that could not be read and are not in
        the result, and as `mlflow` how to open the training's MLflow run, which gets the figures as
        `pseudo_label/SPLIT/miou_PROTOCOL` and so on; None if it cannot be reached.

    Raises:
        ValueError: the protocol gates by image labels that samples lack, `out` or the unfinished work belongs to
            another job, another process works on it, or the cluster has too few resources.
        TrainingError: a worker failed.
    """
    _check_labels(job)
    described = job.describe() | {
        "step": job.checkpoint.state.step,
        "data": job.shards.location,
        "splits": sorted(job.splits),
        "void_below": job.config.inference.void_below,
    }
    if is_remote(str(out)):
        location = str(out).rstrip("/")
        with owned(f"{location}/{LEASE}", f"output {location}"):
            record = _label_in_store(job, location, described, request)
    else:
        out = Path(out).expanduser().resolve()
        with owned(beside(out), f"output folder {out}"):
            record = _label_all(job, out, described, request)
    figures = {
        metric_key("pseudo_label", split, f"{name}_{protocol}"): value
        for split, protocols in record["quality"].items()
        for protocol, quality in protocols.items()
        for name, value in quality["metrics"].items()
        if "/" not in name
    }
    return record | {"mlflow": track_figures(job.checkpoint, figures)}


def _label_all(job: MaskJob, out: Path, described: dict[str, Any], request: WorkerRequest) -> dict[str, Any]:
    """Labels what is missing in a folder that this process holds; returns its record."""
    record = read_record(out)
    if record is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and holds no pseudo masks; choose another --out")
        partial = _open_partial(out, described)
        remaining = [
            (split, place)
            for split in described["splits"]
            for place, name in enumerate(job.shards.split(split).shard_names)
            if _finished(partial, name) is None
        ]
        if remaining:
            # Workers of Ray may be on nodes that do not see the folder.
            values = job.values() | {"folder": "" if request.num_workers else str(partial)}
            for done, (line, files) in enumerate(hand_out(_open, values, remaining, request), 1):
                for name, data in files.items():
                    with written_whole(partial / name) as incoming:
                        incoming.write_bytes(data)
                say(f"{line} ({done} of {len(remaining)} shards)")
        record = _assemble(partial, job.shards, described)
        flush_folder(partial)
        partial.rename(out)
        flush(out.parent)
    else:
        _check_same(record, described, out)
    remove_folder(out / WORK, within=out)
    return record


def _label_in_store(job: MaskJob, location: str, described: dict[str, Any], request: WorkerRequest) -> dict[str, Any]:
    """As `_label_all`, into an object store; what a killed copying left there is completed."""
    record = _record_of(location)
    if record is not None:
        _check_same(record, described, location)
        return record
    present = patiently(location, lambda: files_in(location, recursive=True)).keys() - {LEASE}
    begun = read_json(open_cached(location, COPYING, again=True))["job"] if COPYING in present else None
    if present and begun != described:
        kind = f"no pseudo masks but {min(present)}" if begun is None else "the unfinished copy of other pseudo masks"
        raise ValueError(f"{location} holds {kind}; choose another --out")
    made = cached(f"{location} {json.dumps(described)}") / "made"
    record = _label_all(job, made, described, request)
    copy_to(made / RECORD, f"{location}/{COPYING}")
    last, names = [DATASET_FILE, RECORD], {path.name for path in made.iterdir()}  # these two make it a data set
    for name in [*sorted(names - set(last)), *last]:
        copy_to(made / name, f"{location}/{name}")
    system, place = filesystem_of(f"{location}/{COPYING}")
    system.delete_file(place)
    remove_folder(made, within=made.parent, own=names)
    return record


def _check_same(record: dict[str, Any], described: dict[str, Any], out: Path | str) -> None:
    if record["job"] != described:
        difference = _differences(record["job"], described)
        raise ValueError(f"{out} holds other pseudo masks ({difference}); choose another --out")
    say(f"{out} already holds these pseudo masks; none was made again")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Reads a folder's `pseudo_labels.json`; None if it has none.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / RECORD} cannot be read: {error}; make the pseudo masks again") from None
    return record


def _record_of(location: str) -> dict[str, Any] | None:
    """The record of a data set in a folder or an object store; None if it has none."""
    try:
        return read_record(open_cached(location, RECORD, again=True).parent if is_remote(location) else Path(location))
    except RemoteError:
        return None  # reading the data set says whether the store answers


def check_distillation(config: Config) -> str:
    """Checks that a distillation (DeepLabV3+ trained on the pseudo masks of another network) has what it needs.

    Returns:
        A line about the teacher and how good it is.

    Raises:
        ValueError: the extra is missing, or the data have no pseudo masks where training or validation needs them.
    """
    require_deeplab()
    record = _record_of(config.data.path)
    if record is None:
        load_dataset(config.data.path)  # says what is there if it is no data set at all
        raise ValueError(
            f"{config.data.path} holds no pseudo masks; make some with `slrnet pseudo-label --checkpoint RUN --data "
            f"{config.data.path} --out PSEUDO`, or train on true masks with `slrnet train`"
        )
    labeled, train_split, val_split = record["job"]["splits"], config.data.train_split, config.data.val_split
    if train_split not in labeled or val_split in labeled:
        raise ValueError(
            f"{config.data.path} has pseudo masks in {', '.join(labeled)}; a distillation trains on pseudo masks of "
            f"{train_split!r} and validates on true ones of {val_split!r}: make them with --splits {train_split}"
        )
    teacher = record["job"]["checkpoint"]
    place = on_this_machine(teacher)
    metrics = load_checkpoint(place).state.metrics if place.is_dir() else {}
    scores = [f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name.startswith("val/miou")]
    return f"teacher {teacher}, masks by {record['job']['protocol']}: {', '.join(scores) or 'not measured'}"


# On the driver.


def _check_labels(job: MaskJob) -> None:
    for split in job.splits if job.config.evaluation.gating == "image_labels" else ():
        view = job.shards.split(split)
        if unknown := view.num_samples - len(view.with_image_labels):
            raise DataError(
                f"evaluation.gating is image_labels, but the image labels of {unknown} of {view.num_samples} samples "
                f"of split {split!r} are not known; use gating none or scores"
            )


def _open_partial(out: Path, job: dict[str, Any]) -> Path:
    """The folder of unfinished work, new or from an earlier call that agrees in all that the masks depend on."""
    partial = out.with_name(f".{out.name}.partial")
    file = partial / WORK / "job.json"
    try:
        earlier = read_json(file)
    except FileNotFoundError:
        mark_folder(file.parent)
        write_json(file, job)
        return partial
    if earlier != job:
        raise ValueError(
            f"{partial} holds the unfinished work of another job ({_differences(earlier, job)}); finish that one, "
            "or choose another --out"
        )
    return partial


def _differences(earlier: dict[str, Any], job: dict[str, Any]) -> str:
    names = [name for name in job if earlier.get(name) != job[name]]
    return "; ".join(f"{name} {earlier.get(name)!r}, now {job[name]!r}" for name in names)[:400]


def _finished(partial: Path, shard: str) -> dict[str, Any] | None:
    """The notes of a shard that is complete and undamaged; None where it has to be made."""
    try:
        note: dict[str, Any] = read_json(partial / WORK / f"{shard}.json")
        digest = sha256_of(partial / shard)
    except (OSError, ValueError):
        return None
    return note if note["sha256"] == digest else None


def _assemble(partial: Path, shards: ShardSet, job: dict[str, Any]) -> dict[str, Any]:
    """Turns the folder of finished shards into a data set; returns its record."""
    parts: list[pa.Table] = []
    quality: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for split in shards.splits:
        view = shards.split(split)
        if split in job["splits"]:
            notes = [_checked(partial, view, place) for place in range(len(view.shard_names))]
            for name, note in zip(view.shard_names, notes, strict=True):
                left_out |= {f"{name}: {key}": reason for key, reason in note["left_out"].items()}
            quality[split] = _total_quality(notes, shards.info.classes)
            parts += [pa.table(note["columns"], schema=SCHEMA) for note in notes]
        else:
            for name in view.shard_names:
                with written_whole(partial / name) as incoming:
                    shutil.copyfile(shards.path_of(name), incoming)
            parts += [view.shard_rows(place) for place in range(len(view.shard_names))]
    for leftover in partial.glob(f"{UNFINISHED}*"):
        leftover.unlink()
    rows, name, classes = pa.concat_tables(parts), f"{shards.info.name}-pseudo", shards.info.classes
    palette = shards.info.palette_array()
    made = {"made_by": _command(job), "depth": shards.info.depth}
    save_dataset(partial, [rows], name=name, classes=classes, palette=palette, **made)
    record = {"job": job, "quality": quality, "left_out": left_out, "environment": environment_tags()}
    write_json(partial / RECORD, record)
    return record


def _checked(partial: Path, view: SplitView, place: int) -> dict[str, Any]:
    """A finished shard's notes, after checking that it holds each readable sample of the manifest exactly once."""
    name, keys = view.shard_names[place], view.shard_rows(place)["key"].to_pylist()
    note = _finished(partial, name)
    if note is None or note["columns"]["key"] != [key for key in keys if key not in note["left_out"]]:
        raise DataError(
            f"shard {partial / name} does not hold each of the data set's {len(keys)} samples once; "
            "start the job again with another --out"
        )
    return note


def _total_quality(notes: Sequence[Mapping[str, Any]], classes: tuple[str, ...]) -> dict[str, Any]:
    """The metrics of all shards together, by protocol; empty if no sample has a true mask."""
    images, quality = sum(note["images"] for note in notes), {}
    matrices: dict[str, ConfusionMatrix] = defaultdict(lambda: ConfusionMatrix(len(classes)))
    for protocol, counts in (item for note in notes for item in note["counts"].items()):
        matrices[protocol].counts += torch.tensor(counts)
    for protocol, matrix in matrices.items():
        metrics = quality_metrics("pseudo_mask", Quality(matrix, protocol, images), classes)
        values = {name.removeprefix("pseudo_mask/"): value for name, value in metrics.items()}
        quality[protocol] = {"images": images, "metrics": values | {"coverage": matrix.coverage()}}
    return quality


def _command(job: dict[str, Any]) -> str:
    """The command line that makes these masks."""
    evaluation = job["evaluation"]
    named = ("scales", "scale", "gating_threshold", "gating_top", "background_power")
    settings = {f"evaluation.{name}": evaluation[name] for name in named}
    settings |= {f"crf.{name}": value for name, value in (job["crf"] or {}).items() if value is not None}
    settings["inference.void_below"] = job["void_below"]
    words = ["--checkpoint", job["checkpoint"], "--data", job["data"], "--splits", ",".join(job["splits"])]
    words += ["--protocol", evaluation["protocol"], "--gating", evaluation["gating"]]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return shlex.join(["python", "ray_jobs/pseudo_label.py", *words])


# On the workers.


def _open(values: dict[str, Any], process: Process, alive: Alive) -> Work:
    predictor, shards = open_job(values, process, alive)

    def work(parts: Iterable[tuple[str, int]]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for split, place in parts:
            view = shards.split(split)
            name, rows = view.shard_names[place], {row["key"]: row for row in view.shard_rows(place).to_pylist()}
            loader = EvalLoader(shards, split=split, indices=view.samples_of(place), on_error="skip")
            members = ((rows[predicted.sample.key], predicted) for predicted in predictor(read_ahead(loader)))
            shared = values["folder"]
            with nullcontext(shared) if shared else tempfile.TemporaryDirectory() as folder:
                _write_shard(Path(folder) / name, members, predictor, shards, loader)
                made = (name, f"{WORK}/{name}.json")  # in this order: notes say that a shard is complete
                files = {} if shared else {file: (Path(folder) / file).read_bytes() for file in made}
            told = [f"left out: {skipped.shard}: {skipped.key}: {skipped.reason}" for skipped in loader.skipped]
            yield "\n".join([*told, f"{name}: {len(rows) - len(loader.skipped)} masks"]), files

    return work


def _write_shard(
    path: Path,
    members: Iterable[tuple[Mapping[str, Any], PredictedMask]],
    predictor: MaskPredictor,
    shards: ShardSet,
    loader: EvalLoader,
) -> None:
    """Writes a shard, given its rows of the manifest and their masks, and then its notes; each whole or not at all.

    The notes list the samples that the loader has skipped.
    """
    classes, palette = shards.info.classes, shards.info.palette_array()
    void_below, name = predictor.inference.config.inference.void_below, predictor.names[-1]
    protocols = (*predictor.names, f"{name}, void below {void_below:g}")
    matrices: dict[str, ConfusionMatrix] = defaultdict(lambda: ConfusionMatrix(len(classes)))
    images = 0
    with written_whole(path) as incoming:
        with incoming.open("wb") as file, ShardWriter(file, path.name) as shard:
            for row, predicted in members:
                sample, mask, confidence = predicted.sample, predicted.masks[-1], predicted.confidence
                kept = np.where(confidence < void_below, np.uint8(IGNORE_INDEX), mask)
                notes = {"protocol": name, "void_below": void_below, **_confidences(mask, confidence, kept, classes)}
                shard.add(
                    key=row["key"],
                    split=row["split"],
                    subsets=sorted({*row["subsets"], SUBSET}),
                    size=(row["width"], row["height"]),
                    classes=row["classes"] if row["has_image_labels"] else None,
                    image=sample.jpeg,
                    mask=encode_mask(kept, palette),
                    notes={"pseudo_label": notes},
                )
                if sample.pixel_labels is not None:
                    for protocol, labels in zip(protocols, (*predicted.masks, kept), strict=True):
                        matrices[protocol].update(torch.from_numpy(labels), sample.pixel_labels)
                    images += 1
        digest = sha256_of(incoming)
    counts = {protocol: matrix.counts.tolist() for protocol, matrix in matrices.items()}
    left_out = {skipped.key: skipped.reason for skipped in loader.skipped}
    note = {"sha256": digest, "columns": shard.columns, "counts": counts, "images": images, "left_out": left_out}
    write_json(path.parent / WORK / f"{path.name}.json", note)


def _confidences(
    mask: Mask, confidence: npt.NDArray[np.float32], kept: Mask, classes: tuple[str, ...]
) -> dict[str, Any]:
    def mean(values: npt.NDArray[np.float32]) -> float:
        return round(float(values.mean(dtype=np.float64)), 4)

    by_class = {classes[label]: mean(confidence[mask == label]) for label in np.unique(mask)}
    coverage = round(float((kept != IGNORE_INDEX).mean()), 4)
    return {"confidence": mean(confidence), "class_confidence": by_class, "coverage": coverage}
