"""Refinement of masks by pixel-adaptive convolution (the R of paper Eq. 3; Su et al. 2019, Araslanov and Roth 2020).

In each iteration, a pixel's probabilities become a weighted mean over its 3x3 neighborhoods at several dilations;
similar colors weigh more. The released code builds all neighbors of all channels as one tensor by convolutions; adding
shifted slices in place gives the same numbers in a fraction of the time and memory (benchmarks/refine.py). On CPUs,
many channels are faster still as columns of a matrix that a sparse matrix of the weights multiplies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from slrnet.ops.compiled import with_compiler
from slrnet.ops.maps import widened

__all__ = ["affinities", "attentions", "refine", "scaled_dilations", "similarities"]

DILATIONS = (1, 2, 4, 8, 12, 24)
CONTRAST_SHARE = 0.1
"""Color differences are divided by this share of the local standard deviation."""
FEATURE_TEMPERATURE = 0.1
"""Cosines of features are divided by it."""
SPARSE_CHANNELS = 4
"""Number of channels from which the sparse product is faster (benchmarks/refine.py)."""
SPARSE_PIXELS = 2**18
"""Largest map for the sparse product; its matrix takes 0.4 kB per pixel, twice as much as the weights."""


def refine(
    images: Tensor,
    probs: Tensor,
    *,
    num_iters: int = 10,
    dilations: tuple[int, ...] = DILATIONS,
    features: Tensor | None = None,
    feature_share: float = 0.0,
    attends: bool = False,
    compiled: bool = False,
) -> Tensor:
    """Refines masks by the appearance of the image.

    Args:
        images: (N, 3, H, W) float in [0, 1], at the masks' resolution.
        probs: (N, K, H, W) float, any number of channels; each is refined separately.
        num_iters: number of iterations; 0 returns `probs`.
        dilations: dilations of the 3x3 neighborhoods, in pixels, each at least 1.
        features: (N, C, H, W) float, whose similarities make `feature_share` of the neighbors' weights.
        feature_share: in [0, 1]; above 0, features are needed.
        attends: `features` are attention instead, (N, h w, h, w) of any h and w; see `attentions`.
        compiled: let `torch.compile` make one kernel of an iteration, for this size.

    Returns:
        (N, K, H, W), float32 at least. Channels that sum to 1 still do.

    Raises:
        ValueError: shapes that do not fit, no dilation, or one below 1.
    """
    if images.ndim != 4 or probs.ndim != 4 or images.shape[0] != probs.shape[0] or images.shape[2:] != probs.shape[2:]:
        raise ValueError(
            f"images {tuple(images.shape)} and probs {tuple(probs.shape)} must be (N, 3, H, W) and (N, K, H, W) of one "
            "size; resize the images to the masks"
        )
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations are {dilations}; allowed is at least one whole number from 1 on")
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        probs = widened(probs)
        if num_iters == 0:
            return probs
        sparse = probs.device.type == "cpu" and torch.backends.mkl.is_available()
        sparse &= probs.shape[1] >= SPARSE_CHANNELS and probs[0, 0].numel() <= SPARSE_PIXELS
        run = _refine_by_products if sparse else _refine_by_slices
        weights = with_compiler(affinities, compiled)(widened(images), dilations=dilations)
        if feature_share:
            assert features is not None
            told = widened(features)
            size = (probs.shape[-2], probs.shape[-1])
            guides = attentions(told, size, dilations) if attends else similarities(told, dilations=dilations)
            weights.lerp_(guides, feature_share)
        return with_compiler(run, compiled and not sparse)(probs, weights, num_iters, dilations)


def scaled_dilations(dilations: tuple[int, ...], *, side: int, size: tuple[int, int]) -> tuple[int, ...]:
    """Dilations that are meant for a square mask of `side` pixels, for one of `size` = (H, W) pixels, without repeats.

    They scale with the root of the mask's area, to whole numbers, at least 1. With a side of 0 they stay as they are.
    """
    if not side:
        return dilations
    factor = math.sqrt(size[0] * size[1]) / side
    return tuple(dict.fromkeys(max(1, round(dilation * factor)) for dilation in dilations))


def affinities(images: Tensor, *, dilations: tuple[int, ...] = DILATIONS) -> Tensor:
    """Weights of a pixel's neighbors: softmax of -|difference| / (1e-8 + 0.1 std), averaged over the color channels.

    The standard deviation is that of a color channel over all samples of all neighborhoods, each with its center, with
    Bessel's correction. Outside the image its border is repeated.

    Args:
        images: (N, 3, H, W) float32 in [0, 1].
        dilations: dilations of the 3x3 neighborhoods, in pixels.

    Returns:
        (N, 8 len(dilations), H, W) float32, summing to 1 over the neighbors.
    """
    scale = (-1 / (1e-8 + CONTRAST_SHARE * _local_std(images, dilations))) / images.shape[1]
    difference = torch.empty_like(images)
    # Writing to slices of one tensor would keep a compiler from making one kernel of it.
    weights = torch.stack(
        [
            torch.sub(neighbor, images, out=difference).abs_().mul_(scale).sum(dim=1)
            for neighbor in _neighbors(images, dilations)
        ],
        dim=1,
    )
    # At least one neighbor's is above -32, by the bound in `_local_std`: no need to subtract the largest first.
    weights.exp_()
    return weights.div_(weights.sum(dim=1, keepdim=True))


def similarities(features: Tensor, *, dilations: tuple[int, ...] = DILATIONS) -> Tensor:
    """Weights of a pixel's neighbors by features: softmax of the cosine of the two feature vectors, divided by 0.1.

    Args:
        features: (N, C, H, W) float32.
        dilations: dilations of the 3x3 neighborhoods, in pixels.

    Returns:
        (N, 8 len(dilations), H, W) float32, summing to 1 over the neighbors.
    """
    units = F.normalize(features, dim=1)
    cosines = [(units * neighbor).sum(dim=1) for neighbor in _neighbors(units, dilations)]
    return (torch.stack(cosines, dim=1) / FEATURE_TEMPERATURE).softmax(dim=1)


def attentions(attention: Tensor, size: tuple[int, int], dilations: tuple[int, ...] = DILATIONS) -> Tensor:
    """Weights of a pixel's neighbors: the attention between its nearest token and theirs, over the neighbors' sum.

    Args:
        attention: (N, h w, h, w) float32, positive; entry (n, i, y, x) is that between token i and token y w + x.
        size: (H, W) of the masks; their corner pixels are at the corner tokens.
        dilations: dilations of the 3x3 neighborhoods, in pixels.

    Returns:
        (N, 8 len(dilations), H, W) float32, summing to 1 over the neighbors.
    """
    cells, device = attention.shape[-2:], attention.device
    rows, columns = (torch.linspace(0, c - 1, n, device=device).round() for c, n in zip(cells, size, strict=True))
    tokens = (rows[:, None] * cells[1] + columns)[None, None]
    neighbors = torch.cat(list(_neighbors(tokens, dilations)), dim=1)  # (1, M, H, W)
    pairs = neighbors[0].long() * attention.shape[1] + tokens[0].long()
    weights = attention.flatten(1)[:, pairs].clamp_min(torch.finfo(attention.dtype).tiny)
    return weights / weights.sum(dim=1, keepdim=True)


def _local_std(images: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Standard deviation (N, 3, H, W) over a pixel's neighborhoods, from differences to the pixel itself.

    Moments of the colors themselves cancel where an image is nearly flat. Moments of the differences do not: the pixel
    is one sample in nine, so the squared mean is at most 8/9 of the mean square.
    """
    total, squares, difference = torch.zeros_like(images), torch.zeros_like(images), torch.empty_like(images)
    for neighbor in _neighbors(images, dilations):
        torch.sub(neighbor, images, out=difference)
        total += difference
        squares.addcmul_(difference, difference)
    count = 9 * len(dilations)  # the pixel belongs to each neighborhood, with difference 0
    variance = (squares - total.square() / count) / (count - 1)
    return variance.clamp_min(0).sqrt()


