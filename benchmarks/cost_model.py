"""Predicts the cost of the paper's runs on GPUs from counted operators. Nothing here was measured on a GPU.

    python benchmarks/cost_model.py [--recipe NAME ...] [--out FOLDER]

The script counts FLOPs and bytes of every operator of a training step on tensors without memory, by stage, forward and
backward (`benchmarks/_operators.py`). An operator takes as long as the slowest of its arithmetic, its memory traffic
and its kernel launches (the roofline model). Operators run one after the other, and gradients are exchanged in a ring
of all GPUs. Hours and dollars follow from this. All assumptions are constants below, each with its source; docs/cost.md
explains them, and `benchmarks/gpu.py` measures the same stages on a GPU. Claim, for a network with published
measurements: ResNet-50 in mixed precision on an A100 is within a factor of 1.35 of the prediction.

Exit status: 0, 1 if the claim does not hold, or 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchvision.models import resnet50

from benchmarks._operators import BACKWARD, Count, Kind, Operator, count_classifier, count_step, count_validation
from slrnet.config import Config, ConfigError, apply_overrides
from slrnet.evaluation.masks import TOGETHER
from slrnet.launch.memory import expected_memory
from slrnet.recipes import get_recipe
from slrnet.storage.files import written_whole


@dataclass(frozen=True)
class Gpu:
    """A GPU, its node of eight GPUs, and its price.

    Attributes:
        name: the GPU's name.
        peak: FLOP/s by kind of arithmetic, without sparsity.
        bandwidth: memory bandwidth in bytes/s.
        memory: memory size in bytes.
        processors: number of streaming multiprocessors.
        share: share of the peak that convolutions and matrix products reach.
        link: bytes/s in one direction between the GPUs of a node.
        network: bytes/s from a node to other nodes.
        node: name of the node's instance type.
        price: US dollars per GPU-hour.
    """

    name: str
    peak: Mapping[Kind, float]
    bandwidth: float
    memory: float
    processors: int
    share: float
    link: float
    network: float
    node: str
    price: float


# Peaks, bandwidths, memory and NVLink (600 and 900 GB/s, both directions together): NVIDIA's data sheets of the A100
# 80GB SXM and the H100 SXM, without sparsity. `tf32x3` is a third of `tf32`: three products replace one. Networks:
# AWS's lists of instance types, 400 Gb/s for p4de.24xlarge and 3,200 Gb/s for p5.48xlarge. Prices: on-demand list
# prices of these nodes, 27.45 and 55.04 dollars per hour for eight GPUs, from public copies of the price list in
# November 2026.
A100 = Gpu(
    name="A100", peak={"bf16": 312e12, "tf32": 156e12, "tf32x3": 52e12, "fp32": 19.5e12}, bandwidth=2.039e12,
    memory=80e9, processors=108, share=0.7, link=300e9, network=50e9, node="p4de.24xlarge", price=27.45 / 8,
)  # fmt: skip
H100 = Gpu(
    name="H100", peak={"bf16": 989e12, "tf32": 494.5e12, "tf32x3": 164.8e12, "fp32": 66.9e12}, bandwidth=3.35e12,
    memory=80e9, processors=132, share=0.55, link=450e9, network=400e9, node="p5.48xlarge", price=55.04 / 8,
)  # fmt: skip
GPUS = (A100, H100)
PRICED = "November 2026"

# Our assumptions. `share` above: large matrix products alone reach more; convolutions at these sizes, some of them
# dilated, reach less, and an H100 stays further below its peak than an A100.
BANDWIDTH_SHARE = 0.85
"""Share of the memory bandwidth that elementwise operators reach; copies of large tensors reach 0.9."""
VECTOR_SHARE = 0.7
"""Share of the plain float32 peak that operators reach."""
LAUNCH = 5e-6
"""Minimum seconds per kernel: PyTorch's eager mode launches one every 4 to 10 microseconds."""
HOST = 8e-6
"""Seconds of the host per kernel in eager mode: Python, dispatcher, autograd and the launch. A step of one or two
images waits for it: some 3,000 kernels take the host 25 ms, however small they are."""
READING = 2.5e-3
"""Seconds in which a thread reads and decodes an image of `VALIDATION_SIZE` and its mask; benchmarks/evaluate.py."""
CARD = 24e9
"""Bytes of the smaller cards in use: L4, A10, GeForce RTX 3090 and 4090."""
TILE = 128 * 64
"""Convolution outputs per tile, one tile per multiprocessor; with fewer tiles than processors, some are idle."""
LINK_SHARE = 0.8
"""Share of the link speed that an all-reduce of tens of megabytes reaches."""
HOP = 10e-6
"""Latency from one GPU to the next in seconds, independent of the size."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel exchanges at once."""
NODE = 8
"""GPUs per node."""
LARGE_CROPS = (448, 512)
"""The released crop of training with masks, and a usual one."""
VALIDATION_SIZE = (375, 500)
"""Typical height and width of a VOC or COCO image in pixels."""

