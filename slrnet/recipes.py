"""Named full configurations; a recipe is a function without arguments that returns a `Config`.

Scores in the docstrings are the paper's where they say so; our own carry hardware and commit in the README.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from slrnet.config import (
    CalibrationConfig,
    Config,
    ConfigError,
    CvlrConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    WeightsConfig,
)

__all__ = ["RECIPES", "demo", "get_recipe", "voc_wsss", "voc_wsss_lite"]


def voc_wsss() -> Config:
    """Pascal VOC 2012 from image labels, WideResNet-38 (paper Experiment I).

    Paper: 67.2 % mIoU on val with multi-scale inference and CRF, 64.07 % without CRF (Table 7). Not yet run by us.
    Command: `ray_jobs/train.py --recipe voc_wsss --data SHARDS --num-workers 8`; needs the ImageNet weights file of
    WideResNet-38 (see the README).
    """
    return Config(recipe="voc_wsss", train=TrainConfig(epochs=20, pretrain_epochs=5))


def voc_wsss_lite() -> Config:
    """VOC from image labels on two CPU cores: EfficientNet-Lite0 at stride 16, crop 192.

    It departs from the paper where a short schedule on small crops asks for it: crops zoom in, less dropout, centred
    CVLR, weaker consistency and auxiliary losses, thresholds that keep more of the background.
    Command: `ray_jobs/train.py --recipe voc_wsss_lite --data SHARDS --num-workers 2`; two workers of one thread are
    faster than one of two. Hardware, minutes and score: see the README.
    """
    return Config(
        recipe="voc_wsss_lite",
        data=DataConfig(crop_size=192, crop_scale=(0.4, 1.0), workers=1),
        model=ModelConfig(
            encoder="efficientnet_lite0",
            output_stride=16,
            aspp_dilations=(6, 12, 18),
            dropout=0.2,
        ),
        cvlr=CvlrConfig(centered=True),
        calibration=CalibrationConfig(refine_stride=2, confidence_threshold=0.5, background_threshold=0.6),
        losses=LossConfig(mask_consistency="probs"),
        weights=WeightsConfig(consistency=1.0, auxiliary=0.1),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(epochs=10, pretrain_epochs=2, batch_size=8),
        evaluation=EvaluationConfig(pseudo_mask_images=100),
    )


def demo() -> Config:
    """The embedded, synthetic data set on two CPU cores, in minutes.

    Command: `make demo`, or `ray_jobs/train.py` without arguments.
    """
    lite = voc_wsss_lite()
    return lite.model_copy(
        update={
            "recipe": "demo",
            "data": lite.data.model_copy(update={"crop_size": 128, "shuffle_buffer": 200, "workers": 1}),
            "train": TrainConfig(epochs=8, pretrain_epochs=2, batch_size=8, log_every=5),
            "evaluation": EvaluationConfig(pseudo_mask_images=48, panel_images=6),
        }
    )


RECIPES: dict[str, Callable[[], Config]] = {recipe.__name__: recipe for recipe in (voc_wsss, voc_wsss_lite, demo)}
"""All recipes by name."""


def get_recipe(name: str) -> Config:
    """Builds the configuration of a recipe.

    Raises:
        ConfigError: there is no recipe of that name; the nearest one is named.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.3)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown recipe {name!r}; {hint}known are {', '.join(RECIPES)}")
    return RECIPES[name]()
