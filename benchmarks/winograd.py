"""3x3 convolutions for inference on the CPU: Winograd's minimal filtering against PyTorch's own.

    python benchmarks/winograd.py

Both sides run in turn on the maps that WideResNet-38 has for two images of 320x240; ratios are of median times.
Claimed: at 256 and more channels 1.5 times as fast, outputs equal within 3e-5 of the largest one.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks._turns import parse_turns, times_in_turn
from slrnet.cpu.winograd import WinogradConv2d

CLAIMED, CLAIMED_DIFFERENCE, FROM_CHANNELS = 1.5, 3e-5, 256
SHAPES = ((128, 128, 1, 120, 160), (256, 256, 1, 60, 80), (512, 512, 1, 30, 40), (512, 1024, 2, 30, 40))
"""Channels in and out, dilation, height and width."""


@torch.no_grad()
def main() -> int:
    args = parse_turns(__doc__, repeats=7)
    torch.manual_seed(0)
    missed = 0
    for inputs, outputs, rate, height, width in SHAPES:
        conv = nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate, bias=False)
        conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        maps = torch.randn(2, inputs, height, width).contiguous(memory_format=torch.channels_last)
        forms = {"direct": conv, "winograd": WinogradConv2d(conv)}
        results = {name: form(maps) for name, form in forms.items()}
        difference = float((results["direct"] - results["winograd"]).abs().max() / results["direct"].abs().max())
        times = times_in_turn({name: partial(form, maps) for name, form in forms.items()}, repeats=args.repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratio = medians["direct"] / medians["winograd"]
        claim = f" (claimed: at least {CLAIMED})" if inputs >= FROM_CHANNELS else ""
        print(
            f"{inputs} to {outputs} channels, {height}x{width}, dilation {rate}: direct {1e3 * medians['direct']:.0f} "
            f"ms, winograd {1e3 * medians['winograd']:.0f} ms, ratio {ratio:.2f}{claim}, difference {difference:.1e}"
        )
        missed += (ratio < CLAIMED and inputs >= FROM_CHANNELS) or difference > CLAIMED_DIFFERENCE
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
