"""What the paper's runs should cost on GPUs: predictions, from counted operators. Nothing here was measured on a GPU.

    python benchmarks/cost_model.py [--recipe NAME ...] [--out FOLDER]

FLOPs and bytes of every operator of a training step are counted on tensors without memory, by stage, forward and
backward (`benchmarks/_operators.py`). An operator takes as long as the slowest of its arithmetic, its memory traffic
and its kernels' start (the roofline); operators run one after the other. Gradients go round a ring of all GPUs. Hours
and dollars follow. All assumptions are constants below, each with its source; docs/cost.md explains them, and
`benchmarks/gpu.py` measures the same stages where there is a GPU. Claimed, of a network that others measured: ResNet-50
in mixed precision trains on an A100 within a factor of 1.35 of what the model says.

Exit status: 0, 1 where the claim fails, or 2 for wrong arguments.
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
from slrnet.config import Config, ConfigError
from slrnet.recipes import get_recipe
from slrnet.storage.files import written_whole


@dataclass(frozen=True)
class Gpu:
    """A GPU, a node of eight of them, and what an hour costs.

    Attributes:
        name: of the GPU.
        peak: FLOP/s by kind of arithmetic, without sparsity.
        bandwidth: bytes/s of its memory.
        memory: bytes of it.
        processors: streaming multiprocessors.
        share: of the peak that convolutions and matrix products reach.
        link: bytes/s in one direction between the GPUs of a node.
        network: bytes/s that a node sends to other nodes.
        node: name of the node.
        price: US dollars for a GPU and hour.
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
# 80GB SXM and the H100 SXM, without sparsity. `tf32x3` is a third of `tf32`: three products stand for one. Networks:
# AWS's lists of instance types, 400 Gb/s for p4de.24xlarge and 3,200 Gb/s for p5.48xlarge. Prices: on-demand list
# prices of these nodes, 27.45 and 55.04 dollars an hour for eight GPUs, as public copies of the list had them in
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

# Assumptions of ours. `share` above: large products alone reach more; convolutions at these sizes, some of them
# dilated, less, and an H100 falls further behind its peak than an A100.
BANDWIDTH_SHARE = 0.85
"""Of the memory's bandwidth that elementwise operators reach; copies of large tensors reach 0.9."""
VECTOR_SHARE = 0.7
"""Of the peak of plain float32."""
LAUNCH = 5e-6
"""Seconds that a kernel takes at least: PyTorch's eager mode hands over one in 4 to 10 microseconds."""
TILE = 128 * 64
"""Outputs of a convolution that one multiprocessor works on; with fewer tiles than processors, some stand idle."""
LINK_SHARE = 0.8
"""Of the links' speed that an all-reduce of tens of megabytes reaches."""
HOP = 10e-6
"""Seconds from one GPU to the next, whatever the size."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel exchanges at once."""
NODE = 8
"""GPUs of a node."""
VALIDATION_SIZE = (375, 500)
"""Height and width of a usual image of VOC and COCO, pixels."""

MEASURED_RESNET50 = {"mixed precision": 2470.0, "TF32": 938.0}
"""Images/s of one A100 80GB, batch 256: NVIDIA, DeepLearningExamples, ConvNets/resnet50v1.5, PyTorch 21.03. Mixed
precision has channels last, as the trainer does; TF32 has not, and then layouts are changed back and forth, of which
the model knows nothing."""
CLAIMED_FACTOR = 1.35
"""Of the first."""


@dataclass(frozen=True)
class Workload:
    """The data of a run.

    Attributes:
        classes: K with the background.
        draws: images of an epoch, repeated draws counted.
        validation: images that are measured after each epoch, beside `evaluation.pseudo_mask_images`.
        present: most foreground classes of an image in a batch, for the refinement.
        masks: share of the draws that come with a true mask.
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
"""The paper's runs. Half of COCO's 82,783 training images; the others as docs/paper.md prepares them."""
SCALES = ((2, 16), (8, 16), (64, 64), (64, 512))
"""GPUs and global batch. 16 is the paper's; 64 GPUs need at least an image each."""
STAGES = (
    "views", "encoder", "aspp", "fusion", "auxiliary_head", "cvlr", "cue_injection", "gate", "mask_head", "network",
    "alignment", "calibration", "losses", "agreement", "optimizer", "between",
)  # fmt: skip
LABELS = {"network": "class scores", "between": "between stages"}
INNER = STAGES[1:10]
"""Parts of the network, and what it does between them."""


