"""The low-rank modules that the paper compares CVLR with (Table 8), with CVLR's interface.

All of them factorize the features of each view separately: D C with k atoms approximates X (d x P), between the same
two projectors and with the same skip connection as CVLR. Written from the papers named below.

Letters: N images, V views, C channels, d feature dimension, k atoms of the dictionary, P positions of one view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slrnet.config import CvlrConfig
from slrnet.models.cvlr import (
    CrossViewLowRank,
    LowRankViews,
    apply_linear,
    build_projectors,
    check_settings,
    draw_start,
)

__all__ = ["EMAttention", "Hamburger", "LowRankModule", "SeparateLowRank", "build_low_rank"]

EPS = 1e-6
RIDGE = 0.1
"""beta of the ridge regression that gives the codes of concept decomposition."""
MOMENTUM = 0.9
"""Share of the old bases that a training step of EM attention keeps."""


class SeparateLowRank(CrossViewLowRank):
    """CVLR with one dictionary per view (Table 8, "Separate dictionary"); arguments as for `CrossViewLowRank`."""

    def forward(self, features: Sequence[Tensor], logits: Sequence[Tensor]) -> LowRankViews:
        """As `CrossViewLowRank.forward`, with the dictionaries of all views side by side, (N, V, d, k)."""
        views = [super(SeparateLowRank, self).forward([x], [z]) for x, z in zip(features, logits, strict=True)]
        return LowRankViews(
            [view.features[0] for view in views],
            [view.codes[0] for view in views],
            torch.stack([view.dictionary for view in views], dim=1),
        )


class _FreeAtoms(nn.Module):
    """Projectors, skip connection and the loop over views, for atoms that stand for no class."""

    class_codes = False

    def __init__(
        self,
        channels: int,
        *,
        dim: int = 256,
        num_bases: int = 64,
        num_iters: int = 6,
        temperature: float = 1.0,
        centered: bool = False,
    ) -> None:
        super().__init__()
        check_settings(num_iters, temperature)
        self.project_in, self.project_out = build_projectors(channels, dim)
        self.num_bases = num_bases
        self.num_iters = num_iters
        self.temperature = temperature
        self.centered = centered

    def forward(self, features: Sequence[Tensor], logits: Sequence[Tensor]) -> LowRankViews:
        """As `CrossViewLowRank.forward`, with the dictionaries of all views side by side, (N, V, d, k).

        Args:
            features: per view (N, C, h, w).
            logits: ignored.
        """
        maps, codes, dictionaries = [], [], []
        with torch.autocast(features[0].device.type, enabled=False):
            for view in features:
                positions = view.float().flatten(2)
                varying = positions - positions.mean(dim=2, keepdim=True) if self.centered else positions
                dictionary, view_codes = self._factorize(apply_linear(self.project_in, varying))
                added = apply_linear(self.project_out, dictionary @ view_codes)
                maps.append((positions + added).unflatten(2, view.shape[-2:]))
                codes.append(view_codes.unflatten(2, view.shape[-2:]))
                dictionaries.append(dictionary)
        return LowRankViews(maps, codes, torch.stack(dictionaries, dim=1))

    def _factorize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Dictionary (N, d, k) and codes (N, k, P) of one view's projected features (N, d, P)."""
        raise NotImplementedError

    def _similarity_codes(self, features: Tensor, dictionary: Tensor) -> Tensor:
        return (dictionary.transpose(1, 2) @ features / self.temperature).softmax(dim=1)


class EMAttention(_FreeAtoms):
    """Expectation-maximization attention (Li et al. 2019): T iterations without gradient, bases that change slowly.

    Neither bases nor codes carry a gradient, so the input projector, which acts only through them, keeps its orthogonal
    start. Each training step moves the bases toward the batch's mean bases, averaged over all ranks.

    Args:
        channels: C, channels of the feature maps.
        dim: d, dimension of the atoms.
        num_bases: k, the number of atoms.
        num_iters: T >= 1; the authors use 3.
        options: `temperature` > 0 of the responsibilities' softmax, which the authors set to 1 (the default), and
            `centered`: factorize the features less their mean over the view's positions.

    Raises:
        ValueError: num_iters < 1 or temperature <= 0.
    """

    bases: Tensor

    def __init__(
        self, channels: int, *, dim: int = 256, num_bases: int = 64, num_iters: int = 3, **options: Any
    ) -> None:
        super().__init__(channels, dim=dim, num_bases=num_bases, num_iters=num_iters, **options)
        self.project_in.requires_grad_(False)
        self.register_buffer("bases", _unit(torch.randn(dim, num_bases) * (2 / num_bases) ** 0.5, dim=0))

    @torch.no_grad()
    def _factorize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        bases, codes = self.bases.expand(len(features), -1, -1), features.new_zeros(())
        for _ in range(self.num_iters):
            codes = self._similarity_codes(features, bases)
            bases = _unit(_weighted_means(features, codes), dim=1)
        if self.training:
            self._follow(bases.mean(dim=0))
        return bases, codes

    def _follow(self, mean: Tensor) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        self.bases.mul_(MOMENTUM).add_(mean, alpha=1 - MOMENTUM)


