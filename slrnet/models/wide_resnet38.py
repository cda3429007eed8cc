"""WideResNet-38 (model A1 of Wu, Shen and van den Hengel, arXiv:1611.10080), dilated for dense prediction.

The encoder of the paper (Sec. 4.2) and of the methods it compares with. Blocks are pre-activated: batch norm, ReLU,
convolution. Parameter names are those of the published ImageNet file `ilsvrc-cls_rna-a1_cls1000_ep-0001.pth`
(`conv1a`, `b2` ... `b7`, `bn7`), so that it loads by name.

Differences from the released code: output strides 16 and 32 besides 8; all stages are returned instead of a dictionary
of chosen layers. Values are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BottleneckBlock", "PlainBlock", "StageSpec", "WideResNet38"]


class StageSpec(NamedTuple):
    """The blocks of a stage."""

    name: str  # of the stage's first block; the following ones are name_1, name_2, ...
    num_blocks: int
    mid_channels: int
    out_channels: int
    natural_stride: int  # of the image classifier, before strides beyond the output stride become dilation
    dropout: float | None  # None for plain blocks


_STAGES = (
    StageSpec("b2", 3, 128, 128, 2, None),
    StageSpec("b3", 3, 256, 256, 2, None),
    StageSpec("b4", 6, 512, 512, 2, None),
    StageSpec("b5", 3, 512, 1024, 2, None),
    StageSpec("b6", 1, 512, 2048, 2, 0.3),
    StageSpec("b7", 1, 1024, 4096, 1, 0.5),
)


class WideResNet38(nn.Module):
    """WideResNet-38 without its classifier.

    Strides beyond `output_stride` become dilations.

    Attributes:
        stages: for each stage, the names of its direct children in the order of use.
        channels: channels of each stage's features.
        strides: pixels of the image per pixel of each stage's features.
    """

    def __init__(self, *, output_stride: int = 8) -> None:
        """Builds the network for an output stride of 8, 16 or 32, with PyTorch's default initialization."""
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.channels = tuple(spec.out_channels for spec in _STAGES)
        stages: list[tuple[str, ...]] = []
        strides: list[int] = []
        inputs, stride, dilation = 64, 1, 1
        for spec in _STAGES:
            strided = spec.natural_stride if stride * spec.natural_stride <= output_stride else 1
            stages.append(self._add_stage(spec, inputs, stride=strided, dilation=dilation))
            inputs, stride = spec.out_channels, stride * strided
            dilation *= spec.natural_stride // strided
            strides.append(stride)
        self.bn7 = nn.BatchNorm2d(inputs)
        self.stages = (("conv1a", *stages[0]), *stages[1:-1], (*stages[-1], "bn7"))
        self.strides = tuple(strides)

    def _add_stage(self, spec: StageSpec, inputs: int, *, stride: int, dilation: int) -> tuple[str, ...]:
        """Adds the blocks of a stage that enters with `dilation`, and returns their names."""
        names = tuple(f"{spec.name}_{i}" if i else spec.name for i in range(spec.num_blocks))
        inner_dilation = dilation * spec.natural_stride // stride
        block = PlainBlock if spec.dropout is None else BottleneckBlock
        for name in names:
            self.add_module(name, block(inputs, spec, stride=stride, dilations=(dilation, inner_dilation)))
            inputs, stride, dilation = spec.out_channels, 1, inner_dilation
        return names

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps normalized images (N, 3, H, W) to the features of every stage.

        Stage i gives (N, channels[i], ceil(H / strides[i]), ceil(W / strides[i])). The last features are
        batch-normalized and rectified; the others are the plain sums of the residual blocks.
        """
        features: list[Tensor] = []
        x = images
        for names in self.stages:
            for name in names:
                x = self.get_submodule(name)(x)
            features.append(x)
        features[-1] = F.relu(x)
        return features


class PlainBlock(nn.Module):
    """Pre-activated residual block of two 3x3 convolutions, with one dilation each."""

    def __init__(self, inputs: int, spec: StageSpec, *, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        middle, outputs = spec.mid_channels, spec.out_channels
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv3x3(inputs, middle, stride=stride, dilation=dilations[0])
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = _conv3x3(middle, outputs, dilation=dilations[1])
        self.conv_branch1: nn.Conv2d | None = None
        if inputs != outputs or stride != 1:
            self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        activated = F.relu(self.bn_branch2a(x), inplace=True)
        # A block that changes the shape projects the activated input, one that keeps it adds the input itself.
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(activated)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(F.relu(self.bn_branch2b1(branch), inplace=True))
        return branch.add_(shortcut)  # type: ignore[no-any-return]


class BottleneckBlock(nn.Module):
    """Pre-activated residual block of 1x1, 3x3 and 1x1 convolutions with dropout of whole channels between them.

    The second dilation is that of the 3x3 convolution; the first one has no use here.
    """

    def __init__(self, inputs: int, spec: StageSpec, *, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        middle, wide, outputs = spec.mid_channels, 2 * spec.mid_channels, spec.out_channels
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, middle, 1, stride, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.dropout_2b1 = nn.Dropout2d(spec.dropout or 0.0)
        self.conv_branch2b1 = _conv3x3(middle, wide, dilation=dilations[1])
        self.bn_branch2b2 = nn.BatchNorm2d(wide)
        self.dropout_2b2 = nn.Dropout2d(spec.dropout or 0.0)
        self.conv_branch2b2 = nn.Conv2d(wide, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        activated = F.relu(self.bn_branch2a(x), inplace=True)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(self.dropout_2b1(F.relu(self.bn_branch2b1(branch), inplace=True)))
        branch = self.conv_branch2b2(self.dropout_2b2(F.relu(self.bn_branch2b2(branch), inplace=True)))
        return branch.add_(self.conv_branch1(activated))  # type: ignore[no-any-return]


def _conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
