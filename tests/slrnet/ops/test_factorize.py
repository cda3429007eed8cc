"""The factorization as an operator: compiled, exported, checkpointed; and flat in memory.

Under distributed training it is tested as a part of the network, in tests/slrnet/training/test_trainer_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slrnet.models.cvlr import CrossViewLowRank, factorize
from slrnet.ops import factorize as factorization


def draw(n: int = 2, d: int = 5, k: int = 3, p: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, p, generator=generator, dtype=dtype)
    return features.requires_grad_(), (2 * torch.randn(n, k, p, generator=generator, dtype=dtype)).softmax(dim=1)


def gradients(module: nn.Module, views: list[Tensor], logits: list[Tensor]) -> list[Tensor]:
    total = torch.stack([view.square().sum() for view in module(views, logits).features]).sum()
    return list(torch.autograd.grad(total, [*views, *logits, *module.parameters()]))


def module_and_inputs() -> tuple[CrossViewLowRank, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    module = CrossViewLowRank(6, dim=4, num_iters=2)
    module.project_out.reset_parameters()
    sizes = ((4, 3), (2, 2))
    views = [torch.randn(2, 6, *size).requires_grad_() for size in sizes]
    return module, views, [torch.randn(2, 3, *size).requires_grad_() for size in sizes]


@pytest.mark.slow
def test_operator_checks_of_torch() -> None:
    """Schema, fake tensors and the registered gradient, also with sizes that are not known beforehand."""
    features, codes = draw(dtype=torch.float64)
    arguments = (features, codes.requires_grad_(), 2, 0.7, "recompute")
    assert set(torch.library.opcheck(factorization.factorize_op, arguments).values()) == {"SUCCESS"}


def plain_sums(features: Tensor, atoms: Tensor, offset: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    codes = ((atoms.transpose(1, 2) @ features + offset.unsqueeze(2)) / temperature).softmax(dim=1)
    return features @ codes.transpose(1, 2), codes.sum(dim=2)


def draw_atoms() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = draw(p=23, dtype=torch.float64)[0].detach().requires_grad_()
    atoms = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    return features, atoms, torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("block", [5, 2048])
def test_assigned_sums_equal_plain_autograd(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorization, "BLOCK", block)
    inputs = draw_atoms()
    sums, expected = (form(*inputs, 0.7) for form in (factorization.assigned_sums, plain_sums))
    weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype) for out in expected]
    for left, right in zip(
        [*sums, *torch.autograd.grad(sums, inputs, weights)],
        [*expected, *torch.autograd.grad(expected, inputs, weights)],
        strict=True,
    ):
        assert torch.allclose(left, right, atol=1e-12)


def test_assigned_sums_pass_the_checks_of_torch() -> None:
    checks = torch.library.opcheck(factorization.assigned_sums, (*draw_atoms(), 0.7))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_compiles_as_a_whole() -> None:
    module, views, logits = module_and_inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for left, right in zip(gradients(module, views, logits), gradients(compiled, views, logits), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_exports_in_plain_operators_for_any_size() -> None:
    module = module_and_inputs()[0]
    side = torch.export.Dim("side", min=2, max=64)
    sizes = [{2: side, 3: side}]
    example = ([torch.randn(2, 6, 4, 4)], [torch.randn(2, 3, 4, 4)])
    program = torch.export.export(module.eval(), example, dynamic_shapes=(sizes, sizes))
    assert "slrnet" not in str(program.graph)
    other = ([torch.randn(2, 6, 7, 7)], [torch.randn(2, 3, 7, 7)])
    assert torch.allclose(program.module()(*other).features[0], module(*other).features[0], atol=1e-5)


def test_activation_checkpointing() -> None:
    module, views, logits = module_and_inputs()
    plain = gradients(module, views, logits)
    total = torch.stack(
        [view.square().sum() for view in checkpoint(module, views, logits, use_reentrant=False).features]
    ).sum()
    again = torch.autograd.grad(total, [*views, *logits, *module.parameters()])
    for left, right in zip(plain, again, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("num_iters", [1, 3])
def test_blocks_of_positions_do_not_matter(num_iters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, codes = draw(p=23, dtype=torch.float64)
    codes.requires_grad_()

    def results() -> list[Tensor]:
        out = factorize(features, codes, num_iters=num_iters, implementation="recompute")
        total = torch.stack([value.sin().sum() for value in out]).sum()
        return [*out, *torch.autograd.grad(total, [features, codes])]

    whole = results()
    monkeypatch.setattr(factorization, "BLOCK", 5)
    assert all(torch.allclose(left, right, atol=1e-12) for left, right in zip(whole, results(), strict=True))


def test_no_tensor_of_the_backward_pass_is_as_large_as_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the gradients that it returns."""
    monkeypatch.setattr(factorization, "BLOCK", 8)
    features, codes = draw(d=4, k=6, p=400)
    codes.requires_grad_()
    out = factorize(features, codes, num_iters=4, implementation="recompute")
    large: list[tuple[str, tuple[int, ...]]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not func.is_view and result.numel() >= codes.numel() // 2:
                large.append((str(func), tuple(result.shape)))
            return result

    arguments = (
        features.detach(),
        codes.detach(),
        torch.stack([out.dictionary.detach()] * 4),
        torch.ones(4, 2, 6),
        (torch.zeros_like(out.dictionary), torch.zeros_like(codes), torch.zeros_like(features)),
    )
    with Watch():
        factorization._backward(*arguments, 1.0)
    assert {shape for _, shape in large} <= {tuple(features.shape), tuple(codes.shape)}
    assert len(large) <= 2


@pytest.mark.parametrize("implementation", ["reference", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(implementation: str, dtype: torch.dtype) -> None:
    features, codes = (value.detach() for value in draw(p=60))
    low = factorize(features.to(dtype), codes.to(dtype), num_iters=2, implementation=implementation)  # type: ignore[arg-type]
    full = factorize(features.to(dtype).float(), codes.to(dtype).float(), num_iters=2)
    assert (low.dictionary.dtype, low.codes.dtype, low.reconstruction.dtype) == (torch.float32, dtype, dtype)
    for left, right in zip(low, full, strict=True):
        assert float((left.float() - right).abs().max() / right.abs().max()) < 1e-2
