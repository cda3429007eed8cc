"""Algorithm 1's iterations and their gradient as PyTorch operators.

`slrnet::factorize` is the whole algorithm. `slrnet::assigned_sums` is one pass: it assigns the positions to atoms and
sums up what each atom gets. The backward pass computes an iteration's codes again from its dictionary. Both passes work
on blocks of positions, so codes and their gradients are never in memory as a whole; only the inputs and, for each
iteration, a dictionary with its code masses are kept.

`torch.library` registers the operators, so `torch.compile`, `torch.export`, activation checkpointing and DDP see one
node with known shapes. There is no second derivative: differentiating the backward operator is an error.

Letters: N images, d feature dimension, k atoms, P positions, T iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slrnet.ops.kernels import MASS_FLOOR, NORM_FLOOR

__all__ = ["assigned_sums", "directions_of", "factorize_op", "working_dtype"]

BLOCK = 2048
"""Positions in a block on the CPU."""


@torch.library.custom_op("slrnet::factorize", mutates_args=())
def factorize_op(
    features: Tensor, codes: Tensor, num_iters: int, temperature: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs Algorithm 1.

    Args:
        features: (N, d, P); float16 and bfloat16 are computed in float32.
        codes: (N, k, P) of the same dtype, non-negative and summing to 1 over k.
        num_iters: T >= 1.
        temperature: tau > 0.
        implementation: `recompute` or `triton`.

    Returns:
        The dictionaries of all iterations (T, N, d, k) and the code masses that divide them (T, N, k), both at least
        float32; the last codes (N, k, P) and the reconstruction (N, d, P) in the dtype of the features.
    """
    if implementation == "triton":
        from slrnet.ops import factorize_triton

        return factorize_triton.forward(features, codes, num_iters, temperature)
    return _forward(features, codes, num_iters, temperature)


