"""How large masks are, against the true ones: `python benchmarks/mask_sizes.py RUN [RUN ...] --data SHARDS`.

Predicts training images, with their image labels known, and groups them by the share of the image that the objects
truly cover. A network that knows where objects end claims much of an image with a large object and little of one with
a small object; one that does not claims about the same share of both. Claim: none; it shows where mIoU is lost.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from tabulate import tabulate  # noqa: E402

from slrnet.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from slrnet.config import apply_overrides  # noqa: E402
from slrnet.data.catalog import IGNORE_INDEX  # noqa: E402
from slrnet.data.epoch_plan import choose_subset  # noqa: E402
from slrnet.data.eval_loader import EvalLoader  # noqa: E402
from slrnet.data.manifest import load_dataset  # noqa: E402
from slrnet.evaluation.examine import EvaluationTarget  # noqa: E402

EDGES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
"""Groups of images, by the share of the image that objects cover."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="runs or checkpoints")
    parser.add_argument("--data", required=True, metavar="DIR", help="shards whose images have masks")
    parser.add_argument("--split", default="train", metavar="NAME", help="default: train")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="most images (default: 100)")
    options = parser.parse_args()
    for run in options.runs:
        shares = measure(run, options.data, options.split, options.images)
        print(f"{run.name}: {len(shares)} images of {options.split}, image labels known, one scale")
        print(table(shares))
        print(f"correlation of true and claimed shares: {np.corrcoef(shares[:, 0], shares[:, 1])[0, 1]:.2f}\n")


def measure(run: Path, data: str, split: str, most: int) -> npt.NDArray[np.float64]:
    """Per image: true and claimed share of objects, and the share of each that both have."""
    checkpoint, shards = load_checkpoint(run), load_dataset(data)
    changes = ["evaluation.gating=image_labels", "evaluation.background_power=1.0"]
    target = EvaluationTarget.of(replace(checkpoint, config=apply_overrides(checkpoint.config, changes)), shards)
    indices = choose_subset(shards.split(split), most, seed=0, among=shards.split(split).with_masks)
    rows = []
    for sample in EvalLoader(shards, split=split, indices=indices):
        assert sample.pixel_labels is not None
        known = sample.pixel_labels != IGNORE_INDEX
        truth, claim = sample.pixel_labels[known] > 0, target.predict(sample).argmax(dim=0)[known] > 0
        both, true, claimed = (float(part.sum()) for part in (truth & claim, truth, claim))
        rows.append((true / len(truth), claimed / len(truth), both / max(1.0, true), both / max(1.0, claimed)))
    return np.array(rows)


def table(shares: npt.NDArray[np.float64]) -> str:
    groups = np.digitize(shares[:, 0], EDGES[1:-1])
    rows = [
        [f"{100 * EDGES[group]:g} to {100 * EDGES[group + 1]:g}", len(own), *(100 * own.mean(axis=0))]
        for group in range(len(EDGES) - 1)
        if len(own := shares[groups == group])
    ]
    head = ["objects cover, %", "images", "truly", "claimed", "of the object found", "of the claim right"]
    return str(tabulate(rows, head, tablefmt="github", floatfmt=".0f"))


if __name__ == "__main__":
    main()
