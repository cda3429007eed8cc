"""Pyramid and blocks against plain operators and timm's own arithmetic."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.models.hiera import Hiera
from torch import Tensor

from slrnet.models.encoders import _any_size
from slrnet.models.pyramid import Blocks, Pyramid, nominal_stride, take_blocks
from tests.fixtures import small_encoders  # noqa: F401, registers the small models


def _normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = (x - mean).square().mean(dim=1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def _doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each pixel becomes 2 x 2, pixel by pixel."""
    out = torch.zeros(len(x), weight.shape[1], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    for dy in range(2):
        for dx in range(2):
            out[..., dy::2, dx::2] = torch.einsum("nchw,cd->ndhw", x, weight[:, :, dy, dx]) + bias.view(1, -1, 1, 1)
    return out


def _by_hand(level: Tensor, tensors: list[Tensor]) -> Tensor:
    level, tensors = _normalized(level, *tensors[:2]), tensors[2:]
    while tensors:
        level = _normalized(_doubled(level, *tensors[:2]), *tensors[2:4])
        level, tensors = level * 0.5 * (1 + torch.erf(level / math.sqrt(2))), tensors[4:]
    return level


def test_values_and_gradients_are_those_of_plain_operators() -> None:
    torch.manual_seed(0)
    pyramid = Pyramid([6, 8], [16, 16], output_stride=32, skip_stride=4).double()
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter)
    levels = [torch.randn(2, channels, 4, 6, dtype=torch.float64, requires_grad=True) for channels in (6, 8)]
    skip, deep = pyramid(levels)
    assert (skip.shape, deep.shape, pyramid.channels) == ((2, 2, 16, 24), (2, 8, 2, 3), (2, 8))
    pooled = _by_hand(levels[1], list(pyramid.deep.parameters())).unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    expected = [_by_hand(levels[0], list(pyramid.skip.parameters())), pooled]
    weights = [torch.randn_like(value) for value in expected]
    inputs = [*levels, *pyramid.parameters()]
    for value, own in zip((skip, deep), expected, strict=True):
        torch.testing.assert_close(value, own)
    gradients, by_hand = (
        torch.autograd.grad(sum((v * w).sum() for v, w in zip(values, weights, strict=True)), inputs)
        for values in ((skip, deep), expected)
    )
    torch.testing.assert_close(gradients, by_hand)


