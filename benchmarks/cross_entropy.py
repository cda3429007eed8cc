"""Compares the compiled CPU kernel for cross-entropy of resized logits, with gradient, to PyTorch's operators.

    python benchmarks/cross_entropy.py

Both alternate on eight 24x24 logit maps that are resized to 192x192 labels, as in a step of EfficientNet-Lite0. Ratios
compare median times. The operators are the fallback when no compiler is available. Claim: losses and gradients are
equal up to rounding, in at most half the time at 21 classes and a quarter at 201.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks._claims import at_most
from benchmarks._turns import parse_turns, times_in_turn
from slrnet.cpu.compiled import compiled
from slrnet.losses.segmentation import balanced_cross_entropy
from slrnet.ops.kernels import SWITCH

CLAIMED = {21: 0.5, 201: 0.25}
CLAIMED_DIFFERENCE = 2e-5


def main() -> int:
    args = parse_turns(__doc__, repeats=15)
    if compiled("cross_entropy") is None:
        return 1
    held = [compare(classes, args.repeats) for classes in CLAIMED]
    return int(not all(held))


def compare(classes: int, repeats: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(8, classes, 24, 24, generator=generator)
    logits = logits.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (8, 192, 192), generator=generator)

    def kernel() -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        loss = balanced_cross_entropy(leaf, labels)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    def operators() -> tuple[Tensor, Tensor]:
        with mock.patch.dict(os.environ, {SWITCH: "off"}):
            return kernel()

    forms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"kernel": kernel, "operators": operators}
    pairs = zip(*(form() for form in forms.values()), strict=True)
    difference = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
    times = times_in_turn(forms, repeats=repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{classes} classes: " + ", ".join(f"{name} {1e3 * median:.1f} ms" for name, median in medians.items()))
    near = at_most("largest relative difference", difference, CLAIMED_DIFFERENCE)
    return (
        at_most("time of the kernel over the operators", medians["kernel"] / medians["operators"], CLAIMED[classes])
        and near
    )


if __name__ == "__main__":
    sys.exit(main())
