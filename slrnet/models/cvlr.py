"""Cross-view low-rank factorization (paper Sec. 3.3, Algorithm 1) and the module around it.

`factorize` is Algorithm 1 as printed: all positions of all views share one dictionary, the reconstruction uses the
dictionary before normalization, and the gradient flows through every iteration. `CrossViewLowRank` adds the two linear
projectors and the skip connection. The authors' released code computes something else: its first dictionary comes from
view 1 only, without gradient, and its reconstruction uses the normalized dictionary and earlier codes.
`form="released"` gives that arithmetic.

Letters: N images, C channels, d feature dimension, k atoms of the dictionary, P positions of all views side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slrnet.config import CvlrConfig, Implementation
from slrnet.ops.factorize import assigned_sums, directions_of, factorize_op, working_dtype
from slrnet.ops.kernels import MASS_FLOOR
from slrnet.ops.maps import widened

__all__ = [
    "CrossViewLowRank",
    "Factorization",
    "Implementation",
    "LowRankViews",
    "apply_linear",
    "draw_start",
    "factorize",
    "unit",
]

EPS = 1e-6
"""Added to norms and sums before a division."""


class Factorization(NamedTuple):
    """The result of Algorithm 1: `dictionary` (N, d, k), `codes` (N, k, P), `reconstruction` (N, d, P)."""

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
    """Factorizes features into a dictionary and codes (paper Algorithm 1).

    Args:
        features: (N, d, P) float features of all positions of all views; half precision is computed in float32.
        codes: (N, k, P) first codes, non-negative and summing to 1 over k at each position.
        num_iters: T >= 1, the number of alternating updates of dictionary and codes.
        temperature: tau > 0 of the codes' softmax.
        implementation: `reference` is plain autograd. `recompute` keeps the inputs and, per iteration, one dictionary
            and its code masses; it computes the codes again in the backward pass, which has no derivative of its own.
            `triton` does the same in kernels for CUDA tensors. `auto` chooses `reference` in `torch.export`, and else
            `recompute`: with the projectors folded into it, as in `CrossViewLowRank`, it should be faster on GPUs too
            (docs/cost.md).

    Returns:
        The last dictionary, not normalized and in float32 at least, the last codes and their product. An atom that no
        position chooses is the zero vector: no division is by a mass or a norm below 1e-6.

    Raises:
        ValueError: shapes or dtypes that do not fit, codes that are no distribution, num_iters < 1, temperature <= 0,
            an unknown implementation, or one that cannot run on these tensors.
    """
    _check_arguments(features, codes, num_iters, temperature, implementation)
    chosen = _choose(implementation, features, codes)
    with torch.autocast(features.device.type, enabled=False):
        if chosen == "reference":
            return _factorize_reference(features, codes, num_iters, temperature)
        dictionaries, _, last_codes, reconstruction = factorize_op(features, codes, num_iters, temperature, chosen)
        return Factorization(dictionaries[-1], last_codes, reconstruction)


def _choose(
    implementation: Implementation, features: Tensor, codes: Tensor
) -> Literal["reference", "recompute", "triton"]:
    """The implementation that `auto` stands for, or the given one if it can run on these tensors."""
    if implementation == "auto":
        return "reference" if torch.compiler.is_exporting() else "recompute"
    if implementation != "triton":
        return implementation
    if find_spec("triton") is None:
        raise ValueError("implementation 'triton' needs the package triton, which is not installed; use 'auto'")
    from slrnet.ops import factorize_triton

    if misfit := factorize_triton.misfit(features, codes.shape[1]):
        raise ValueError(f"implementation 'triton' {misfit}")
    return "triton"


def _factorize_reference(features: Tensor, codes: Tensor, num_iters: int, temperature: float) -> Factorization:
    dtype = features.dtype
    features, codes = features.to(working_dtype(features)), codes.to(working_dtype(features))
    dictionary = features.new_zeros(())
    for _ in range(num_iters):
        mass = codes.sum(dim=2).clamp_min(MASS_FLOOR)  # (N, k)
        dictionary = features @ codes.transpose(1, 2) / mass.unsqueeze(1)  # (N, d, k), line 2
        codes = (directions_of(dictionary).transpose(1, 2) @ features / temperature).softmax(dim=1)  # (N, k, P), line 3
    return Factorization(dictionary, codes.to(dtype), (dictionary @ codes).to(dtype))  # line 5


class LowRankViews(NamedTuple):
    """Per view: `features` (N, C, h, w) low-rank maps and `codes` (N, k, h, w); shared: `dictionary` (N, d, k).

    Modules that factorize each view separately return their dictionaries side by side, as (N, V, d, k).
    """

    features: list[Tensor]
    codes: list[Tensor]
    dictionary: Tensor


class CrossViewLowRank(nn.Module):
    """CVLR with its projectors and skip connection (paper Sec. 3.3, "Detailed CVLR Module Design").

    By default, the output projection starts at zero, so the module starts as the identity. Features after a ReLU share
    a large mean: their weighted means are then nearly the same vector, the codes are uniform, and the reconstruction
    adds the same vector to every position. `centered` avoids that.

    Args:
        channels: C, channels of the feature maps that come in and go out.
        settings: fields of `CvlrConfig`, such as `dim`, `num_iters` and `temperature`, with its defaults; `method` is
            one of `methods`. With `free`, the `num_bases` atoms stand for no class, and the first codes are random, but
            the same ones each time in evaluation mode (Table 8, "w/o latent space reg."); else the atoms are the
            classes of the logits. Form `released` has only one implementation.

    Attributes:
        methods: values of `cvlr.method` that the class computes.
        class_codes: an atom stands for a class; only then can codes be compared between views and with class scores.

    Raises:
        ValueError: a setting that is unknown, out of range or in conflict with another one.
    """

    methods: ClassVar[tuple[str, ...]] = ("cvlr", "free")

    def __init__(self, channels: int, **settings: Any) -> None:
        super().__init__()
        config = CvlrConfig(**settings)
        if config.method not in self.methods:
            allowed = ", ".join(self.methods)
            raise ValueError(f"{type(self).__name__} has no method {config.method!r}; allowed are {allowed}")
        self.project_in, self.project_out = nn.Linear(channels, config.dim), nn.Linear(config.dim, channels)
        if config.start == "identity":
            nn.init.orthogonal_(self.project_in.weight)
            for start in (self.project_in.bias, self.project_out.weight, self.project_out.bias):
                nn.init.zeros_(start)
            with torch.no_grad():
                self.project_out.weight.add_(self.project_in.weight.T, alpha=config.start_share)
        self.method = config.method
        self.num_iters = config.num_iters
        self.temperature = config.temperature
        self.form = config.form
        self.centered = config.centered
        self.num_bases = config.num_bases
        self.class_codes = config.method in ("cvlr", "separate")
        self.implementation = config.implementation

    def forward(self, features: Sequence[Tensor], logits: Sequence[Tensor]) -> LowRankViews:
        """Factorizes the features of all views together.

        Args:
            features: per view (N, C, h, w); views may differ in size.
            logits: per view (N, k, h, w), the auxiliary head's logits Z, whose softmax gives the first codes; ignored
                where atoms stand for no class.

        Returns:
            Low-rank feature maps and codes per view, of the sizes that came in, in float32 (CVLR does not run under
            autocast), and the shared dictionary.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            positions = torch.cat([widened(view).flatten(2) for view in features], dim=2)  # (N, C, P)
            run = self._paper if self.form == "paper" else self._released
            low_rank, codes, dictionary = run(positions, [widened(view).flatten(2) for view in logits])
        # Convolutions follow, which would each bring the features to this layout.
        maps = [view.contiguous(memory_format=torch.channels_last) for view in _to_maps(low_rank, features)]
        return LowRankViews(maps, _to_maps(codes, features), dictionary)

    def _paper(self, positions: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self.class_codes:
            first = torch.cat(logits, dim=2).softmax(dim=1)  # (N, k, P)
        else:
            shape = (len(positions), self.num_bases, positions.shape[2])
            first = draw_start(torch.randn, shape, positions, training=self.training).softmax(dim=1)
        mean = positions.mean(dim=2, keepdim=True) if self.centered else None  # (N, C, 1)
        if _choose(self.implementation, positions, first) == "recompute":
            return self._folded(positions, first, mean)
        dictionary, codes, reconstruction = factorize(
            apply_linear(self.project_in, positions if mean is None else positions - mean),
            first,
            num_iters=self.num_iters,
            temperature=self.temperature,
            implementation=self.implementation,
        )
        return positions + apply_linear(self.project_out, reconstruction), codes, dictionary

    def _folded(self, positions: Tensor, first: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The paper's form with the projectors applied to the k atoms instead of the P positions, which are many more.

        Projectors are linear. The mean of W x + b is the mean of x, projected. The product of an atom a with W x + b is
        that of W^T a with x plus that of a with b. And V (D C) + c is (V D + c) C, because codes sum to 1. So neither
        projected positions nor the reconstruction are ever in memory.
        """
        weight, shift = self.project_in.weight, self.project_in.bias.expand(len(positions), -1)  # (d, C), (N, d)
        if mean is not None:
            shift = shift - mean.squeeze(2) @ weight.T
        sums, mass = torch.bmm(positions, first.transpose(1, 2)), first.sum(dim=2)  # (N, C, k), (N, k)
        for step in range(self.num_iters):
            divisor = mass.clamp_min(MASS_FLOOR).unsqueeze(1)
            dictionary = weight @ (sums / divisor) + shift.unsqueeze(2) * (mass.unsqueeze(1) / divisor)  # line 2
            directions = directions_of(dictionary)  # (N, d, k)
            atoms, offset = weight.T @ directions, (directions * shift.unsqueeze(2)).sum(dim=1)  # (N, C, k), (N, k)
            if step + 1 < self.num_iters:
                sums, mass = assigned_sums(positions, atoms, offset, self.temperature)
        logits = torch.baddbmm(offset.unsqueeze(2), atoms.transpose(1, 2), positions)
        codes = (logits / self.temperature).softmax(dim=1)  # line 3
        outwards = self.project_out.weight @ dictionary + self.project_out.bias.unsqueeze(1)  # (N, C, k)
        return torch.baddbmm(positions, outwards, codes), codes, dictionary  # line 5 and the skip connection

    def _released(self, positions: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        first = logits[0].detach().softmax(dim=1)
        first = first / (first.sum(dim=2, keepdim=True) + EPS)
        means = positions[..., : first.shape[2]].detach() @ first.transpose(1, 2)  # (N, C, k), view 1 only
        dictionary = unit(apply_linear(self.project_in, means), dim=1)
        projected = apply_linear(self.project_in, positions)  # (N, d, P)
        codes = first
        for _ in range(self.num_iters):
            codes = (dictionary.transpose(1, 2) @ projected / self.temperature).softmax(dim=1)
            share = (codes + EPS) / (codes + EPS).sum(dim=2, keepdim=True)
            dictionary = unit(projected @ share.transpose(1, 2), dim=1)
        reconstruction = F.relu(dictionary @ codes)
        return F.relu(positions + apply_linear(self.project_out, reconstruction)), codes, dictionary


def _to_maps(positions: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Splits (N, c, P) into one map (N, c, h, w) per view, of the sizes of `like`."""
    parts = positions.split([view.shape[-2] * view.shape[-1] for view in like], dim=2)
    return [part.unflatten(2, view.shape[-2:]) for part, view in zip(parts, like, strict=True)]


def draw_start(draw: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, *, training: bool) -> Tensor:
    """Random first values, in the dtype and on the device of `like`; the same ones each time outside training."""
    if training:
        return draw(shape, dtype=like.dtype, device=like.device)
    return draw(shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)


def apply_linear(layer: nn.Linear, positions: Tensor) -> Tensor:
    """Applies a linear layer to the channels of (N, C, P) without transposing the positions."""
    return torch.matmul(layer.weight, positions) + layer.bias.unsqueeze(1)


def unit(vectors: Tensor, *, dim: int) -> Tensor:
    """Vectors along `dim`, divided by their norms plus 1e-6."""
    norm: Tensor = vectors.norm(dim=dim, keepdim=True)
    return vectors / (norm + EPS)


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
    if num_iters < 1:
        raise ValueError(f"num_iters is {num_iters}; allowed are whole numbers from 1 (turn CVLR off to skip it)")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed are numbers above 0 (the paper uses 1)")
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; allowed are {', '.join(get_args(Implementation))}")
    if codes.device.type != "cpu" or torch.compiler.is_compiling() or not codes.numel():
        return  # on a GPU, waiting for the answer would stall every step
    # NaN passes: it comes from a diverged network, which the trainer reports for all ranks by the loss.
    error = float((codes.detach().sum(dim=1) - 1).abs().amax())
    if error > 0.02 or float(codes.detach().amin()) < 0:
        raise ValueError(
            f"codes do not sum to 1 over dimension 1 (off by {error:.3g}) or are negative; pass softmax(logits, dim=1)"
        )
