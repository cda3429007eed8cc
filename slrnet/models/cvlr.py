"""Cross-view low-rank factorisation (paper Sec. 3.3, Algorithm 1) and the module around it.

`factorize` is Algorithm 1 as printed: one dictionary shared by all positions of all views, the un-normalised dictionary
in the reconstruction, a gradient through every iteration. `CrossViewLowRank` adds the two linear projectors and the
skip connection. The authors' released code computes something else (first dictionary from view 1 only and detached,
normalised dictionary and earlier codes in the reconstruction); `form="released"` gives that arithmetic.

Letters: N images, d feature dimension, k atoms of the dictionary, P positions of all views side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["CrossViewLowRank", "Factorization", "LowRankViews", "factorize"]

MASS_FLOOR = 1e-6
"""An atom's code mass is not divided by less than this; larger masses are left as they are."""
NORM_FLOOR = 1e-6
"""An atom is not divided by a norm below this when it is normalised."""

Form = Literal["paper", "released"]
FORMS: tuple[Form, ...] = ("paper", "released")
Implementation = Literal["auto", "reference", "recompute"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("auto", "reference", "recompute")


class Factorization(NamedTuple):
    """What Algorithm 1 returns: `dictionary` (N, d, k), `codes` (N, k, P), `reconstruction` (N, d, P)."""

    dictionary: Tensor
    codes: Tensor
    reconstruction: Tensor


def factorize(
    features: Tensor,
    codes: Tensor,
    *,
    num_iters: int,
    temperature: float = 1.0,
    implementation: Implementation = "auto",
) -> Factorization:
    """Factorises features into a dictionary and codes (paper Algorithm 1).

    Args:
        features: (N, d, P) float features of all positions of all views.
        codes: (N, k, P) first codes, non-negative and summing to 1 over k at each position.
        num_iters: T >= 1, alternating updates of dictionary and codes.
        temperature: tau > 0 of the codes' softmax.
        implementation: `reference` is plain autograd; `recompute` keeps the inputs and one dictionary per iteration
            and computes the codes again in the backward pass (no double backward); `auto` picks `recompute`.

    Returns:
        The last dictionary, not normalised, the last codes and their product. An atom that no position chooses is
        the zero vector (mass and norm are kept above 1e-6, see `MASS_FLOOR`).

    Raises:
        ValueError: shapes or dtypes that do not fit, codes that are no distribution, num_iters < 1, temperature <= 0,
            or an unknown implementation.
    """
    _check_arguments(features, codes, num_iters, temperature, implementation)
    with torch.autocast(features.device.type, enabled=False):
        if implementation == "reference":
            return _factorize_reference(features, codes, num_iters, temperature)
        dictionary, last_codes, reconstruction = _Recompute.apply(features, codes, num_iters, temperature)
        return Factorization(dictionary, last_codes, reconstruction)


def _factorize_reference(features: Tensor, codes: Tensor, num_iters: int, temperature: float) -> Factorization:
    dictionary = features.new_zeros(())
    for _ in range(num_iters):
        dictionary = _update_dictionary(features, codes)  # line 2
        codes = _update_codes(features, dictionary, temperature)  # line 3
    return Factorization(dictionary, codes, dictionary @ codes)  # line 5


def _update_dictionary(features: Tensor, codes: Tensor) -> Tensor:
    mass = codes.sum(dim=2).clamp_min(MASS_FLOOR)  # (N, k)
    return features @ codes.transpose(1, 2) / mass.unsqueeze(1)  # (N, d, k)


def _update_codes(features: Tensor, dictionary: Tensor, temperature: float) -> Tensor:
    norm: Tensor = dictionary.norm(dim=1, keepdim=True)
    directions = dictionary / norm.clamp_min(NORM_FLOOR)
    return (directions.transpose(1, 2) @ features / temperature).softmax(dim=1)  # (N, k, P)


class _Recompute(torch.autograd.Function):
    """Algorithm 1 with a backward pass that recomputes the codes of each iteration from its dictionary."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, codes: Tensor, num_iters: int, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dictionaries = []
        last = codes
        for _ in range(num_iters):
            dictionaries.append(_update_dictionary(features, last))
            last = _update_codes(features, dictionaries[-1], temperature)
        ctx.save_for_backward(features, codes, *dictionaries)
        ctx.temperature = temperature
        return dictionaries[-1], last, dictionaries[-1] @ last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_dictionary, grad_codes, grad_reconstruction = grads
        features, first_codes, *dictionaries = ctx.saved_tensors
        temperature: float = ctx.temperature
        codes = _update_codes(features, dictionaries[-1], temperature)
        grad_dictionary = torch.baddbmm(grad_dictionary, grad_reconstruction, codes.transpose(1, 2))
        grad_codes = torch.baddbmm(grad_codes, dictionaries[-1].transpose(1, 2), grad_reconstruction)
        grad_features = torch.zeros_like(features)
        for t in reversed(range(len(dictionaries))):
            dictionary = dictionaries[t]
            before = _update_codes(features, dictionaries[t - 1], temperature) if t else first_codes
            grad_dictionary = grad_dictionary + _backward_codes(
                features, dictionary, codes, grad_codes, temperature, grad_features
            )
            grad_codes = _backward_dictionary(features, dictionary, before, grad_dictionary, grad_features)
            grad_dictionary = torch.zeros_like(dictionary)
            codes = before
        return grad_features, grad_codes, None, None


def _backward_codes(
    features: Tensor, dictionary: Tensor, codes: Tensor, grad: Tensor, temperature: float, grad_features: Tensor
) -> Tensor:
    """Back through line 3; adds to `grad_features` in place and returns the gradient of the dictionary (N, d, k)."""
    norm: Tensor = dictionary.norm(dim=1, keepdim=True)
    safe = norm.clamp_min(NORM_FLOOR)
    directions = dictionary / safe
    weighted = codes * grad
    grad_logits = (weighted - codes * weighted.sum(dim=1, keepdim=True)) / temperature  # (N, k, P)
    grad_features.baddbmm_(directions, grad_logits)
    grad_directions = features @ grad_logits.transpose(1, 2)  # (N, d, k)
    along = (directions * grad_directions).sum(dim=1, keepdim=True) * (norm > NORM_FLOOR)
    return (grad_directions - directions * along) / safe


def _backward_dictionary(
    features: Tensor, dictionary: Tensor, codes: Tensor, grad: Tensor, grad_features: Tensor
) -> Tensor:
    """Back through line 2; adds to `grad_features` in place and returns the gradient of the codes (N, k, P)."""
    mass = codes.sum(dim=2)
    scaled = grad / mass.clamp_min(MASS_FLOOR).unsqueeze(1)  # (N, d, k)
    grad_features.baddbmm_(scaled, codes)
    grad_mass = (scaled * dictionary).sum(dim=1) * (mass > MASS_FLOOR)  # (N, k)
    return torch.baddbmm(-grad_mass.unsqueeze(2), scaled.transpose(1, 2), features)


class LowRankViews(NamedTuple):
    """Per view: `features` (N, C, h, w) low-rank maps and `codes` (N, k, h, w); shared: `dictionary` (N, d, k)."""

    features: list[Tensor]
    codes: list[Tensor]
    dictionary: Tensor


class CrossViewLowRank(nn.Module):
    """CVLR with its projectors and skip connection (paper Sec. 3.3, "Detailed CVLR Module Design").

    Args:
        channels: channels C of the feature maps that come in and go out.
        dim: d, dimension of the dictionary's atoms.
        num_iters: T >= 1.
        temperature: tau > 0.
        form: `paper`, or `released` for the arithmetic of the published checkpoints.
        centered: factorise the features less their mean over all positions of all views. Features after a ReLU share
            a large mean; weighted means of them are then all but the same vector, the codes are uniform, and the
            reconstruction adds the same vector to every position. Paper form only.
        implementation: see `factorize`; the released form has one implementation only.

    The output projection starts at zero, so the module starts as the identity.

    Raises:
        ValueError: an unknown form or implementation, num_iters < 1, temperature <= 0, or a centered released form.
    """

    def __init__(
        self,
        channels: int,
        *,
        dim: int = 256,
        num_iters: int = 1,
        temperature: float = 1.0,
        form: Form = "paper",
        centered: bool = False,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; allowed are {', '.join(FORMS)}")
        if centered and form != "paper":
            raise ValueError(f"centered goes with form 'paper', not {form!r}; set one of the two")
        _check_settings(num_iters, temperature, implementation)
        self.project_in = nn.Linear(channels, dim)
        self.project_out = nn.Linear(dim, channels)
        nn.init.orthogonal_(self.project_in.weight)
        for start in (self.project_in.bias, self.project_out.weight, self.project_out.bias):
            nn.init.zeros_(start)
        self.num_iters = num_iters
        self.temperature = temperature
        self.form = form
        self.centered = centered
        self.implementation = implementation

    def forward(self, features: Sequence[Tensor], logits: Sequence[Tensor]) -> LowRankViews:
        """Factorises the features of all views together.

        Args:
            features: per view (N, C, h, w); views may differ in size.
            logits: per view (N, k, h, w), the auxiliary head's logits Z, whose softmax gives the first codes.

        Returns:
            Low-rank feature maps and codes per view, of the sizes that came in, in float32 (CVLR does not run under
            autocast), and the shared dictionary.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            positions = torch.cat([view.float().flatten(2) for view in features], dim=2)  # (N, C, P)
            run = self._paper if self.form == "paper" else self._released
            low_rank, codes, dictionary = run(positions, [view.float() for view in logits])
            sizes = [view.shape[-2] * view.shape[-1] for view in features]
            return LowRankViews(
                [
                    part.unflatten(2, view.shape[-2:])
                    for part, view in zip(low_rank.split(sizes, 2), features, strict=True)
                ],
                [
                    part.unflatten(2, view.shape[-2:])
                    for part, view in zip(codes.split(sizes, 2), features, strict=True)
                ],
                dictionary,
            )

    def _paper(self, positions: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        first = torch.cat([view.flatten(2) for view in logits], dim=2).softmax(dim=1)  # (N, k, P)
        varying = positions - positions.mean(dim=2, keepdim=True) if self.centered else positions
        dictionary, codes, reconstruction = factorize(
            _linear(self.project_in, varying),
            first,
            num_iters=self.num_iters,
            temperature=self.temperature,
            implementation=self.implementation,
        )
        return positions + _linear(self.project_out, reconstruction), codes, dictionary

    def _released(self, positions: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        eps = 1e-6
        first = logits[0].detach().flatten(2).softmax(dim=1)
        first = first / (first.sum(dim=2, keepdim=True) + eps)
        means = positions[..., : first.shape[2]].detach() @ first.transpose(1, 2)  # (N, C, k), view 1 only
        dictionary = _unit(_linear(self.project_in, means), eps)
        projected = _linear(self.project_in, positions)  # (N, d, P)
        codes = first
        for _ in range(self.num_iters):
            codes = (dictionary.transpose(1, 2) @ projected / self.temperature).softmax(dim=1)
            share = (codes + eps) / (codes + eps).sum(dim=2, keepdim=True)
            dictionary = _unit(projected @ share.transpose(1, 2), eps)
        reconstruction = F.relu(dictionary @ codes)
        return F.relu(positions + _linear(self.project_out, reconstruction)), codes, dictionary


def _linear(layer: nn.Linear, positions: Tensor) -> Tensor:
    """Applies a linear layer to the channels of (N, C, P) without transposing the positions."""
    return torch.matmul(layer.weight, positions) + layer.bias.unsqueeze(1)


def _unit(vectors: Tensor, eps: float) -> Tensor:
    norm: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / (eps + norm)


def _check_arguments(features: Tensor, codes: Tensor, num_iters: int, temperature: float, implementation: str) -> None:
    if features.ndim != 3 or codes.ndim != 3:
        raise ValueError(
            f"features {tuple(features.shape)} and codes {tuple(codes.shape)} must be (N, d, P) and (N, k, P); "
            "flatten the positions of all views into the last dimension"
        )
    if features.shape[0] != codes.shape[0] or features.shape[2] != codes.shape[2]:
        raise ValueError(
            f"features {tuple(features.shape)} and codes {tuple(codes.shape)} differ in N or P; "
            "make the codes from the same images and positions"
        )
    if features.dtype != codes.dtype:
        raise ValueError(f"features are {features.dtype} and codes {codes.dtype}; convert one to the other's dtype")
    _check_settings(num_iters, temperature, implementation)
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_distribution(codes.detach())


def _check_settings(num_iters: int, temperature: float, implementation: str) -> None:
    if num_iters < 1:
        raise ValueError(f"num_iters is {num_iters}; allowed are whole numbers from 1 (turn CVLR off to skip it)")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed are numbers above 0 (the paper uses 1)")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; allowed are {', '.join(IMPLEMENTATIONS)}")


def _check_distribution(codes: Tensor) -> None:
    """On the CPU only: reading the answer from a GPU would stall every step.

    NaN passes: it comes from a diverged network, which the trainer reports for all ranks by the loss.
    """
    error = float((codes.sum(dim=1) - 1).abs().amax()) if codes.numel() else 0.0
    if error > 0.02 or (codes.numel() and float(codes.amin()) < 0):
        raise ValueError(
            f"codes do not sum to 1 over dimension 1 (off by {error:.3g}) or are negative; pass softmax(logits, dim=1)"
        )
