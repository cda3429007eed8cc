"""Compares the factorization in time and memory: `recompute` with plain autograd, the module with the released one.

    python benchmarks/cvlr.py --peer-dir FOLDER

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet); its factorization is imported from
`models/slrnet.py`. Both sides alternate; ratios compare median times of forward and backward together. Claims, for
features (2, 256, 8242): `recompute` takes at most 1.15 times as long as `reference` and, at k = 201 and T = 6, a third
of its memory; the tensors that it saves for the backward pass grow by one dictionary and its code masses per iteration.
For four images the module is at least 1.3 times as fast as the released one.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks._memory import forget_peak, peak_memory
from benchmarks._released import released_module
from benchmarks._turns import times_in_turn
from slrnet.models.cvlr import CrossViewLowRank, Implementation, factorize

N, DIM, POSITIONS = 2, 256, 8242
BASES = (21, 81, 201)
ITERATIONS = (1, 3, 6)
CLAIMED_TIME, CLAIMED_MEMORY, CLAIMED_KEPT, CLAIMED_RELEASED = 1.15, 1 / 3, 1.05, 1.3


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(step_memory(args.peak))
        return 0
    missed = [
        *compare_times(args.repeats),
        *compare_kept(),
        *compare_peaks(args.threads),
        *(compare_released(args.peer_dir, args.repeats) if args.peer_dir else []),
    ]
    print("all claims hold" if not missed else f"missed: {', '.join(missed)}")
    return int(bool(missed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peak", choices=["reference", "recompute"], help="print the peak memory of this implementation and exit"
    )
    return parser.parse_args()


def compare_times(repeats: int) -> list[str]:
    missed = []
    for k in BASES:
        for num_iters in ITERATIONS:
            forms = {name: step_of(name, k, num_iters) for name in ("reference", "recompute")}
            medians = measure(forms, repeats)
            ratio = medians["recompute"] / medians["reference"]
            print(
                f"k {k:>3}, T {num_iters}: reference {medians['reference']:.3f} s, "
                f"recompute {medians['recompute']:.3f} s, ratio {ratio:.2f} (claimed: at most {CLAIMED_TIME})",
                flush=True,
            )
            missed += [f"time at k {k}, T {num_iters}"] if ratio > CLAIMED_TIME else []
    return missed


def compare_kept() -> list[str]:
    missed = []
    for k in BASES:
        kept = {num_iters: kept_bytes(k, num_iters) for num_iters in ITERATIONS}
        allowed = CLAIMED_KEPT * kept[1] + 5 * N * DIM * k * 4
        print(
            f"k {k:>3}: saved for the backward pass {kept[1] / 2**20:.2f} MiB at T 1, {kept[6] / 2**20:.2f} MiB at T 6 "
            f"(claimed: at most {allowed / 2**20:.2f})"
        )
        missed += [f"kept bytes at k {k}"] if kept[6] > allowed else []
    return missed


def compare_peaks(threads: int) -> list[str]:
    peaks = {}
    for name in ("reference", "recompute"):
        command = [sys.executable, __file__, "--peak", name, "--threads", str(threads)]
        peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ratio = peaks["recompute"] / peaks["reference"]
    print(
        f"k 201, T 6: a step needs {peaks['reference']:.0f} MiB with reference and "
        f"{peaks['recompute']:.0f} MiB with recompute in addition to inputs, outputs and gradients, ratio {ratio:.2f} "
        f"(claimed: at most {CLAIMED_MEMORY:.2f})"
    )
    return ["peak memory"] if ratio > CLAIMED_MEMORY else []


def compare_released(folder: Path, repeats: int) -> list[str]:
    missed = []
    for num_iters in ITERATIONS:
        medians = measure({"slrnet": module_step(num_iters), "released": released_step(folder, num_iters)}, repeats)
        ratio = medians["released"] / medians["slrnet"]
        print(
            f"module with projectors, 4 images, k 21, T {num_iters}: released {medians['released']:.3f} s, "
            f"slrnet {medians['slrnet']:.3f} s, ratio {ratio:.2f} (claimed: at least {CLAIMED_RELEASED})"
        )
        missed += [f"released module at T {num_iters}"] if ratio < CLAIMED_RELEASED else []
    return missed


def inputs(k: int, positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, DIM, positions, generator=generator)
    codes = (2 * torch.randn(N, k, positions, generator=generator)).softmax(dim=1)
    return features.requires_grad_(), codes.requires_grad_()


def step_of(implementation: Implementation, k: int, num_iters: int, positions: int = POSITIONS) -> Callable[[], None]:
    features, codes = inputs(k, positions)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        out = factorize(features, codes, num_iters=num_iters, implementation=implementation)
        torch.autograd.grad([out.reconstruction, out.codes], [features, codes], [weight, codes])

    return step


def kept_bytes(k: int, num_iters: int) -> int:
    features, codes = inputs(k)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        factorize(features, codes, num_iters=num_iters, implementation="recompute")
    return sum(kept.values())


def step_memory(implementation: Implementation) -> float:
    """Returns the peak MiB of a step at k = 201 and T = 6 in addition to inputs, outputs and their gradients."""
    k = 201
    step_of(implementation, k, 6, positions=100)()  # exclude what libraries allocate on first use
    step = step_of(implementation, k, 6)
    results = [tensor.detach().clone() for tensor in inputs(k) * 2]  # allocates memory of the outputs' size in advance
    forget_peak()
    before = peak_memory()
    del results
    step()
    return max(0.0, peak_memory() - before)


def module_step(num_iters: int) -> Callable[[], None]:
    module = CrossViewLowRank(DIM, dim=DIM, num_iters=num_iters)
    views, logits = module_inputs()
    return training_step(module, views, lambda: module(views, logits).features)


def released_step(folder: Path, num_iters: int) -> Callable[[], None]:
    released = released_module(folder, "models.slrnet")
    module = released.FactorizationReconstruction(DIM, num_iters=num_iters)
    first = released.DictionaryInitialization()
    views, logits = module_inputs()

    def run() -> list[Tensor]:
        start = first(views[0].detach(), logits[0].detach()).permute(0, 2, 1)
        joint = torch.cat([view.flatten(2) for view in views], dim=2).permute(0, 2, 1)
        return [module(joint, start)[0]]

    return training_step(module, views, run)


def module_inputs() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((81, 81), (41, 41))
    views = [torch.randn(4, DIM, *size, generator=generator).requires_grad_() for size in sizes]
    return views, [torch.randn(4, 21, *size, generator=generator) for size in sizes]


def training_step(module: nn.Module, views: list[Tensor], run: Callable[[], list[Tensor]]) -> Callable[[], None]:
    leaves = [*views, *module.parameters()]

    def step() -> None:
        total = torch.stack([view.square().mean() for view in run()]).sum()
        torch.autograd.grad(total, leaves, allow_unused=True)

    return step


def measure(forms: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Returns the median seconds of each implementation."""
    for form in forms.values():
        form()
    return {name: statistics.median(times) for name, times in times_in_turn(forms, repeats=repeats).items()}


if __name__ == "__main__":
    sys.exit(main())
