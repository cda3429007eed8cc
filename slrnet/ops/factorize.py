"""Algorithm 1's iterations and their gradient as operators of PyTorch.

`slrnet::factorize` is the whole of it, `slrnet::assigned_sums` one pass: assign the positions to atoms, and sum up
what each atom got. Going forwards, one pass over the positions turns the codes of one iteration into the dictionary of
the next; going backwards, one pass per iteration computes the codes again from that iteration's dictionary. Both work
on blocks of positions, so neither the codes of an iteration nor their gradients ever stand in memory as a whole: what
is kept for the backward pass are the inputs and one dictionary with its code masses per iteration.

The operators are registered with `torch.library`, so `torch.compile`, `torch.export`, activation checkpointing and DDP
see one node with known shapes. There is no second derivative: differentiating the backward operator is an error.

Letters: N images, d feature dimension, k atoms, P positions, T iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slrnet.ops.kernels import MASS_FLOOR, NORM_FLOOR

__all__ = ["assigned_sums", "directions_of", "factorize_op", "working_dtype"]

BLOCK = 2048
"""Positions that are worked on together on the CPU."""


@torch.library.custom_op("slrnet::factorize", mutates_args=())
def factorize_op(
    features: Tensor, codes: Tensor, num_iters: int, temperature: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs Algorithm 1.

    Args:
        features: (N, d, P); float16 and bfloat16 are worked on in float32.
        codes: (N, k, P) of the same type, non-negative and summing to 1 over k.
        num_iters: T >= 1.
        temperature: tau > 0.
        implementation: `recompute` or `triton`.

    Returns:
        The dictionaries of all iterations (T, N, d, k) and the code masses that they were divided by (T, N, k), in
        float32 at least; the last codes (N, k, P) and the reconstruction (N, d, P) in the type of the features.
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
    arguments = (features, codes, dictionaries, masses, grad_dictionary, grad_codes, grad_reconstruction, temperature)
    if implementation == "triton":
        from slrnet.ops import factorize_triton

        return factorize_triton.backward(*arguments)
    return _backward(*arguments)


@factorize_op.register_fake
def _(
    features: Tensor, codes: Tensor, num_iters: int, temperature: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d, _ = features.shape
    k = codes.shape[1]
    dtype = working_dtype(features)
    return (
        features.new_empty((num_iters, n, d, k), dtype=dtype),
        features.new_empty((num_iters, n, k), dtype=dtype),
        codes.new_empty(codes.shape),
        features.new_empty(features.shape),
    )


@_backward_op.register_fake
def _(features: Tensor, codes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), codes.new_empty(codes.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    features, codes, _, ctx.temperature, ctx.implementation = inputs
    ctx.save_for_backward(features, codes, output[0], output[1])


def _differentiate(
    ctx: Any, grad_dictionaries: Tensor, _: Tensor, grad_codes: Tensor, grad_reconstruction: Tensor
) -> tuple[Tensor, Tensor, None, None, None]:
    """Only the last dictionary is given to callers; the gradients of the others are zero."""
    features, codes, dictionaries, masses = ctx.saved_tensors
    grads = _backward_op(
        features,
        codes,
        dictionaries,
        masses,
        grad_dictionaries[-1],
        grad_codes,
        grad_reconstruction,
        ctx.temperature,
        ctx.implementation,
    )
    return *grads, None, None, None


factorize_op.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("slrnet::assigned_sums", mutates_args=())
def assigned_sums(features: Tensor, atoms: Tensor, offset: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums of the features by atom, weighted by codes that never stand in memory as a whole.

    The codes are the softmax over k of (atoms^T features + offset) / temperature.

    Args:
        features: (N, d, P), float32 or float64.
        atoms: (N, d, k) of the same type.
        offset: (N, k) of the same type.
        temperature: tau > 0.

    Returns:
        sum over positions of features times codes (N, d, k), and the codes' masses (N, k). There is no second
        derivative.
    """
    sums = torch.zeros_like(atoms, memory_format=torch.contiguous_format)
    mass = torch.zeros_like(offset, memory_format=torch.contiguous_format)
    _add_sums(sums, mass, features, atoms, temperature, offset)
    return sums, mass


