"""Measures the time that each part of `slrnet.cpu` saves in training steps, predictions and a loader epoch.

    python benchmarks/cpu_tricks.py [--only lite classes wide predict loader]

Prints the table of docs/performance.md. All variants alternate in one single-threaded process and are compared by CPU
time, so other work on the machine has little effect. The row `nothing` runs the same code twice and shows the noise.
    lite     a step of the recipe voc_wsss_lite (EfficientNet-Lite0, batch 8) at crop 208 with a decoder of 256 channels
    classes  the same step with 201 classes, as in L2ID
    wide     a step of the recipe voc_wsss with one image (WideResNet-38, crop 321)
    predict  WideResNet-38 at one scale, 500x375
    loader   crops of 321 from 500x375 JPEGs
Claim: each part saves 5 % or more in one of them. By default, training uses bfloat16 only on processors with AMX.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._ours import our_step, random_batch
from slrnet.config import Config
from slrnet.cpu import compiled, crop, depthwise
from slrnet.cpu.few_taps import FewTapsConv2d
from slrnet.cpu.winograd import WinogradConv2d
from slrnet.ops.kernels import SWITCH
from slrnet.recipes import voc_wsss, voc_wsss_lite
from slrnet.sweeps.space import apply_values

Switch = Callable[[], contextlib.AbstractContextManager[object]]
PRECISIONS = ("fp32", "bf16")
CLAIMED = 1.05


@contextlib.contextmanager
def without_avx512(options: str = "-mno-avx512f") -> Iterator[None]:
    """Context manager that uses the crop kernel compiled for a processor with AVX2 only."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        compiler = Path(folder) / "cc"
        compiler.write_text(f'#!/bin/sh\nexec {compiled._compiler()} "$@" {options}\n')
        compiler.chmod(0o755)
        os.environ[compiled.COMPILER_VARIABLE] = str(compiler)
        library = compiled.compiled.__wrapped__("crop")
    with mock.patch.object(crop, "compiled", return_value=library):
        yield


OFF: dict[str, Switch] = {
    "nothing": contextlib.nullcontext,
    "depthwise convolutions": lambda: mock.patch.object(depthwise, "eager_on_cpu", return_value=False),
    "convolutions without padding": lambda: mock.patch.object(FewTapsConv2d, "_few_taps", return_value=False),
    "Winograd convolutions": lambda: mock.patch.object(WinogradConv2d, "_pays", return_value=False),
    "cross-entropy kernel": lambda: mock.patch.dict(os.environ, {SWITCH: "off"}),
    "crop kernel": lambda: mock.patch.dict(os.environ, {SWITCH: "off"}),
    "crop kernel's AVX-512": without_avx512,
}


def lite() -> Config:
    return apply_values(voc_wsss_lite(), {"data.crop_size": 208, "model.decoder_dim": 256})


def step(config: Config, precision: str, *, batch: int, num_classes: int = 21) -> Callable[[], object]:
    images = random_batch(batch=batch, crop=config.data.crop_size, num_classes=num_classes, present=2)
    return our_step(apply_values(config, {"train.precision": precision}), images, num_classes=num_classes)


def prediction(precision: str) -> Callable[[], object]:
    from benchmarks.evaluate import our_checkpoint, ours

    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    predict = ours(our_checkpoint(None), "ss", precision)
    return lambda: predict(image)


@contextlib.contextmanager
def loader_pass() -> Iterator[Callable[[], object]]:
    from benchmarks.loader import SIZE, exhaust, open_loader, write_shards

    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), 480, SIZE)
        loader = open_loader(Path(folder))
        yield lambda: exhaust(loader.epoch(0))


STEP = ("depthwise convolutions", "convolutions without padding", "cross-entropy kernel")
WORK: dict[str, tuple[tuple[str, ...], Callable[[str], contextlib.AbstractContextManager[Callable[[], object]]]]] = {
    "lite": (STEP, lambda precision: contextlib.nullcontext(step(lite(), precision, batch=8))),
    "classes": (
        ("cross-entropy kernel",),
        lambda precision: contextlib.nullcontext(step(lite(), precision, batch=8, num_classes=201)),
    ),
    "wide": (STEP[1:], lambda precision: contextlib.nullcontext(step(voc_wsss(), precision, batch=1))),
    "predict": (("Winograd convolutions",), lambda precision: contextlib.nullcontext(prediction(precision))),
    "loader": (("crop kernel", "crop kernel's AVX-512"), lambda precision: loader_pass()),
}
"""Workloads: the parts to switch off in each one, and its builder by precision."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=WORK, default=list(WORK), help="run only these workloads (default: all)"
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, saved = [], dict.fromkeys(OFF, 0.0)
    for name in args.only:
        parts, build = WORK[name]
        for precision in args.precisions if name != "loader" else ("",):
            with build(precision) as work:
                for part, (seconds, ratio, spread) in compare(work, ("nothing", *parts), args.repeats).items():
                    rows.append((name, precision, part, f"{seconds:.3f}", f"{ratio:.2f}", spread))
                    print(*rows[-1], flush=True, file=sys.stderr)
                    saved[part] = max(saved[part], ratio)
    print(tabulate(rows, ("work", "precision", "without", "CPU seconds", "times", "spread"), tablefmt="pipe"))
    measured = {part for _, _, part, *_ in rows} - {"nothing"}
    missed = sorted(part for part in measured if saved[part] < CLAIMED)
    print(f"parts that save less than 5 %: {', '.join(missed) or 'none'} (claimed: none)")
    return 1 if missed else 0


def compare(work: Callable[[], object], parts: tuple[str, ...], repeats: int) -> dict[str, tuple[float, float, str]]:
    """Returns for each part the median CPU seconds without it, their median ratio to all parts on, and its range."""
    ratios: dict[str, list[float]] = {part: [] for part in parts}
    seconds: dict[str, list[float]] = {part: [] for part in parts}
    for turn in range(repeats + 1):  # the first turn warms up
        base = cpu_seconds(work)
        for part in parts:
            with OFF[part]():
                taken = cpu_seconds(work)
            if turn:
                seconds[part].append(taken)
                ratios[part].append(taken / base)
    return {
        part: (
            statistics.median(seconds[part]),
            statistics.median(ratios[part]),
            f"{min(ratios[part]):.2f} to {max(ratios[part]):.2f}",
        )
        for part in parts
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    sys.exit(main())
