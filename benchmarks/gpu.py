"""Checks and measures training and evaluation on a GPU: `python benchmarks/gpu.py --out FOLDER`.

    python benchmarks/gpu.py [--recipe voc_wsss] [--images 16] [--crop 321] [--like A100|H100|H200] [--out FOLDER]

Parts, in this order: `checks` compares kernels with their references and a step with the same one on the CPU; `stages`
sets the stages of a training step beside the cost model's (`benchmarks/cost_model.py`); `choices` times the step with
other settings; `batches` gives images/s and memory by batch size; `evaluation` images/s; `training` trains the demo for
up to --seconds. Images are noise and weights random, so nothing is drawn but the demo's pictures (--data keeps them for
the next time). A part that fails does not end the others. FOLDER gets gpu.json and gpu.md after each part.

You need one NVIDIA GPU that PyTorch can use, and of packages torch, torchvision, triton, timm, safetensors, numpy,
pillow, pyarrow, psutil, pydantic and webdataset. --tiny runs every part with a tiny network, on a CPU too.
--predict only prints what the model predicts. No claim: nobody has run this on a GPU yet.

Exit status: 0, 1 if a part failed, or 2 without a GPU or for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks._operators import BACKWARD, Count, count_step, step_trainer
from benchmarks._ours import random_batch
from benchmarks.cost_model import A100, H100, INNER, WORKLOADS, Gpu, seconds
from data_prep.demo import build_demo
from slrnet.config import Config, ConfigError, apply_overrides
from slrnet.data.batch import EvalSample
from slrnet.data.manifest import DataError, load_dataset
from slrnet.distributed.process import Process, configure_arithmetic
from slrnet.evaluation.masks import TOGETHER, evaluate_masks
from slrnet.inference.forward import Inference
from slrnet.models.cvlr import factorize
from slrnet.models.network import autocast_dtype
from slrnet.models.slrnet import build_network
from slrnet.ops.compiled import compile_regions
from slrnet.ops.cross_entropy import by_operators, sums_and_gradients
from slrnet.recipes import get_recipe
from slrnet.storage.files import written_whole
from slrnet.tools.profile import PREFIX, named_stages
from slrnet.training.trainer import Trainer

WARM_UP = 5
"""Unmeasured steps, in which libraries choose their kernels and Triton compiles its own."""
RANGES = ("slrnet.training.step", "slrnet.training.trainer", "slrnet.tools.profile")
"""Modules whose profiler ranges are the stages."""
PARTS = tuple(stage for stage in INNER if stage != "network")
H200 = replace(H100, name="H200", bandwidth=4.8e12, memory=141e9)
"""NVIDIA's data sheet: an H100 SXM with more and faster memory. The price is the H100's."""
GPUS = (A100, H100, H200)
CHOICES = {
    "as it is": (),
    "compiled": ("train.compile=true",),
    "CVLR: reference": ("cvlr.implementation=reference",),
    "CVLR: triton": ("cvlr.implementation=triton",),
    "TF32 everywhere": ("train.tf32=all",),
    "deterministic": ("train.deterministic=true",),
    "float32": ("train.precision=fp32",),
}
"""Settings whose steps are timed side by side; a step without cuDNN's search for algorithms comes with them."""
ONLY_GPUS = ("compiled", "CVLR: triton")
TINY = (
    "model.encoder=timm:test_resnet", "model.output_stride=16", "model.decoder_dim=8", "model.skip_dim=4", "cvlr.dim=8",
    "model.aspp_dilations=[1,2,3]", "calibration.refine_iters=2", "calibration.refine_dilations=[1,2]",
)  # fmt: skip


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


def measure(
    config: Config,
    *,
    num_classes: int,
    present: int,
    steps: int,
    device: str,
    clock: Clock,
    warm_up: int = WARM_UP,
    search: bool = True,
) -> Measured:
    """Takes `warm_up` unmeasured steps on one batch of noise, then times `steps` steps and their stages.

    Each image is labeled with `present` of the `num_classes` - 1 foreground classes. With `search`, cuDNN times its
    algorithms first, as in a training.
    """
    watch, size = Stopwatch(clock), config.train.batch_size
    batch = random_batch(batch=size, crop=config.data.crop_size, num_classes=num_classes, present=present)
    batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    on_gpu = device == "cuda"
    if on_gpu:
        batch = batch.pin_memory()
        torch.cuda.reset_peak_memory_stats()
    trainer, times = _stepping(config, num_classes, torch.device(device)), []
    torch.backends.cudnn.benchmark = search and not config.train.deterministic
    with contextlib.ExitStack() as stack:
        for module in RANGES:
            stack.enter_context(mock.patch(f"{module}.record_function", watch))
        stack.enter_context(named_stages(trainer.model))
        for step in range(warm_up + steps):
            if step == warm_up:
                watch.seen.clear()
                times.clear()
            begun = time.perf_counter()
            trainer._step(batch, step, pretraining=False)  # ends when the losses are on the host
            times.append(time.perf_counter() - begun)
    stages = {name: total / steps for name, total in watch.totals().items()}
    return Measured(stages, statistics.median(times), torch.cuda.max_memory_allocated() if on_gpu else 0)


