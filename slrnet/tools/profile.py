"""Where a training step spends its time (`slrnet profile`): a time line, and a table of stages.

Stages of the network are what going forward takes; going backward is one stage. On a GPU the seconds are the device's,
and may lack what another thread has started going backward (`benchmarks/gpu.py` times that).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from slrnet.config import Config
from slrnet.data.manifest import load_dataset
from slrnet.distributed.process import Process
from slrnet.storage.files import written_whole
from slrnet.training.trainer import Trainer

__all__ = ["PREFIX", "Profile", "named_stages", "profile_steps", "stage_table"]

PREFIX = "slrnet: "
"""Of the names of all stages, here and in `slrnet.training`."""


class Profile:
    """What was seen of some optimiser steps.

    Attributes:
        seconds: of each step, the clock's.
        stages: seconds of each stage, all steps together; stages of the network are also part of `network`.
        device: "cpu" or "cuda", whose time the stages' seconds are.
    """

    def __init__(self, seconds: list[float], seen: profile, device: str) -> None:
        self.seconds = seconds
        self.device = device
        self._seen = seen
        events = [event for event in seen.key_averages() if event.key.startswith(PREFIX)]
        self.stages = {
            event.key.removeprefix(PREFIX): (event.device_time_total if device == "cuda" else event.cpu_time_total)
            / 1e6
            for event in events
        }

    def write_trace(self, path: Path) -> None:
        """Writes the time line as a gzipped Chrome trace, whole or not at all; `path` ends in `.json.gz`."""
        with written_whole(path) as incoming:
            self._seen.export_chrome_trace(str(incoming))


def profile_steps(config: Config, *, steps: int, device: str) -> Profile:
    """Profiles optimiser steps with pseudo labels, after one that warms up.

    Args:
        config: of a run; `train.batch_size` images make a step.
        steps: how many are profiled, >= 1.
        device: "cpu" or "cuda".

    Raises:
        DataError: the data set cannot be read.
        ValueError: the epoch has fewer steps, or `device` is not there.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA GPU here; use --device cpu")
        activities.append(ProfilerActivity.CUDA)
    shards = load_dataset(config.data.path)
    with tempfile.TemporaryDirectory() as folder:
        process = Process(device=torch.device(device))
        trainer = Trainer(config, shards, process=process, folder=Path(folder))
        if trainer.loader.steps_per_epoch <= steps:
            raise ValueError(
                f"an epoch has {trainer.loader.steps_per_epoch} steps of {config.train.batch_size} images, and one "
                f"warms up before the {steps} that are profiled; lower --steps or train.batch_size"
            )
        taken = trainer.try_steps(steps + 1)
        next(taken)
        with named_stages(trainer.model), profile(activities=activities) as seen:
            seconds = list(taken)
    return Profile(seconds, seen, device)


def stage_table(found: Profile) -> str:
    """The stages as a Markdown table, longest first, those of the network below it."""
    steps, total = len(found.seconds), sum(found.seconds)
    outer = ["views", "network", "alignment", "calibration", "losses", "backward", "agreement", "optimiser"]
    known = {name: found.stages[name] for name in outer if name in found.stages}
    inner = {name: value for name, value in found.stages.items() if name not in outer}
    lines = ["| stage | seconds a step | share |", "| --- | ---: | ---: |"]
    for name, value in sorted(known.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {value / steps:.4f} | {value / total:.1%} |")
        if name == "network":
            ranked = sorted(inner.items(), key=lambda item: -item[1])
            lines += [f"| network: {part} | {taken / steps:.4f} | {taken / total:.1%} |" for part, taken in ranked]
    lines.append(f"| whole step | {total / steps:.4f} | 100.0% |")
    return "\n".join(lines)


@contextlib.contextmanager
def named_stages(model: nn.Module) -> Iterator[None]:
    """While it lasts, what each part of a network does going forward is a range of the profiler, named after it.

    Args:
        model: whose direct children are the parts.
    """
    handles, open_stages = [], []

    def begin(name: str) -> None:
        open_stages.append(record_function(f"{PREFIX}{name}"))
        open_stages[-1].__enter__()

    def end() -> None:
        open_stages.pop().__exit__(None, None, None)

    for name, part in model.named_children():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        handles.append(part.register_forward_hook(lambda *_: end()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
