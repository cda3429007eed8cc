"""Speed and agreement of the refinement against the released one, on the same masks.

    python benchmarks/refine.py --peer-dir FOLDER

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet); its `models/mods/pamr.py` is imported from there.
Both run in turn, so that a busy machine slows both; the ratio is that of the median times. Without the option only
this project's times are printed. Claimed: at least 20 times as fast at (4, 21, 81, 81), equal within 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._turns import times_in_turn
from slrnet.calibration.refine import DILATIONS, refine

CLAIMED_RATIO = 20.0
CLAIMED_DIFFERENCE = 1e-5
Refinement = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    images, probs = make_inputs(args.batch, args.classes, args.size)
    forms: dict[str, Refinement] = {"slrnet": refine}
    if args.peer_dir is not None:
        forms["released"] = load_released(args.peer_dir)
    outputs = {name: form(images, probs) for name, form in forms.items()}  # also warms up
    runs = {name: partial(form, images, probs) for name, form in forms.items()}
    times = times_in_turn(runs, repeats=args.repeats)
    print(f"{tuple(probs.shape)}, 10 iterations, dilations {DILATIONS}, {args.threads} thread(s), {args.repeats} runs")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:>9}: median {medians[name]:.4f} s, fastest {min(values):.4f} s, slowest {max(values):.4f} s")
    few = {"present": partial(refine, images, probs[:, : args.present])}
    present = times_in_turn(few, repeats=args.repeats)["present"]
    print(f"   slrnet: median {statistics.median(present):.4f} s when only {args.present} channels are present")
    if "released" in forms:
        difference = float((outputs["slrnet"] - outputs["released"]).abs().max())
        ratio = medians["released"] / medians["slrnet"]
        print(f"ratio of medians {ratio:.1f} (claimed: at least {CLAIMED_RATIO:.0f})")
        print(f"largest difference {difference:.1e} (claimed: at most {CLAIMED_DIFFERENCE:.0e})")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument(
        "--present", type=int, default=3, help="channels that image labels leave, for the second figure"
    )
    parser.add_argument("--size", type=int, default=81)
    return parser.parse_args()


def make_inputs(batch: int, classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Pictures with flat, smooth and noisy parts, and random masks."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).mul(1.6).sub(0.3).clamp(0, 1)
    images[:, :, : size // 4] = images[:, :, :1, :1]  # one colour, as in a saturated sky
    return images, (3 * torch.randn(batch, classes, size, size, generator=generator)).softmax(dim=1)


def load_released(folder: Path) -> Refinement:
    path = folder / "models" / "mods" / "pamr.py"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; give the folder of a checkout of DesertsP/SLRNet as --peer-dir")
    spec = importlib.util.spec_from_file_location("released_pamr", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    released = module.PAMR(num_iter=10, dilations=list(DILATIONS))

    def run(images: Tensor, probs: Tensor) -> Tensor:
        with torch.no_grad():
            return released(images, probs)  # type: ignore[no-any-return]

    return run


if __name__ == "__main__":
    main()
