"""Runs the authors' code (GitHub DesertsP/SLRNet) from a checkout that you provide; nothing of it is copied here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from slrnet.calibration.refine import DILATIONS

LOSS_WEIGHTS = (1.0, 4.0, 4.0, 1.0)
"""Weights of classification, mask consistency, code consistency and segmentation in the released VOC config."""


def released_module(folder: Path, name: str) -> ModuleType:
    """Imports a released module, such as `models.slrnet`."""
    file = folder / Path(*name.split(".")).with_suffix(".py")
    if not file.is_file():
        raise SystemExit(f"{file} does not exist; pass a checkout of DesertsP/SLRNet as --peer-dir")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    package, _, _ = name.rpartition(".")
    if package == "datasets" and package not in sys.modules:  # its __init__ imports packages that nothing here needs
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder / package)]
    return importlib.import_module(name)


def released_network(
    folder: Path, *, num_classes: int = 21, training: bool = True, model: str = "models.slrnet", **options: Any
) -> nn.Module:
    """Builds the released SLRNet with WideResNet-38 and random weights; each setting has its own `model`."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"pretrained": None, "backbone": "resnet38", "scale_factor": 0.5} | options
    network: nn.Module = released_module(folder, model).Net(num_classes=num_classes, **settings)
    network.train(training)  # the released train() does not return the module
    return network


def released_network_lite(folder: Path, *, num_classes: int, model: str = "models.slrnet", **options: Any) -> nn.Module:
    """Builds the released SLRNet with EfficientNet-Lite0 at stride 16 and random weights.

    Two stages and all batch norms are frozen. The encoder is timm's. Released layers that expect the 256 shallow
    channels of WideResNet-38 take this encoder's number of channels instead. The ASPP has the dilations for
    this stride.
    """
    import timm

    class Backbone(nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            create: Any = timm.create_model
            self.features = create("tf_efficientnet_lite0", features_only=True, output_stride=16)
            stem, blocks = [self.features.conv_stem, self.features.bn1], self.features.blocks
            self.fixed_layers = nn.ModuleList([*stem, blocks[0], blocks[1]])
            self.channels = self.features.feature_info.channels()

        def fan_out(self) -> int:
            return int(self.channels[-1])

        def forward_as_dict(self, images: Tensor) -> dict[str, Tensor]:
            maps = self.features(images)
            return {"conv3": maps[2], "conv6": maps[-1]}

    own = released_module(folder, model)
    base = own if hasattr(own, "ASPP") else released_module(folder, "models.single_stage")
    backbone, aspp = base.resnet38d, base.ASPP
    base.resnet38d, base.ASPP = Backbone, lambda channels, stride, norm: aspp(channels, 16, norm)
    try:
        network: Any = released_network(folder, num_classes=num_classes, model=model, **options)
    finally:
        base.resnet38d, base.ASPP = backbone, aspp
    shallow = int(network.backbone.channels[2])
    lifts = [network.fc8_skip, network.fc8_up if hasattr(network, "fc8_up") else network.shallow_mask.fc_skip]
    for layers in lifts:  # what takes the shallow features
        layers[0] = nn.Conv2d(shallow, layers[0].out_channels, 1, bias=False)
    network.train()
    return network


def released_step(network: nn.Module, images: Tensor, image_labels: Tensor) -> Callable[[], float]:
    """Builds a training step of the released tools/train_voc_wss.py after pretraining, without its anomaly detection.

    Args:
        network: in training mode.
        images: (N, 3, H, W) in [0, 1].
        image_labels: (N, K - 1) multi-hot.

    Returns:
        A function that takes a step and returns the loss.
    """
    groups = network.parameter_groups()  # type: ignore[operator]
    rate = 1e-6
    optimizer = torch.optim.SGD(
        [
            {"params": group, "lr": rate * factor, "weight_decay": decay}
            for group, factor, decay in zip(groups, (1, 2, 10, 20), (5e-4, 0, 5e-4, 0), strict=True)
            if group
        ],
        lr=rate,
        momentum=0.9,
        nesterov=True,
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def step() -> float:
        normed = (images - mean) / std
        *losses, _, _ = network(normed, images.clone(), image_labels)
        classification, segmentation, masks, codes = (loss.mean() for loss in losses)
        weights = LOSS_WEIGHTS
        loss = weights[0] * classification + weights[1] * masks + weights[2] * codes + weights[3] * segmentation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def released_refinement(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the released refinement of masks (N, K, H, W) by images (N, 3, H, W), with 10 iterations."""
    module = released_module(folder, "models.mods.pamr").PAMR(num_iter=10, dilations=list(DILATIONS))

    def run(images: Tensor, probs: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images, probs)  # type: ignore[no-any-return]

    return run
