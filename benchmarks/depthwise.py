"""Dilated depthwise convolutions on the CPU: interleaved maps against PyTorch's own.

    python benchmarks/dilated.py

Both sides run in turn, forward and backward, on four images of 1,152 channels as in EfficientNet-Lite0; ratios are of
median times. Claimed: equal results; at dilation 2 (output stride 16) twice as fast, at dilation 4 (stride 8) 5 times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks._turns import times_in_turn
from slrnet.models.depthwise import DepthwiseConv2d

CLAIMED = {2: 2.0, 4: 5.0}
CHANNELS, KERNEL = 1152, 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    missed = 0
    for rate, claimed in CLAIMED.items():
        conv = nn.Conv2d(
            CHANNELS, CHANNELS, KERNEL, padding=rate * (KERNEL // 2), dilation=rate, groups=CHANNELS, bias=False
        )
        forms = {"dilated": conv, "interleaved": DepthwiseConv2d(conv)}
        maps = torch.randn(4, CHANNELS, 7 * rate, 7 * rate).contiguous(memory_format=torch.channels_last)
        difference = float((forms["dilated"](maps) - forms["interleaved"](maps)).detach().abs().max())
        steps = {name: step_of(form, maps) for name, form in forms.items()}
        for step in steps.values():
            step()
        times = times_in_turn(steps, repeats=args.repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratio = medians["dilated"] / medians["interleaved"]
        print(
            f"dilation {rate}, {7 * rate}x{7 * rate}: dilated {1e3 * medians['dilated']:.0f} ms, interleaved "
            f"{1e3 * medians['interleaved']:.0f} ms, ratio {ratio:.1f} (claimed: at least {claimed}), "
            f"largest difference {difference:.1e}"
        )
        missed += ratio < claimed or difference > 1e-4
    return int(missed > 0)


def step_of(form: nn.Module, maps: torch.Tensor) -> Callable[[], None]:
    leaf = maps.clone().requires_grad_()
    leaves = [leaf, *form.parameters()]

    def step() -> None:
        torch.autograd.grad(form(leaf).sum(), leaves)

    return step


if __name__ == "__main__":
    sys.exit(main())
