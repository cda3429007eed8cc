"""Dilated 3x3 convolutions on small maps on the CPU: products with the map alone against PyTorch's own.

    python benchmarks/few_taps.py

Both sides run in turn, forward and backward, on the maps that the ASPP gets: 4,096 channels of WideResNet-38 at crop
321 (41x41, and 21x21 of the second view), 320 of EfficientNet-Lite0 at crop 192 (12x12 and 6x6); ratios are of median
times. Claimed: equal within 1e-4 of the largest output, and at no rate slower.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._turns import parse_turns, times_in_turn
from slrnet.cpu.few_taps import _FewTaps

CASES = (
    (2, 4096, 41, (12, 24, 36)), (2, 4096, 21, (12, 24, 36)), (8, 320, 12, (6, 12, 18)), (8, 320, 6, (6, 12, 18)),
)  # fmt: skip
CLAIMED_DIFFERENCE, CLAIMED_RATIO = 1e-4, 1.0


def main() -> int:
    args = parse_turns(__doc__, repeats=5)
    held = True
    for batch, channels, size, rates in CASES:
        x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = (torch.randn(256, channels, 3, 3) / channels).contiguous(memory_format=torch.channels_last)
        weight.requires_grad_()
        for rate in rates:
            forms = {
                "slrnet": partial(step, x, weight, rate, ours=True),
                "PyTorch": partial(step, x, weight, rate, ours=False),
            }
            ours, theirs = ([one.detach() for one in form()] for form in forms.values())
            difference = max(
                float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, theirs, strict=True)
            )
            times = times_in_turn(forms, repeats=args.repeats)
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratio = medians["PyTorch"] / medians["slrnet"]
            print(
                f"{channels} channels, {size}x{size}, rate {rate}: {medians['slrnet']:.4f} s, PyTorch "
                f"{medians['PyTorch']:.4f} s, ratio {ratio:.2f}, difference {difference:.0e}",
                flush=True,
            )
            held = held and difference <= CLAIMED_DIFFERENCE and ratio >= CLAIMED_RATIO
    print(f"claimed: ratios of at least {CLAIMED_RATIO:g}, differences of at most {CLAIMED_DIFFERENCE:.0e}")
    return 0 if held else 1


def step(x: Tensor, weight: Tensor, rate: int, *, ours: bool) -> tuple[Tensor, ...]:
    """Output and gradients."""
    out = _FewTaps.apply(x, weight, rate) if ours else F.conv2d(x, weight, padding=rate, dilation=rate)
    return out, *torch.autograd.grad(out.sum() / 7 + (out * out).sum(), (x, weight))


if __name__ == "__main__":
    sys.exit(main())
