"""The modules of Table 8 against slow loops, and what all of them have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from slrnet.config import CvlrConfig
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.low_rank import EMAttention, Hamburger, SeparateLowRank, build_low_rank

Array = npt.NDArray[np.float64]
METHODS = ("cvlr", "separate", "free", "emau", "nmf", "vq", "cd")
SIZES = ((4, 3), (2, 2), (3, 5))
OPTIONS: dict[str, Any] = {"dim": 5, "num_bases": 4, "num_iters": 2}


def views_of(*sizes: tuple[int, int], channels: int = 6, k: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, channels, *size, generator=generator) for size in sizes]
    return features, [2 * torch.randn(2, k, *size, generator=generator) for size in sizes]


def module_of(method: Any, **options: Any) -> CrossViewLowRank:
    """A module whose output projection is no longer the zero it starts from."""
    torch.manual_seed(3)
    module = build_low_rank(CvlrConfig(method=method, **OPTIONS | options), 6)
    module.project_out.reset_parameters()
    module.project_in.bias.data.uniform_(-0.1, 0.1)
    return module


def projected(module: CrossViewLowRank, view: Tensor, n: int) -> Array:
    out = module.project_in(view[n].flatten(1).T).T
    return np.asarray(out.detach().double().numpy())


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=0))
    return np.asarray(powers / powers.sum(axis=0))


def unit(columns: Array) -> Array:
    return np.asarray(columns / (np.linalg.norm(columns, axis=0) + 1e-6))


def means(x: Array, codes: Array) -> Array:
    """Column j: the mean of x's columns, weighted by row j of the codes."""
    return np.stack([sum(x[:, p] * row[p] for p in range(len(row))) / (row.sum() + 1e-6) for row in codes], axis=1)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_shapes(self, method: str) -> None:
        module = module_of(method)
        out = module(*views_of(*SIZES))
        k = 3 if module.class_codes else 4
        assert [tuple(view.shape) for view in out.features] == [(2, 6, *size) for size in SIZES]
        assert [tuple(view.shape) for view in out.codes] == [(2, k, *size) for size in SIZES]
        shared = method in ("cvlr", "free")
        assert tuple(out.dictionary.shape) == ((2, 5, k) if shared else (2, 3, 5, k))

    def test_low_rank_and_skip_connection(self, method: str) -> None:
        """What is added to the features is a linear map of D C, plus a constant."""
        module = module_of(method).eval()
        features, logits = views_of(SIZES[0])
        out = module(features, logits)
        dictionary = out.dictionary if out.dictionary.ndim == 3 else out.dictionary[:, 0]
        rebuilt = dictionary @ out.codes[0].flatten(2)
        added = module.project_out(rebuilt.transpose(1, 2)).transpose(1, 2).unflatten(2, SIZES[0])
        assert torch.allclose(out.features[0], features[0] + added, atol=1e-5)

    def test_starts_as_the_identity(self, method: Any) -> None:
        module = build_low_rank(CvlrConfig(method=method, **OPTIONS), 6)
        features, logits = views_of(*SIZES[:2])
        out = module(features, logits)
        assert all(torch.equal(left, right) for left, right in zip(out.features, features, strict=True))

    def test_what_learns_gets_a_finite_gradient(self, method: str) -> None:
        module = module_of(method)
        features, logits = views_of(*SIZES[:2])
        features = [view.requires_grad_() for view in features]
        torch.stack([view.square().sum() for view in module(features, logits).features]).sum().backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or bool(parameter.grad.isfinite().all())
        assert all(view.grad is not None for view in features)

    def test_evaluating_is_repeatable(self, method: str) -> None:
        module = module_of(method).eval()
        features, logits = views_of(*SIZES[:2])
        first, again = (module(features, logits) for _ in range(2))
        assert all(torch.equal(left, right) for left, right in zip(first.features, again.features, strict=True))

    def test_views_mix_only_through_a_shared_dictionary(self, method: str) -> None:
        module = module_of(method).eval()
        features, logits = views_of(*SIZES[:2])
        other = module([features[0], features[1] + torch.arange(4.0).view(2, 2)], logits)
        same = torch.allclose(other.features[0], module(features, logits).features[0], atol=1e-6)
        assert same == (method not in ("cvlr", "free"))

    def test_centered(self, method: str) -> None:
        features, logits = views_of(SIZES[0])
        shifted = [view + 50 * torch.arange(6.0)[:, None, None] for view in features]
        for centered in (True, False):
            module = module_of(method, centered=centered).eval()
            left, right = module(features, logits).codes[0], module(shifted, logits).codes[0]
            assert torch.allclose(left, right, atol=1e-3) == centered

    def test_float32_under_autocast(self, method: str) -> None:
        module = module_of(method).eval()
        features, logits = views_of(SIZES[0])
        with torch.autocast("cpu", torch.bfloat16):
            inside = module([view.bfloat16() for view in features], logits)
        outside = module([view.bfloat16().float() for view in features], logits)
        assert inside.features[0].dtype == torch.float32
        assert torch.equal(inside.features[0], outside.features[0])

    def test_hard_features_stay_finite(self, method: str) -> None:
        module = module_of(method, num_iters=6)
        for scale in (0.0, 1e4):
            features = [(view * scale).requires_grad_() for view in views_of(*SIZES[:2])[0]]
            out = module(features, views_of(*SIZES[:2])[1])
            torch.stack([view.sum() for view in out.features]).sum().backward()
            assert all(bool(view.isfinite().all()) for view in (*out.features, *out.codes))
            assert all(view.grad is not None and bool(view.grad.isfinite().all()) for view in features)


