"""The Triton kernels against plain autograd, in Triton's interpreter; and compiled for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from slrnet.models.cvlr import Implementation, factorize
from slrnet.ops import factorize_triton as kernels

ROOT = Path(__file__).resolve().parents[3]


def run(
    implementation: Implementation, features: Tensor, codes: Tensor, num_iters: int, temperature: float
) -> list[Tensor]:
    """All outputs and all gradients, in float32, of a sum that gives every output a gradient."""
    features, codes = features.clone().requires_grad_(), codes.clone().requires_grad_()
    out = factorize(features, codes, num_iters=num_iters, temperature=temperature, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    total = sum((value.float() * torch.randn(value.shape, generator=generator)).sum() for value in out)
    gradients = torch.autograd.grad(total, (features, codes))  # type: ignore[arg-type]
    return [value.detach().float() for value in (*out, *gradients)]


def draw(n: int, d: int, k: int, p: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, p, generator=generator)
    return features.to(dtype), (2 * torch.randn(n, k, p, generator=generator)).softmax(dim=1).to(dtype)


def errors(left: list[Tensor], right: list[Tensor]) -> list[float]:
    """Largest differences, relative to each tensor's largest value."""
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(left, right, strict=True)]


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small features are cut into as many stretches of positions and slices of rows as large ones."""
    monkeypatch.setattr(kernels, "PARTIAL_SHARE", 100.0)
    monkeypatch.setattr(kernels, "SUMS", 16 * 32)


@pytest.mark.parametrize(
    ("shape", "num_iters", "temperature"),
    [((1, 5, 3, 7), 1, 1.0), ((2, 33, 4, 65), 3, 0.5), ((1, 20, 81, 40), 2, 2.0)],
)
@pytest.mark.slow
def test_equals_plain_autograd(shape: tuple[int, int, int, int], num_iters: int, temperature: float) -> None:
    features, codes = draw(*shape)
    expected = run("reference", features, codes, num_iters, temperature)
    assert max(errors(run("triton", features, codes, num_iters, temperature), expected)) < 1e-5


@pytest.mark.usefixtures("many_parts")
@pytest.mark.slow
def test_equals_plain_autograd_in_many_parts() -> None:
    features, codes = draw(1, 40, 21, 100)
    plan = kernels.plan_of(1, 40, 21, 100, features.dtype)
    assert plan.splits > 1
    assert plan.slices > 1
    expected = run("reference", features, codes, 1, 1.0)
    assert max(errors(run("triton", features, codes, 1, 1.0), expected)) < 1e-5


@pytest.mark.usefixtures("many_parts")
@pytest.mark.slow
def test_same_bits_again() -> None:
    features, codes = draw(1, 20, 5, 70)
    first, again = (run("triton", features, codes, 1, 1.0) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_half_precision_features_are_summed_in_float32(dtype: torch.dtype) -> None:
    features, codes = draw(1, 24, 5, 30, dtype)
    out = run("triton", features, codes, 1, 1.0)
    assert max(errors(out, run("reference", features.float(), codes.float(), 1, 1.0))) < 1e-2
    result = factorize(features, codes, num_iters=1, implementation="triton")
    assert (result.dictionary.dtype, result.codes.dtype, result.reconstruction.dtype) == (torch.float32, dtype, dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e4])
def test_hard_inputs(scale: float) -> None:
    """An atom without mass, one with hardly any; features that are zero, tiny or huge."""
    features, codes = draw(1, 6, 3, 20)
    codes = torch.cat([codes, torch.zeros(1, 1, 20), torch.full((1, 1, 20), 1e-8)], dim=1)
    out, expected = (run(name, features * scale, codes, 1, 1.0) for name in ("triton", "reference"))  # type: ignore[arg-type]
    assert bool(torch.equal(out[0][..., 3], torch.zeros(1, 6)))
    for left, right in zip(out, expected, strict=True):
        assert bool(left.isfinite().all())
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_nan_reaches_the_output() -> None:
    features, codes = draw(1, 5, 3, 20)
    features[0, 0, 4] = float("nan")
    assert bool(factorize(features, codes, num_iters=1, implementation="triton").reconstruction.isnan().any())


def test_strided_features() -> None:
    features, codes = draw(1, 6, 3, 20)
    spread = features.transpose(1, 2).contiguous().transpose(1, 2)
    assert not spread.is_contiguous()
    left, right = (run("triton", value, codes, 1, 1.0) for value in (features, spread))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("n", "d", "k", "p"), [(1, 1, 1, 1), (2, 256, 21, 8242), (16, 512, 201, 8242), (4, 1024, 256, 99)]
)
def test_plans_cover_everything(n: int, d: int, k: int, p: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plan = kernels.plan_of(n, d, k, p, dtype)
        assert plan.slices * plan.rows >= d
        assert plan.atoms >= max(k, 16)
        assert 1 <= plan.splits <= max(1, p)
        partial = 2 * plan.splits * n * d * k * 4
        assert plan.splits == 1 or partial <= kernels.PARTIAL_SHARE * n * d * p * dtype.itemsize


@pytest.mark.parametrize(
    ("features", "k", "message"),
    [
        (torch.zeros(1, 4, 8, dtype=torch.float64), 3, "got torch.float64; use 'recompute'"),
        (torch.zeros(1, 2000, 8), 3, "got d = 2000 and k = 3; use 'recompute'"),
        (torch.zeros(1, 4, 8), 5000, "got d = 4 and k = 5000"),
        (torch.zeros(1, 4, 8, device="meta"), 3, "takes CPU tensors, as TRITON_INTERPRET=1 is set, and got meta"),
    ],
)
def test_what_cannot_run_is_named(features: Tensor, k: int, message: str) -> None:
    problem = kernels.misfit(features, k)
    assert problem is not None
    assert message in problem
    codes = features.new_full((1, k, 8), 1 / k)
    with pytest.raises(ValueError, match="implementation 'triton' takes"):
        factorize(features, codes, num_iters=1, implementation="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="takes CUDA tensors, and got cpu; 'auto', 'recompute' and 'reference'"):
        factorize(*draw(1, 4, 3, 8), num_iters=1, implementation="triton")


@pytest.mark.slow
def test_compiles_for_a_gpu_without_spilling() -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--capability", "90", "--shape", "64,7"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels that spill: 0" in done.stdout
    assert "_backward_first_codes" in done.stdout
