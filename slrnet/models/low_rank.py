"""The low-rank modules that the paper compares CVLR with (Table 8), with CVLR's interface.

All factorize the features of each view separately: D C with k atoms approximates X (d x P), between the same two
projectors and with the same skip connection as CVLR. Written from the papers named below.

Letters: N images, V views, C channels, d feature dimension, k atoms of the dictionary, P positions of one view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from slrnet.config import CvlrConfig
from slrnet.models.cvlr import EPS, CrossViewLowRank, LowRankViews, apply_linear, draw_start, unit

__all__ = ["EMAttention", "Hamburger", "SeparateLowRank", "build_low_rank"]

RIDGE = 0.1
"""beta of the ridge regression that gives the codes of concept decomposition."""
MOMENTUM = 0.9
"""Share of the old bases that a training step of EM attention keeps."""


class SeparateLowRank(CrossViewLowRank):
    """CVLR with one dictionary per view (Table 8, "Separate dictionary"); arguments as for `CrossViewLowRank`."""

    methods: ClassVar[tuple[str, ...]] = ("separate",)

    def forward(self, features: Sequence[Tensor], logits: Sequence[Tensor]) -> LowRankViews:
        """As `CrossViewLowRank.forward`, with the dictionaries of all views side by side, (N, V, d, k)."""
        alone = [[view] for view in logits] if self.class_codes else [[]] * len(features)
        views = [super(SeparateLowRank, self).forward([x], z) for x, z in zip(features, alone, strict=True)]
        return LowRankViews(
            [view.features[0] for view in views],
            [view.codes[0] for view in views],
            torch.stack([view.dictionary for view in views], dim=1),
        )


class _FreeAtoms(SeparateLowRank):
    """A factorization of each view into atoms that stand for no class; `logits` are ignored."""

    def _paper(self, positions: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        varying = positions - positions.mean(dim=2, keepdim=True) if self.centered else positions
        dictionary, codes = self._factorize(apply_linear(self.project_in, varying))
        return positions + apply_linear(self.project_out, dictionary @ codes), codes, dictionary

    def _factorize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Dictionary (N, d, k) and codes (N, k, P) of one view's projected features (N, d, P)."""
        raise NotImplementedError

    def _similarity_codes(self, features: Tensor, dictionary: Tensor) -> Tensor:
        return (dictionary.transpose(1, 2) @ features / self.temperature).softmax(dim=1)


class EMAttention(_FreeAtoms):
    """Expectation-maximization attention (Li et al. 2019): T iterations without gradient, bases that change slowly.

    Neither bases nor codes carry a gradient, so the input projector, which acts only through them, keeps its orthogonal
    start. Each training step moves the bases toward the mean bases of the global batch.

    Args:
        channels: C, channels of the feature maps.
        settings: as for `CrossViewLowRank`; the authors use 3 iterations and temperature 1.
    """

    methods = ("emau",)
    bases: Tensor

    def __init__(self, channels: int, **settings: Any) -> None:
        super().__init__(channels, **settings)
        self.project_in.requires_grad_(False)
        start = torch.randn(self.project_in.out_features, self.num_bases) * (2 / self.num_bases) ** 0.5
        self.register_buffer("bases", unit(start, dim=0))

    @torch.no_grad()
    def _factorize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        bases, codes = self.bases.expand(len(features), -1, -1), features.new_zeros(())
        for _ in range(self.num_iters):
            codes = self._similarity_codes(features, bases)
            bases = unit(_weighted_means(features, codes), dim=1)
        if self.training:
            mean = bases.mean(dim=0)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                total = torch.stack([mean, torch.ones_like(mean)]) * len(bases)
                torch.distributed.all_reduce(total)
                mean = total[0] / total[1]
            self.bases.mul_(MOMENTUM).add_(mean, alpha=1 - MOMENTUM)
        return bases, codes


class Hamburger(_FreeAtoms):
    """Matrix decomposition between two linear maps (Geng et al. 2021): T iterations, gradient through one step.

    `nmf` is non-negative factorization by multiplicative updates, of features after a ReLU. `vq` is soft k-means by
    cosine similarity. `cd` is concept decomposition: spherical k-means for the dictionary, ridge regression for the
    codes. Each forward pass starts from a random dictionary and iterates without gradient. One last update of the codes
    carries the gradient.

    Args:
        channels: C, channels of the feature maps.
        settings: as for `CrossViewLowRank`; `method` is the decomposition. The authors train with 6 iterations. The
            temperature is that of the softmax of cosine similarities and, for `nmf`, of the first codes.
    """

    methods = ("nmf", "vq", "cd")

    def _factorize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        start = draw_start(torch.rand, (*features.shape[:2], self.num_bases), features, training=self.training)
        if self.method == "nmf":
            return self._non_negative(features.relu(), unit(start, dim=1))
        return self._by_similarity(features, unit(2 * start - 1, dim=1))

    def _non_negative(self, features: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            codes = self._similarity_codes(features, dictionary)
            for _ in range(self.num_iters):
                codes = _multiplied_codes(features, dictionary, codes)
                ratio = features @ codes.transpose(1, 2) / (dictionary @ (codes @ codes.transpose(1, 2)) + EPS)
                dictionary = dictionary * ratio
        return dictionary, _multiplied_codes(features, dictionary, codes)

    def _by_similarity(self, features: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        directions = unit(features, dim=1)
        with torch.no_grad():
            for _ in range(self.num_iters):
                codes = self._similarity_codes(directions, unit(dictionary, dim=1))
                dictionary = _weighted_means(features, codes)
                if self.method == "cd":
                    dictionary = unit(dictionary, dim=1)
        if self.method == "vq":
            return dictionary, self._similarity_codes(directions, unit(dictionary, dim=1))
        gram = dictionary.transpose(1, 2) @ dictionary
        gram = gram + RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return dictionary, torch.linalg.solve(gram, dictionary.transpose(1, 2) @ features)


def build_low_rank(config: CvlrConfig, channels: int) -> CrossViewLowRank:
    """Builds the module that `config.method` names, for feature maps of `channels` channels."""
    modules = (CrossViewLowRank, SeparateLowRank, EMAttention, Hamburger)
    return next(module for module in modules if config.method in module.methods)(channels, **config.model_dump())


def _weighted_means(features: Tensor, codes: Tensor) -> Tensor:
    """Means of the features (N, d, P), weighted by the codes (N, k, P): (N, d, k)."""
    return features @ (codes / (codes.sum(dim=2, keepdim=True) + EPS)).transpose(1, 2)


def _multiplied_codes(features: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    """One multiplicative update of non-negative codes."""
    target = dictionary.transpose(1, 2) @ features
    return codes * target / (dictionary.transpose(1, 2) @ dictionary @ codes + EPS)