def seconds_of(operator: Operator, gpu: Gpu) -> float:
    """What an operator takes: the slowest of arithmetic, memory and start."""
    rate = gpu.peak[operator.kind] * (VECTOR_SHARE if operator.kind == "fp32" else gpu.share)
    if operator.outputs:
        rate *= min(1.0, operator.outputs / (TILE * gpu.processors))
    moving = operator.moved / (gpu.bandwidth * BANDWIDTH_SHARE)
    return max(operator.flops / rate, moving, operator.kernels * LAUNCH)


def seconds(operators: Iterable[Operator], gpu: Gpu) -> float:
    """What operators take one after the other, or what the start of their kernels takes."""
    return sum(seconds_of(operator, gpu) for operator in operators)


def least_seconds(operators: Iterable[Operator], gpu: Gpu) -> float:
    """The roofline itself, at the peaks: no program that computes and moves as much can be faster."""
    listed = list(operators)
    arithmetic = sum(operator.flops / gpu.peak[operator.kind] for operator in listed)
    return max(arithmetic, sum(operator.moved for operator in listed) / gpu.bandwidth)


def all_reduce_seconds(size: int, gpus: int, gpu: Gpu) -> float:
    """An all-reduce of `size` bytes: twice through the slowest link, less a GPU's own part, and the hops of a tree."""
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= NODE else min(gpu.link, gpu.network)
    hops = math.ceil(size / BUCKET) * 2 * math.ceil(math.log2(gpus))
    return 2 * (gpus - 1) / gpus * size / (speed * LINK_SHARE) + hops * HOP


@dataclass(frozen=True)
class Step:
    """Seconds of a step on each GPU.

    Attributes:
        forward: all but what goes backward.
        backward: without the exchange of gradients.
        exchange: of gradients.
        images: of the global batch.
    """

    forward: float
    backward: float
    exchange: float
    images: int

    @property
    def hidden(self) -> float:
        """The exchange runs beside the backward pass."""
        return self.forward + max(self.backward, self.exchange)

    @property
    def exposed(self) -> float:
        """The exchange follows the backward pass."""
        return self.forward + self.backward + self.exchange


def step_of(count: Count, gpus: int, gpu: Gpu) -> Step:
    """Predicts a step of `gpus` GPUs with `count.images` images each."""
    backward = seconds((operator for operator in count.operators if operator.stage == BACKWARD), gpu)
    exchange = all_reduce_seconds(count.gradients, gpus, gpu)
    return Step(seconds(count.operators, gpu) - backward, backward, exchange, gpus * count.images)


def hours_of(config: Config, load: Workload, step: Step, gpus: int, validation: float, *, hidden: bool) -> float:
    """Hours of a run: all epochs with pseudo labels, each followed by its measurements, which the GPUs share.

    Args:
        config: of the run.
        load: its data.
        step: predicted.
        gpus: that train.
        validation: seconds that one GPU takes for an image.
        hidden: the exchange of gradients runs beside the backward pass.
    """
    taken = step.hidden if hidden else step.exposed
    measured = load.validation + len(config.views.scales) * config.evaluation.pseudo_mask_images
    epoch = load.draws // step.images * taken + math.ceil(measured / gpus) * validation
    return config.train.epochs * epoch / 3600


class Counts:
    """Counted steps and validations of recipes, each made once."""

    def __init__(self, get: Callable[[str], Config] = get_recipe, loads: Mapping[str, Workload] = WORKLOADS) -> None:
        self.get, self.loads = get, loads
        self._steps: dict[tuple[str, int], Count] = {}
        self._validations: dict[str, tuple[Operator, ...]] = {}

    def step(self, recipe: str, images: int) -> Count:
        if (recipe, images) not in self._steps:
            load = self.loads[recipe]
            self._steps[recipe, images] = count_step(
                self.get(recipe),
                num_classes=load.classes,
                images=images,
                classes_per_image=load.present,
                masks_share=load.masks,
            )
        return self._steps[recipe, images]

    def validation(self, recipe: str) -> tuple[Operator, ...]:
        if recipe not in self._validations:
            load = self.loads[recipe]
            self._validations[recipe] = count_validation(
                self.get(recipe), num_classes=load.classes, size=VALIDATION_SIZE
            )
        return self._validations[recipe]


