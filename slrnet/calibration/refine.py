"""Refinement of masks by pixel-adaptive convolution (the R of paper Eq. 3; Su et al. 2019, Araslanov and Roth 2020).

A pixel's probabilities become a mean over its 3x3 neighbourhoods at several dilations, weighted by likeness of colour,
again and again. The released code builds all neighbours of all channels as one tensor with the help of convolutions;
here shifted slices are added up in place, which gives the same numbers in a small part of the time and memory. On CPUs
several channels are faster as columns of a matrix, which a sparse one of the weights multiplies.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["affinities", "refine"]

DILATIONS = (1, 2, 4, 8, 12, 24)
CONTRAST_SHARE = 0.1
"""Share of the local standard deviation that a difference of colour is measured against."""
_SEVERAL = 4
"""Channels from which the sparse product is faster (benchmarks/refine.py)."""
_LARGEST = 2**18
"""Pixels of the largest map for which it is made: it takes 0.4 kB for each, twice the weights themselves."""


def refine(images: Tensor, probs: Tensor, *, num_iters: int = 10, dilations: tuple[int, ...] = DILATIONS) -> Tensor:
    """Refines masks by the appearance of the image.

    Args:
        images: (N, 3, H, W) float in [0, 1], of the masks' resolution.
        probs: (N, K, H, W) float, any number of channels; each is refined by itself.
        num_iters: iterations; 0 returns `probs`.
        dilations: of the 3x3 neighbourhoods, in pixels, each at least 1.

    Returns:
        (N, K, H, W) float32. Where the channels sum to 1 they still do.

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
        probs = probs.float()
        if num_iters == 0:
            return probs
        weights = affinities(images.float(), dilations=dilations)
        if _sparse_pays(probs):
            return _refine_by_products(probs, weights, num_iters, dilations)
        for _ in range(num_iters):
            probs = _weighted_neighbours(probs, weights, dilations)
        return probs


def affinities(images: Tensor, *, dilations: tuple[int, ...] = DILATIONS) -> Tensor:
    """Weights of a pixel's neighbours, softmax of -|difference| / (1e-8 + 0.1 std), averaged over the colours.

    Args:
        images: (N, 3, H, W) float32 in [0, 1]. Outside the image its border is repeated.
        dilations: of the 3x3 neighbourhoods.

    Returns:
        (N, 8 len(dilations), H, W), summing to 1 over the neighbours. The standard deviation is taken per colour over
        all samples of all neighbourhoods, each with its centre, with Bessel's correction.
    """
    scale = (-1 / (1e-8 + CONTRAST_SHARE * _local_std(images, dilations))) / images.shape[1]
    weights = images.new_empty(len(images), 8 * len(dilations), *images.shape[2:])
    difference = torch.empty_like(images)
    for index, neighbour in enumerate(_neighbours(images, dilations)):
        torch.sub(neighbour, images, out=difference)
        torch.sum(difference.abs_().mul_(scale), dim=1, out=weights[:, index])
    # Some neighbour's is above -32, by the bound in `_local_std`, so that the largest need not be subtracted first.
    weights.exp_()
    return weights.div_(weights.sum(dim=1, keepdim=True))


def _local_std(images: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Standard deviation (N, 3, H, W) over a pixel's neighbourhoods, from differences to the pixel itself.

    Moments of the colours themselves cancel where an image is nearly flat. Moments of the differences do not: the pixel
    is one sample in nine, so that the squared mean is at most 8/9 of the mean square.
    """
    total, squares, difference = torch.zeros_like(images), torch.zeros_like(images), torch.empty_like(images)
    for neighbour in _neighbours(images, dilations):
        torch.sub(neighbour, images, out=difference)
        total += difference
        squares.addcmul_(difference, difference)
    count = 9 * len(dilations)  # the pixel belongs to each neighbourhood, with difference 0
    variance = (squares - total.square() / count) / (count - 1)
    return variance.clamp_min(0).sqrt()


def _weighted_neighbours(maps: Tensor, weights: Tensor, dilations: tuple[int, ...]) -> Tensor:
    out = torch.zeros_like(maps)
    for index, neighbour in enumerate(_neighbours(maps, dilations)):
        out.addcmul_(neighbour, weights[:, index : index + 1])
    return out


def _sparse_pays(probs: Tensor) -> bool:
    several, fits = probs.shape[1] >= _SEVERAL, probs[0, 0].numel() <= _LARGEST
    return probs.device.type == "cpu" and several and fits and torch.backends.mkl.is_available()


def _refine_by_products(probs: Tensor, weights: Tensor, num_iters: int, dilations: tuple[int, ...]) -> Tensor:
    height, width = probs.shape[2:]
    pixels = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    columns = torch.stack([n.flatten() for n in _neighbours(pixels, dilations)], dim=1).to(torch.int32)  # (P, M)
    starts = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=torch.int32)
    refined = torch.empty_like(probs)
    for image, own in enumerate(weights):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            matrix = torch.sparse_csr_tensor(
                starts, columns.flatten(), own.flatten(1).T.flatten(), (len(columns),) * 2, check_invariants=False
            )
        maps = probs[image].flatten(1).T.contiguous()
        for _ in range(num_iters):
            maps = matrix @ maps
        refined[image] = maps.T.view_as(refined[image])
    return refined


def _neighbours(maps: Tensor, dilations: tuple[int, ...]) -> Iterator[Tensor]:
    """Views of the bordered maps, shifted to each of the eight neighbours at each dilation."""
    height, width = maps.shape[-2:]
    border = max(dilations)
    padded = F.pad(maps, [border] * 4, mode="replicate")
    for dilation in dilations:
        for dy in (-dilation, 0, dilation):
            for dx in (-dilation, 0, dilation):
                if dy or dx:
                    yield padded[..., border + dy : border + dy + height, border + dx : border + dx + width]