@torch.library.custom_op("slrnet::assigned_sums_backward", mutates_args=())
def _assigned_sums_backward(
    features: Tensor, atoms: Tensor, offset: Tensor, grad_sums: Tensor, grad_mass: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_features = torch.zeros_like(features)
    grad_atoms = torch.zeros_like(atoms, memory_format=torch.contiguous_format)
    grad_offset = torch.zeros_like(offset, memory_format=torch.contiguous_format)
    for part in _blocks(features.shape[2]):
        block, out = features[..., part], grad_features[..., part]
        grad_offset += _add_sums_gradient(out, grad_atoms, block, atoms, temperature, grad_sums, grad_mass, offset)
    return grad_features, grad_atoms, grad_offset


@assigned_sums.register_fake
def _(features: Tensor, atoms: Tensor, offset: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return atoms.new_empty(atoms.shape), offset.new_empty(offset.shape)


@_assigned_sums_backward.register_fake
def _(features: Tensor, atoms: Tensor, offset: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(features), atoms.new_empty(atoms.shape), offset.new_empty(offset.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, atoms, offset, ctx.temperature = inputs
    ctx.save_for_backward(features, atoms, offset)


def _differentiate_sums(ctx: Any, grad_sums: Tensor, grad_mass: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_assigned_sums_backward(*ctx.saved_tensors, grad_sums, grad_mass, ctx.temperature), None


assigned_sums.register_autograd(_differentiate_sums, setup_context=_keep_inputs)


def working_dtype(features: Tensor) -> torch.dtype:
    """float32 for half precision, else the features' own."""
    return torch.float32 if features.dtype in (torch.float16, torch.bfloat16) else features.dtype


def directions_of(dictionary: Tensor) -> Tensor:
    """The atoms (N, d, k) at length 1; one shorter than `NORM_FLOOR` stays as short as it is, in proportion."""
    norm: Tensor = dictionary.norm(dim=1, keepdim=True)
    return dictionary / norm.clamp_min(NORM_FLOOR)


def _blocks(positions: int) -> Iterator[slice]:
    for start in range(0, positions, BLOCK):
        yield slice(start, min(start + BLOCK, positions))


def _codes_of(block: Tensor, atoms: Tensor, temperature: float, offset: Tensor | None = None) -> Tensor:
    """Line 3 for a block of positions (N, d, p): (N, k, p)."""
    if offset is None:
        logits = torch.bmm(atoms.transpose(1, 2), block)
    else:
        logits = torch.baddbmm(offset.unsqueeze(2), atoms.transpose(1, 2), block)
    return logits.div_(temperature).softmax(dim=1)


def _add_sums(
    sums: Tensor, mass: Tensor, features: Tensor, atoms: Tensor, temperature: float, offset: Tensor | None = None
) -> None:
    """Line 3, and line 2's sums of it: adds features times codes to `sums` (N, d, k) and the codes to `mass` (N, k)."""
    for part in _blocks(features.shape[2]):
        block = features[..., part].to(sums.dtype)
        own = _codes_of(block, atoms, temperature, offset)
        mass += own.sum(dim=2)
        sums.baddbmm_(block, own.transpose(1, 2))


def _add_sums_gradient(
    grad_block: Tensor,
    grad_atoms: Tensor,
    block: Tensor,
    atoms: Tensor,
    temperature: float,
    grad_sums: Tensor,
    grad_mass: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """Back through `_add_sums` for a block of positions (N, d, p).

    Adds to the gradients of the block and of the atoms, given those of the sums (N, d, k) and of the masses (N, k).

    Returns:
        The gradient of the offset (N, k).
    """
    own = _codes_of(block, atoms, temperature, offset)
    grad_own = torch.baddbmm(grad_mass.unsqueeze(2), grad_sums.transpose(1, 2), block)
    grad_block.baddbmm_(grad_sums, own)
    return _add_codes_gradient(grad_block, grad_atoms, block, atoms, temperature, own, grad_own)


def _add_codes_gradient(
    grad_block: Tensor,
    grad_atoms: Tensor,
    block: Tensor,
    atoms: Tensor,
    temperature: float,
    codes: Tensor,
    grad_codes: Tensor,
) -> Tensor:
    """Back through line 3 for a block; takes the memory of `grad_codes`. Returns the gradient of the offset (N, k)."""
    grad_codes -= (codes * grad_codes).sum(dim=1, keepdim=True)
    grad_logits = grad_codes.mul_(codes).div_(temperature)
    grad_block.baddbmm_(atoms, grad_logits)
    grad_atoms.baddbmm_(block, grad_logits.transpose(1, 2))
    return grad_logits.sum(dim=2)


def _forward(
    features: Tensor, codes: Tensor, num_iters: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d, positions = features.shape
    dtype = working_dtype(features)
    dictionaries = features.new_empty((num_iters, n, d, codes.shape[1]), dtype=dtype)
    masses = features.new_empty((num_iters, n, codes.shape[1]), dtype=dtype)
    directions: Tensor | None = None
    for t in range(num_iters):
        total, mass = dictionaries[t].zero_(), masses[t].zero_()
        if directions is None:
            for part in _blocks(positions):
                own = codes[..., part].to(dtype)
                mass += own.sum(dim=2)
                total.baddbmm_(features[..., part].to(dtype), own.transpose(1, 2))
        else:
            _add_sums(total, mass, features, directions, temperature)
        total /= mass.clamp_min(MASS_FLOOR).unsqueeze(1)
        directions = directions_of(total)
    assert directions is not None
    last, reconstruction = torch.empty_like(codes), torch.empty_like(features)
    for part in _blocks(positions):
        own = _codes_of(features[..., part].to(dtype), directions, temperature)
        last[..., part] = own
        reconstruction[..., part] = torch.bmm(dictionaries[-1], own)
    return dictionaries, masses, last, reconstruction


def _backward(
    features: Tensor,
    codes: Tensor,
    dictionaries: Tensor,
    masses: Tensor,
    grad_dictionary: Tensor,
    grad_codes: Tensor,
    grad_reconstruction: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(features)
    grad_features = torch.zeros_like(features, dtype=dtype)
    grad_first = torch.empty_like(codes)
    dictionary, directions = dictionaries[-1], directions_of(dictionaries[-1])
    grad_here, grad_directions = grad_dictionary.to(dtype, copy=True), torch.zeros_like(dictionary)
    for part in _blocks(features.shape[2]):  # lines 5 and 3 of the last iteration
        block, rebuilt = features[..., part].to(dtype), grad_reconstruction[..., part].to(dtype)
        own = _codes_of(block, directions, temperature)
        grad_own = torch.baddbmm(grad_codes[..., part].to(dtype), dictionary.transpose(1, 2), rebuilt)
        grad_here.baddbmm_(rebuilt, own.transpose(1, 2))
        _add_codes_gradient(grad_features[..., part], grad_directions, block, directions, temperature, own, grad_own)
    scaled, grad_mass = _through_dictionary(dictionary, masses[-1], directions, grad_here, grad_directions)
    for t in range(len(dictionaries) - 2, -1, -1):
        dictionary, directions = dictionaries[t], directions_of(dictionaries[t])
        grad_here, grad_directions = torch.zeros_like(dictionary), torch.zeros_like(dictionary)
        for part in _blocks(features.shape[2]):  # line 2 of the next iteration, and line 3
            block, out = features[..., part].to(dtype), grad_features[..., part]
            _add_sums_gradient(out, grad_directions, block, directions, temperature, scaled, grad_mass)
        scaled, grad_mass = _through_dictionary(dictionary, masses[t], directions, grad_here, grad_directions)
    for part in _blocks(features.shape[2]):  # line 2 of the first iteration
        grad_features[..., part].baddbmm_(scaled, codes[..., part].to(dtype))
        block = features[..., part].to(dtype)
        grad_first[..., part] = torch.baddbmm(grad_mass.unsqueeze(2), scaled.transpose(1, 2), block)
    return grad_features.to(features.dtype), grad_first


def _through_dictionary(
    dictionary: Tensor, mass: Tensor, directions: Tensor, grad: Tensor, grad_directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Back through the atoms' norms and line 2's division.

    Returns:
        The gradients of line 2's sum (N, d, k) and of the code masses (N, k).
    """
    norm: Tensor = dictionary.norm(dim=1, keepdim=True)
    along = (directions * grad_directions).sum(dim=1, keepdim=True) * (norm > NORM_FLOOR)
    grad = grad + (grad_directions - directions * along) / norm.clamp_min(NORM_FLOOR)
    scaled = grad / mass.clamp_min(MASS_FLOOR).unsqueeze(1)
    grad_mass = -(scaled * dictionary).sum(dim=1) * (mass > MASS_FLOOR)
    return scaled, grad_mass