def by_stage(operators: Iterable[Operator]) -> dict[tuple[str, bool], list[Operator]]:
    """Operators by the stage that they belong to, and whether they go backward."""
    found = defaultdict(list)
    for operator in operators:
        found[operator.source if operator.source in STAGES else "between", operator.stage == BACKWARD].append(operator)
    return found


def stage_costs(count: Count) -> str:
    """FLOPs, bytes and kernels of each stage for an image, as a Markdown table."""
    lines = [
        "| stage | GFLOP forward | MB forward | GFLOP backward | MB backward | kernels of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = by_stage(count.operators)
    for stage in (*STAGES, None):
        cells, kernels = [], 0
        for backward in (False, True):
            own = [op for key, ops in found.items() if key[1] == backward and stage in (None, key[0]) for op in ops]
            cells += [f"{sum(operator.flops for operator in own) / count.images / 1e9:.2f}"]
            cells += [f"{sum(operator.moved for operator in own) / count.images / 1e6:.0f}"]
            kernels += sum(operator.kernels for operator in own)
        if kernels:
            lines.append(f"| {_label(stage)} | {' | '.join(cells)} | {kernels} |")
    return "\n".join(lines)


def stage_seconds(count: Count, gpus: Sequence[Gpu] = GPUS) -> str:
    """Predicted milliseconds of each stage of a step, forward and backward, as a Markdown table."""
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
    """Predicted speed, hours and dollars of a recipe's run by number of GPUs, as a Markdown table.

    Each cell has both bounds: the exchange of gradients beside the backward pass, and after it.
    """
    lines = [
        "| GPUs | global batch (on each) | learning rate | all-reduce, ms | step, ms | images/s | hours | dollars "
        "| memory, GB at least |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    config, load = counts.get(recipe), counts.loads[recipe]
    for gpu in GPUS:
        validation = seconds(counts.validation(recipe), gpu)
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


def _bounds(values: Sequence[float], digits: int) -> str:
    """The lower and the upper bound, or one where they look the same."""
    return " to ".join(dict.fromkeys(f"{value:,.{digits}f}" for value in values))


def compare_resnet50(gpu: Gpu = A100) -> tuple[str, bool]:
    """The model against what others measured: a Markdown table, and whether the claim holds."""
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
    """The constants as a Markdown table."""
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
    """All tables as Markdown, and whether the claim holds."""
    counts = counts or Counts()
    first = counts.step(recipes[0], images)
    config = counts.get(recipes[0])
    step = f"{recipes[0]}, {config.model.encoder}, crop {config.data.crop_size}, {images} images on a GPU, bf16"
    volume = f"Gradients that each step exchanges: {first.gradients / 1e6:.0f} MB in float32."
    compared, held = compare()
    parts = [
        "# Predicted cost on GPUs",
        "Predictions of a model; none of these figures has been measured on a GPU.",
        f"## Assumptions\n\n{assumptions()}",
        f"## Cost of each stage for an image ({step})\n\n{stage_costs(first)}\n\n{volume}",
        f"## Predicted milliseconds of a step ({step})\n\n{stage_seconds(first)}",
        *(f"## Predicted run: {recipe}\n\n{runs_table(recipe, counts, prices, scales=scales)}" for recipe in recipes),
        f"## The model against a published measurement\n\n{compared}",
    ]
    return "\n\n".join(parts), held


def main(arguments: Sequence[str] | None = None, *, make: Callable[..., tuple[str, bool]] = report) -> int:
    options = parse_arguments(arguments)
    try:
        for recipe in options.recipe:
            get_recipe(recipe)
        if not set(options.recipe) <= set(WORKLOADS):
            raise ConfigError(f"--recipe takes the runs whose data are known: {', '.join(WORKLOADS)}")
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
        "--recipe", nargs="+", default=list(WORKLOADS), metavar="NAME", help="runs to predict (default: all five)"
    )
    parser.add_argument(
        "--images", type=int, default=16, metavar="N", help="on a GPU, in the tables of stages (default: 16)"
    )
    for gpu in GPUS:
        parser.add_argument(
            f"--{gpu.name.lower()}-price", type=float, default=gpu.price, metavar="DOLLARS",
            help=f"for a GPU and hour (default: {gpu.price:.2f}, {gpu.node} on demand in {PRICED})",
        )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write cost.md there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
