"""What `slrnet train` and `slrnet.train` share: which data and runs are meant, and `slrnet.train` itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slrnet.config import Config, apply_overrides
from slrnet.recipes import get_recipe
from slrnet.storage.remote import cached, is_remote

if TYPE_CHECKING:
    from slrnet.launch.train import OnEpoch, RunResult

__all__ = ["places", "shards_for", "train", "usual_storage"]


def usual_storage() -> str:
    """Where runs go if nobody says: $SLRNET_STORAGE, else ~/slrnet_runs."""
    return os.environ.get("SLRNET_STORAGE") or "~/slrnet_runs"


def places(storage: str) -> tuple[Path, str]:
    """This machine's folder for runs, and the object store's location that it is copied to, or ""."""
    return (cached(storage), storage) if "://" in storage else (Path(storage), "")


def shards_for(data: str, storage: Path, remote: str) -> str:
    """The folder of shards that `data` means: itself, what is made of a folder of images with labels, or the demo's.

    Raises:
        DataError: something in the folder is refused.
    """
    from data_prep.demo import demo_data
    from data_prep.own_folder import shards_of, understood

    if not data:
        return str(demo_data(storage))
    given = None if remote or "://" in data else understood(Path(data))
    return data if given is None else str(shards_of(Path(data), given, storage))


def train(
    config: Config | str | None,
    *,
    data: str | Path,
    settings: Mapping[str, Any],
    name: str | None,
    storage: str | Path | None,
    init: str | Path | None,
    resume: bool,
    on_epoch: OnEpoch | None,
    workers: Mapping[str, Any],
) -> RunResult:
    """Trains a run from Python; `slrnet.train` describes the arguments."""
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.checkpoints.run_store import on_this_machine
    from slrnet.launch.checks import resume_config
    from slrnet.launch.train import LaunchOptions, launch

    place = str(storage or usual_storage())
    place = place if is_remote(place) else str(Path(place).expanduser().resolve())
    folder, remote = places(place)
    if resume and not name:
        raise ValueError("resume=True continues the run of a name; give name=NAME")
    if config is None and resume:
        config = resume_config(folder, name or "", remote=remote)
    elif config is None:
        config = load_checkpoint(on_this_machine(str(init))).config if init else get_recipe("demo")
    config = get_recipe(config) if isinstance(config, str) else config
    changes = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    changes += [f"train.init={init}"] if init else []
    config = apply_overrides(config, changes)
    given = str(data) if "://" in str(data) or not data else str(Path(data).expanduser().resolve())
    config = apply_overrides(config, [f"data.path={shards_for(given or config.data.path, folder, remote)}"])
    name = name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    options = LaunchOptions(name=name, storage=folder, remote=remote, resume=resume, **workers)
    return launch(config, options, on_epoch=on_epoch)
