"""Features at the strides that a decoder needs, from backbones that have others: vision transformers above all.

A plain vision transformer has one stride in all of its blocks, its patch; Swin, PVT and Hiera end at stride 32. As in
ViTDet (Li et al. 2022), transposed convolutions make features finer and pooling makes them coarser. Each level enters
through a layer norm of its own, so that what reaches ASPP and fusion has one scale, whatever the backbone's is.

Strides are nominal: the patch counts as the nearest power of two. With patches of 14 pixels, stride 16 is 14 pixels,
and stride 4 is 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.hiera import Hiera, Reroll
from torch import Tensor, nn

__all__ = ["Blocks", "Pyramid", "nominal_stride", "take_blocks"]


class Pyramid(nn.Module):
    """Makes features of two strides from a backbone's levels.

    Args:
        channels: channels of each level, from the image on.
        strides: nominal stride of each level, powers of two.
        output_stride: stride of the deep features, made from the last level.
        skip_stride: stride of the skip features, made from the coarsest earlier level that is not coarser, else from
            the first one.

    Attributes:
        channels: channels of the skip and of the deep features.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], *, output_stride: int, skip_stride: int
    ) -> None:
        super().__init__()
        self.source = max((i for i, stride in enumerate(strides[:-1]) if stride <= skip_stride), default=0)
        self.skip, skip_channels = _rescale(channels[self.source], strides[self.source], skip_stride)
        self.deep, deep_channels = _rescale(channels[-1], strides[-1], output_stride)
        self.channels = (skip_channels, deep_channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps levels, (N, C, height, width) each, to the skip and the deep features."""
        return [self.skip(levels[self.source]), self.deep(levels[-1])]


def _rescale(channels: int, stride: int, wanted: int) -> tuple[nn.Sequential, int]:
    """Layer norm, then steps of a factor two in stride; a finer step halves the channels, which it returns too."""
    steps: list[nn.Module] = [LayerNorm2d(channels)]
    while stride > wanted:
        steps += [nn.ConvTranspose2d(channels, -(-channels // 2), 2, stride=2)]
        stride, channels = stride // 2, -(-channels // 2)
        steps += [LayerNorm2d(channels), nn.GELU()]
    if stride < wanted:
        steps.append(nn.MaxPool2d(wanted // stride))
    return nn.Sequential(*steps), channels


class Blocks(nn.Module):
    """A timm model that returns the features of some of its levels; prefix and register tokens are left out.

    Args:
        model: has timm's `forward_intermediates`; what comes after the last level is cut off.
        indices: which of its levels, ascending.
        norm: apply the model's final norm to all of them, as DINOv2 does for dense tasks.

    Attributes:
        attention: after `keep_attention`, that of the last pass: see there.
    """

    attention: Tensor | None = None
    _heads: Tensor | None = None

    def __init__(self, model: Any, indices: Sequence[int], *, norm: bool) -> None:
        super().__init__()
        self.indices = list(indices)
        model.prune_intermediate_layers(self.indices, prune_norm=not norm, prune_head=True)
        if type(model) is Hiera:
            model.__class__ = _FreeHiera
        self.model = model
        self.norm = norm

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps images (N, 3, H, W) to (N, C, height, width) each."""
        run: Any = self.model.forward_intermediates
        levels: list[Tensor] = run(images, indices=self.indices, norm=self.norm, intermediates_only=True)
        if self._heads is not None:
            (height, width), heads, self._heads = levels[-1].shape[-2:], self._heads, None
            mean = heads[..., -height * width :, -height * width :].mean(dim=1)
            self.attention = ((mean + mean.mT) / 2).unflatten(-1, (height, width))
        return levels

    def keep_attention(self) -> None:
        """Keeps, at each pass, how much the last block's tokens attend to each other: (N, h w, h, w), no gradient.

        It is the mean over heads and over both directions; prefix tokens are left out.

        Raises:
            AttributeError: the model is no plain transformer, or computes its attention in another way.
        """
        layer = self.model.blocks[-1].attn
        layer.attn_drop.register_forward_pre_hook(self._keep)
        layer.fused_attn = False  # fused attention has no map

    def _keep(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        """Gets all heads' attention, (N, heads, tokens, tokens), the prefix tokens first."""
        self._heads = arguments[0].detach()


def take_blocks(model: Any) -> tuple[Blocks, list[int], list[int]]:
    """Takes the levels of a timm model: all of a hierarchical one; of a plain transformer a fourth's end and the last.

    Returns:
        The backbone, the channels of its levels, and pixels of the image per pixel of each.

    Raises:
        AttributeError: the model cannot give intermediate features.
        ValueError: its strides are not those of a pyramid.
    """
    info: list[dict[str, Any]] = list(model.feature_info)
    strides = [int(level["reduction"]) for level in info]
    plain = len(set(strides)) == 1
    if not plain and any(stride & (stride - 1) for stride in strides):
        raise ValueError(f"its features have the strides {strides}, which are not powers of two")
    indices = [math.ceil(len(info) / 4) - 1, len(info) - 1] if plain else list(range(len(info)))
    width = "num_chs_norm" if plain else "num_chs"
    channels = [int(info[index].get(width, info[index]["num_chs"])) for index in indices]
    return Blocks(model, indices, norm=plain), channels, [strides[index] for index in indices]


def nominal_stride(patch: int) -> int:
    """The power of two nearest to a stride, by their ratio: 16 for patches of 14 pixels."""
    return int(2 ** round(math.log2(patch)))


class _FreeHiera(Hiera):
    """timm's Hiera for images of any size, in multiples of 32 pixels; timm's models have one size each."""

    def forward_intermediates(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """As timm's, after its order of tokens is set to the image's size."""
        size = [side // stride for side, stride in zip(x.shape[-2:], self.patch_stride, strict=True)]
        self.unroll.size = size
        self.mask_spatial_shape = [side // unit for side, unit in zip(size, self.mask_unit_size, strict=True)]
        schedule = self.unroll.schedule
        self.reroll.schedule = Reroll(size, (1, 1), schedule, self.stage_ends, self.q_pool).schedule
        return super().forward_intermediates(x, *arguments, **options)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.pos_embed_win is not None or self.unroll.size == self.tokens_spatial_shape:
            return super()._pos_embed(x)  # type: ignore[no-any-return]
        assert self.pos_embed is not None
        grid = self.pos_embed.unflatten(1, self.tokens_spatial_shape).permute(0, 3, 1, 2)
        fitted = F.interpolate(grid, size=self.unroll.size, mode="bicubic", antialias=True)
        return x + fitted.flatten(2).transpose(1, 2)
