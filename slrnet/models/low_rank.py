"""The low-rank modules that the paper compares CVLR with (Table 8), behind CVLR's own interface.

All of them factorise the features of each view on its own: X (d x P) is approximated by D C with k atoms, between the
same two projectors and the same skip connection as CVLR. Written from the papers named below.

Letters: N images, d feature dimension, k atoms of the dictionary, P positions of one view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from slrnet.models.cvlr import (
    CrossViewLowRank,
    Implementation,
    LowRankViews,
    apply_linear,
    build_projectors,
    check_settings,
    draw_start,
    factorize,
)

__all__ = [
    "EMAttention",
    "Hamburger",
    "LowRankModule",
    "SeparateLowRank",
    "build_low_rank",
]

EPS = 1e-6
RIDGE = 0.1
"""beta of the ridge regression that gives the codes of concept decomposition."""
Method = Literal["cvlr", "separate", "free", "emau", "nmf", "vq", "cd"]
Decomposition = Literal["nmf", "vq", "cd"]


class _PerView(nn.Module):
    """Projectors, skip connection and the loop over views; subclasses factorise (N, d, P).

    Attributes:
        class_codes: whether an atom stands for a class, so that codes can be compared with class scores and each other.
    """

    class_codes = False

    def __init__(self, channels: int, *, dim: int, num_iters: int, temperature: float, centered: bool) -> None:
        super().__init__()
        check_settings(num_iters, temperature)
        self.project_in, self.project_out = build_projectors(channels, dim)
        self.num_iters = num_iters
        self.temperature = temperature
        self.centered = centered

    def forward(self, features: Sequence[Tensor], logits: Sequence[Tensor]) -> LowRankViews:
        """As `CrossViewLowRank.forward`; the dictionaries of all views come back as (N, V, d, k).

        Args:
            features: per view (N, C, h, w).
            logits: per view (N, k, h, w) where atoms are classes; not looked at where they are not.
        """
        maps, codes, dictionaries = [], [], []
        with torch.autocast(features[0].device.type, enabled=False):
            for index, view in enumerate(features):
                positions = view.float().flatten(2)
                first = logits[index].float().flatten(2).softmax(dim=1) if self.class_codes else None
                varying = positions - positions.mean(dim=2, keepdim=True) if self.centered else positions
                dictionary, own, rebuilt = self._factorise(apply_linear(self.project_in, varying), first)
                maps.append((positions + apply_linear(self.project_out, rebuilt)).unflatten(2, view.shape[-2:]))
                codes.append(own.unflatten(2, view.shape[-2:]))
                dictionaries.append(dictionary)
        return LowRankViews(maps, codes, torch.stack(dictionaries, dim=1))

    def _factorise(self, features: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Dictionary (N, d, k), codes (N, k, P) and reconstruction (N, d, P) of one view's features."""
        raise NotImplementedError


