"""Depthwise convolutions on the CPU: ours against PyTorch's own, forward and backward.

    python benchmarks/depthwise.py

Both sides run in turn on eight images of layers of EfficientNet-Lite0 at crop 192, in float32 and, where the processor
multiplies matrices of it, in bfloat16; ratios are of median times. Claimed: results equal up to rounding; the dilated
layers 1.1 times as fast, all others not slower, and in bfloat16 all of them twice as fast.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks._turns import parse_turns, times_in_turn
from slrnet.cpu.depthwise import DepthwiseConv2d
from slrnet.models.network import mixed_precision

SLACK = 0.1
"""Of what counts as not slower: timings vary."""
CLAIMED_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Layer:
    channels: int
    size: int
    kernel: int
    dilation: int = 1
    stride: int = 1

    def build(self) -> nn.Conv2d:
        padding = self.dilation * (self.kernel // 2)
        return nn.Conv2d(
            self.channels, self.channels, self.kernel, stride=self.stride, padding=padding, dilation=self.dilation,
            groups=self.channels, bias=False,
        )  # fmt: skip


LAYERS = (
    Layer(1152, 12, 5, dilation=2), Layer(1152, 6, 5, dilation=2), Layer(1152, 24, 5, dilation=4), Layer(672, 12, 5),
    Layer(672, 6, 5), Layer(240, 24, 5), Layer(144, 48, 5, stride=2),
)  # fmt: skip


def main() -> int:
    args = parse_turns(__doc__, repeats=7)
    with mixed_precision("auto", torch.device("cpu")):
        capable = torch.is_autocast_enabled("cpu")
    dtypes = (torch.float32, torch.bfloat16) if capable else (torch.float32,)
    held = [compare(layer, dtype, args.repeats) for dtype in dtypes for layer in LAYERS]
    return int(not all(held))


def compare(layer: Layer, dtype: torch.dtype, repeats: int) -> bool:
    torch.manual_seed(0)
    conv = layer.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    maps = torch.randn(8, layer.channels, layer.size, layer.size).contiguous(memory_format=torch.channels_last)
    steps = {name: step_of(form, maps, dtype) for name, form in (("own", DepthwiseConv2d(conv)), ("theirs", conv))}
    results = {name: step() for name, step in steps.items()}
    difference = max(
        float((own - theirs).abs().max() / theirs.abs().max())
        for own, theirs in zip(results["own"], results["theirs"], strict=True)
    )
    times = times_in_turn(steps, repeats=repeats)
    own, theirs = (1e3 * statistics.median(times[name]) for name in ("own", "theirs"))
    claimed = 2.0 if dtype == torch.bfloat16 else 1.1 if layer.dilation > 1 else 1.0 - SLACK
    held = theirs / own >= claimed and difference <= CLAIMED_DIFFERENCE[dtype]
    print(
        f"{layer.channels} channels, {layer.size}x{layer.size}, kernel {layer.kernel}, dilation {layer.dilation}, "
        f"stride {layer.stride}, {str(dtype).removeprefix('torch.')}: {own:.1f} ms, PyTorch {theirs:.1f} ms, ratio "
        f"{theirs / own:.2f} (claimed: at least {claimed}), relative difference {difference:.0e}"
        f"{'' if held else '  NOT HELD'}",
        flush=True,
    )
    return held


def step_of(form: nn.Module, maps: torch.Tensor, dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """Gives the outputs and the gradients of the maps and the weights, in float32."""
    leaf = maps.to(dtype).requires_grad_()
    leaves = [leaf, *form.parameters()]

    def step() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = form(leaf)
        slopes = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return [one.detach().float() for one in (out, *torch.autograd.grad(out, leaves, slopes))]

    return step


if __name__ == "__main__":
    sys.exit(main())
