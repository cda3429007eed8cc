"""Converts the authors' published checkpoints, and those of 1-Stage, to ours (`slrnet convert-weights`).

Each tensor of a file must be one that is taken, a second name of one, or a constant of the refinement. Nothing in the
file can run code. With pixel labels and unlabeled images, the heads have one more output, for the background. The other
two settings have the same tensors, so you name the one with masks. 1-Stage (Araslanov and Roth 2020,
visinf/1-stage-wseg) is SLRNet's network without the auxiliary head and CVLR, with the encoder's modules at the top
level. Only its checkpoints with WideResNet-38 can be read: those with ResNets and VGG16 have other strides than the
encoders here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, TrainState
from slrnet.config import Config, Setting, config_from_dict
from slrnet.data.catalog import VOC_CLASSES
from slrnet.models.encoders import describe_misfit, read_tensors
from slrnet.models.slrnet import build_network
from slrnet.recipes import get_recipe

__all__ = ["released_checkpoint", "rename_released"]

_NAMES = json.loads(files("slrnet.tools").joinpath("released_names.json").read_text(encoding="utf-8"))
PREFIXES: dict[str, str] = _NAMES["prefixes"]
"""Prefixes of the released network's modules, and ours."""
SECOND_NAMES: dict[str, str] = _NAMES["second_names"]
"""Prefixes by which the released network lists some modules a second time, and their first ones."""

STAGE_ONE_ENCODER = re.compile(r"^(conv1a|b[2-7](_\d)?|bn7)\.")
"""Modules of WideResNet-38 as 1-Stage names them, without `backbone.`."""


def released_checkpoint(
    path: str | Path, *, classes: Sequence[str] = VOC_CLASSES, setting: Setting | None = None
) -> Checkpoint:
    """Reads a published `.pth` file.

    Args:
        path: the file.
        classes: names of its K classes, background first.
        setting: labels that it was trained on; None: `sss` if it predicts the background, else `wsss`.

    Returns:
        A checkpoint with the settings of the released training and inference (recipes `voc_wsss_released` and so on),
        at epoch 0: scores above .3 and among the six highest; from image labels alone, the background to the power 3.
        With pixel labels and unlabeled images no gating, because there are no scores. For 1-Stage without CVLR, with
        its scales and scores above .1 (the mean over the scales; its code takes the maximum).

    Raises:
        ValueError: the file is damaged, holds more than tensors, or fits neither the network nor the setting; the
            message names the tensors that are missing, unknown, or of another shape.
    """
    weights = rename_released(read_tensors(Path(path)), source=str(path))
    outputs = weights["mask_head.classify.weight"].shape[0]
    if outputs not in (len(classes), len(classes) - 1):
        raise ValueError(
            f"{path} predicts {outputs} classes, {len(classes)} with the background are named; name its classes "
            "(one more than it predicts, or as many where it predicts the background too)"
        )
    alone, one_stage = outputs == len(classes), not any(name.startswith(("cvlr.", "aux")) for name in weights)
    setting = setting or ("sss" if alone else "wsss")
    if (setting == "sss") != alone or (one_stage and setting != "wsss"):
        fitting = "sss" if alone else "wsss" if one_stage else "wsss or sss_image_labels"
        raise ValueError(
            f"setting {setting!r} does not fit {path}, which predicts {outputs} classes of the {len(classes)} named"
            f"{' and is of 1-Stage' if one_stage else ''}; use {fitting}"
        )
    config = _released_config(setting)
    if one_stage:
        config = _stage_one(config)
    with torch.device("meta"):
        expected = build_network(config, num_classes=len(classes)).state_dict()
    if misfit := describe_misfit(weights, expected, needed=set(expected)):
        name = "SLRNet" if config.cvlr.enabled else "1-Stage"
        raise ValueError(f"{path} does not fit {name} with WideResNet-38; tensors: {misfit}")
    state = TrainState(epoch=0, step=0, classes=tuple(classes), data_fingerprint="published", world_size=1)
    return Checkpoint(Path(path), config, state, weights, {})


def rename_released(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Renames the tensors of the file `source` to ours, with or without the `module.` of data-parallel training.

    Raises:
        ValueError: a tensor has an unknown name, or two names of one tensor have different values.
    """
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {STAGE_ONE_ENCODER.sub(r"backbone.\g<0>", name): tensor for name, tensor in tensors.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("_aff."):  # a constant of the released refinement
            continue
        if first := _replace_prefix(name, SECOND_NAMES):
            if first not in tensors or not torch.equal(tensors[first], tensor):
                raise ValueError(f"{source}: tensors {first} and {name} are one in the released code but differ here")
        elif own := _replace_prefix(name, PREFIXES):
            renamed[own] = tensor
        else:
            raise ValueError(
                f"{source}: tensor {name} is unknown; the file is of no released SLRNet, and of no 1-Stage with "
                "WideResNet-38"
            )
    if "mask_head.classify.weight" not in renamed:
        raise ValueError(f"{source} has no mask head (last_conv.8.weight); the file is of no released SLRNet")
    return renamed


def _released_config(setting: Setting) -> Config:
    """The recipe of the released training, without the encoder's ImageNet weights."""
    names = {"wsss": "voc_wsss", "sss_image_labels": "voc_sss_image_labels", "sss": "voc_sss"}
    config = get_recipe(f"{names[setting]}_released")
    return config_from_dict(config.model_dump() | {"model": config.model.model_dump() | {"encoder_weights": "none"}})


def _stage_one(config: Config) -> Config:
    gating = {"gating": "scores", "gating_threshold": 0.1, "gating_top": 20}
    evaluation = gating | {"scales": (1.0, 0.5, 1.5, 2.0), "background_power": 3.0, "resizing": "released"}
    model = config.model.model_dump() | {"auxiliary_views": "all"}
    changes = {"recipe": "released_one_stage", "model": model, "cvlr": {"enabled": False}, "evaluation": evaluation}
    return config_from_dict(config.model_dump() | changes)


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The name with the first prefix that it has replaced; None if it has none."""
    return next((own + name.removeprefix(one) for one, own in prefixes.items() if name.startswith(one)), None)