MEASURED_RESNET50 = {"mixed precision": 2470.0, "TF32": 938.0}
"""Images/s of one A100 80GB, batch 256: NVIDIA, DeepLearningExamples, ConvNets/resnet50v1.5, PyTorch 21.03. Mixed
precision uses channels last, as the trainer does. TF32 does not, so tensors are converted between layouts, which the
model does not count."""
CLAIMED_FACTOR = 1.35
"""For mixed precision."""


@dataclass(frozen=True)
class Workload:
    """The data of a run.

    Attributes:
        classes: K, including the background.
        draws: images per epoch, including repeated draws.
        validation: images evaluated after each epoch, in addition to `evaluation.pseudo_mask_images`.
        present: most foreground classes of any image in a batch; the refinement processes this many.
        masks: share of the draws that have a ground-truth mask.
    """

    classes: int
    draws: int
    validation: int
    present: int
    masks: float = 0.0


SEMI = 5 * 1464 + 9118
WORKLOADS = {
    "voc_wsss": Workload(classes=21, draws=10582, validation=1449, present=4),
    "coco_wsss": Workload(classes=81, draws=41391, validation=40504, present=10),
    "l2id_wsss": Workload(classes=201, draws=349319, validation=4690, present=6),
    "voc_sss_image_labels": Workload(classes=21, draws=SEMI, validation=1449, present=4, masks=5 * 1464 / SEMI),
    "voc_sss": Workload(classes=21, draws=SEMI, validation=1449, present=20, masks=5 * 1464 / SEMI),
}
"""The paper's runs: half of COCO's 82,783 training images; the other datasets as docs/paper.md prepares them."""
SCALES = ((2, 16), (8, 16), (64, 64), (64, 512))
"""GPUs and global batch size. 16 is the paper's batch size; 64 GPUs need at least one image each."""
STAGES = (
    "views", "encoder", "aspp", "fusion", "auxiliary_head", "cvlr", "cue_injection", "gate", "mask_head", "network",
    "alignment", "calibration", "losses", "agreement", "optimizer", "between",
)  # fmt: skip
LABELS = {"network": "class scores", "between": "between stages"}
INNER = STAGES[1:10]
"""Parts of the network, and the operators between them."""


def seconds_of(operator: Operator, gpu: Gpu) -> float:
    """Returns an operator's seconds: the slowest of arithmetic, memory traffic and kernel launches."""
    rate = gpu.peak[operator.kind] * (VECTOR_SHARE if operator.kind == "fp32" else gpu.share)
    if operator.outputs:
        rate *= min(1.0, operator.outputs / (TILE * gpu.processors))
    moving = operator.moved / (gpu.bandwidth * BANDWIDTH_SHARE)
    return max(operator.flops / rate, moving, operator.kernels * LAUNCH)


def seconds(operators: Iterable[Operator], gpu: Gpu) -> float:
    """Returns the seconds of operators that run one after the other."""
    return sum(seconds_of(operator, gpu) for operator in operators)


def least_seconds(operators: Iterable[Operator], gpu: Gpu) -> float:
    """Returns the lower bound from the peaks: no program with the same arithmetic and traffic can be faster."""
    listed = list(operators)
    arithmetic = sum(operator.flops / gpu.peak[operator.kind] for operator in listed)
    return max(arithmetic, sum(operator.moved for operator in listed) / gpu.bandwidth)


def all_reduce_seconds(size: int, gpus: int, gpu: Gpu) -> float:
    """Returns the seconds of an all-reduce of `size` bytes.

    The data goes twice through the slowest link, except each GPU's own part. Latency is that of a tree.
    """
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= NODE else min(gpu.link, gpu.network)
    hops = math.ceil(size / BUCKET) * 2 * math.ceil(math.log2(gpus))
    return 2 * (gpus - 1) / gpus * size / (speed * LINK_SHARE) + hops * HOP


