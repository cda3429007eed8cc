"""Checks on the driver: everything about a run that can be refused before any work is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from slrnet.checkpoints.checkpoint import CheckpointError, check_classes, find_checkpoint, load_checkpoint, load_whole
from slrnet.checkpoints.run_store import CONFIG, STATE, RunStore, location_of, on_this_machine
from slrnet.config import Config, load_config, nearest
from slrnet.data.class_balance import ClassLists, shares, table
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.data.supervision import Supervision, supervision_of
from slrnet.storage.folders import MARK
from slrnet.storage.lease import LEASE, require_free
from slrnet.storage.names import check_run_name
from slrnet.storage.ray_job import lasting
from slrnet.storage.remote import is_remote

# The network and the trainer are imported where they are used: Ray's controller reads this module and needs neither.
__all__ = [
    "balance_table",
    "batch_notes",
    "check_folder",
    "check_run",
    "checkpoint_bytes",
    "resume_config",
    "weights_notes",
    "with_absolute_paths",
    "with_first_weights",
]


def resume_config(storage: Path, name: str, *, remote: str = "") -> Config:
    """Reads the settings of an earlier run: those of its last checkpoint, or the run's own before the first one.

    With `remote`, the location of the runs in an object store, the run is copied to the folder `storage` first.

    Raises:
        CheckpointError: there is no such run.
        HeldError: another process works in the run's place in the object store.
        RemoteError: the object store does not answer or refuses.
    """
    check_run_name(name)
    if remote:
        location = f"{remote.rstrip('/')}/{name}"
        require_free(f"{location}/{LEASE}", f"run folder {location}")  # before this machine's copy changes
        RunStore(location, storage / name).fetch()
    check_folder(storage / name, resume=True)
    last = load_whole(storage / name / "checkpoints")
    return load_config(storage / name / CONFIG) if last is None else last.config


def run_exists(storage: Path, name: str, *, remote: str = "") -> bool:
    """Whether there is a run of that name to resume; reads no weights."""
    if remote:
        return RunStore(f"{remote.rstrip('/')}/{name}", storage / name).exists()
    return (storage / name / CONFIG).exists() or any((storage / name / "checkpoints").glob(f"checkpoint-*/{STATE}"))


def check_folder(folder: Path, *, resume: bool) -> Path | None:
    """Checks that a run's folder is free, or with `resume` that it holds a run; returns its last checkpoint, if any.

    Reads no weights.

    Raises:
        CheckpointError: the folder is taken, or holds no run to resume; the message names the runs beside it.
    """
    last = find_checkpoint(folder / "checkpoints")
    if resume and last is None and not (folder / CONFIG).exists():
        others = sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG}"))
        known = f"runs there: {', '.join(others)}" if others else "there are none"
        raise CheckpointError(
            f"there is no run {folder.name!r} in {folder.parent} to resume; {known}; start it with --name"
        )
    if not resume and folder.exists() and any(path.name not in (MARK, LEASE) for path in folder.iterdir()):
        raise CheckpointError(
            f"run folder {folder} exists; continue that run with --resume {folder.name}, or choose another --name"
        )
    return last


def with_absolute_paths(config: Config) -> tuple[Config, ShardSet]:
    """Resolves the paths of a configuration, as Ray's workers run in other folders; returns the data set too.

    Raises:
        ValueError: there is no such data set, the encoder's weights are missing, or either is in Ray's copy of the
            project.
    """
    from slrnet.models.encoders import resolve_weights

    path = config.data.path
    shards = load_dataset(path if is_remote(path) else lasting(Path(path).expanduser(), setting="data.path"))
    weights = resolve_weights(config.model.encoder, config.model.encoder_weights)
    if weights not in ("auto", "none"):
        lasting(Path(weights), setting="model.encoder_weights")
    changes = {
        "data": config.data.model_copy(update={"path": shards.location}),
        "model": config.model.model_copy(update={"encoder_weights": weights}),
    }
    return config.model_copy(update=changes), shards


def with_first_weights(config: Config, shards: ShardSet) -> Config:
    """Names the checkpoint that `train.init` means, which the training starts from, and checks that it fits.

    One that is in an object store is named there, as the workers fetch it themselves.

    Raises:
        CheckpointError: it is missing or damaged, or has other classes or another network.
    """
    if not config.train.init:
        return config
    place = on_this_machine(config.train.init)
    checkpoint = load_checkpoint(lasting(place, setting="train.init").resolve())
    check_classes(checkpoint.state, shards.info.classes, data=shards.location)
    wanted, given = _shapes(config, shards), {name: value.shape for name, value in checkpoint.model.items()}
    if differing := [name for name in {**wanted, **given} if wanted.get(name) != given.get(name)]:
        name = differing[0]
        raise CheckpointError(
            f"train.init: {checkpoint.path} has another network than these settings describe: {len(differing)} tensors "
            f"differ, such as {name} ({_shape(given.get(name))}, here {_shape(wanted.get(name))}); train with the "
            "recipe, model.* and cvlr.* settings of that run, or without --init"
        )
    train = config.train.model_copy(update={"init": location_of(checkpoint.path)})
    return config.model_copy(update={"train": train})


def _shapes(config: Config, shards: ShardSet) -> dict[str, torch.Size]:
    """Shapes of the network's tensors by name."""
    return {name: value.shape for name, value in _meta_network(config, shards).state_dict().items()}


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "a number"


