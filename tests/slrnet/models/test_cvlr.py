"""CVLR against Algorithm 1 in loops: values, gradients, memory of the backward pass, hard inputs, both forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slrnet.models.cvlr import CrossViewLowRank, Implementation, factorize

Array = npt.NDArray[np.float64]
BOTH: tuple[Implementation, ...] = ("reference", "recompute")


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def algorithm_1(x: Array, c: Array, num_iters: int, temperature: float) -> tuple[Array, Array, Array]:
    """The paper's Algorithm 1 for one image, position by position: x (d, P), c (k, P)."""
    d, p = x.shape
    k = len(c)
    dictionary, c = np.zeros((d, k)), c.copy()
    for _ in range(num_iters):
        for j in range(k):
            mass = sum(c[j, q] for q in range(p))
            dictionary[:, j] = sum(x[:, q] * c[j, q] for q in range(p)) / mass
        for q in range(p):
            scores = [dictionary[:, j] @ x[:, q] / np.sqrt((dictionary[:, j] ** 2).sum()) for j in range(k)]
            c[:, q] = softmax(np.array(scores) / temperature)
    rebuilt = np.zeros((d, p))
    for q in range(p):
        for j in range(k):
            rebuilt[:, q] += dictionary[:, j] * c[j, q]
    return dictionary, c, rebuilt


def draw(n: int, d: int, k: int, p: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, p, generator=generator, dtype=dtype)
    return features, (2 * torch.randn(n, k, p, generator=generator, dtype=dtype)).softmax(dim=1)


def gradients(implementation: Implementation, features: Tensor, codes: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of all three outputs, so that each output's gradient is put to use."""
    features, codes = features.clone().requires_grad_(), codes.clone().requires_grad_()
    outputs = factorize(features, codes, implementation=implementation, **settings)
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum() for out in outputs
    )
    return torch.autograd.grad(total, (features, codes))  # type: ignore[arg-type]