def _stepping(config: Config, num_classes: int, device: torch.device) -> Trainer:
    configure_arithmetic(deterministic=config.train.deterministic, tf32=config.train.tf32)
    torch.manual_seed(0)
    model = build_network(config, num_classes=num_classes, weights=False).train()
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.compile:
        compile_regions(model.regions(), device)
    return step_trainer(config, model, config.train.batch_size, device)


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
    whole = _whole(predicted)
    lines.append(_row("**step**", whole, measured.step))
    return "\n".join(
        [
            *lines,
            "",
            f"images/s: predicted {count.images / whole:.1f}, measured {count.images / measured.step:.1f}",
            f"memory, GB: predicted at least {count.memory / 1e9:.1f}, measured at most {measured.memory / 1e9:.1f}",
        ]
    )


def _whole(predicted: Mapping[str, float]) -> float:
    return sum(value for stage, value in predicted.items() if stage not in PARTS)


def _row(label: str, predicted: float, measured: float) -> str:
    ratio = f"{measured / predicted:.2f}" if predicted else "-"
    return f"| {label} | {1e3 * predicted:.2f} | {1e3 * measured:.2f} | {ratio} |"


def configuration(recipe: str, *, crop: int, images: int, changes: Sequence[str] = ()) -> Config:
    """Returns the recipe with this crop and batch size and random weights.

    Raises:
        ConfigError: the recipe is unknown or needs masks, or a number is out of range.
    """
    config = get_recipe(recipe)
    if config.setting != "wsss" or recipe not in WORKLOADS:
        raise ConfigError(f"recipe {recipe!r} needs masks, or the paper has no such run; use voc_wsss or coco_wsss")
    sizes = [f"data.crop_size={crop}", f"train.batch_size={images}", "model.encoder_weights=none"]
    return apply_overrides(config, [*changes, *sizes])


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


@dataclass(frozen=True)
class Bench:
    """What all parts of the measurement need."""

    config: Config
    gpu: Gpu
    name: str
    device: str
    clock: Clock
    options: argparse.Namespace

    @property
    def classes(self) -> int:
        return WORKLOADS[self.options.recipe].classes

    @property
    def present(self) -> int:
        return WORKLOADS[self.options.recipe].present

    def count(self, images: int) -> Count:
        return count_step(self.config, num_classes=self.classes, images=images, classes_per_image=self.present)

    def measure(self, *changes: str, search: bool = True) -> Measured:
        config = apply_overrides(self.config, changes)
        kinds: dict[str, Any] = {"num_classes": self.classes, "present": self.present, "device": self.device}
        warm_up = 1 if self.options.tiny else WARM_UP
        return measure(config, steps=self.options.steps, clock=self.clock, warm_up=warm_up, search=search, **kinds)


def checks(bench: Bench) -> dict[str, Any]:
    """Largest differences, relative to the largest value, between what must agree."""
    generator, found = torch.Generator().manual_seed(0), {}
    device, own = torch.device(bench.device), "triton" if bench.device == "cuda" else "recompute"
    for dtype in (torch.float32, torch.bfloat16):
        features = torch.randn(2, 64, 333, generator=generator).to(device, dtype)
        codes = torch.randn(2, 21, 333, generator=generator).softmax(dim=1).to(device, dtype)
        results = [_factorized(features, codes, name) for name in (own, "reference")]
        found[f"factorization, {dtype}"] = _difference(*results)
    labels = torch.randint(0, 21, (2, 65, 49), generator=generator).to(device)
    logits = torch.randn(2, 21, 9, 7, generator=generator).to(device)
    weights = torch.rand(2, 65, 49, generator=generator).to(device)
    found["cross-entropy"] = _difference(
        sums_and_gradients(logits, labels, weights), by_operators(logits, labels, weights)
    )
    found["step against the CPU's"] = _step_difference(bench)
    with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
        assert autocast_dtype("auto", torch.device("cuda")) == torch.float16
    limits = {"factorization, torch.bfloat16": 3e-2, "step against the CPU's": 1e-2}
    wrong = {name: value for name, value in found.items() if not value <= limits.get(name, 1e-4)}
    if wrong:
        raise ArithmeticError(f"these differ by more than rounding: {wrong}")
    return found


