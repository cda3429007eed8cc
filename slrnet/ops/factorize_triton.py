"""Triton kernels of Algorithm 1 and its gradient; `slrnet.ops.factorize` does the same in PyTorch.

Each pass reads the features once, in T + 1 passes forward and 2 T + 2 backward. It computes a tile's codes, uses them
and drops them; caches serve rows of a tile that are read again. A dictionary is a sum over positions. Each of `splits`
stretches of positions has partial sums, which a second kernel adds in a fixed order. There are no atomics, so the same
tiles give the same bits. If a dictionary is too large for one program's registers, neighboring programs share its d
rows in slices and all compute the same codes.

Sums are in float32 for any dtype of features. Products of float32 features use three TF32 products on tensor cores,
which is exact to about 1e-6; those of half-precision features use one.

Letters: N images, d feature dimension, k atoms, P positions, T iterations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slrnet.ops.kernels import MASS_FLOOR, NORM_FLOOR, on_device_of_first, triton_obstacle

__all__ = ["INTERPRETED", "Plan", "backward", "forward", "misfit", "plan_of"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run on the CPU in Triton's interpreter; fixed when this module is imported."""
MASS_LIMIT, NORM_LIMIT = tl.constexpr(MASS_FLOOR), tl.constexpr(NORM_FLOOR)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM, MAX_BASES = 1024, 1024
SUMS = 8192
"""float32 sums that one program keeps in registers; more of them would spill to memory."""
MANY_ATOMS = 256
"""Number of atoms from which codes take so many registers that only half as many sums fit."""
CHUNK = tl.constexpr(16)
"""Rows of d that a product over d takes at once."""
PARTIAL_SHARE = 0.1
"""Largest share of the features' bytes to write and read again as partial sums."""
SHARED_OF_ATOM = 192
"""Bytes of shared memory that the smallest tile takes for each atom, rounded up to a power of 2, where T > 1."""
COLUMNS = 8
"""Atoms in a program of the finishing kernels."""
FINISHING_WARPS = 8
"""Warps of the finishing kernels; with fewer, the d rows of an atom take too many registers of each thread."""
PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H100."""


class Plan(NamedTuple):
    """How programs share a pass over the positions."""

    splits: int
    """Stretches of positions with partial sums."""
    slices: int
    """Programs that share the d rows of one stretch's sums."""
    rows: int
    """Rows of each slice, a power of 2."""
    atoms: int
    """k rounded up to a power of 2, at least 16."""
    precision: str
    """Precision of products over d or positions."""
    wide: str
    """Precision of products over all atoms, whose operands are in registers as a whole."""

    def tile(self) -> dict[str, Any]:
        """The constants that all passes are compiled with."""
        return {"ATOMS": self.atoms, "PRECISION": self.precision}