def check_run(config: Config, shards: ShardSet, world_size: int) -> Supervision:
    """Checks that data and batch allow a training with one worker or more; returns which labels it sees.

    Raises:
        ValueError: a split or subset is missing, or the batch does not fit the workers or the data.
    """
    from slrnet.training.trainer import check_batch

    check_batch(config, world_size)
    _check_splits(config, shards)
    supervision = supervision_of(config, shards)
    if supervision.draws < config.train.batch_size:
        raise ValueError(
            f"an epoch of split {config.data.train_split!r} has {supervision.draws} samples, fewer than "
            f"train.batch_size {config.train.batch_size}; use a batch of {supervision.draws} or less"
        )
    return supervision


def batch_notes(config: Config, most_workers: int) -> list[str]:
    """Lines about what batch norms do not measure: anything less than the global batch changes the training."""
    train, shared = config.train, config.model.sync_batch_norm
    notes = []
    if most_workers > 1 and not shared:
        notes.append(
            f"model.sync_batch_norm=false: the batch norms of each worker measure its own images, about "
            f"{train.batch_size / most_workers:g} of {train.batch_size} with {most_workers} workers, so the number of "
            "workers changes the training"
        )
    if train.accumulation > 1:
        share = train.batch_size / train.accumulation / (1 if shared else most_workers)
        notes.append(
            f"train.accumulation={train.accumulation}: batch norms measure about {share:g} images at a time instead of "
            f"the whole batch of {train.batch_size}, which changes the training; more workers share the memory of a "
            "batch without that"
        )
    return notes


def weights_notes(config: Config) -> list[str]:
    """A line about the license of downloaded weights, if the run starts from any."""
    from slrnet.models.encoders import weights_line

    line = weights_line(config.model)
    return [line] if line else []


def _check_splits(config: Config, shards: ShardSet) -> None:
    """Raises a `DataError` that says what a missing split is for and how to get one."""
    for field, purpose in (("train_split", "trains on"), ("val_split", "is measured on")):
        name: str = getattr(config.data, field)
        if name not in shards.splits:
            raise DataError(
                f"{shards.location} has no split {name!r}, which a training {purpose}; it has: "
                f"{', '.join(shards.splits)}{nearest(name, shards.splits)}. Name another one with --set "
                f"data.{field}=NAME, or make the data again with one: `slrnet prepare folder` takes "
                f"--val-fraction 0.1, --split {name}=LISTFILE or a column `split` in the table, and `slrnet prepare "
                f"voc` a list ImageSets/Segmentation/{name}.txt"
            )


def balance_table(config: Config, shards: ShardSet, supervision: Supervision) -> str:
    """Shows how class balancing changes the share of each class among the images that an epoch draws."""
    samples = np.concatenate([pool.samples.array for pool in supervision.pools])
    draws = np.concatenate([np.broadcast_to(pool.draws, len(pool.samples)) for pool in supervision.pools])
    lists = ClassLists.of(shards.split(config.data.train_split), samples)
    return table(shares(lists, draws, strength=config.data.class_balance), shards.info.classes, most=20)


def checkpoint_bytes(config: Config, shards: ShardSet) -> int:
    """Size of a checkpoint in bytes: the weights, their average, if any, and the optimizer's state."""
    model = _meta_network(config, shards)
    values: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    momentum: int = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    return values * (2 if config.train.ema else 1) + momentum * (2 if config.optim.name == "adamw" else 1)


def _meta_network(config: Config, shards: ShardSet) -> torch.nn.Module:
    """The network of a run, without values."""
    from slrnet.models.slrnet import build_network

    with torch.device("meta"):
        return build_network(config, num_classes=shards.info.num_classes, weights=False)