@dataclass(frozen=True)
class Step:
    """Seconds of a step on each GPU.

    Attributes:
        forward: everything except the backward pass.
        backward: the backward pass without the gradient exchange.
        exchange: the gradient exchange.
        images: size of the global batch.
        host: what the host needs to start all kernels; no step takes less.
    """

    forward: float
    backward: float
    exchange: float
    images: int
    host: float = 0.0

    @property
    def hidden(self) -> float:
        """Seconds if the gradient exchange overlaps the backward pass."""
        return max(self.forward + max(self.backward, self.exchange), self.host)

    @property
    def exposed(self) -> float:
        """Seconds if the gradient exchange follows the backward pass."""
        return max(self.forward + self.backward + self.exchange, self.host)


def step_of(count: Count, gpus: int, gpu: Gpu) -> Step:
    """Predicts a step on `gpus` GPUs with `count.images` images each."""
    backward = seconds((operator for operator in count.operators if operator.stage == BACKWARD), gpu)
    exchange = all_reduce_seconds(count.gradients, gpus, gpu)
    forward = seconds(count.operators, gpu) - backward
    return Step(forward, backward, exchange, gpus * count.images, host_seconds(count.operators))


def host_seconds(operators: Iterable[Operator]) -> float:
    """Returns the seconds in which the host starts the kernels of all operators."""
    return HOST * sum(operator.kernels for operator in operators)


def validation_seconds(operators: Sequence[Operator], gpu: Gpu) -> float:
    """Returns the seconds of an image, of which `TOGETHER` go through the network at once: the slowest of three.

    They are the GPU's work, the host's, and the thread that reads ahead.
    """
    return max(max(seconds(operators, gpu), host_seconds(operators)) / TOGETHER, READING)


