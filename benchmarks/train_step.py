"""Compares a whole training step in time and memory with the released code, with the same encoder.

    python benchmarks/train_step.py --peer-dir FOLDER [--only wide|lite|classes|views|share]

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet). A step is views, network, calibration, losses,
backward and optimizer, on random images and weights. Each side runs in its own process with two threads, and they
alternate. Ratios compare median times and peak resident memory. Without --peer-dir, the script measures only this
project. It trains in its default precision: bfloat16 if the processor has bfloat16 matrix instructions. Also shown: its
time and memory in float32, which the released code uses.
Claims, each with image labels only:
    wide     WideResNet-38, crop 321, batch 2: at most 0.75 of the released time and 0.7 of its memory
    lite     EfficientNet-Lite0, crop 192, batch 8: at most 0.5 of the released time
    classes  the lite step at 201 classes of which 4 are present: at most 1.15 times the step at 21 classes
    views    a third view: at most 1.05 times the time predicted from the number of pixels of all views
    share    alignment, calibration and losses, forward and backward, take less than 10 % of the lite step
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._claims import at_most
from benchmarks._ours import no_pixel_left_out, our_step, random_batch
from benchmarks._sides import SideResult, run_in_turn, serve_side
from benchmarks._turns import times_in_turn
from slrnet.config import Config
from slrnet.models.network import mixed_precision
from slrnet.models.slrnet import build_network
from slrnet.recipes import voc_wsss, voc_wsss_lite
from slrnet.sweeps.space import apply_values
from slrnet.training.optim import build_optimizer
from slrnet.training.step import find_pseudo_rows, losses_of, make_views, step_generator

PARTS = ("wide", "lite", "classes", "views", "share")
SCALES = {2: (1.0, 0.5), 3: (1.0, 0.5, 0.75)}


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.side:
        serve_side(_side(args))
        return 0
    held = [CLAIMS[name](args) for name in args.only or PARTS]
    return 0 if all(held) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="check only these claims (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("slrnet", "released"), help=argparse.SUPPRESS)
    parser.add_argument("--encoder", choices=("wide", "lite"), default="lite", help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, default=21, help=argparse.SUPPRESS)
    parser.add_argument("--present", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--views", type=int, choices=list(SCALES), default=2, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=("auto", "fp32"), default="auto", help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(encoder: str, views: int = 2, precision: str = "auto") -> Config:
    recipe = voc_wsss() if encoder == "wide" else voc_wsss_lite()
    crop = 321 if encoder == "wide" else 192
    same = {"model.decoder_dim": 256, "calibration.masks": "decoder"}  # what the released network has
    changes = {"views.scales": SCALES[views], "data.crop_size": crop, "train.precision": precision}
    return apply_values(recipe, same | changes)


def _side(args: argparse.Namespace) -> Callable[[], object]:
    config = _config(args.encoder, args.views, args.precision)
    size = {"batch": 2 if args.encoder == "wide" else 8, "crop": config.data.crop_size}
    batch = random_batch(**size, num_classes=args.classes, present=args.present)
    if args.side == "slrnet":
        return our_step(config, batch, num_classes=args.classes)
    from benchmarks._released import released_network, released_network_lite, released_step

    build = released_network if args.encoder == "wide" else released_network_lite
    return released_step(build(args.peer_dir, num_classes=args.classes), batch.floats(), batch.image_labels)


def _compare(
    args: argparse.Namespace, sides: dict[str, list[str]], *, repeats: int | None = None
) -> dict[str, SideResult]:
    """Alternates the sides and prints and returns their results; `sides` maps names to arguments."""
    common = [sys.executable, str(Path(__file__).resolve()), "--threads", str(args.threads)]
    common += [] if args.peer_dir is None else ["--peer-dir", str(args.peer_dir)]
    seen = run_in_turn({name: [*common, *options] for name, options in sides.items()}, repeats=repeats or args.repeats)
    width = max(map(len, seen))
    for name, result in seen.items():
        print(f"{name:>{width}}: {result}", flush=True)
    return seen


def _against_released(args: argparse.Namespace, encoder: str) -> dict[str, SideResult]:
    ours = ["--side", "slrnet", "--encoder", encoder]
    sides = {"slrnet": ours, "slrnet, float32": [*ours, "--precision", "fp32"]}
    if args.peer_dir is not None:
        sides["released"] = ["--side", "released", "--encoder", encoder]
    return _compare(args, sides)


def _show_float32(seen: dict[str, SideResult]) -> None:
    print(f"in float32: time over released {seen['slrnet, float32'].median / seen['released'].median:.3f}", end=", ")
    print(f"peak memory over released {seen['slrnet, float32'].peak / seen['released'].peak:.3f}", flush=True)


def wide(args: argparse.Namespace) -> bool:
    print("\nWideResNet-38, crop 321, batch 2")
    seen = _against_released(args, "wide")
    if "released" not in seen:
        return True
    _show_float32(seen)
    time = at_most("time over released", seen["slrnet"].median / seen["released"].median, 0.75)
    return at_most("peak memory over released", seen["slrnet"].peak / seen["released"].peak, 0.7) and time


def lite(args: argparse.Namespace) -> bool:
    print("\nEfficientNet-Lite0, crop 192, batch 8")
    seen = _against_released(args, "lite")
    if "released" not in seen:
        return True
    _show_float32(seen)
    return at_most("time over released", seen["slrnet"].median / seen["released"].median, 0.5)


def classes(args: argparse.Namespace) -> bool:
    print("\nEfficientNet-Lite0, crop 192, batch 8, 4 classes present in each image")
    names = ("slrnet",) if args.peer_dir is None else ("slrnet", "released")
    sides = {
        f"{name}, {count} classes": ["--side", name, "--classes", str(count), "--present", "4"]
        for name in names
        for count in (21, 201)
    }
    # The claimed difference is a small part of a step, so a few turns would only measure noise.
    seen = _compare(args, sides, repeats=3 * args.repeats)
    growth = {name: seen[f"{name}, 201 classes"].median / seen[f"{name}, 21 classes"].median for name in names}
    if "released" in growth:
        print(f"released: 201 classes over 21: {growth['released']:.3f}")
    return at_most("slrnet: 201 classes over 21", growth["slrnet"], 1.15)


def views(args: argparse.Namespace) -> bool:
    print("\nEfficientNet-Lite0, crop 192, batch 8, views of scales 1, 0.5 and then 0.75")
    seen = _compare(args, {f"{n} views": ["--side", "slrnet", "--views", str(n)] for n in SCALES})
    pixels = {n: sum(scale**2 for scale in scales) for n, scales in SCALES.items()}
    return at_most(
        "time over the pixels' share",
        seen["3 views"].median / seen["2 views"].median / (pixels[3] / pixels[2]),
        1.05,
    )


def share(args: argparse.Namespace) -> bool:
    """Compares the part from the network's outputs to their gradients with the whole step."""
    print("\nEfficientNet-Lite0, crop 192, batch 8: alignment, calibration and losses, forward and backward")
    config, num_classes = _config("lite"), 21
    batch = random_batch(batch=8, crop=192, num_classes=num_classes, present=2)
    model = build_network(config, num_classes=num_classes, weights=False).train()
    build_optimizer(model, config.optim, batch_size=8)
    images = batch.floats()
    inputs, drawn = make_views(images, config.views, model.encoder, step_generator(0))
    with torch.no_grad(), mixed_precision("auto", torch.device("cpu")):
        outputs = model(inputs)

    def after_the_network() -> None:
        leaves = replace(
            outputs,
            **{
                name: [tensor.detach().requires_grad_() for tensor in value]
                for name, value in vars(outputs).items()
                if isinstance(value, list) and all(isinstance(tensor, Tensor) for tensor in value)
            },
        )
        rows = find_pseudo_rows(batch)
        with no_pixel_left_out():  # as in the whole step
            losses = losses_of(leaves, drawn, images, batch, config=config, pseudo_rows=rows)
        losses.total.backward()

    forms: dict[str, Callable[[], object]] = {
        "after the network": after_the_network,
        "whole step": our_step(config, batch, num_classes=num_classes),
    }
    for form in forms.values():
        form()
    times = times_in_turn(forms, repeats=2 * args.repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:>17}: median {value:.3f} s", flush=True)
    return at_most("share", medians["after the network"] / medians["whole step"], 0.1)


CLAIMS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "wide": wide, "lite": lite, "classes": classes, "views": views, "share": share,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