class SeparateLowRank(_PerView):
    """CVLR with a dictionary of its own for each view (Table 8, "Separate dictionary").

    Args:
        channels: channels C of the feature maps.
        dim: d.
        num_iters: T >= 1.
        temperature: tau > 0.
        centered: factorise what varies over the view's positions only.
        implementation: see `slrnet.models.cvlr.factorize`.
    """

    class_codes = True

    def __init__(
        self,
        channels: int,
        *,
        dim: int = 256,
        num_iters: int = 1,
        temperature: float = 1.0,
        centered: bool = False,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(channels, dim=dim, num_iters=num_iters, temperature=temperature, centered=centered)
        self.implementation = implementation

    def _factorise(self, features: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert first is not None
        return factorize(
            features,
            first,
            num_iters=self.num_iters,
            temperature=self.temperature,
            implementation=self.implementation,
        )


class EMAttention(_PerView):
    """Expectation-maximisation attention (Li et al. 2019): T iterations without gradient, bases that move slowly.

    Neither bases nor codes carry a gradient, so the input projector, which acts through them alone, stays as it
    starts: an orthogonal map. In training the bases move towards the batch's mean, over all ranks where there are
    several.

    Args:
        channels: channels C of the feature maps.
        dim: d.
        num_bases: k.
        num_iters: T >= 1; the authors take 3.
        temperature: tau > 0 of the responsibilities' softmax; the authors take 1.
        momentum: share of the old bases that a training step keeps.
        centered: factorise what varies over the view's positions only.
    """

    bases: Tensor

    def __init__(
        self,
        channels: int,
        *,
        dim: int = 256,
        num_bases: int = 64,
        num_iters: int = 3,
        temperature: float = 1.0,
        momentum: float = 0.9,
        centered: bool = False,
    ) -> None:
        super().__init__(channels, dim=dim, num_iters=num_iters, temperature=temperature, centered=centered)
        self.project_in.requires_grad_(False)
        self.momentum = momentum
        self.register_buffer("bases", _unit(torch.randn(dim, num_bases) * (2 / num_bases) ** 0.5, dim=0))

    @torch.no_grad()
    def _factorise(self, features: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        bases, codes = self.bases.expand(len(features), -1, -1), features.new_zeros(())
        for _ in range(self.num_iters):
            codes = (bases.transpose(1, 2) @ features / self.temperature).softmax(dim=1)
            bases = _unit(_weighted_means(features, codes), dim=1)
        if self.training:
            self._follow(bases.mean(dim=0))
        return bases, codes, bases @ codes

    def _follow(self, mean: Tensor) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        self.bases.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)


class Hamburger(_PerView):
    """Matrix decomposition between two linear maps (Geng et al. 2021): T iterations, gradient through one step.

    `nmf` is non-negative factorisation by multiplicative updates, of features after a ReLU; `vq` soft k-means by cosine
    similarity; `cd` concept decomposition: spherical k-means for the dictionary, ridge regression for the codes. The
    dictionary starts at random in every forward pass and is found without gradient; the codes are then computed once
    more, and this step carries the gradient.

    Args:
        channels: channels C of the feature maps.
        decomposition: `nmf`, `vq` or `cd`.
        dim: d.
        num_bases: k.
        num_iters: T >= 1; the authors take 6 for training.
        temperature: tau > 0 of the softmax of cosine similarities (`vq`, `cd`) and of the first codes (`nmf`).
        centered: factorise what varies over the view's positions only.
    """

    def __init__(
        self,
        channels: int,
        *,
        decomposition: Decomposition = "nmf",
        dim: int = 256,
        num_bases: int = 64,
        num_iters: int = 6,
        temperature: float = 1.0,
        centered: bool = False,
    ) -> None:
        super().__init__(channels, dim=dim, num_iters=num_iters, temperature=temperature, centered=centered)
        if decomposition not in ("nmf", "vq", "cd"):
            raise ValueError(f"decomposition is {decomposition!r}; allowed are nmf, vq, cd")
        self.decomposition = decomposition
        self.num_bases = num_bases

    def _factorise(self, features: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        bases = draw_start(torch.rand, (*features.shape[:2], self.num_bases), features, training=self.training)
        if self.decomposition == "nmf":
            dictionary, codes = self._non_negative(features.relu(), _unit(bases, dim=1))
        else:
            dictionary, codes = self._by_similarity(features, _unit(2 * bases - 1, dim=1))
        return dictionary, codes, dictionary @ codes

    def _non_negative(self, features: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            codes = (dictionary.transpose(1, 2) @ features / self.temperature).softmax(dim=1)
            for _ in range(self.num_iters):
                codes = _multiplied_codes(features, dictionary, codes)
                ratio = features @ codes.transpose(1, 2) / (dictionary @ (codes @ codes.transpose(1, 2)) + EPS)
                dictionary = dictionary * ratio
        return dictionary, _multiplied_codes(features, dictionary, codes)

    def _by_similarity(self, features: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for _ in range(self.num_iters):
                dictionary = _weighted_means(features, self._similar(features, dictionary))
                if self.decomposition == "cd":
                    dictionary = _unit(dictionary, dim=1)
        if self.decomposition == "vq":
            return dictionary, self._similar(features, dictionary)
        gram = dictionary.transpose(1, 2) @ dictionary
        gram = gram + RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return dictionary, torch.linalg.solve(gram, dictionary.transpose(1, 2) @ features)

    def _similar(self, features: Tensor, dictionary: Tensor) -> Tensor:
        cosines = _unit(dictionary, dim=1).transpose(1, 2) @ _unit(features, dim=1)
        return (cosines / self.temperature).softmax(dim=1)


LowRankModule = CrossViewLowRank | SeparateLowRank | EMAttention | Hamburger
"""Any module of Table 8."""


def build_low_rank(
    method: Method,
    channels: int,
    *,
    dim: int,
    num_bases: int,
    num_iters: int,
    temperature: float,
    form: Literal["paper", "released"],
    centered: bool,
    implementation: Implementation,
) -> LowRankModule:
    """Builds the module that `cvlr.method` names; see `slrnet.config.CvlrConfig` for the arguments.

    Raises:
        ValueError: an unknown method, or settings that the module refuses.
    """
    shared = {"dim": dim, "num_iters": num_iters, "temperature": temperature, "centered": centered}
    if method in ("cvlr", "free"):
        bases = num_bases if method == "free" else None
        return CrossViewLowRank(
            channels,
            form=form,
            num_bases=bases,
            implementation=implementation,
            **shared,  # type: ignore[arg-type]
        )
    if method == "separate":
        return SeparateLowRank(channels, implementation=implementation, **shared)  # type: ignore[arg-type]
    if method == "emau":
        return EMAttention(channels, num_bases=num_bases, **shared)  # type: ignore[arg-type]
    if method in ("nmf", "vq", "cd"):
        return Hamburger(channels, decomposition=method, num_bases=num_bases, **shared)  # type: ignore[arg-type]
    raise ValueError(f"method is {method!r}; allowed are cvlr, separate, free, emau, nmf, vq, cd")


def _unit(vectors: Tensor, *, dim: int) -> Tensor:
    norm: Tensor = vectors.norm(dim=dim, keepdim=True)
    return vectors / (norm + EPS)


def _weighted_means(features: Tensor, codes: Tensor) -> Tensor:
    """Means of the features (N, d, P), weighted by the codes (N, k, P): (N, d, k)."""
    return features @ (codes / (codes.sum(dim=2, keepdim=True) + EPS)).transpose(1, 2)


def _multiplied_codes(features: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    """One multiplicative update of non-negative codes."""
    wanted = dictionary.transpose(1, 2) @ features
    return codes * wanted / (dictionary.transpose(1, 2) @ dictionary @ codes + EPS)
