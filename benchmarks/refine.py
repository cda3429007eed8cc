"""Compares the mask refinement with the released one: speed, memory and results on the same masks.

    python benchmarks/refine.py --peer-dir FOLDER

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet); its `models/mods/pamr.py` is imported from there.
Both alternate, so that a busy machine slows both; ratios compare median times. Memory is the increase of a separate
process's peak. Without --peer-dir, the script measures only this project.
Claims, at (4, 21, 81, 81) with ten iterations: at most 0.04 of the released time, or 0.015 if only 3 classes are
present, and 0.1 of its memory; results equal within 1e-5. At the size of a whole image (1, K, 321, 321), with 4 classes
present of K = 81 or 201: it needs less than 200 MiB, while the released code would need the printed number of GiB.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._claims import at_most
from benchmarks._memory import forget_peak, peak_memory
from benchmarks._released import released_refinement
from benchmarks._turns import times_in_turn
from slrnet.calibration.refine import DILATIONS, refine

CLAIMED_TIME, CLAIMED_FEW, CLAIMED_MEMORY, CLAIMED_DIFFERENCE = 0.04, 0.015, 0.1, 1e-5
CLAIMED_FULL_SIZE = 200.0
FULL_SIZE, FULL_PRESENT = 321, 4
Refinement = Callable[[Tensor, Tensor], Tensor]


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(_peak(args))
        return 0
    held = _at_masks_size(args)
    return 0 if _at_full_size(args) and held else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument(
        "--present", type=int, default=3, help="classes present in the image labels, for the second figure"
    )
    parser.add_argument("--size", type=int, default=81)
    parser.add_argument("--peak", choices=("slrnet", "released"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _at_masks_size(args: argparse.Namespace) -> bool:
    images, probs = make_inputs(args.batch, args.classes, args.size)
    few = probs[:, : args.present]
    forms: dict[str, tuple[Refinement, Tensor]] = {"slrnet": (refine, probs), "slrnet, few classes": (refine, few)}
    if args.peer_dir is not None:
        forms["released"] = (released_refinement(args.peer_dir), probs)
    outputs = {name: form(images, maps) for name, (form, maps) in forms.items()}  # also warms up
    runs = {name: partial(form, images, maps) for name, (form, maps) in forms.items()}
    times = times_in_turn(runs, repeats=args.repeats)
    print(f"{tuple(probs.shape)}, 10 iterations, dilations {DILATIONS}, {args.threads} thread(s), {args.repeats} runs")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:>19}: median {medians[name]:.4f} s, fastest {min(values):.4f} s, slowest {max(values):.4f} s")
    if args.peer_dir is None:
        return True
    peaks = {name: _measure_peak(args, name, args.classes) for name in ("slrnet", "released")}
    print(f"memory: slrnet {peaks['slrnet']:.1f} MiB, released {peaks['released']:.1f} MiB")
    difference = float((outputs["slrnet"] - outputs["released"]).abs().max())
    return all(
        (
            at_most("time over released", medians["slrnet"] / medians["released"], CLAIMED_TIME),
            at_most(f"{args.present} classes", medians["slrnet, few classes"] / medians["released"], CLAIMED_FEW),
            at_most("memory over released", peaks["slrnet"] / peaks["released"], CLAIMED_MEMORY),
            at_most("largest difference", difference, CLAIMED_DIFFERENCE),
        )
    )


def _at_full_size(args: argparse.Namespace) -> bool:
    peak = _measure_peak(args, "slrnet", FULL_PRESENT, batch=1, size=FULL_SIZE)
    images, probs = make_inputs(1, FULL_PRESENT, FULL_SIZE)
    times = times_in_turn({"refine": partial(refine, images, probs)}, repeats=args.repeats)["refine"]
    print(f"(1, {FULL_PRESENT} present, {FULL_SIZE}, {FULL_SIZE}): median {statistics.median(times):.3f} s")
    for classes in (81, 201):
        # The neighbors of all classes, (1, K, 48, H, W), stored once gathered and once weighted.
        gathered = 2 * classes * 8 * len(DILATIONS) * FULL_SIZE**2 * 4 / 2**30
        print(f"the released code at {classes} classes: the neighbors of all classes take {gathered:.1f} GiB")
    return at_most("memory at that size, MiB", peak, CLAIMED_FULL_SIZE)


def _measure_peak(
    args: argparse.Namespace, name: str, classes: int, *, batch: int | None = None, size: int = 0
) -> float:
    """Returns the MiB that a refinement adds to the peak memory of a separate process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--peak", name, "--classes", str(classes)]
    command += ["--batch", str(batch or args.batch), "--size", str(size or args.size), "--threads", str(args.threads)]
    command += [] if args.peer_dir is None else ["--peer-dir", str(args.peer_dir)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak(args: argparse.Namespace) -> float:
    form = refine if args.peak == "slrnet" else released_refinement(args.peer_dir)
    images, probs = make_inputs(args.batch, args.classes, args.size)
    form(*make_inputs(1, 2, 24))  # loads libraries and kernels
    forget_peak()
    before = peak_memory()
    form(images, probs)
    return peak_memory() - before


def make_inputs(batch: int, classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns images with flat, smooth and noisy parts, and random masks."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).mul(1.6).sub(0.3).clamp(0, 1)
    images[:, :, : size // 4] = images[:, :, :1, :1]  # one color, as in a saturated sky
    return images, (3 * torch.randn(batch, classes, size, size, generator=generator)).softmax(dim=1)


if __name__ == "__main__":
    sys.exit(main())