class Hamburger(_FreeAtoms):
    """Matrix decomposition between two linear maps (Geng et al. 2021): T iterations, gradient through one step.

    `nmf` is non-negative factorization by multiplicative updates, of features after a ReLU. `vq` is soft k-means by
    cosine similarity. `cd` is concept decomposition: spherical k-means for the dictionary, ridge regression for the
    codes. Each forward pass starts from a random dictionary and iterates without gradient. One last update of the codes
    carries the gradient.

    Args:
        channels: C, channels of the feature maps.
        decomposition: `nmf`, `vq` or `cd`.
        options: `dim`, `num_bases`, `num_iters` (the authors train with 6, the default) and `centered` as for
            `EMAttention`; `temperature` > 0 of the softmax of cosine similarities and, for `nmf`, of the first codes.

    Raises:
        ValueError: an unknown decomposition, num_iters < 1 or temperature <= 0.
    """

    def __init__(self, channels: int, *, decomposition: Literal["nmf", "vq", "cd"] = "nmf", **options: Any) -> None:
        super().__init__(channels, **options)
        if decomposition not in ("nmf", "vq", "cd"):
            raise ValueError(f"decomposition is {decomposition!r}; allowed are nmf, vq, cd")
        self.decomposition = decomposition

    def _factorize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        start = draw_start(torch.rand, (*features.shape[:2], self.num_bases), features, training=self.training)
        if self.decomposition == "nmf":
            return self._non_negative(features.relu(), _unit(start, dim=1))
        return self._by_similarity(features, _unit(2 * start - 1, dim=1))

    def _non_negative(self, features: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            codes = self._similarity_codes(features, dictionary)
            for _ in range(self.num_iters):
                codes = _multiplied_codes(features, dictionary, codes)
                ratio = features @ codes.transpose(1, 2) / (dictionary @ (codes @ codes.transpose(1, 2)) + EPS)
                dictionary = dictionary * ratio
        return dictionary, _multiplied_codes(features, dictionary, codes)

    def _by_similarity(self, features: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        directions = _unit(features, dim=1)
        with torch.no_grad():
            for _ in range(self.num_iters):
                codes = self._similarity_codes(directions, _unit(dictionary, dim=1))
                dictionary = _weighted_means(features, codes)
                if self.decomposition == "cd":
                    dictionary = _unit(dictionary, dim=1)
        if self.decomposition == "vq":
            return dictionary, self._similarity_codes(directions, _unit(dictionary, dim=1))
        gram = dictionary.transpose(1, 2) @ dictionary
        gram = gram + RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return dictionary, torch.linalg.solve(gram, dictionary.transpose(1, 2) @ features)


LowRankModule = CrossViewLowRank | EMAttention | Hamburger
"""Any module of Table 8."""


def build_low_rank(config: CvlrConfig, channels: int) -> LowRankModule:
    """Builds the module that `cvlr.method` names.

    Args:
        config: the settings of the module.
        channels: C, channels of the feature maps that come in and go out.
    """
    shared: dict[str, Any] = {
        "dim": config.dim,
        "num_iters": config.num_iters,
        "temperature": config.temperature,
        "centered": config.centered,
    }
    if config.method == "emau":
        return EMAttention(channels, num_bases=config.num_bases, **shared)
    if config.method in ("nmf", "vq", "cd"):
        return Hamburger(channels, decomposition=config.method, num_bases=config.num_bases, **shared)
    module = SeparateLowRank if config.method == "separate" else CrossViewLowRank
    num_bases = config.num_bases if config.method == "free" else None
    return module(channels, form=config.form, num_bases=num_bases, implementation=config.implementation, **shared)


def _unit(vectors: Tensor, *, dim: int) -> Tensor:
    norm: Tensor = vectors.norm(dim=dim, keepdim=True)
    return vectors / (norm + EPS)


def _weighted_means(features: Tensor, codes: Tensor) -> Tensor:
    """Means of the features (N, d, P), weighted by the codes (N, k, P): (N, d, k)."""
    return features @ (codes / (codes.sum(dim=2, keepdim=True) + EPS)).transpose(1, 2)


def _multiplied_codes(features: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    """One multiplicative update of non-negative codes."""
    target = dictionary.transpose(1, 2) @ features
    return codes * target / (dictionary.transpose(1, 2) @ dictionary @ codes + EPS)
