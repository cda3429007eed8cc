from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slrnet.models.wide_resnet38 import BottleneckBlock, PlainBlock, StageSpec, WideResNet38


def _randomise(module: nn.Module, seed: int = 0) -> None:
    """Gives convolutions and batch norms random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _reference_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolution with zero padding, one product at a time."""
    (_, _, size, _), stride, dilation = conv.weight.shape, conv.stride[0], conv.dilation[0]
    margin = dilation * (size - 1) // 2
    height, width = x.shape[2:]
    out = x.new_zeros(x.shape[0], conv.out_channels, -(-height // stride), -(-width // stride))
    for row, column, i, j in itertools.product(range(out.shape[2]), range(out.shape[3]), range(size), range(size)):
        source_row, source_column = row * stride + i * dilation - margin, column * stride + j * dilation - margin
        if 0 <= source_row < height and 0 <= source_column < width:
            out[:, :, row, column] += x[:, :, source_row, source_column] @ conv.weight[:, :, i, j].T
    return out


def _reference_norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    shape = (1, -1, 1, 1)
    centred = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return (centred * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)


def _reference_block(x: Tensor, block: PlainBlock | BottleneckBlock) -> Tensor:
    activated = _reference_norm_relu(x, block.bn_branch2a)
    shortcut = x if block.conv_branch1 is None else _reference_conv(activated, block.conv_branch1)
    branch = _reference_conv(activated, block.conv_branch2a)
    branch = _reference_conv(_reference_norm_relu(branch, block.bn_branch2b1), block.conv_branch2b1)
    if isinstance(block, BottleneckBlock):
        branch = _reference_conv(_reference_norm_relu(branch, block.bn_branch2b2), block.conv_branch2b2)
    return shortcut + branch


def spec(mid_channels: int, out_channels: int) -> StageSpec:
    return StageSpec("b", 1, mid_channels, out_channels, 1, 0.5)


BLOCKS: dict[str, Callable[[], PlainBlock | BottleneckBlock]] = {
    "same shape": lambda: PlainBlock(3, spec(2, 3), stride=1, dilations=(2, 2)),
    "stride": lambda: PlainBlock(3, spec(2, 3), stride=2, dilations=(1, 1)),
    "first dilation": lambda: PlainBlock(3, spec(2, 4), stride=1, dilations=(1, 2)),
    "bottleneck": lambda: BottleneckBlock(3, spec(2, 5), stride=1, dilations=(1, 2)),
    "bottleneck with stride": lambda: BottleneckBlock(3, spec(2, 5), stride=2, dilations=(1, 1)),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_equals_slow_reference(kind: str) -> None:
    block = BLOCKS[kind]().double().eval()
    _randomise(block)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x), _reference_block(x, block))


def test_bottleneck_drops_whole_channels_in_training_only() -> None:
    block = BottleneckBlock(3, spec(16, 8), stride=1, dilations=(1, 1))
    dropped: list[Tensor] = []
    for convolution in (block.conv_branch2b1, block.conv_branch2b2):  # what they are given
        convolution.register_forward_pre_hook(lambda module, inputs: dropped.append(inputs[0]))
    # Positive everywhere, so that a channel is zero only where it was dropped.
    for norm in (block.bn_branch2b1, block.bn_branch2b2):
        nn.init.constant_(norm.bias, 100.0)
    torch.manual_seed(0)
    block(torch.rand(2, 3, 4, 4))
    block.eval()(torch.rand(2, 3, 4, 4))
    for output, is_training in zip(dropped, (True, True, False, False), strict=True):
        zeros = (output == 0).flatten(2)
        assert torch.equal(zeros.any(2), zeros.all(2))
        assert zeros.any() == is_training


def test_layers_have_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WideResNet38().state_dict().items()}
    blocks = ["b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2", "b4", *(f"b4_{i}" for i in range(1, 6)), "b5", "b5_1", "b5_2"]
    assert list(dict.fromkeys(name.split(".")[0] for name in shapes)) == ["conv1a", *blocks, "b6", "b7", "bn7"]
    convolutions = {name: shape for name, shape in shapes.items() if "conv" in name}
    # 1 + 15 plain blocks of 2, + 2 bottlenecks of 3, + a projection where b2 ... b7 change the shape
    assert len(convolutions) == 1 + 15 * 2 + 2 * 3 + 6
    expected = {
        "conv1a.weight": (64, 3, 3, 3),
        "b2.conv_branch1.weight": (128, 64, 1, 1),
        "b2.conv_branch2a.weight": (128, 64, 3, 3),
        "b2.conv_branch2b1.weight": (128, 128, 3, 3),
        "b5.conv_branch2a.weight": (512, 512, 3, 3),
        "b5.conv_branch2b1.weight": (1024, 512, 3, 3),
        "b6.conv_branch1.weight": (2048, 1024, 1, 1),
        "b6.conv_branch2a.weight": (512, 1024, 1, 1),
        "b6.conv_branch2b1.weight": (1024, 512, 3, 3),
        "b6.conv_branch2b2.weight": (2048, 1024, 1, 1),
        "b7.conv_branch2b2.weight": (4096, 2048, 1, 1),
        "b6.bn_branch2b2.running_var": (1024,),
        "bn7.weight": (4096,),
    }
    assert {name: shapes[name] for name in expected} == expected
    # 105.07 million values in 4 bytes each (with the statistics of the batch norms) are the 402 MB of the file, whose
    # megabytes have 2^20 bytes.
    values = sum(torch.Size(shape).numel() for name, shape in shapes.items() if not name.endswith("tracked"))
    assert round(values * 4 / 2**20) in range(400, 403)


def test_dilations_at_output_stride_8_are_the_released_ones() -> None:
    with torch.device("meta"):
        network = WideResNet38(output_stride=8)
    dilations = {
        name: module.dilation[0]
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.dilation[0] != 1
    }
    twos = ["b5.conv_branch2b1", *(f"b5_{i}.conv_branch2{half}" for i in (1, 2) for half in ("a", "b1"))]
    assert dilations == {**dict.fromkeys(twos, 2), "b6.conv_branch2b1": 4, "b7.conv_branch2b1": 4}
    assert [network.b6.dropout_2b1.p, network.b7.dropout_2b2.p] == [0.3, 0.5]


@pytest.mark.parametrize(
    ("output_stride", "strides"), [(8, (2, 4, 8, 8, 8, 8)), (16, (2, 4, 8, 16, 16, 16)), (32, (2, 4, 8, 16, 32, 32))]
)
def test_shapes_for_every_output_stride(output_stride: int, strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = WideResNet38(output_stride=output_stride)
        features = network(torch.empty(1, 3, 97, 161))
    assert network.strides == strides
    expected = [
        (1, channels, -(-97 // stride), -(-161 // stride))
        for channels, stride in zip((128, 256, 512, 1024, 2048, 4096), strides, strict=True)
    ]
    assert [tuple(feature.shape) for feature in features] == expected


def test_dilation_computes_the_strided_network_at_more_positions() -> None:
    fine = WideResNet38(output_stride=8).eval()
    with torch.device("meta"):
        coarse = WideResNet38(output_stride=32).eval()
    coarse.load_state_dict(fine.state_dict(), assign=True)
    images = torch.randn(1, 3, 49, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, sparse = fine(images), coarse(images)
    assert dense[-1].std() > 0
    assert dense[-1].min() >= 0
    assert dense[-2].min() < 0
    for level, factor in enumerate((1, 1, 1, 2, 4, 4)):
        torch.testing.assert_close(dense[level][..., ::factor, ::factor], sparse[level])