@torch.library.custom_op("slrnet::factorize_backward", mutates_args=())
def _backward_op(
    features: Tensor,
    codes: Tensor,
    dictionaries: Tensor,
    masses: Tensor,
    grad_dictionary: Tensor,
    grad_codes: Tensor,
    grad_reconstruction: Tensor,
    temperature: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and first codes, from those of the last dictionary (N, d, k), codes and reconstruction."""
    grads = (grad_dictionary, grad_codes, grad_reconstruction)
    if implementation == "triton":
        from slrnet.ops import factorize_triton

        return factorize_triton.backward(features, codes, dictionaries, masses, grads, temperature)
    return _backward(features, codes, dictionaries, masses, grads, temperature)


@factorize_op.register_fake
def _(features: Tensor, codes: Tensor, num_iters: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, d, _positions), k = features.shape, codes.shape[1]
    dictionaries = features.new_empty((num_iters, n, d, k), dtype=working_dtype(features))
    masses = dictionaries.new_empty((num_iters, n, k))
    return dictionaries, masses, codes.new_empty(codes.shape), features.new_empty(features.shape)


@_backward_op.register_fake
def _(features: Tensor, codes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), codes.new_empty(codes.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    features, codes, _, ctx.temperature, ctx.implementation = inputs
    ctx.save_for_backward(features, codes, output[0], output[1])


def _differentiate(
    ctx: Any, grad_dictionaries: Tensor, _: Tensor, grad_codes: Tensor, grad_reconstruction: Tensor
) -> tuple[Tensor, Tensor, None, None, None]:
    """Callers get only the last dictionary; the gradients of the others are zero."""
    grads = (grad_dictionaries[-1], grad_codes, grad_reconstruction)
    return *_backward_op(*ctx.saved_tensors, *grads, ctx.temperature, ctx.implementation), None, None, None


factorize_op.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("slrnet::assigned_sums", mutates_args=())
def assigned_sums(features: Tensor, atoms: Tensor, offset: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums of the features by atom, weighted by codes that are never in memory as a whole.

    The codes are the softmax over k of (atoms^T features + offset) / temperature.

    Args:
        features: (N, d, P), float32 or float64.
        atoms: (N, d, k) of the same dtype.
        offset: (N, k) of the same dtype.
        temperature: tau > 0.

    Returns:
        The sums over positions of features times codes (N, d, k), and the codes' masses (N, k). There is no second
        derivative.
    """
    sums, mass = atoms.new_zeros(atoms.shape), offset.new_zeros(offset.shape)
    _add_sums(sums, mass, features, _Assignment(atoms, temperature, offset))
    return sums, mass


@torch.library.custom_op("slrnet::assigned_sums_backward", mutates_args=())
def _assigned_sums_backward(
    features: Tensor, atoms: Tensor, offset: Tensor, grad_sums: Tensor, grad_mass: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    assignment = _Assignment(atoms, temperature, offset)
    grad_features = torch.zeros_like(features)
    grad_atoms, grad_offset = atoms.new_zeros(atoms.shape), offset.new_zeros(offset.shape)
    for part, block in _blocks(features, features.dtype):
        codes, grad_codes = assignment.back_through_sums(grad_features[..., part], block, grad_sums, grad_mass)
        grad_offset += assignment.back_through_codes(grad_features[..., part], grad_atoms, block, codes, grad_codes)
    return grad_features, grad_atoms, grad_offset


@assigned_sums.register_fake
def _(features: Tensor, atoms: Tensor, offset: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return atoms.new_empty(atoms.shape), offset.new_empty(offset.shape)


@_assigned_sums_backward.register_fake
def _(features: Tensor, atoms: Tensor, offset: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(features), atoms.new_empty(atoms.shape), offset.new_empty(offset.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.temperature = inputs[3]


def _differentiate_sums(ctx: Any, grad_sums: Tensor, grad_mass: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_assigned_sums_backward(*ctx.saved_tensors, grad_sums, grad_mass, ctx.temperature), None


assigned_sums.register_autograd(_differentiate_sums, setup_context=_keep_inputs)


def working_dtype(features: Tensor) -> torch.dtype:
    """float32 for half precision, otherwise the features' dtype."""
    return torch.float32 if features.dtype in (torch.float16, torch.bfloat16) else features.dtype


def directions_of(dictionary: Tensor) -> Tensor:
    """The atoms (N, d, k) at length 1; atoms shorter than `NORM_FLOOR` are divided by it instead."""
    norm: Tensor = dictionary.norm(dim=1, keepdim=True)
    return dictionary / norm.clamp_min(NORM_FLOOR)


def _blocks(features: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of positions, and the features (N, d, p) of each."""
    for start in range(0, features.shape[2], BLOCK):
        part = slice(start, start + BLOCK)
        yield part, features[..., part].to(dtype)


class _Assignment(NamedTuple):
    """Line 3: codes (N, k, P) are the softmax over k of (atoms^T features + offset) / temperature."""

    atoms: Tensor
    """(N, d, k)."""
    temperature: float
    offset: Tensor | None = None
    """(N, k)."""

    def codes(self, block: Tensor) -> Tensor:
        """The codes (N, k, p) of a block of positions (N, d, p)."""
        if self.offset is None:
            logits = torch.bmm(self.atoms.mT, block)
        else:
            logits = torch.baddbmm(self.offset.unsqueeze(2), self.atoms.mT, block)
        return logits.div_(self.temperature).softmax(dim=1)

    def back_through_sums(
        self, grad_block: Tensor, block: Tensor, grad_sums: Tensor, grad_mass: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Line 2: adds to the block's gradient, given those of the sums (N, d, k) and masses (N, k).

        Returns:
            The block's codes and their gradient (N, k, p).
        """
        codes = self.codes(block)
        grad_block.baddbmm_(grad_sums, codes)
        return codes, torch.baddbmm(grad_mass.unsqueeze(2), grad_sums.mT, block)

    def back_through_codes(
        self, grad_block: Tensor, grad_atoms: Tensor, block: Tensor, codes: Tensor, grad_codes: Tensor
    ) -> Tensor:
        """Line 3: adds to the gradients of the block and the atoms. Overwrites `grad_codes`.

        Returns:
            The gradient of the offset (N, k).
        """
        grad_codes -= (codes * grad_codes).sum(dim=1, keepdim=True)
        grad_logits = grad_codes.mul_(codes).div_(self.temperature)
        grad_block.baddbmm_(self.atoms, grad_logits)
        grad_atoms.baddbmm_(block, grad_logits.mT)
        return grad_logits.sum(dim=2)


def _add_sums(sums: Tensor, mass: Tensor, features: Tensor, codes: _Assignment | Tensor) -> None:
    """Line 2: adds features times codes to `sums` (N, d, k) and the codes to `mass` (N, k)."""
    for part, block in _blocks(features, sums.dtype):
        own = codes[..., part].to(sums.dtype) if isinstance(codes, Tensor) else codes.codes(block)
        mass += own.sum(dim=2)
        sums.baddbmm_(block, own.mT)


def _forward(
    features: Tensor, codes: Tensor, num_iters: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, d, _), k, dtype = features.shape, codes.shape[1], working_dtype(features)
    dictionaries = features.new_zeros((num_iters, n, d, k), dtype=dtype)
    masses = features.new_zeros((num_iters, n, k), dtype=dtype)
    for t in range(num_iters):
        source = codes if t == 0 else _Assignment(directions_of(dictionaries[t - 1]), temperature)
        _add_sums(dictionaries[t], masses[t], features, source)
        dictionaries[t] /= masses[t].clamp_min(MASS_FLOOR).unsqueeze(1)
    assignment = _Assignment(directions_of(dictionaries[-1]), temperature)
    last, reconstruction = torch.empty_like(codes), torch.empty_like(features)
    for part, block in _blocks(features, dtype):
        own = assignment.codes(block)
        last[..., part] = own
        reconstruction[..., part] = torch.bmm(dictionaries[-1], own)
    return dictionaries, masses, last, reconstruction


def _backward(
    features: Tensor,
    codes: Tensor,
    dictionaries: Tensor,
    masses: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of features and first codes; `grads` are those of dictionary, codes and reconstruction."""
    dtype = working_dtype(features)
    grad_features, grad_first = torch.zeros_like(features, dtype=dtype), torch.empty_like(codes)
    grad, grad_codes, grad_reconstruction = grads[0].to(dtype, copy=True), grads[1], grads[2]
    grad_sums = grad_mass = grad  # set by the last iteration, which comes first
    for t in reversed(range(len(dictionaries))):
        dictionary, assignment = dictionaries[t], _Assignment(directions_of(dictionaries[t]), temperature)
        grad_directions = torch.zeros_like(dictionary)
        for part, block in _blocks(features, dtype):
            out = grad_features[..., part]
            if t == len(dictionaries) - 1:  # line 5
                rebuilt, own = grad_reconstruction[..., part].to(dtype), assignment.codes(block)
                grad_own = torch.baddbmm(grad_codes[..., part].to(dtype), dictionary.mT, rebuilt)
                grad.baddbmm_(rebuilt, own.mT)
            else:  # line 2 of the next iteration
                own, grad_own = assignment.back_through_sums(out, block, grad_sums, grad_mass)
            assignment.back_through_codes(out, grad_directions, block, own, grad_own)
        grad_sums, grad_mass = _through_dictionary(dictionary, masses[t], assignment.atoms, grad, grad_directions)
        grad = torch.zeros_like(dictionary)
    for part, block in _blocks(features, dtype):  # line 2 of the first iteration
        grad_features[..., part].baddbmm_(grad_sums, codes[..., part].to(dtype))
        grad_first[..., part] = torch.baddbmm(grad_mass.unsqueeze(2), grad_sums.mT, block)
    return grad_features.to(features.dtype), grad_first


def _through_dictionary(
    dictionary: Tensor, mass: Tensor, directions: Tensor, grad: Tensor, grad_directions: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of line 2's sums (N, d, k) and masses (N, k), through the atoms' norms and line 2's division."""
    norm: Tensor = dictionary.norm(dim=1, keepdim=True)
    along = (directions * grad_directions).sum(dim=1, keepdim=True) * (norm > NORM_FLOOR)
    grad = grad + (grad_directions - directions * along) / norm.clamp_min(NORM_FLOOR)
    grad_sums = grad / mass.clamp_min(MASS_FLOOR).unsqueeze(1)
    return grad_sums, -(grad_sums * dictionary).sum(dim=1) * (mass > MASS_FLOOR)
