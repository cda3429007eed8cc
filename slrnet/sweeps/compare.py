"""SLRNet against its one-view baseline without CVLR at equal time, over seeds: `slrnet demo --compare`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slrnet.checkpoints.checkpoint import read_state
from slrnet.config import Config, apply_overrides
from slrnet.evaluation.masks import protocol_name
from slrnet.launch.train import LaunchOptions, launch
from slrnet.storage import shown
from slrnet.storage.files import write_text
from slrnet.sweeps.ablations import ABLATIONS, Ablation
from slrnet.sweeps.plan import time_step, usual_device
from slrnet.sweeps.results import ablation_table, margin_table
from slrnet.sweeps.trials import Margin, Trial, Trials, paired_margin
from slrnet.tracking.protocol import metric_key

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """What a comparison gives."""

    text: str
    """Tables of means and margins and how they came about, Markdown."""
    margin: Margin
    """Of SLRNet over its baseline, in validation mIoU."""


def compare(
    config: Config, *, seeds: Sequence[int], folder: Path, say: Callable[[str], None] = shown.say
) -> Comparison:
    """Trains both in this process, one after the other for each seed, and compares them after their last epochs.

    Steps of both are timed first. The baseline then trains for as many more epochs as its steps are shorter, rounded
    up, so that it has at least the same time. `folder` gets the runs and `comparison.md`.

    Args:
        config: SLRNet's settings, with the data's path.
        seeds: seeds of the trainings; two or more give an interval.
        folder: folder to make.
        say: receives the lines to show.

    Raises:
        ValueError: as `launch` raises it.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))} name one twice; give each once")
    baseline, _, _, full = ABLATIONS["views_by_cvlr"].variants
    at_the_end = ["evaluation.panel_images=0", f"evaluation.every={config.train.epochs}"]
    ours = [apply_overrides(config, [*at_the_end, f"train.seed={seed}"]) for seed in seeds]
    theirs = [apply_overrides(settings, baseline.changes) for settings in ours]
    times = [time_step(settings[0], usual_device())[0] for settings in (theirs, ours)]
    epochs = max(config.train.epochs, math.ceil(config.train.epochs * times[1] / times[0]))
    longer = [f"train.epochs={epochs}", f"evaluation.every={epochs}"]
    theirs = [apply_overrides(settings, longer) for settings in theirs]
    say(
        f"a step takes {times[1]:.2f} s with SLRNet and {times[0]:.2f} s with its baseline, so these train for "
        f"{config.train.epochs} and {epochs} epochs"
    )
    trials, spent = [], [0.0, 0.0]
    for seed, *both in zip(seeds, theirs, ours, strict=True):
        for place, settings in enumerate(both):
            begun, name = time.perf_counter(), f"{('baseline', 'slrnet')[place]}-{seed}"
            run = launch(settings, LaunchOptions(name=name, storage=folder, num_workers=0), say=say)
            spent[place] += time.perf_counter() - begun
            values = {"variant": place, "train.seed": seed}
            trials.append(Trial(name=name, values=values, status="finished", metrics=read_state(run.last).metrics))
    metric = metric_key("val", f"miou_{protocol_name(config.evaluation)}")
    ablation = Ablation("SLRNet and its baseline at equal time", "network", (baseline, full))
    rows = Trials(trials, (metric, "val/mfdr", "val/mfnr")).rows(ablation)
    text = "\n".join(
        [
            ablation_table(ablation, rows),
            margin_table(rows, metric),
            _protocol(config, epochs, [total / len(seeds) for total in spent]),
        ]
    )
    write_text(folder / "comparison.md", text)
    return Comparison(text, paired_margin(rows[1].by_seed, rows[0].by_seed))


def _protocol(config: Config, epochs: int, seconds: Sequence[float]) -> str:
    """How the figures came about; `epochs` of the baseline, `seconds` of a training of the baseline and of SLRNet."""
    return (
        f"Figures are of the last epoch, of {config.train.epochs} (SLRNet) and {epochs} (baseline): "
        f"{seconds[1]:.0f} s and {seconds[0]:.0f} s a training, measuring included. Both have the first "
        f"{config.train.pretrain_epochs} epochs without pseudo labels. Masks by {protocol_name(config.evaluation)}, "
        f"split {config.data.val_split} of {config.data.path}.\n"
    )