class TestFactorize:
    @pytest.mark.parametrize("implementation", [*BOTH, "auto"])
    @pytest.mark.parametrize(("num_iters", "k", "temperature"), [(1, 3, 1.0), (2, 7, 0.5), (3, 21, 1.0), (6, 4, 3.0)])
    def test_equals_algorithm_1_in_loops(
        self, implementation: Implementation, num_iters: int, k: int, temperature: float
    ) -> None:
        features, codes = draw(2, 5, k, 9)
        out = factorize(features, codes, num_iters=num_iters, temperature=temperature, implementation=implementation)
        for n in range(2):
            expected = algorithm_1(features[n].numpy(), codes[n].numpy(), num_iters, temperature)
            for value, wanted in zip(out, expected, strict=True):
                np.testing.assert_allclose(value[n].numpy(), wanted, rtol=0, atol=1e-10)

    def test_worked_by_hand(self) -> None:
        """Positions 2 and 4 on one axis, codes (1, 0) and (1/2, 1/2): atoms (2 + 2) / 1.5 and 2 / 0.5."""
        features = torch.tensor([[[2.0, 4.0]]], dtype=torch.float64)
        codes = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]], dtype=torch.float64)
        out = factorize(features, codes, num_iters=1)
        assert torch.allclose(out.dictionary, torch.tensor([[[8 / 3, 4.0]]], dtype=torch.float64), atol=1e-12)
        assert torch.allclose(out.codes, torch.full((1, 2, 2), 0.5, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(out.reconstruction, torch.full((1, 1, 2), 10 / 3, dtype=torch.float64), atol=1e-12)

    @pytest.mark.parametrize("implementation", BOTH)
    @pytest.mark.parametrize(("num_iters", "k"), [(1, 3), (2, 5), (3, 4), (6, 3)])
    def test_gradcheck(self, implementation: Implementation, num_iters: int, k: int) -> None:
        features, codes = draw(1, 3, k, 4, seed=k)
        run = lambda x, c: tuple(factorize(x, c, num_iters=num_iters, temperature=0.8, implementation=implementation))  # noqa: E731
        assert torch.autograd.gradcheck(run, (features.requires_grad_(), codes.requires_grad_()))

    @pytest.mark.parametrize(("num_iters", "k"), [(1, 21), (3, 21), (6, 12)])
    def test_gradcheck_with_many_atoms(self, num_iters: int, k: int) -> None:
        features, codes = draw(2, 4, k, 5, seed=k)
        run = lambda x, c: tuple(factorize(x, c, num_iters=num_iters, implementation="recompute"))  # noqa: E731
        assert torch.autograd.gradcheck(run, (features.requires_grad_(), codes.requires_grad_()), fast_mode=True)

    @given(
        n=st.integers(1, 3),
        d=st.integers(1, 6),
        k=st.integers(1, 22),
        p=st.integers(1, 12),
        num_iters=st.integers(1, 6),
        temperature=st.floats(0.2, 5),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=40, deadline=None)
    def test_implementations_agree(
        self, n: int, d: int, k: int, p: int, num_iters: int, temperature: float, seed: int
    ) -> None:
        features, codes = draw(n, d, k, p, seed=seed)
        options = {"num_iters": num_iters, "temperature": temperature}
        plain = factorize(features, codes, implementation="reference", **options)  # type: ignore[arg-type]
        own = factorize(features, codes, implementation="recompute", **options)  # type: ignore[arg-type]
        for left, right in zip(plain, own, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
        for left, right in zip(
            gradients("reference", features, codes, **options),
            gradients("recompute", features, codes, **options),
            strict=True,
        ):
            assert torch.allclose(left, right, rtol=1e-8, atol=1e-8 * float(1 + left.abs().max()))
        assert torch.allclose(own.codes.sum(dim=1), torch.ones(n, p, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(own.dictionary @ own.codes, own.reconstruction, atol=1e-12)

    def test_positions_are_a_set(self) -> None:
        """Algorithm 1 sums over the positions of all views: their order, and so the views', cannot matter."""
        features, codes = draw(2, 4, 3, 10)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
        out = factorize(features, codes, num_iters=3)
        permuted = factorize(features[..., order], codes[..., order], num_iters=3)
        assert torch.allclose(permuted.dictionary, out.dictionary, atol=1e-12)
        assert torch.allclose(permuted.reconstruction, out.reconstruction[..., order], atol=1e-12)

    def test_temperature_sharpens(self) -> None:
        features, codes = draw(1, 4, 3, 10)
        sharp, soft = (factorize(features, codes, num_iters=1, temperature=t).codes.amax(dim=1) for t in (0.05, 5.0))
        assert bool((sharp > soft).all())

    @pytest.mark.parametrize("num_iters", [1, 4])
    def test_backward_keeps_the_inputs_and_one_dictionary_with_its_masses_per_iteration(self, num_iters: int) -> None:
        features, codes = draw(2, 5, 3, 40, dtype=torch.float32)
        features.requires_grad_(), codes.requires_grad_()
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = factorize(features, codes, num_iters=num_iters)
        inputs = [tensor for tensor in kept if tensor.data_ptr() in (features.data_ptr(), codes.data_ptr())]
        others = [tensor for tensor in kept if tensor.data_ptr() not in (features.data_ptr(), codes.data_ptr())]
        assert len(inputs) == 2
        assert [tuple(tensor.shape) for tensor in others] == [(num_iters, 2, 5, 3), (num_iters, 2, 3)]
        out.reconstruction.sum().backward()  # type: ignore[no-untyped-call]
        assert features.grad is not None

    @pytest.mark.parametrize("implementation", BOTH)
    @pytest.mark.parametrize("num_iters", [1, 3])
    def test_an_atom_without_mass_is_the_zero_vector(self, implementation: Implementation, num_iters: int) -> None:
        features, codes = draw(1, 4, 3, 6)
        codes = torch.cat([codes, torch.zeros(1, 1, 6, dtype=codes.dtype)], dim=1)
        first = factorize(features, codes, num_iters=1, implementation=implementation)
        assert torch.equal(first.dictionary[..., 3], torch.zeros(1, 4, dtype=codes.dtype))
        for gradient in gradients(implementation, features, codes, num_iters=num_iters):
            assert bool(gradient.isfinite().all())

    @pytest.mark.parametrize("implementation", BOTH)
    @pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4, 1e8])
    @pytest.mark.parametrize("num_iters", [1, 3])
    def test_stays_finite(self, implementation: Implementation, scale: float, num_iters: int) -> None:
        features, codes = draw(2, 4, 5, 8, dtype=torch.float32)
        codes = (codes.log() * 1e4).softmax(dim=1)  # one-hot; some atoms may have no position at all
        out = factorize(features * scale, codes, num_iters=num_iters, implementation=implementation)
        for value in (*out, *gradients(implementation, features * scale, codes, num_iters=num_iters)):
            assert bool(value.isfinite().all())
        assert torch.allclose(out.codes.sum(dim=1), torch.ones(2, 8), atol=1e-6)

    @pytest.mark.parametrize("scale", [0.0, 3e-7, 1.0])
    def test_implementations_agree_where_the_floors_act(self, scale: float) -> None:
        """The last atom's mass is 6e-8, and at 3e-7 the norms too lie below their floor, which then has no gradient."""
        features, codes = draw(1, 4, 3, 6)
        codes = torch.cat([codes, torch.full((1, 1, 6), 1e-8, dtype=codes.dtype)], dim=1)
        for left, right in zip(
            gradients("reference", features * scale, codes, num_iters=1),
            gradients("recompute", features * scale, codes, num_iters=1),
            strict=True,
        ):
            assert torch.allclose(left, right, rtol=1e-8, atol=1e-12)

    def test_nan_reaches_the_output(self) -> None:
        """A diverged network must be reported by the loss, on all ranks, not by one rank's argument check."""
        features, codes = draw(1, 3, 2, 4)
        codes[0, :, 1] = float("nan")
        assert bool(factorize(features, codes, num_iters=1).reconstruction.isnan().any())

    def test_second_derivatives_are_refused(self) -> None:
        features, codes = draw(1, 3, 2, 4)
        features.requires_grad_()
        total = factorize(features, codes, num_iters=2, implementation="recompute").reconstruction.square().sum()
        (gradient,) = torch.autograd.grad(total, features, create_graph=True)
        with pytest.raises(RuntimeError, match="factorize_backward"):
            gradient.sum().backward()  # type: ignore[no-untyped-call]

    def test_runs_in_the_inputs_precision_under_autocast(self) -> None:
        features, codes = draw(1, 3, 2, 4, dtype=torch.float32)
        plain = factorize(features, codes, num_iters=2)
        with torch.autocast("cpu", torch.bfloat16):
            inside = factorize(features, codes, num_iters=2)
        assert all(torch.equal(left, right) for left, right in zip(plain, inside, strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, c: ((x[0], c), {}), r"\(N, d, P\)"),
            (lambda x, c: ((x, c.unflatten(2, (2, 2))), {}), r"\(N, k, P\)"),
            (lambda x, c: ((x, c[..., :-1]), {}), "differ in N or P"),
            (lambda x, c: ((x, c[:1]), {}), "differ in N or P"),
            (lambda x, c: ((x, c.float()), {}), "float64 and codes torch.float32"),
            (lambda x, c: ((x, c * 1.1), {}), "sum to 1"),
            (lambda x, c: ((x, c + torch.tensor([[-1.0], [1.0]])), {}), "negative"),
            (lambda x, c: ((x, c), {"num_iters": 0}), "num_iters is 0"),
            (lambda x, c: ((x, c), {"temperature": 0.0}), "temperature is 0"),
            (lambda x, c: ((x, c), {"temperature": float("nan")}), "temperature is nan"),
            (lambda x, c: ((x, c), {"implementation": "fast"}), "'fast'; allowed are auto, reference, recompute"),
        ],
    )
    def test_mistakes_are_named(self, change: Callable[[Tensor, Tensor], Any], message: str) -> None:
        (features, codes), options = change(*draw(2, 3, 2, 4))
        with pytest.raises(ValueError, match=message):
            factorize(features, codes, **({"num_iters": 1} | options))


def views_of(sizes: list[tuple[int, int]], channels: int, k: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(2, channels, *size, generator=generator) for size in sizes]
    return features, [2 * torch.randn(2, k, *size, generator=generator) for size in sizes]


def trained_module(channels: int, **options: Any) -> CrossViewLowRank:
    """A module whose output projection is no longer the zero it starts from."""
    module = CrossViewLowRank(channels, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for layer in (module.project_in, module.project_out):
            layer.reset_parameters()
    return module


def side_by_side(maps: list[Tensor], n: int) -> Array:
    return torch.cat([view[n].detach().flatten(1) for view in maps], dim=1).double().numpy()


def weights_of(module: CrossViewLowRank) -> tuple[Array, Array, Array, Array]:
    layers = (module.project_in, module.project_out)
    w_in, b_in, w_out, b_out = (
        parameter.detach().double().numpy() for layer in layers for parameter in (layer.weight, layer.bias)
    )
    return w_in, b_in, w_out, b_out


def released_form(
    module: CrossViewLowRank, x: Array, z_1: Array, num_iters: int, temperature: float
) -> tuple[Array, Array, Array]:
    """The published checkpoints' arithmetic for one image: x (C, P) of all views, z_1 (k, P_1) logits of view 1."""
    w_in, b_in, w_out, b_out = weights_of(module)
    first = np.stack([softmax(z_1[:, q]) for q in range(z_1.shape[1])], axis=1)
    atoms = []
    for row in first:
        mean = sum(x[:, q] * row[q] for q in range(len(row))) / row.sum()
        atom = w_in @ mean + b_in
        atoms.append(atom / np.linalg.norm(atom))
    projected = np.stack([w_in @ x[:, q] + b_in for q in range(x.shape[1])], axis=1)
    codes = np.zeros((len(atoms), x.shape[1]))
    for _ in range(num_iters):
        for q in range(x.shape[1]):
            codes[:, q] = softmax(np.array([atom @ projected[:, q] for atom in atoms]) / temperature)
        for j, row in enumerate(codes):
            atom = sum(projected[:, q] * row[q] for q in range(len(row))) / row.sum()
            atoms[j] = atom / np.linalg.norm(atom)
    dictionary = np.stack(atoms, axis=1)
    rebuilt = np.maximum(dictionary @ codes, 0)
    return np.maximum(x + w_out @ rebuilt + b_out[:, None], 0), codes, dictionary


class TestCrossViewLowRank:
    sizes = ((4, 3), (2, 2), (3, 5))

    @pytest.mark.parametrize("views", [1, 2, 3])
    @pytest.mark.parametrize("num_iters", [1, 3])
    def test_paper_form_equals_loops(self, views: int, num_iters: int) -> None:
        module = trained_module(6, dim=4, num_iters=num_iters, temperature=0.7)
        features, logits = views_of(list(self.sizes[:views]), 6, 3)
        out = module(features, logits)
        w_in, b_in, w_out, b_out = weights_of(module)
        for n in range(2):
            x, z = side_by_side(features, n), side_by_side(logits, n)
            first = np.stack([softmax(z[:, q]) for q in range(z.shape[1])], axis=1)
            dictionary, codes, rebuilt = algorithm_1(w_in @ x + b_in[:, None], first, num_iters, 0.7)
            np.testing.assert_allclose(out.dictionary[n].detach(), dictionary, atol=1e-5)
            np.testing.assert_allclose(side_by_side(out.codes, n), codes, atol=1e-5)
            np.testing.assert_allclose(side_by_side(out.features, n), x + w_out @ rebuilt + b_out[:, None], atol=1e-5)

    @pytest.mark.parametrize("centered", [False, True])
    @pytest.mark.parametrize("num_iters", [1, 3])
    @pytest.mark.parametrize("views", [1, 3])
    def test_projected_atoms_equal_projected_positions(self, views: int, num_iters: int, centered: bool) -> None:
        """`recompute` never projects a position; `reference` does, as the paper writes it. All gradients agree."""
        results = []
        for implementation in ("reference", "recompute"):
            module = trained_module(
                6, dim=4, num_iters=num_iters, centered=centered, temperature=0.5, implementation=implementation
            )
            maps = views_of(list(self.sizes[:views]), 6, 3)
            inputs = [[view.requires_grad_() for view in given] for given in maps]
            out = module(*inputs)
            outputs = [*out.features, *out.codes, out.dictionary]
            generator = torch.Generator().manual_seed(5)
            weights = [torch.randn(value.shape, generator=generator) for value in outputs]
            leaves = [*inputs[0], *inputs[1], *module.parameters()]
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
        for plain, folded in zip(*results, strict=True):
            assert float((plain - folded).detach().abs().max()) <= 1e-5 * max(1.0, float(plain.detach().abs().max()))

    def test_centered_form_factorises_what_varies(self) -> None:
        module = trained_module(6, dim=4, num_iters=2, centered=True)
        features, logits = views_of([(4, 3), (2, 2)], 6, 3)
        out = module(features, logits)
        w_in, b_in, w_out, b_out = weights_of(module)
        for n in range(2):
            x, z = side_by_side(features, n), side_by_side(logits, n)
            first = np.stack([softmax(z[:, q]) for q in range(z.shape[1])], axis=1)
            varying = x - x.mean(axis=1, keepdims=True)
            dictionary, codes, rebuilt = algorithm_1(w_in @ varying + b_in[:, None], first, 2, 1.0)
            np.testing.assert_allclose(out.dictionary[n].detach(), dictionary, atol=1e-5)
            np.testing.assert_allclose(side_by_side(out.codes, n), codes, atol=1e-5)
            np.testing.assert_allclose(side_by_side(out.features, n), x + w_out @ rebuilt + b_out[:, None], atol=1e-5)

    def test_centered_codes_do_not_see_what_all_positions_share(self) -> None:
        features, logits = views_of([(4, 3), (2, 2)], 6, 3)
        shifted = [view + 50 * torch.arange(6.0)[:, None, None] for view in features]
        for centered in (True, False):
            module = trained_module(6, dim=4, centered=centered)
            left, right = module(features, logits).codes[0], module(shifted, logits).codes[0]
            assert torch.allclose(left, right, atol=1e-4) == centered

    def test_starts_as_the_identity_and_learns(self) -> None:
        module = CrossViewLowRank(6, dim=4)
        features, logits = views_of([(4, 3), (2, 2)], 6, 3)
        out = module(features, logits).features
        assert all(torch.equal(left, right) for left, right in zip(out, features, strict=True))
        sum(view.square().sum() for view in out).backward()  # type: ignore[union-attr]
        assert module.project_out.weight.grad is not None
        assert bool(module.project_out.weight.grad.any())

    def test_may_start_with_a_share_of_the_reconstruction(self) -> None:
        """Of features that the projector keeps (it is square here), one atom per position: a tenth more."""
        module = CrossViewLowRank(3, dim=3, start_share=0.1)
        features = [torch.eye(3).view(1, 3, 1, 3) * 5]
        logits = [torch.eye(3).view(1, 3, 1, 3) * 1e3]
        out = module(features, logits)
        reconstruction = out.dictionary @ out.codes[0].flatten(2)  # in the projector's frame
        expected = features[0].flatten(2) + 0.1 * module.project_in.weight.T @ reconstruction
        assert torch.allclose(out.features[0].flatten(2), expected, atol=1e-5)
        assert not torch.allclose(out.features[0], features[0], atol=0.05)

    def test_may_start_with_two_default_projectors(self) -> None:
        """PyTorch's default is uniform up to 1 / sqrt(inputs), for weights and biases."""
        module = CrossViewLowRank(64, dim=16, start="default")
        for layer, inputs in ((module.project_in, 64), (module.project_out, 16)):
            for tensor in (layer.weight, layer.bias):
                assert float(tensor.detach().abs().max()) <= inputs**-0.5
                assert float(tensor.detach().std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.4)

    @pytest.mark.parametrize("views", [1, 2, 3])
    @pytest.mark.parametrize(("num_iters", "temperature"), [(1, 1.0), (3, 0.5)])
    def test_released_form_equals_loops(self, views: int, num_iters: int, temperature: float) -> None:
        module = trained_module(6, dim=4, num_iters=num_iters, temperature=temperature, form="released")
        features, logits = views_of(list(self.sizes[:views]), 6, 3)
        out = module(features, logits)
        for n in range(2):
            x, z_1 = side_by_side(features, n), side_by_side(logits[:1], n)
            maps, codes, dictionary = released_form(module, x, z_1, num_iters, temperature)
            np.testing.assert_allclose(out.dictionary[n].detach(), dictionary, atol=2e-5)
            np.testing.assert_allclose(side_by_side(out.codes, n), codes, atol=2e-5)
            np.testing.assert_allclose(side_by_side(out.features, n), maps, atol=2e-5)

    @pytest.mark.parametrize("form", ["paper", "released"])
    def test_sizes_and_shapes_come_back(self, form: Any) -> None:
        out = trained_module(6, dim=9, form=form)(*views_of(list(self.sizes), 6, 3))
        assert [tuple(view.shape) for view in out.features] == [(2, 6, *size) for size in self.sizes]
        assert [tuple(view.shape) for view in out.codes] == [(2, 3, *size) for size in self.sizes]
        assert tuple(out.dictionary.shape) == (2, 9, 3)

    def test_the_skip_connection_is_all_that_a_silent_projector_leaves(self) -> None:
        features, logits = views_of(list(self.sizes), 6, 3)
        for form in ("paper", "released"):
            module = trained_module(6, dim=4, form=form)  # type: ignore[arg-type]
            torch.nn.init.zeros_(module.project_out.weight)
            torch.nn.init.zeros_(module.project_out.bias)
            for view, out in zip(features, module(features, logits).features, strict=True):
                assert torch.equal(out, view if form == "paper" else view.relu())

    @pytest.mark.parametrize("form", ["paper", "released"])
    def test_views_share_the_dictionary(self, form: Any) -> None:
        module = trained_module(6, dim=4, form=form)
        features, logits = views_of([(4, 3), (2, 2)], 6, 3)
        other = module([features[0], features[1] + 1], logits)
        assert not torch.allclose(other.features[0], module(features, logits).features[0], atol=1e-3)

    def test_images_do_not_mix(self) -> None:
        module = trained_module(6, dim=4)
        features, logits = views_of([(4, 3), (2, 2)], 6, 3)
        alone = module([view[1:] for view in features], [view[1:] for view in logits])
        assert torch.allclose(alone.features[0], module(features, logits).features[0][1:], atol=1e-6)

    def test_gradient_reaches_the_first_codes_in_the_paper_form_only(self) -> None:
        for form, reached in (("paper", True), ("released", False)):
            features, logits = views_of([(4, 3), (2, 2)], 6, 3)
            for view in (*features, *logits):
                view.requires_grad_()
            out = trained_module(6, dim=4, form=form)(features, logits)  # type: ignore[arg-type]
            sum(view.square().sum() for view in out.features).backward()  # type: ignore[union-attr]
            assert all(view.grad is not None and bool(view.grad.any()) for view in features)
            assert all((view.grad is not None and bool(view.grad.any())) == reached for view in logits)

    @pytest.mark.parametrize("form", ["paper", "released"])
    def test_float32_under_autocast(self, form: Any) -> None:
        module = trained_module(6, dim=4, form=form)
        features, logits = views_of([(4, 3), (2, 2)], 6, 3)
        low = [view.bfloat16() for view in features]
        with torch.autocast("cpu", torch.bfloat16):
            inside = module(low, logits)
        outside = module([view.float() for view in low], logits)
        for left, right in zip([*inside.features, *inside.codes], [*outside.features, *outside.codes], strict=True):
            assert left.dtype == torch.float32
            assert torch.equal(left, right)

    @pytest.mark.parametrize("form", ["paper", "released"])
    def test_huge_logits_stay_finite(self, form: Any) -> None:
        module = trained_module(6, dim=4, num_iters=2, form=form)
        features, logits = views_of([(4, 3), (2, 2)], 6, 3)
        features = [view.mul(1e3).requires_grad_() for view in features]
        out = module(features, [view * 1e5 for view in logits])
        sum(view.sum() for view in out.features).backward()
        tensors = [*out.features, *out.codes, *(view.grad for view in features), *(p.grad for p in module.parameters())]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"form": "Paper"}, "'paper' or 'released'"),
            ({"num_iters": 0}, "num_iters\n"),
            ({"temperature": -1.0}, "temperature\n"),
            ({"implementation": "fast"}, "'reference', 'recompute' or 'triton'"),
            ({"form": "released", "centered": True}, "centered goes with form 'paper', not 'released'"),
            ({"form": "released", "method": "free"}, "method 'free' has no form 'released'"),
        ],
    )
    def test_mistakes_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CrossViewLowRank(6, dim=4, **options)