def test_separate_is_cvlr_on_each_view_alone() -> None:
    module = module_of("separate")
    together = CrossViewLowRank(6, dim=5, num_iters=2)
    together.load_state_dict(module.state_dict())
    features, logits = views_of(*SIZES)
    out = module(features, logits)
    for index, view in enumerate(features):
        alone = together([view], [logits[index]])
        assert torch.allclose(out.features[index], alone.features[0], atol=1e-6)
        assert torch.allclose(out.dictionary[:, index], alone.dictionary, atol=1e-6)


@pytest.mark.parametrize("number", [1, 3])
def test_views_and_logits_must_be_equally_many(number: int) -> None:
    features, logits = views_of(*SIZES[:2])
    with pytest.raises(ValueError, match="zip"):
        module_of("separate")(features, (2 * logits)[:number])


@pytest.mark.parametrize("method", ["free", "emau", "nmf", "vq", "cd"])
def test_free_atoms_need_no_logits(method: str) -> None:
    features, _ = views_of(*SIZES)
    assert [view.shape for view in module_of(method)(features, []).features] == [view.shape for view in features]


def test_free_atoms_start_at_random() -> None:
    module = module_of("free").train()
    assert not module.class_codes
    features, _ = views_of(*SIZES[:2])
    torch.manual_seed(0)
    first = module(features, []).features[0]
    assert not torch.equal(first, module(features, []).features[0])
    torch.manual_seed(0)
    assert torch.equal(first, module(features, []).features[0])


class TestEMAttention:
    def test_equals_loops(self) -> None:
        module = module_of("emau", num_iters=3).eval()
        assert isinstance(module, EMAttention)
        features, logits = views_of(SIZES[0])
        out = module(features, logits)
        for n in range(2):
            x, bases = projected(module, features[0], n), module.bases.double().numpy()
            codes = np.zeros((4, x.shape[1]))
            for _ in range(3):
                codes = np.stack([softmax(bases.T @ x[:, p]) for p in range(x.shape[1])], axis=1)
                bases = unit(means(x, codes))
            np.testing.assert_allclose(out.codes[0][n].flatten(1), codes, atol=1e-5)
            np.testing.assert_allclose(out.dictionary[n, 0], bases, atol=1e-5)

    def test_bases_follow_in_training_only(self) -> None:
        module = module_of("emau")
        assert isinstance(module, EMAttention)
        features, logits = views_of(SIZES[0])
        before = module.bases.clone()
        mean = module.eval()(features, logits).dictionary[:, 0].mean(dim=0)
        assert torch.equal(module.bases, before)
        module.train()(features, logits)
        assert torch.allclose(module.bases, 0.9 * before + 0.1 * mean, atol=1e-6)
        assert "bases" in module.state_dict()