def memory_advice(recipe: str, counts: Counts, *, crop: int, images: int, card: float = CARD) -> str:
    """Returns a line that says whether a step fits on a card, and what to set if not."""
    whole = expected_memory(counts.step(recipe, images, crop).memory)
    need = f"{recipe}, crop {crop}, {images} images on a GPU: about {whole / 1e9:.0f} GB of {card / 1e9:.0f}"
    if whole <= card:
        return f"{need}; fits"
    parts, part = 1, whole
    while part > card and images // parts > 1:
        parts *= 2
        part = expected_memory(counts.step(recipe, -(-images // parts), crop).memory)
    if part > card:
        return f"{need}; even one image needs {part / 1e9:.0f} GB: use a smaller crop or a larger card"
    return f"{need}; set train.accumulation={parts} ({-(-images // parts)} images at a time, {part / 1e9:.0f} GB)"


def hours_of(config: Config, load: Workload, step: Step, gpus: int, validation: float, *, hidden: bool) -> float:
    """Returns the hours of a run: all epochs with pseudo labels, each followed by an evaluation that the GPUs share.

    Args:
        config: the run's settings.
        load: the run's data.
        step: the predicted step.
        gpus: number of GPUs.
        validation: seconds that one GPU needs to evaluate an image.
        hidden: True if the gradient exchange overlaps the backward pass.
    """
    taken = step.hidden if hidden else step.exposed
    measured = load.validation + len(config.views.scales) * config.evaluation.pseudo_mask_images
    epoch = load.draws // step.images * taken + math.ceil(measured / gpus) * validation
    return config.train.epochs * epoch / 3600


class Counts:
    """Counts training steps and validations of recipes, and caches them."""

    def __init__(self, get: Callable[[str], Config] = get_recipe, loads: Mapping[str, Workload] = WORKLOADS) -> None:
        self.get, self.loads = get, loads
        self._steps: dict[tuple[str, int, int | None], Count] = {}
        self._validations: dict[str, tuple[Operator, ...]] = {}

    def step(self, recipe: str, images: int, crop: int | None = None) -> Count:
        if (recipe, images, crop) not in self._steps:
            load, changes = self.loads[recipe], [] if crop is None else [f"data.crop_size={crop}"]
            self._steps[recipe, images, crop] = count_step(
                apply_overrides(self.get(recipe), changes),
                num_classes=load.classes,
                images=images,
                classes_per_image=load.present,
                masks_share=load.masks,
            )
        return self._steps[recipe, images, crop]

    def validation(self, recipe: str) -> tuple[Operator, ...]:
        if recipe not in self._validations:
            load = self.loads[recipe]
            self._validations[recipe] = count_validation(
                self.get(recipe), num_classes=load.classes, size=VALIDATION_SIZE, images=TOGETHER
            )
        return self._validations[recipe]


def by_stage(operators: Iterable[Operator]) -> dict[tuple[str, bool], list[Operator]]:
    """Groups operators by their source stage and by True for the backward pass."""
    found = defaultdict(list)
    for operator in operators:
        found[operator.source if operator.source in STAGES else "between", operator.stage == BACKWARD].append(operator)
    return found


def stage_costs(count: Count) -> str:
    """Returns a Markdown table of each stage's FLOPs and bytes per image and kernels per step."""
    lines = [
        "| stage | GFLOP forward | MB forward | GFLOP backward | MB backward | kernels of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = by_stage(count.operators)
    for stage in (*STAGES, None):
        cells, kernels = [], 0
        for backward in (False, True):
            selected = [
                op for key, ops in found.items() if key[1] == backward and stage in (None, key[0]) for op in ops
            ]
            cells += [f"{sum(operator.flops for operator in selected) / count.images / 1e9:.2f}"]
            cells += [f"{sum(operator.moved for operator in selected) / count.images / 1e6:.0f}"]
            kernels += sum(operator.kernels for operator in selected)
        if kernels:
            lines.append(f"| {_label(stage)} | {' | '.join(cells)} | {kernels} |")
    return "\n".join(lines)


def stage_seconds(count: Count, gpus: Sequence[Gpu] = GPUS) -> str:
    """Returns a Markdown table of each stage's predicted milliseconds per step, forward and backward."""
    heads = [f"{gpu.name} {part}" for gpu in gpus for part in ("forward", "backward", "at its peaks")]
    lines = [f"| stage | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    found = by_stage(count.operators)
    for stage in (*STAGES, None):
        parts = [
            [op for key, ops in found.items() if key[1] == backward and stage in (None, key[0]) for op in ops]
            for backward in (False, True)
        ]
        if any(parts):
            cells = [
                f"{1e3 * value:.2f}"
                for gpu in gpus
                for value in (*(seconds(part, gpu) for part in parts), least_seconds(parts[0] + parts[1], gpu))
            ]
            lines.append(f"| {_label(stage)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _label(stage: str | None) -> str:
    if stage is None:
        return "**all**"
    return f"network: {LABELS.get(stage, stage)}" if stage in INNER else LABELS.get(stage, stage)


def runs_table(
    recipe: str, counts: Counts, prices: Mapping[str, float], *, scales: Sequence[tuple[int, int]] = SCALES
) -> str:
    """Returns a Markdown table of a run's predicted speed, hours and dollars by number of GPUs.

    Cells show two bounds: the gradient exchange overlaps the backward pass, or follows it.
    """
    lines = [
        "| GPUs | global batch (on each) | learning rate | all-reduce, ms | step, ms | images/s | hours | dollars "
        "| memory, GB at least |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    config, load = counts.get(recipe), counts.loads[recipe]
    for gpu in GPUS:
        validation = validation_seconds(counts.validation(recipe), gpu)
        for gpus, batch in scales:
            count = counts.step(recipe, batch // gpus)
            step = step_of(count, gpus, gpu)
            hours = [hours_of(config, load, step, gpus, validation, hidden=hidden) for hidden in (True, False)]
            rate = config.optim.lr * batch / config.optim.reference_batch_size
            lines.append(
                f"| {gpus} {gpu.name} | {batch} ({batch // gpus}) | {rate:g} | {1e3 * step.exchange:.1f} "
                f"| {_bounds([1e3 * step.hidden, 1e3 * step.exposed], 1)} "
                f"| {_bounds([batch / step.exposed, batch / step.hidden], 0)} | {_bounds(hours, 2)} "
                f"| {_bounds([hour * gpus * prices[gpu.name] for hour in hours], 0)} | {count.memory / 1e9:.1f} |"
            )
    return "\n".join(lines)


def memory_lines(recipe: str, counts: Counts, images: int) -> str:
    """Returns the advice for the recipe's crop and two larger ones, as a Markdown list."""
    crops = (counts.get(recipe).data.crop_size, *LARGE_CROPS)
    return "\n".join(f"- {memory_advice(recipe, counts, crop=crop, images=images)}" for crop in crops)


def _bounds(values: Sequence[float], digits: int) -> str:
    """Formats the lower and upper bound, or one number if both print the same."""
    return " to ".join(dict.fromkeys(f"{value:,.{digits}f}" for value in values))


def compare_resnet50(gpu: Gpu = A100) -> tuple[str, bool]:
    """Returns a Markdown table of predictions and published measurements, and True if the claim holds."""
    lines = ["| ResNet-50, batch 256, one A100 | predicted, images/s | measured by NVIDIA | ratio |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    ratios = []
    for name, measured in MEASURED_RESNET50.items():
        operators = count_classifier(resnet50, images=256, size=224, bf16=name != "TF32")
        predicted = 256 / seconds(operators, gpu)
        ratios.append(predicted / measured)
        lines.append(f"| {name} | {predicted:,.0f} | {measured:,.0f} | {predicted / measured:.2f} |")
    return "\n".join(lines), 1 / CLAIMED_FACTOR <= ratios[0] <= CLAIMED_FACTOR


def assumptions() -> str:
    """Returns the constants as a Markdown table."""
    rows = [
        ("bf16, TFLOP/s", lambda gpu: f"{gpu.peak['bf16'] / 1e12:g}"),
        ("TF32 (float32 convolutions)", lambda gpu: f"{gpu.peak['tf32'] / 1e12:g}"),
        ("float32 without tensor cores", lambda gpu: f"{gpu.peak['fp32'] / 1e12:g}"),
        ("memory, TB/s", lambda gpu: f"{gpu.bandwidth / 1e12:g}"),
        ("share of the peak that convolutions reach", lambda gpu: f"{gpu.share:g}"),
        ("share of the memory's bandwidth", lambda gpu: f"{BANDWIDTH_SHARE:g}"),
        ("NVLink in one direction, GB/s", lambda gpu: f"{gpu.link / 1e9:g}"),
        ("network of a node, GB/s", lambda gpu: f"{gpu.network / 1e9:g}"),
        ("dollars for a GPU and hour", lambda gpu: f"{gpu.price:.2f}"),
        ("node, on demand", lambda gpu: gpu.node),
    ]
    lines = [f"| assumed | {' | '.join(gpu.name for gpu in GPUS)} |", "| --- |" + " ---: |" * len(GPUS)]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(cell, GPUS))} |" for name, cell in rows])


def report(
    recipes: Sequence[str],
    images: int,
    prices: Mapping[str, float],
    *,
    counts: Counts | None = None,
    scales: Sequence[tuple[int, int]] = SCALES,
    compare: Callable[[], tuple[str, bool]] = compare_resnet50,
) -> tuple[str, bool]:
    """Returns all tables as Markdown, and True if the claim holds."""
    counts = counts or Counts()
    first = counts.step(recipes[0], images)
    config = counts.get(recipes[0])
    step = f"{recipes[0]}, {config.model.encoder}, crop {config.data.crop_size}, {images} images on a GPU, bf16"
    volume = f"Gradients that each step exchanges: {first.gradients / 1e6:.0f} MB in float32."
    compared, held = compare()
    parts = [
        "# Predicted cost on GPUs",
        "These are model predictions; none of these figures has been measured on a GPU.",
        f"## Assumptions\n\n{assumptions()}",
        f"## Cost of each stage for an image ({step})\n\n{stage_costs(first)}\n\n{volume}",
        f"## Predicted milliseconds of a step ({step})\n\n{stage_seconds(first)}",
        *(f"## Predicted run: {recipe}\n\n{runs_table(recipe, counts, prices, scales=scales)}" for recipe in recipes),
        f"## Memory\n\n{memory_lines(recipes[0], counts, images)}",
        f"## The model against a published measurement\n\n{compared}",
    ]
    return "\n\n".join(parts), held


def main(arguments: Sequence[str] | None = None, *, make: Callable[..., tuple[str, bool]] = report) -> int:
    options = parse_arguments(arguments)
    try:
        for recipe in options.recipe:
            get_recipe(recipe)
        if not set(options.recipe) <= set(WORKLOADS):
            raise ConfigError(f"--recipe must be one of the runs with a known workload: {', '.join(WORKLOADS)}")
        if options.images < 1 or min(options.a100_price, options.h100_price) < 0:
            raise ConfigError("--images must be at least 1, and prices at least 0")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text, held = make(options.recipe, options.images, {"A100": options.a100_price, "H100": options.h100_price})
    print(text)
    print(f"\nclaim: within a factor of {CLAIMED_FACTOR} of NVIDIA's ResNet-50: {'held' if held else 'missed'}")
    if options.out is not None:
        with written_whole(options.out / "cost.md") as incoming:
            incoming.write_text(text + "\n", encoding="utf-8")
    return 0 if held else 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=list(WORKLOADS),
        metavar="NAME",
        help="runs to predict (default: the paper's five)",
    )
    parser.add_argument(
        "--images", type=int, default=16, metavar="N", help="images per GPU in the stage tables (default: 16)"
    )
    for gpu in GPUS:
        parser.add_argument(
            f"--{gpu.name.lower()}-price", type=float, default=gpu.price, metavar="DOLLARS",
            help=f"price per GPU-hour (default: {gpu.price:.2f}, {gpu.node} on demand in {PRICED})",
        )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write cost.md there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