def _factorized(features: Tensor, codes: Tensor, implementation: Any) -> list[Tensor]:
    features, codes = features.clone().requires_grad_(), codes.clone().requires_grad_()
    out = factorize(features, codes, num_iters=2, implementation=implementation)
    total = out.dictionary.sum() + out.codes.float().square().sum() + out.reconstruction.float().square().sum()
    return [*(value.detach() for value in out), *torch.autograd.grad(total, (features, codes))]


def _difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def _step_difference(bench: Bench) -> float:
    """Losses of a step in float32 without dropout, whose random numbers differ, on the device and on the CPU."""
    still = ("train.precision=fp32", "train.tf32=off", "model.dropout=0.0", "model.gate_rate=0.0", "train.batch_size=2")
    config = apply_overrides(configuration(bench.options.recipe, crop=64, images=2, changes=TINY), still)
    batch = random_batch(batch=2, crop=64, num_classes=bench.classes, present=bench.present)
    batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    results = []
    for device in (bench.device, "cpu"):
        trainer = _stepping(config, bench.classes, torch.device(device))
        results.append([trainer._step(batch, step, pretraining=False)["loss"] for step in range(2)])
    configure_arithmetic(deterministic=False, tf32="convolutions")
    return max(abs(left - right) / abs(right) for left, right in zip(*results, strict=True))


def stages(bench: Bench) -> dict[str, Any]:
    count = bench.count(bench.config.train.batch_size)
    predicted, found = predict(count, bench.gpu), bench.measure()
    print(comparison(found, predicted, count, bench.gpu, name=bench.name), flush=True)
    return {
        "predicted ms": {name: 1e3 * value for name, value in predicted.items()} | {"step": 1e3 * _whole(predicted)},
        "measured ms": {name: 1e3 * value for name, value in found.stages.items()} | {"step": 1e3 * found.step},
        "measured / predicted": found.step / _whole(predicted),
    }


