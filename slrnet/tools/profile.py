"""Measures where a training step spends its time: a timeline, and a table of stages; see `slrnet profile --help`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from slrnet.config import Config
from slrnet.data.manifest import load_dataset
from slrnet.distributed.process import Process
from slrnet.storage.files import written_whole
from slrnet.training.trainer import Trainer

__all__ = ["PREFIX", "Profile", "named_stages", "profile_steps", "stage_table"]

PREFIX = "slrnet: "
"""Prefix of the names of all stages, here and in `slrnet.training`."""


class Profile(NamedTuple):
    """The profile of some optimizer steps."""

    seconds: list[float]
    """Wall time of each step."""
    stages: dict[str, float]
    """Seconds of each stage, all steps together; stages of the network are also part of `network`."""


def profile_steps(config: Config, trace: Path, *, steps: int, device: str) -> Profile:
    """Profiles optimizer steps with pseudo labels, after one that warms up.

    Args:
        config: the run's settings; a step takes `train.batch_size` images.
        trace: file for the timeline, a gzipped Chrome trace, whose name ends in `.json.gz`.
        steps: number of steps to profile, >= 1.
        device: "cpu" or "cuda".

    Raises:
        DataError: the data set cannot be read.
        ValueError: the epoch has fewer steps, or there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here; use --device cpu")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    shards = load_dataset(config.data.path)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, shards, process=Process(device=torch.device(device)), folder=Path(folder))
        if trainer.loader.steps_per_epoch <= steps:
            raise ValueError(
                f"an epoch has {trainer.loader.steps_per_epoch} steps of {config.train.batch_size} images, and one "
                f"warms up before the {steps} that are profiled; lower --steps or train.batch_size"
            )
        taken = trainer.try_steps(steps + 1)
        next(taken)
        with named_stages(trainer.model), profile(activities=activities) as record:
            seconds = list(taken)
    with written_whole(trace) as incoming:
        record.export_chrome_trace(str(incoming))
    time = "device_time_total" if device == "cuda" else "cpu_time_total"
    events = [event for event in record.key_averages() if event.key.startswith(PREFIX)]
    return Profile(seconds, {one.key.removeprefix(PREFIX): getattr(one, time) / 1e6 for one in events})


def stage_table(measured: Profile) -> str:
    """Writes the stages as a Markdown table, longest first, those of the network below it."""
    steps, total = len(measured.seconds), sum(measured.seconds)
    outer = ["views", "network", "alignment", "calibration", "losses", "backward", "agreement", "optimizer"]
    rows: list[tuple[str, float]] = []
    ranked = sorted(measured.stages.items(), key=lambda stage: -stage[1])
    for name, seconds in ranked:
        if name in outer:
            rows.append((name, seconds))
        if name == "network":
            rows += [(f"network: {part}", inner) for part, inner in ranked if part not in outer]
    rows.append(("whole step", total))
    cells = [(name, f"{seconds / steps:.4f}", f"{seconds / total:.1%}") for name, seconds in rows]
    head, columns = ("stage", "seconds a step", "share"), ("left", "right", "right")
    return tabulate(cells, head, tablefmt="pipe", colalign=columns, disable_numparse=True)


@contextlib.contextmanager
def named_stages(model: nn.Module) -> Iterator[None]:
    """Inside the context, the forward pass of each child of a network is a range of the profiler with its name."""
    with contextlib.ExitStack() as undo:
        for name, part in model.named_children():
            vars(part)["forward"] = record_function(f"{PREFIX}{name}")(part.forward)
            undo.callback(vars(part).pop, "forward")
        yield