class TestHamburger:
    def first_bases(self) -> Array:
        drawn = torch.rand((2, 5, 4), generator=torch.Generator().manual_seed(0))
        return np.asarray(drawn.double().numpy())

    def test_nmf_equals_loops(self) -> None:
        module = module_of("nmf", num_iters=3).eval()
        features, logits = views_of(SIZES[0])
        out = module(features, logits)
        for n in range(2):
            x, bases = np.maximum(projected(module, features[0], n), 0), unit(self.first_bases()[n])
            codes = softmax(bases.T @ x)
            for _ in range(3):
                codes = codes * (bases.T @ x) / (bases.T @ bases @ codes + 1e-6)
                bases = bases * (x @ codes.T) / (bases @ codes @ codes.T + 1e-6)
            codes = codes * (bases.T @ x) / (bases.T @ bases @ codes + 1e-6)
            np.testing.assert_allclose(out.dictionary[n, 0], bases, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(out.codes[0][n].detach().flatten(1), codes, rtol=1e-3, atol=1e-5)

    def test_nmf_comes_nearer(self) -> None:
        """Lee and Seung: a multiplicative update never increases the distance."""
        distances = []
        for num_iters in (1, 2, 5, 20):
            module = module_of("nmf", num_iters=num_iters).eval()
            features, logits = views_of(SIZES[0])
            out = module(features, logits)
            x = np.maximum(projected(module, features[0], 0), 0)
            distances.append(np.linalg.norm(x - (out.dictionary[0, 0] @ out.codes[0][0].flatten(1)).detach().numpy()))
            assert bool((out.codes[0] >= 0).all())
            assert bool((out.dictionary >= 0).all())
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 0.8 * distances[0]

    @pytest.mark.parametrize("method", ["vq", "cd"])
    def test_by_similarity_equals_loops(self, method: str) -> None:
        module = module_of(method, num_iters=3, temperature=0.5).eval()
        features, logits = views_of(SIZES[0])
        out = module(features, logits)
        for n in range(2):
            x, bases = projected(module, features[0], n), unit(2 * self.first_bases()[n] - 1)
            for _ in range(3):
                bases = means(x, softmax(unit(bases).T @ unit(x) / 0.5))
                bases = unit(bases) if method == "cd" else bases
            if method == "vq":
                codes = softmax(unit(bases).T @ unit(x) / 0.5)
            else:
                codes = np.linalg.inv(bases.T @ bases + 0.1 * np.eye(4)) @ bases.T @ x
            np.testing.assert_allclose(out.dictionary[n, 0], bases, atol=1e-4)
            np.testing.assert_allclose(out.codes[0][n].detach().flatten(1), codes, atol=1e-4)

    def test_the_dictionary_has_no_gradient_and_the_codes_have(self) -> None:
        for method in ("nmf", "vq", "cd"):
            out = module_of(method)(*views_of(SIZES[0]))
            assert not out.dictionary.requires_grad
            assert out.codes[0].requires_grad


@pytest.mark.parametrize(
    ("module", "method", "allowed"),
    [
        (CrossViewLowRank, "separate", "cvlr, free"),
        (SeparateLowRank, "cvlr", "separate"),
        (EMAttention, "cvlr", "emau"),
        (Hamburger, "emau", "nmf, vq, cd"),
    ],
)
def test_a_method_of_another_class_is_refused(module: type[CrossViewLowRank], method: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{module.__name__} has no method '{method}'; allowed are {allowed}$"):
        module(6, method=method)