def choices(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, changes in CHOICES.items():
        if not (bench.device == "cpu" and name in ONLY_GPUS):
            found[f"{name}, ms"] = _or_error(lambda changes=changes: 1e3 * bench.measure(*changes).step)
    found["without search for algorithms, ms"] = 1e3 * bench.measure(search=False).step
    return found


def batches(bench: Bench) -> dict[str, Any]:
    def speed(images: int) -> dict[str, float]:
        measured = bench.measure(f"train.batch_size={images}")
        predicted = images / _whole(predict(bench.count(images), bench.gpu))
        memory = {"GB": measured.memory / 1e9}
        return {"images/s": images / measured.step, "predicted images/s": predicted} | memory

    return {
        str(images): _or_error(functools.partial(speed, images))
        for images in ((2,) if bench.options.tiny else (2, 8, 16, 32))
    }


def _or_error(work: Callable[[], Any]) -> Any:
    """What `work` returns; of a setting that fails, such as for want of memory, the message."""
    try:
        return work()
    except (RuntimeError, ValueError) as error:
        return {"error": " ".join(str(error).split())[:300]}


def evaluation(bench: Bench) -> dict[str, Any]:
    """Images/s of the protocol ss with its confusion matrix, one and several at a time, without reading."""
    tiny, found, process = bench.options.tiny, {}, Process(device=torch.device(bench.device))
    size, number = ((64, 80), 2) if tiny else ((375, 500), 8 * bench.options.steps)
    noise = torch.zeros(3, *size, dtype=torch.uint8)
    sample = EvalSample("noise", noise, torch.zeros(size, dtype=torch.uint8), torch.zeros(bench.classes - 1))
    for precision in ("fp32", "auto"):
        config = apply_overrides(bench.config, [f"evaluation.precision={precision}"])
        model = build_network(config, num_classes=bench.classes, weights=False).eval()
        model.to(device=bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for together in (1, TOGETHER):
            count = functools.partial(evaluate_masks, Inference(model, config), process=process, together=together)
            count([sample] * together)
            begun = time.perf_counter()
            count([sample] * number)
            found[f"{precision}, {together} at a time, images/s"] = number / (time.perf_counter() - begun)
    return found


def training(bench: Bench) -> dict[str, Any]:
    """Trains the demo, from random weights, and measures after each epoch."""
    tiny = bench.options.tiny
    with tempfile.TemporaryDirectory() as folder:
        data = bench.options.data or Path(folder) / "data"
        if not (data / "dataset.json").is_file():
            build_demo(data, num_train=8 if tiny else 240, num_val=2 if tiny else 60, image_size=72 if tiny else 128)
        changes = [*TINY, "data.crop_size=64", "train.batch_size=4", "train.epochs=2"] if tiny else ["train.epochs=30"]
        fixed = [f"data.path={data}", "model.encoder_weights=none", "data.workers=0", "train.pretrain_epochs=1"]
        config, epochs = apply_overrides(get_recipe("demo"), [*changes, *fixed]), []
        begun, process = time.perf_counter(), Process(device=torch.device(bench.device))
        trainer = Trainer(config, load_dataset(str(data)), process=process, folder=Path(folder) / "run")

        def report(metrics: Mapping[str, float]) -> None:
            epochs.append(
                {name: metrics[name] for name in ("speed/images_per_second", "val/miou_ss") if name in metrics}
            )
            if time.perf_counter() - begun > bench.options.seconds:
                raise TimeoutError

        # Writing checkpoints needs a package that a bare machine lacks.
        with contextlib.suppress(TimeoutError), mock.patch.object(trainer.writer, "save"):
            trainer.fit(report=report)
    return {"seconds": time.perf_counter() - begun, "epochs": epochs}


ALL = {part.__name__: part for part in (checks, stages, choices, batches, evaluation, training)}


def run(bench: Bench) -> dict[str, Any]:
    """Runs all parts; writes what is known after each."""
    record: dict[str, Any] = {"gpu": bench.name, "torch": torch.__version__, "recipe": bench.options.recipe}
    for name, part in ALL.items():
        begun = time.perf_counter()
        try:
            record[name] = part(bench)
        except Exception as error:  # the other parts are worth the GPU's time
            record[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        print(f"{name}, {time.perf_counter() - begun:.0f} s: {json.dumps(record[name])}", flush=True)
        if bench.options.out is not None:
            write(record, bench.options.out)
    return record


def write(record: Mapping[str, Any], folder: Path) -> None:
    """Writes the figures as gpu.json and, as one table, gpu.md."""
    rows = [f"| {' / '.join(path)} | {value} |" for path, value in _leaves(record)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("gpu.json", json.dumps(record, indent=2)),
        ("gpu.md", "\n".join(["| what | figure |", "| --- | ---: |", *rows])),
    ):
        with written_whole(folder / name) as incoming:
            incoming.write_text(text + "\n", encoding="utf-8")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value, start=1)
        for name, inner in items:
            yield from _leaves(inner, (*path, str(name)))
    else:
        yield path, f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.tiny or options.predict):
        print(
            "error: no GPU here: torch.cuda.is_available() is False. This script needs an NVIDIA GPU with driver 580 "
            "or newer for PyTorch's CUDA 13; --predict prints the predictions without a GPU",
            file=sys.stderr,
        )
        return 2
    try:
        name = torch.cuda.get_device_name() if on_gpu else "the CPU"
        if min(options.images, options.steps) < 1:
            raise ValueError("--images and --steps must be at least 1")
        gpu = model_of(name, options.like or (None if on_gpu else "H200"))
        tiny = TINY if options.tiny else ()
        config = configuration(options.recipe, crop=64 if tiny else options.crop, images=options.images, changes=tiny)
        clock = cuda_clock() if on_gpu else PROCESSOR_CLOCK
        bench = Bench(config, gpu, name, "cuda" if on_gpu else "cpu", clock, options)
        if options.predict:
            stages_of = predict(bench.count(options.images), gpu)
            print(json.dumps({name: 1e3 * value for name, value in (stages_of | {"step": _whole(stages_of)}).items()}))
            return 0
        record = run(bench)
    except (ValueError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(any("error" in record[part] for part in ALL))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default="voc_wsss", metavar="NAME", help="a recipe for image labels (default: voc_wsss)"
    )
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images per step (default: 16)")
    parser.add_argument("--crop", type=int, default=321, metavar="PIXELS", help="crop size (default: 321)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="measured steps (default: 10)")
    parser.add_argument("--seconds", type=int, default=180, metavar="S", help="time for the demo (default: 180)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the demo's pictures; drawn there if it is missing")
    parser.add_argument("--like", choices=[gpu.name for gpu in GPUS], help="predict for this GPU instead of this one")
    parser.add_argument("--predict", action="store_true", help="print the predicted ms of the stages, and stop")
    parser.add_argument("--tiny", action="store_true", help="a tiny network and tiny images: shows that all parts run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write gpu.json and gpu.md there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