def plan_of(n: int, d: int, k: int, positions: int, dtype: torch.dtype) -> Plan:
    """Cuts a pass into programs: enough to fill a GPU, but no partial sums that outweigh the features."""
    single = dtype == torch.float32
    atoms = _padded(k)
    rows = max(16, min(triton.next_power_of_2(d), SUMS // atoms // (2 if atoms >= MANY_ATOMS else 1)))
    slices = triton.cdiv(d, rows)
    affordable = int(PARTIAL_SHARE * positions * dtype.itemsize / (2 * 4 * k))
    splits = max(1, min(triton.cdiv(PROGRAMS, n * slices), affordable, triton.cdiv(positions, 32)))
    wide = "ieee" if atoms >= 128 else "tf32x3"
    return Plan(splits, slices, rows, atoms, "tf32x3" if single else "tf32", wide if single else "tf32")


def misfit(features: Tensor, k: int) -> str | None:
    """Why the kernels cannot run on these features and k atoms, and what can; None if they can."""
    if features.device.type != ("cpu" if INTERPRETED else "cuda"):
        takes = "CPU tensors, as TRITON_INTERPRET=1 is set" if INTERPRETED else "CUDA tensors"
        return f"takes {takes}, and got {features.device.type}; 'auto', 'recompute' and 'reference' run there"
    if features.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, and got {features.dtype}; use 'recompute' or 'reference'"
    d = features.shape[1]
    if d > MAX_DIM or k > MAX_BASES:
        return f"takes d up to {MAX_DIM} and k up to {MAX_BASES}, and got d = {d} and k = {k}; use 'recompute'"
    if INTERPRETED:
        return None
    if (obstacle := triton_obstacle()) is not None:
        return f"cannot run here: {obstacle}, or use 'recompute'"
    has = int(torch.cuda.get_device_properties(features.device).shared_memory_per_block_optin)  # type: ignore[attr-defined]
    if (needed := SHARED_OF_ATOM * _padded(k)) > has:
        return f"needs {needed >> 10} KiB of shared memory for k = {k}, and this GPU has {has >> 10}; use 'recompute'"
    return None


def _padded(k: int) -> int:
    """Number of atoms, rounded up to a power of 2 that the products take."""
    return max(16, int(triton.next_power_of_2(k)))


def fitting_tiles(configs: list[triton.Config], constants: dict[str, Any]) -> list[triton.Config]:
    """The tiles with which a kernel of these constants spills no registers."""
    sums, single = "ROWS" in constants, constants["PRECISION"] == "tf32x3"
    if constants["ATOMS"] >= MANY_ATOMS:
        fitting = [(16, 1)] if sums else [(16, 1), (16, 2)]
    elif single:
        fitting = [(16, 1), (16, 2)]
    else:
        fitting = [(16, 2), (32, 2)] if sums else [(16, 2), (16, 3), (32, 2)]
    return [config for config in configs if (config.kwargs["TILE"], config.num_stages) in fitting]


def _tuned(names: str, **options: Any) -> Callable[[Any], Any]:
    """Picks the fastest tiles; all of one width if PyTorch is set to be deterministic when this module is imported.

    Results then do not depend on a timing. Stages (how far loads run ahead) change no result.
    """
    tiles = [(16, 2)] if INTERPRETED else [(16, 1), (16, 2), (16, 3), (32, 2)]
    if torch.are_deterministic_algorithms_enabled():
        tiles = [(width, stages) for width, stages in tiles if width == 16]
    return triton.autotune(  # type: ignore[no-any-return]
        configs=[triton.Config({"TILE": tile}, num_warps=8, num_stages=stages) for tile, stages in tiles],
        key=names.split(),
        prune_configs_by={"early_config_prune": lambda configs, _, **constants: fitting_tiles(configs, constants)},
        **options,
    )


@triton.jit
def _load(base, row, column, height, width):
    """A block of a (height, width) array in float32, with zeros outside."""
    inside = (row < height)[:, None] & (column < width)[None, :]
    return tl.load(base + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_transposed(base, row, column, height, width):
    """The transposed block."""
    inside = (column < width)[:, None] & (row < height)[None, :]
    return tl.load(base + row[None, :] * width + column[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, row, column, height, width, block):
    """Writes the part of a block that lies in a (height, width) array, in the array's dtype."""
    inside = (row < height)[:, None] & (column < width)[None, :]
    tl.store(base + row[:, None] * width + column[None, :], block.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _offsets(image, d, k, positions):
    """Where an image's features (d, P), codes (k, P), dictionary (d, k) and masses (k) begin."""
    image = image.to(tl.int64)
    return image * d * positions, image * k * positions, image * d * k, image * k


@triton.jit
def _project(
    total, weights, values, where, d, k, positions, ATOMS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Adds W^T V for a tile of positions to `total` (ATOMS, TILE): `weights` W (d, k), `values` V (d, P)."""
    atom = tl.arange(0, ATOMS)
    for start in range(0, d, CHUNK):
        row = start + tl.arange(0, CHUNK)
        v = _load(values, row, where, d, positions)
        total = tl.dot(_load_transposed(weights, row, atom, d, k), v, total, input_precision=PRECISION)
    return total


@triton.jit
def _codes_of_tile(
    features, dictionary, scale, where, d, k, positions, inverse_temperature,
    ATOMS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Line 3 for a tile of positions: (ATOMS, TILE), zero outside. `scale` (k) is one over the atoms' norms."""
    atom = tl.arange(0, ATOMS)
    logits = tl.zeros((ATOMS, TILE), dtype=tl.float32)
    logits = _project(logits, dictionary, features, where, d, k, positions, ATOMS, PRECISION)
    logits *= (tl.load(scale + atom, mask=atom < k, other=0.0) * inverse_temperature)[:, None]
    logits = tl.where((atom < k)[:, None], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return tl.where((where < positions)[None, :], powers / tl.sum(powers, axis=0)[None, :], 0.0)


@_tuned("d k FIRST")
@triton.jit
def _sum_for_dictionary(
    features, values, codes, dictionary, scale, partial, partial_mass, d, k, positions, splits, inverse_temperature,
    FIRST: tl.constexpr, ROWS: tl.constexpr, ATOMS: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Line 2's sums over a stretch of positions: V C^T into `partial` (N, splits, d, k) and the codes' mass.

    C are the first codes, or those of line 3 for the dictionary (N, d, k). V are the features or, in the backward
    pass, the gradient of the reconstruction: the sum is then the gradient of line 5's dictionary.
    """
    part, image, split = tl.program_id(0), tl.program_id(1) // splits, tl.program_id(1) % splits
    maps, of_codes, atoms, masses = _offsets(image, d, k, positions)
    atom, row = tl.arange(0, ATOMS), part * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, ATOMS), dtype=tl.float32)
    mass = tl.zeros((ATOMS,), dtype=tl.float32)
    length = tl.cdiv(tl.cdiv(positions, TILE), splits) * TILE
    for start in range(split * length, tl.minimum((split + 1) * length, positions), TILE):
        where = start + tl.arange(0, TILE)
        if FIRST:
            own = _load(codes + of_codes, atom, where, k, positions)
        else:
            own = _codes_of_tile(
                features + maps, dictionary + atoms, scale + masses, where, d, k, positions, inverse_temperature,
                ATOMS, TILE, PRECISION,
            )  # fmt: skip
        v = _load(values + maps, row, where, d, positions)
        total = tl.dot(v, tl.trans(own), total, input_precision=PRECISION)
        mass += tl.sum(own, axis=1)
    _store(partial + tl.program_id(1).to(tl.int64) * d * k, row, atom, d, k, total)
    if part == 0:
        tl.store(partial_mass + tl.program_id(1) * k + atom, mass, mask=atom < k)


@triton.jit
def _finish_dictionary(
    partial, partial_mass, dictionary, masses, scale, d, k, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Adds the partial sums in order; writes dictionary (N, d, k), masses (N, k) and one over norms (N, k)."""
    image, row, atom = tl.program_id(1), tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    mass = tl.zeros((COLUMNS,), dtype=tl.float32)
    for split in range(splits):
        one = image * splits + split
        total += _load(partial + one.to(tl.int64) * d * k, row, atom, d, k)
        mass += tl.load(partial_mass + one * k + atom, mask=atom < k, other=0.0)
    total = total / tl.maximum(mass, MASS_LIMIT)[None, :]
    norm = tl.sqrt(tl.sum(total * total, axis=0))
    _store(dictionary + image * d * k, row, atom, d, k, total)
    tl.store(masses + image * k + atom, mass, mask=atom < k)
    tl.store(scale + image * k + atom, 1 / tl.maximum(norm, NORM_LIMIT), mask=atom < k)


@_tuned("d k")
@triton.jit
def _rebuild(
    features, dictionary, scale, codes, reconstruction, d, k, positions, inverse_temperature,
    ATOMS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Lines 3 and 5 for a tile: the last codes (N, k, P) and the reconstruction (N, d, P)."""
    maps, of_codes, atoms, masses = _offsets(tl.program_id(1), d, k, positions)
    atom, where = tl.arange(0, ATOMS), tl.program_id(0) * TILE + tl.arange(0, TILE)
    own = _codes_of_tile(
        features + maps, dictionary + atoms, scale + masses, where, d, k, positions, inverse_temperature,
        ATOMS, TILE, PRECISION,
    )  # fmt: skip
    _store(codes + of_codes, atom, where, k, positions, own)
    for start in range(0, d, CHUNK):
        row = start + tl.arange(0, CHUNK)
        result = tl.dot(_load(dictionary + atoms, row, atom, d, k), own, input_precision=WIDE)
        _store(reconstruction + maps, row, where, d, positions, result)


@triton.jit
def _grad_of_tile(
    features, source, dictionary, scale, weights, grad_mass, grad_codes, image, where, d, k, positions,
    inverse_temperature, LAST: tl.constexpr, ATOMS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's codes and the gradient of line 3's logits, both (ATOMS, TILE); pointers are the first image's.

    The last codes go into line 5 (`weights` is its dictionary, `source` the gradient of the reconstruction) and out of
    the function (`grad_codes`). Earlier ones go into line 2 of the next iteration (`weights` is the gradient of its
    sum, `source` the features, `grad_mass` the masses' gradient, negated).
    """
    maps, of_codes, atoms, masses = _offsets(image, d, k, positions)
    atom = tl.arange(0, ATOMS)
    if LAST:
        grad = _load(grad_codes + of_codes, atom, where, k, positions)
    else:
        grad = tl.zeros((ATOMS, TILE), dtype=tl.float32)
        grad -= tl.load(grad_mass + masses + atom, mask=atom < k, other=0.0)[:, None]
    grad = _project(grad, weights + atoms, source + maps, where, d, k, positions, ATOMS, PRECISION)
    own = _codes_of_tile(
        features + maps, dictionary + atoms, scale + masses, where, d, k, positions, inverse_temperature,
        ATOMS, TILE, PRECISION,
    )  # fmt: skip
    return own, own * (grad - tl.sum(own * grad, axis=0)[None, :]) * inverse_temperature


@_tuned("d k LAST")
@triton.jit
def _sum_for_directions(
    features, source, dictionary, scale, weights, grad_mass, grad_codes, partial, d, k, positions, splits,
    inverse_temperature,
    LAST: tl.constexpr, ROWS: tl.constexpr, ATOMS: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of line 3's directions over a stretch of positions, into `partial` (N, splits, d, k)."""
    part, image, split = tl.program_id(0), tl.program_id(1) // splits, tl.program_id(1) % splits
    row = part * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, ATOMS), dtype=tl.float32)
    length = tl.cdiv(tl.cdiv(positions, TILE), splits) * TILE
    for start in range(split * length, tl.minimum((split + 1) * length, positions), TILE):
        where = start + tl.arange(0, TILE)
        _, grad = _grad_of_tile(
            features, source, dictionary, scale, weights, grad_mass, grad_codes, image, where, d, k, positions,
            inverse_temperature, LAST, ATOMS, TILE, PRECISION,
        )  # fmt: skip
        x = _load(features + image.to(tl.int64) * d * positions, row, where, d, positions)
        total = tl.dot(x, tl.trans(grad), total, input_precision=PRECISION)
    _store(partial + tl.program_id(1).to(tl.int64) * d * k, row, tl.arange(0, ATOMS), d, k, total)


@_tuned("d k LAST", restore_value=["grad_features"])
@triton.jit
def _grad_of_features(
    features, source, dictionary, scale, weights, grad_mass, grad_codes, grad_features, d, k, positions,
    inverse_temperature,
    LAST: tl.constexpr, ATOMS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Adds the gradient through line 3 and the next line 2 to `grad_features` (N, d, P), or writes it if LAST."""
    image = tl.program_id(1)
    maps, _, atoms, masses = _offsets(image, d, k, positions)
    atom, where = tl.arange(0, ATOMS), tl.program_id(0) * TILE + tl.arange(0, TILE)
    own, grad = _grad_of_tile(
        features, source, dictionary, scale, weights, grad_mass, grad_codes, image, where, d, k, positions,
        inverse_temperature, LAST, ATOMS, TILE, PRECISION,
    )  # fmt: skip
    grad *= tl.load(scale + masses + atom, mask=atom < k, other=0.0)[:, None]
    for start in range(0, d, CHUNK):
        row = start + tl.arange(0, CHUNK)
        result = tl.dot(_load(dictionary + atoms, row, atom, d, k), grad, input_precision=WIDE)
        if not LAST:
            result = tl.dot(_load(weights + atoms, row, atom, d, k), own, result, input_precision=WIDE)
            result += _load(grad_features + maps, row, where, d, positions)
        _store(grad_features + maps, row, where, d, positions, result)


@triton.jit
def _finish_gradient(
    partial, partial_last, grad_dictionary, dictionary, masses, weights, grad_mass, d, k, splits,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Back through the norms and line 2's division: writes the gradients of line 2's sum (N, d, k) and of its mass."""
    image, row, atom = tl.program_id(1), tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    direct = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if LAST:
        direct += _load(grad_dictionary + image * d * k, row, atom, d, k)
    grad = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for split in range(splits):
        one = (image * splits + split).to(tl.int64) * d * k
        grad += _load(partial + one, row, atom, d, k)
        if LAST:
            direct += _load(partial_last + one, row, atom, d, k)
    atoms = _load(dictionary + image * d * k, row, atom, d, k)
    mass = tl.load(masses + image * k + atom, mask=atom < k, other=1.0)
    norm = tl.sqrt(tl.sum(atoms * atoms, axis=0))
    safe = tl.maximum(norm, NORM_LIMIT)
    unit = atoms / safe[None, :]
    along = tl.where(norm > NORM_LIMIT, tl.sum(unit * grad, axis=0), 0.0)
    direct += (grad - unit * along[None, :]) / safe[None, :]
    scaled = direct / tl.maximum(mass, MASS_LIMIT)[None, :]
    _store(weights + image * d * k, row, atom, d, k, scaled)
    lost = tl.where(mass > MASS_LIMIT, tl.sum(scaled * atoms, axis=0), 0.0)
    tl.store(grad_mass + image * k + atom, lost, mask=atom < k)


@_tuned("d k", restore_value=["grad_features"])
@triton.jit
def _backward_first_codes(
    features, codes, weights, grad_mass, grad_features, grad_first, d, k, positions,
    ATOMS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Back through line 2 of the first iteration: adds to `grad_features`, writes the gradient of the first codes."""
    maps, of_codes, atoms, masses = _offsets(tl.program_id(1), d, k, positions)
    atom, where = tl.arange(0, ATOMS), tl.program_id(0) * TILE + tl.arange(0, TILE)
    own = _load(codes + of_codes, atom, where, k, positions)
    grad = tl.zeros((ATOMS, TILE), dtype=tl.float32)
    grad -= tl.load(grad_mass + masses + atom, mask=atom < k, other=0.0)[:, None]
    grad = _project(grad, weights + atoms, features + maps, where, d, k, positions, ATOMS, PRECISION)
    _store(grad_first + of_codes, atom, where, k, positions, grad)
    for start in range(0, d, CHUNK):
        row = start + tl.arange(0, CHUNK)
        result = _load(grad_features + maps, row, where, d, positions)
        result = tl.dot(_load(weights + atoms, row, atom, d, k), own, result, input_precision=WIDE)
        _store(grad_features + maps, row, where, d, positions, result)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


@on_device_of_first
def forward(
    features: Tensor, codes: Tensor, num_iters: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `slrnet.ops.factorize.factorize_op`."""
    features, codes = features.contiguous(), codes.contiguous()
    (n, d, positions), k = features.shape, codes.shape[1]
    plan = plan_of(n, d, k, positions, features.dtype)
    dictionaries, masses = _floats(features, num_iters, n, d, k), _floats(features, num_iters, n, k)
    partial, partial_mass = _floats(features, n, plan.splits, d, k), _floats(features, n, plan.splits, k)
    scale = torch.empty_like(masses[0])
    for t in range(num_iters):
        _sum_for_dictionary[plan.slices, n * plan.splits](
            features, features, codes, dictionaries[t - 1], scale, partial, partial_mass, d, k, positions,
            plan.splits, 1 / temperature, FIRST=t == 0, ROWS=plan.rows, **plan.tile(),
        )  # fmt: skip
        _finish_dictionary[triton.cdiv(k, COLUMNS), n](
            partial, partial_mass, dictionaries[t], masses[t], scale, d, k, plan.splits,
            ROWS=triton.next_power_of_2(d), COLUMNS=COLUMNS, num_warps=FINISHING_WARPS,
        )  # fmt: skip
    last, reconstruction = torch.empty_like(codes), torch.empty_like(features)
    _rebuild[_tiles(n, positions)](
        features, dictionaries[-1], scale, last, reconstruction, d, k, positions, 1 / temperature,
        **plan.tile(), WIDE=plan.wide,
    )  # fmt: skip
    return dictionaries, masses, last, reconstruction


@on_device_of_first
def backward(
    features: Tensor,
    codes: Tensor,
    dictionaries: Tensor,
    masses: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of features and first codes; `grads` are those of dictionary, codes and reconstruction."""
    features, codes = features.contiguous(), codes.contiguous()
    grad_dictionary, grad_codes, grad_reconstruction = (grad.contiguous() for grad in grads)
    (n, d, positions), k = features.shape, codes.shape[1]
    plan = plan_of(n, d, k, positions, features.dtype)
    grad_features, grad_first = _floats(features, n, d, positions), torch.empty_like(codes)
    scales = 1 / dictionaries.norm(dim=2).clamp_min(NORM_FLOOR)
    weights, grad_mass = dictionaries[-1].clone(), _floats(features, n, k)
    partial, partial_mass = _floats(features, n, plan.splits, d, k), _floats(features, n, plan.splits, k)
    partial_last = torch.empty_like(partial)
    sizes, sums, tiles = (d, k, positions), (plan.slices, n * plan.splits), _tiles(n, positions)
    _sum_for_dictionary[sums](
        features, grad_reconstruction, codes, dictionaries[-1], scales[-1], partial_last, partial_mass, *sizes,
        plan.splits, 1 / temperature, FIRST=False, ROWS=plan.rows, **plan.tile(),
    )  # fmt: skip
    for t in reversed(range(len(dictionaries))):
        last = t == len(dictionaries) - 1
        source = grad_reconstruction if last else features
        inputs = (features, source, dictionaries[t], scales[t], weights, grad_mass, grad_codes)
        _sum_for_directions[sums](
            *inputs, partial, *sizes, plan.splits, 1 / temperature, LAST=last, ROWS=plan.rows, **plan.tile()
        )
        _grad_of_features[tiles](
            *inputs, grad_features, *sizes, 1 / temperature, LAST=last, **plan.tile(), WIDE=plan.wide
        )
        _finish_gradient[triton.cdiv(k, COLUMNS), n](
            partial, partial_last, grad_dictionary, dictionaries[t], masses[t], weights, grad_mass, d, k, plan.splits,
            LAST=last, ROWS=triton.next_power_of_2(d), COLUMNS=COLUMNS, num_warps=FINISHING_WARPS,
        )  # fmt: skip
    _backward_first_codes[tiles](
        features, codes, weights, grad_mass, grad_features, grad_first, *sizes, **plan.tile(), WIDE=plan.wide
    )
    return grad_features.to(features.dtype), grad_first


def _tiles(n: int, positions: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    """The grid of kernels in which a program has one tile of one image."""
    return lambda meta: (triton.cdiv(positions, meta["TILE"]), n)
