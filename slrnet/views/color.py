"""Color jitter of a whole batch on its device (paper Sec. 4.6: color distortion of the views).

Brightness, contrast, saturation and hue change in this order, by factors of each image's own. Each step computes what
torchvision's function does (`adjust_brightness`, ...), which takes one factor for all images; the released code applies
those image by image on the CPU, in a random order. Hue needs no HSV images: a pixel keeps its largest and smallest
channel, so only the angle on the color hexagon is computed, shifted and turned back into channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slrnet.config import ViewsConfig

__all__ = ["ColorParams", "apply_color", "draw_color"]

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class ColorParams:
    """The drawn distortion of N images, (N,) float32 each; None: that distortion is off.

    `brightness`, `contrast` and `saturation` are factors; `hue` is a shift in turns of the color circle.
    """

    brightness: Tensor | None
    contrast: Tensor | None
    saturation: Tensor | None
    hue: Tensor | None

    def part(self, rows: slice) -> ColorParams:
        """The distortion of some of the images."""
        drawn = (self.brightness, self.contrast, self.saturation, self.hue)
        return ColorParams(*(None if of is None else of[rows] for of in drawn))


def draw_color(n: int, config: ViewsConfig, *, generator: torch.Generator) -> ColorParams:
    """Draws the distortion of `n` images.

    Args:
        n: number of images.
        config: b of each distortion: factors are uniform in [1 - b, 1 + b], shifts of hue in [-b, b].
        generator: a generator on the CPU; the same state gives the same distortion on any device.
    """
    # Always draw all four rows, so that turning one distortion off does not change the others.
    uniform = torch.rand(4, n, generator=generator) * 2.0 - 1.0
    return ColorParams(
        brightness=1.0 + config.brightness * uniform[0] if config.brightness else None,
        contrast=1.0 + config.contrast * uniform[1] if config.contrast else None,
        saturation=1.0 + config.saturation * uniform[2] if config.saturation else None,
        hue=config.hue * uniform[3] if config.hue else None,
    )


def apply_color(images: Tensor, params: ColorParams) -> Tensor:
    """Distorts images (N, 3, H, W), float RGB in [0, 1] on any device, without changing the input.

    Returns:
        (N, 3, H, W) of the same dtype in [0, 1]; `images` itself where everything is off.
    """
    if params.brightness is not None:
        images = (images * _per_image(params.brightness, images)).clamp_(0.0, 1.0)
    if params.contrast is not None:
        mean = _gray(images).mean(dim=(-2, -1), keepdim=True)
        images = _blend(images, mean, params.contrast)
    if params.saturation is not None:
        images = _blend(images, _gray(images), params.saturation)
    if params.hue is not None:
        images = _shift_hue(images, params.hue)
    return images


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(device=images.device, dtype=images.dtype, non_blocking=True).view(-1, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    red, green, blue = _GRAY_WEIGHTS
    gray = images[:, 0:1] * red
    return gray.add_(images[:, 1:2], alpha=green).add_(images[:, 2:3], alpha=blue)


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    """Clamped factor * images + (1 - factor) * other, as other + factor * (images - other)."""
    return torch.lerp(other, images, _per_image(factors, images)).clamp_(0.0, 1.0)


def _shift_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turns the hue by `shifts` turns; a pixel keeps its largest and smallest channel."""
    red, green, blue = images.unbind(1)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - smallest
    # The angle on the color hexagon, in sixths of a turn. Where two channels are largest, both formulas agree; a gray
    # pixel has chroma 0, so any finite angle will do.
    angle = torch.where(
        red == largest,
        green - blue,
        torch.where(green == largest, (blue - red).add_(chroma, alpha=2.0), (red - green).add_(chroma, alpha=4.0)),
    )
    angle.div_(chroma.clamp_min(torch.finfo(images.dtype).tiny))
    angle.add_(6.0 * _per_image(shifts, images)[:, 0])
    angle.sub_(torch.div(angle, 6.0).floor_(), alpha=6.0)
    # A channel's share of the chroma follows from the angle's distance to red (0), green (2) or blue (4).
    shares = [(angle - 3.0).abs_().sub_(1.0), *((angle - at).abs_().neg_().add_(2.0) for at in (2.0, 4.0))]
    out = torch.stack(shares, dim=1)  # a compiler would stop at slices that are written to
    out.clamp_(0.0, 1.0).mul_(chroma.unsqueeze(1)).add_(smallest.unsqueeze(1))
    return out.clamp_(0.0, 1.0)
