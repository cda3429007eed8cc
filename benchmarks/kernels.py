"""Registers, spills, shared memory and memory traffic of the Triton kernels; needs no GPU.

    python benchmarks/kernels.py

Compiles every factorization kernel for each compute capability, (d, k), feature type and tile that a launch can choose,
and the cross-entropy kernel for each capability. Claims: no kernel spills a register at (256, 21), (256, 81) and
(512, 201), and the forward pass of the factorization moves at most 1.15 times the minimum bytes: each pass reads the
features once, and the last one writes the reconstruction and the codes. The count covers traffic to and from the GPU's
memory. Dictionaries, which all programs read, and features that neighboring programs read at the same time come from
the L2 cache after the first read.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slrnet.ops import cross_entropy_triton as cross_entropy_gpu
from slrnet.ops import factorize_triton as kernels

SHAPES = ((256, 21), (256, 81), (512, 201))
CLAIMED_TRAFFIC = 1.15
POSITIONS = 8242
COUNTS = ("d", "k", "positions", "splits", "old_height", "old_width", "classes", "height", "width", "shared")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
OF_FEATURES = {"features", "values", "codes", "source", "grad_codes", "reconstruction", "grad_first"}


FIGURES = (r"Used (\d+) registers", r"(\d+) bytes spill")
"""Patterns in ptxas' log: registers per thread, and bytes of register spills (stores and loads)."""


Launch = tuple[str, Any, dict[str, Any], triton.Config]
"""A kernel's name, the kernel, its constants, and the tile and warps of the launch."""


class Resources(NamedTuple):
    registers: int
    spilled: int
    shared: int


def main() -> int:
    args = parse_arguments()
    print(
        f"{'kernel':<24}{'cc':>4}{'(d, k)':>12}{'type':>6}{'tile':>6}{'stages':>8}{'warps':>7}"
        f"{'registers':>11}{'spilled':>9}{'shared':>9}"
    )
    spilling = 0
    for shape, dtype in ((shape, dtype) for shape in args.shape for dtype in TYPES):
        for launch in launches(*shape, dtype):
            spilling += sum(show(launch, f"({shape[0]}, {shape[1]})", dtype, cc) for cc in args.capability)
    spilling += sum(show(of_cross_entropy(), "-", torch.float32, cc) for cc in args.capability)
    print(f"kernels that spill: {spilling} (claimed: 0)\n")
    print(
        f"{'N':>3}{'(d, k)':>12}{'type':>6}{'splits':>8}{'T=1':>8}{'T=3':>8}{'T=6':>8}   bytes moved / minimum, forward"
    )
    worst = 0.0
    for n in (2, 4, 16):
        for (d, k), dtype in ((shape, dtype) for shape in args.shape for dtype in TYPES):
            ratios = [traffic(n, d, k, dtype, num_iters) for num_iters in (1, 3, 6)]
            worst = max(worst, *ratios)
            splits = kernels.plan_of(n, d, k, POSITIONS, dtype).splits
            print(f"{n:>3}{f'({d}, {k})':>12}{TYPES[dtype]:>6}{splits:>8}" + "".join(f"{r:>8.3f}" for r in ratios))
    print(f"largest ratio {worst:.3f} (claimed: at most {CLAIMED_TRAFFIC})")
    return int(spilling > 0 or worst > CLAIMED_TRAFFIC)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capability",
        type=int,
        nargs="+",
        default=[80, 90, 100],
        help="compute capabilities times ten (default: 80 90 100)",
    )
    parser.add_argument("--shape", type=pair, nargs="+", default=SHAPES, metavar="D,K", help="dictionary sizes")
    return parser.parse_args()


def pair(text: str) -> tuple[int, int]:
    d, k = text.split(",")
    return int(d), int(k)


def show(launch: Launch, shape: str, dtype: torch.dtype, capability: int) -> bool:
    """Prints a kernel's resources; returns True if it spills."""
    name, kernel, constants, config = launch
    found = compile_kernel(kernel, constants, config, dtype, capability)
    print(
        f"{name:<24}{capability:>4}{shape:>12}{TYPES[dtype]:>6}{config.kwargs.get('TILE', '-'):>6}"
        f"{config.num_stages:>8}{config.num_warps:>7}{found.registers:>11}{found.spilled:>9}{found.shared:>9}",
        flush=True,
    )
    return found.spilled > 0


def of_cross_entropy() -> Launch:
    constants = {"PIXELS": cross_entropy_gpu.PIXELS, "BLOCK": cross_entropy_gpu.BLOCK}
    kernel = cross_entropy_gpu._cross_entropy_of_cells
    return kernel.__name__, kernel, constants, triton.Config({}, num_warps=cross_entropy_gpu.WARPS)


def launches(d: int, k: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Yields every kernel with its constants, once per tile that a launch can choose."""
    plan = kernels.plan_of(16, d, k, POSITIONS, dtype)
    sums = plan.tile() | {"ROWS": plan.rows}
    wide = plan.tile() | {"WIDE": plan.wide}
    finish = {"ROWS": triton.next_power_of_2(d), "COLUMNS": kernels.COLUMNS}
    for name, variants in {
        "_sum_for_dictionary": [sums | {"FIRST": True}, sums | {"FIRST": False}],
        "_finish_dictionary": [finish],
        "_rebuild": [wide],
        "_sum_for_directions": [sums | {"LAST": True}, sums | {"LAST": False}],
        "_grad_of_features": [wide | {"LAST": True}, wide | {"LAST": False}],
        "_finish_gradient": [finish | {"LAST": True}, finish | {"LAST": False}],
        "_backward_first_codes": [wide],
    }.items():
        kernel = getattr(kernels, name)
        for constants in variants:
            if hasattr(kernel, "configs"):
                yield from (
                    (name, kernel.fn, constants, config) for config in kernels.fitting_tiles(kernel.configs, constants)
                )
            else:
                yield name, kernel, constants, triton.Config({}, num_warps=kernels.FINISHING_WARPS)


def compile_kernel(
    kernel: Any, constants: dict[str, Any], config: triton.Config, dtype: torch.dtype, capability: int
) -> Resources:
    constants = constants | config.kwargs
    names = kernel.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in COUNTS:
            return "i32"
        if name == "labels":
            return "*i64"
        if name == "inverse_temperature":
            return "fp32"
        return f"*{TYPES[dtype] if name in OF_FEATURES else 'fp32'}"

    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as said:
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = (
            True  # a cached kernel has no log
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    log = said.getvalue()
    if "Used" not in log:
        raise SystemExit(
            f"ptxas did not report the registers of {kernel.__name__}; this script needs another version of Triton"
        )
    return Resources(*(sum(map(int, re.findall(pattern, log))) for pattern in FIGURES), compiled.metadata.shared)


def traffic(n: int, d: int, k: int, dtype: torch.dtype, num_iters: int) -> float:
    """Returns the bytes that the forward pass moves, divided by the minimum."""
    plan = kernels.plan_of(n, d, k, POSITIONS, dtype)
    features, codes = n * d * POSITIONS * dtype.itemsize, n * k * POSITIONS * dtype.itemsize
    least = (num_iters + 1) * features + codes + features + codes  # reads, first codes; reconstruction, last codes
    atoms = n * (d * k + k) * 4
    sums = 2 * plan.splits * atoms  # partial sums, written and read
    finished = 2 * atoms  # the dictionary, written and read
    return (least + num_iters * (sums + finished)) / least


if __name__ == "__main__":
    sys.exit(main())
