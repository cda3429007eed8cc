"""Measures the stages of a training step on a GPU and compares them with the cost model: `python benchmarks/gpu.py`.

    python benchmarks/gpu.py [--recipe voc_wsss] [--images 16] [--crop 321] [--like A100|H100] [--out FOLDER]

Takes optimizer steps of a recipe for image labels, with random weights, on a small generated dataset. CUDA events time
the stages: each part of the network in the forward pass, and the backward pass as a whole. Prints measured and
predicted milliseconds with their ratio, images/s, and peak GPU memory. You need one NVIDIA GPU that PyTorch can use,
and the cost model's constants for it (`benchmarks/cost_model.py`); --like uses the constants of another GPU.
No claim: nobody has run this on a GPU yet.

Exit status: 0, or 2 without a GPU or for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks._operators import BACKWARD, Count, count_step
from benchmarks.cost_model import GPUS, INNER, Gpu, seconds
from data_prep.demo import CLASSES, MAX_OBJECTS, build_demo
from slrnet.config import Config, ConfigError, apply_overrides
from slrnet.data.manifest import DataError, load_dataset
from slrnet.distributed.process import Process
from slrnet.recipes import get_recipe
from slrnet.storage.files import written_whole
from slrnet.tools.profile import PREFIX, named_stages
from slrnet.training.trainer import Trainer

WARM_UP = 5
"""Unmeasured steps, in which libraries choose their kernels and Triton compiles its own."""
RANGES = ("slrnet.training.step", "slrnet.training.trainer", "slrnet.tools.profile")
"""Modules whose profiler ranges are the stages."""
PARTS = tuple(stage for stage in INNER if stage != "network")


@dataclass(frozen=True)
class Clock:
    """Records time stamps and measures the time between them.

    Attributes:
        now: records a time stamp.
        between: returns the seconds between two time stamps; called after all work is done.
    """

    now: Callable[[], Any]
    between: Callable[[Any, Any], float]


def cuda_clock() -> Clock:
    """Returns a clock of CUDA events, which time the GPU's stream; the CPU runs ahead of it."""

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    return Clock(now, between)


PROCESSOR_CLOCK = Clock(time.perf_counter, lambda first, last: last - first)


@dataclass(frozen=True)
class Measured:
    """Mean seconds of each stage, median seconds of a step, and peak GPU memory in bytes."""

    stages: dict[str, float]
    step: float
    memory: int