@pytest.mark.parametrize(
    ("strides", "skip_stride", "source"),
    [((16, 16), 4, 0), ((4, 8, 16, 32), 8, 1), ((4, 8, 16, 32), 2, 0), ((8, 16, 32, 64), 16, 1)],
)
def test_skip_features_come_from_the_coarsest_level_that_is_fine_enough(
    strides: tuple[int, ...], skip_stride: int, source: int
) -> None:
    pyramid = Pyramid([8] * len(strides), strides, output_stride=16, skip_stride=skip_stride)
    maps = [torch.rand(1, 8, 256 // stride, 128 // stride) for stride in strides]
    skip, deep = pyramid(maps)
    assert pyramid.source == source
    assert skip.shape[2:] == (256 // skip_stride, 128 // skip_stride)
    assert deep.shape[2:] == (16, 8)


def test_patches_count_as_the_nearest_power_of_two() -> None:
    assert [nominal_stride(patch) for patch in (8, 14, 16, 20, 32)] == [8, 16, 16, 16, 32]


@pytest.mark.parametrize("family", ["small_vit", "small_dinov2", "small_dinov3", "small_siglip", "small_eva02"])
def test_at_native_size_blocks_are_timms_tokens_without_prefix(family: str) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(family).eval()
    state = whole.state_dict()
    side = 4 * whole.patch_embed.patch_size[0]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        tokens = whole.forward_features(images)[:, whole.num_prefix_tokens :]
    free = timm.create_model(family, dynamic_img_size=True)
    free.load_state_dict(state)
    backbone, channels, strides = take_blocks(free)
    backbone.eval()
    with torch.no_grad():
        middle, last = backbone(images)
        torch.testing.assert_close(last, tokens.transpose(1, 2).unflatten(2, (4, 4)))
        assert backbone(torch.randn(1, 3, side // 2, 2 * side))[1].shape == (1, 16, 2, 8)
    assert backbone.indices == [0, 3]
    assert middle.shape == (2, 16, 4, 4)
    assert (channels, strides) == ([16, 16], [side // 4] * 2)


@pytest.mark.parametrize("windows", [False, True])
def test_hiera_takes_any_size_and_its_own_as_timm_does(windows: bool) -> None:
    torch.manual_seed(0)
    options = {"abs_win_pos_embed": True, "global_pos_size": (2, 2)} if windows else {}
    whole = timm.create_model("small_hiera", **options).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, intermediates_only=True)
        backbone = Blocks(whole, range(4), norm=False)
        wide = backbone(torch.cat([images, images], dim=3))
        for level, own in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(level, own)
    assert isinstance(backbone.model, Hiera)
    assert [tuple(level.shape[2:]) for level in wide] == [(16, 32), (8, 16), (4, 8), (2, 4)]
    # Its windows see the left half alone, but for positions, which are stretched.
    assert not torch.allclose(wide[0][..., :16], expected[0])


@pytest.mark.parametrize(("name", "prefix"), [("small_vit", 1), ("small_dinov2", 5), ("small_siglip", 0)])
def test_attention_is_that_of_queries_and_keys(name: str, prefix: int) -> None:
    """The softmax of each query's products, pixel by pixel; heads and directions averaged, prefix tokens left out."""
    torch.manual_seed(0)
    blocks = take_blocks(timm.create_model(name, dynamic_img_size=True))[0].eval()
    side = 16 if name != "small_dinov2" else 14
    images, inputs = torch.rand(2, 3, 2 * side, 3 * side), []
    layer = blocks.model.blocks[-1].attn
    expected_levels = blocks(images)
    blocks.keep_attention()
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    for level, expected in zip(blocks(images), expected_levels, strict=True):
        torch.testing.assert_close(level, expected)
    hook.remove()
    queries, keys, _ = (inputs[0] @ layer.qkv.weight.T + layer.qkv.bias).unflatten(2, (3, 2, 8)).unbind(2)
    tokens = queries.shape[1]
    assert tokens == prefix + 6
    to = torch.zeros(2, tokens, tokens)
    for n in range(2):
        for query in range(tokens):
            for head in range(2):
                products = [queries[n, query, head] @ keys[n, key, head] / math.sqrt(8) for key in range(tokens)]
                to[n, query] += torch.stack(products).softmax(dim=0) / 2
    assert blocks.attention is not None
    assert blocks.attention.shape == (2, 6, 2, 3)
    assert not blocks.attention.requires_grad
    for one in range(6):
        for other in range(6):
            both = (to[:, prefix + one, prefix + other] + to[:, prefix + other, prefix + one]) / 2
            torch.testing.assert_close(blocks.attention[:, one, other // 3, other % 3], both)


@pytest.mark.parametrize("name", ["small_dinov3", "small_eva02"])
def test_attention_with_rotary_positions_is_what_the_block_applies(name: str) -> None:
    torch.manual_seed(0)
    blocks = take_blocks(_any_size(name))[0].eval()
    images = torch.rand(1, 3, 56 if name == "small_eva02" else 64, 56 if name == "small_eva02" else 64)
    expected = blocks(images)[-1]
    blocks.keep_attention()
    torch.testing.assert_close(blocks(images)[-1], expected)
    assert blocks.attention is not None
    assert blocks.attention.shape == (1, 16, 4, 4)
    rows = blocks.attention.sum(dim=1)
    assert rows.min() > 0
    assert rows.mean() < 1, "prefix tokens get a share"


def test_a_copy_keeps_attention_of_its_own() -> None:
    """The weights' average is a copy, and makes pseudo labels by its own attention."""
    blocks = take_blocks(timm.create_model("small_vit", dynamic_img_size=True))[0]
    blocks.keep_attention()
    blocks(torch.rand(1, 3, 32, 32))
    copied = copy.deepcopy(blocks)
    copied(torch.rand(1, 3, 64, 64))
    assert blocks.attention is not None
    assert copied.attention is not None
    assert (blocks.attention.shape, copied.attention.shape) == ((1, 4, 2, 2), (1, 16, 4, 4))