def _refine_by_slices(probs: Tensor, weights: Tensor, num_iters: int, dilations: tuple[int, ...]) -> Tensor:
    for _ in range(num_iters):
        refined = torch.zeros_like(probs)
        for index, neighbor in enumerate(_neighbors(probs, dilations)):
            refined.addcmul_(neighbor, weights[:, index : index + 1])
        probs = refined
    return probs


def _refine_by_products(probs: Tensor, weights: Tensor, num_iters: int, dilations: tuple[int, ...]) -> Tensor:
    height, width = probs.shape[2:]
    pixels = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    columns = torch.stack([n.flatten() for n in _neighbors(pixels, dilations)], dim=1).to(torch.int32)  # (P, M)
    starts = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=torch.int32)
    refined = torch.empty_like(probs)
    for image, image_weights in enumerate(weights):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            matrix = torch.sparse_csr_tensor(
                starts,
                columns.flatten(),
                image_weights.flatten(1).T.flatten(),
                (len(columns),) * 2,
                check_invariants=False,
            )
        maps = probs[image].flatten(1).T.contiguous()
        for _ in range(num_iters):
            maps = matrix @ maps
        refined[image] = maps.T.view_as(refined[image])
    return refined


def _neighbors(maps: Tensor, dilations: tuple[int, ...]) -> Iterator[Tensor]:
    """Slices of the bordered maps, shifted to each of the eight neighbors at each dilation."""
    height, width = maps.shape[-2:]
    border = max(dilations)
    padded = F.pad(maps, [border] * 4, mode="replicate")
    for dilation in dilations:
        for dy in (-dilation, 0, dilation):
            for dx in (-dilation, 0, dilation):
                if dy or dx:
                    yield padded[..., border + dy : border + dy + height, border + dx : border + dx + width]