class Stopwatch:
    """Replaces the profiler's `record_function` and times the ranges."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seen: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = self.clock.now()
        yield
        self.seen.append((name.removeprefix(PREFIX), begun, self.clock.now()))

    def totals(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for name, begun, ended in self.seen:
            found[name] += self.clock.between(begun, ended)
        return dict(found)


def measure(config: Config, *, steps: int, device: str, clock: Clock, warm_up: int = WARM_UP) -> Measured:
    """Takes `warm_up` unmeasured steps, then times `steps` steps and their stages."""
    watch = Stopwatch(clock)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for module in RANGES:
            stack.enter_context(mock.patch(f"{module}.record_function", watch))
        process = Process(device=torch.device(device))
        shards = load_dataset(config.data.path)
        trainer = Trainer(config, shards, process=process, folder=Path(folder))
        stack.enter_context(named_stages(trainer.model))
        taken = trainer.try_steps(steps + warm_up)
        for _ in range(warm_up):
            next(taken)
        watch.seen.clear()
        times = list(taken)
        stages = {name: total / len(times) for name, total in watch.totals().items()}
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Measured(stages, statistics.median(times), memory)


def predict(count: Count, gpu: Gpu) -> dict[str, float]:
    """Returns the predicted seconds of each stage as the stopwatch measures them.

    The network includes its parts, and the backward pass is one stage.
    """
    found = defaultdict(list)
    for operator in count.operators:
        found[operator.stage].append(operator)
    stages = {name: seconds(operators, gpu) for name, operators in found.items()}
    stages["network"] = sum(stages.pop(name, 0.0) if name == "network" else stages.get(name, 0.0) for name in INNER)
    return stages


def comparison(measured: Measured, predicted: Mapping[str, float], count: Count, gpu: Gpu, *, name: str) -> str:
    """Returns a Markdown table of stages, and lines with speed and memory."""
    lines = [f"| stage | predicted for {gpu.name}, ms | measured on {name}, ms | measured / predicted |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    order = ["views", "network", *PARTS, "alignment", "calibration", "losses", BACKWARD, "agreement", "optimizer"]
    for stage in order:
        if stage in measured.stages:
            label = f"network: {stage}" if stage in PARTS else stage
            lines.append(_row(label, predicted.get(stage, 0.0), measured.stages[stage]))
    whole = sum(value for stage, value in predicted.items() if stage not in PARTS)
    lines.append(_row("**step**", whole, measured.step))
    return "\n".join(
        [
            *lines,
            "",
            f"images/s: predicted {count.images / whole:.1f}, measured {count.images / measured.step:.1f}",
            f"memory, GB: predicted at least {count.memory / 1e9:.1f}, measured at most {measured.memory / 1e9:.1f}",
        ]
    )


def _row(label: str, predicted: float, measured: float) -> str:
    ratio = f"{measured / predicted:.2f}" if predicted else "-"
    return f"| {label} | {1e3 * predicted:.2f} | {1e3 * measured:.2f} | {ratio} |"


def configuration(recipe: str, *, crop: int, images: int, data: Path, changes: Sequence[str] = ()) -> Config:
    """Returns the recipe with this crop and batch size and random weights.

    Raises:
        ConfigError: the recipe is unknown or needs masks, or a number is out of range.
    """
    config = get_recipe(recipe)
    if config.setting != "wsss":
        raise ConfigError(f"recipe {recipe!r} needs masks; use a recipe for image labels, such as voc_wsss")
    settings = [
        f"data.path={data}",
        f"data.crop_size={crop}",
        f"train.batch_size={images}",
        "model.encoder_weights=none",
    ]
    return apply_overrides(config, [*settings, "evaluation.pseudo_mask_images=0", *changes])


def model_of(name: str, like: str | None) -> Gpu:
    """Returns the cost model's constants for the GPU of this name.

    Raises:
        ValueError: the model does not have this GPU, and `like` names no other.
    """
    known = [gpu for gpu in GPUS if (like or name).find(gpu.name) >= 0]
    if not known:
        names = " or ".join(gpu.name for gpu in GPUS)
        raise ValueError(f"the cost model has no constants for {name}; compare it with --like {names}")
    return known[0]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print(
            "error: no GPU here: torch.cuda.is_available() is False. This script needs an NVIDIA GPU with driver 580 "
            "or newer for PyTorch's CUDA 13; benchmarks/cost_model.py prints the predictions without a GPU",
            file=sys.stderr,
        )
        return 2
    try:
        name = torch.cuda.get_device_name()
        gpu = model_of(name, options.like)
        if min(options.images, options.steps) < 1:
            raise ValueError("--images and --steps must be at least 1")
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            config = configuration(options.recipe, crop=options.crop, images=options.images, data=data)
            needed = options.images * (options.steps + WARM_UP + 1)
            build_demo(data, num_train=needed, num_val=1, image_size=options.crop + options.crop // 8)
            measured = measure(config, steps=options.steps, device="cuda", clock=cuda_clock())
        present = min(MAX_OBJECTS, len(CLASSES) - 1)
        count = count_step(config, num_classes=len(CLASSES), images=options.images, classes_per_image=present)
        table = comparison(measured, predict(count, gpu), count, gpu, name=name)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            with written_whole(options.out / "gpu.md") as incoming:
                incoming.write_text(table + "\n", encoding="utf-8")
    except (ValueError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default="voc_wsss", metavar="NAME", help="a recipe for image labels (default: voc_wsss)"
    )
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images per step (default: 16)")
    parser.add_argument("--crop", type=int, default=321, metavar="PIXELS", help="crop size (default: 321)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="measured steps (default: 10)")
    parser.add_argument(
        "--like", choices=[gpu.name for gpu in GPUS], help="predict for this GPU instead of the one in this machine"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write gpu.md there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
