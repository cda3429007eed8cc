"""Recipes are complete, valid and what they say they are."""

from __future__ import annotations

import inspect
import re

import pytest

from slrnet.config import ConfigError, config_from_dict
from slrnet.recipes import RECIPES, demo, get_recipe, voc_wsss


def test_every_recipe_is_valid_and_says_its_name_and_how_it_is_run() -> None:
    for name, recipe in RECIPES.items():
        config, text = get_recipe(name), inspect.getdoc(recipe) or ""
        assert config.recipe == name
        # Copies with updates skip validation: what came out is validated here.
        assert config_from_dict(config.model_dump(mode="json")) == config, name
        assert config.data.path == "", name
        assert "Command: `" in text, name
        assert f"--recipe {name}" in text or "without arguments" in text, name


def test_voc_wsss_is_experiment_one_of_the_paper() -> None:
    config = voc_wsss()
    assert config.setting == "wsss"
    assert (config.model.encoder, config.model.output_stride, config.data.crop_size) == ("wide_resnet38", 8, 321)
    assert (config.cvlr.form, config.cvlr.num_iters, config.cvlr.dim, config.cvlr.temperature) == ("paper", 1, 256, 1.0)
    assert (config.train.epochs, config.train.pretrain_epochs) == (20, 5)
    assert (config.optim.lr, config.optim.new_lr_factor, config.optim.weight_decay) == (5e-4, 10.0, 5e-4)
    assert sorted(config.views.scales) == [0.5, 1.0]
    views = config.views
    assert (views.flip, views.brightness, views.contrast, views.saturation, views.hue) == (True, 0.3, 0.3, 0.3, 0.1)
    weights = config.weights
    assert (weights.segmentation, weights.classification, weights.consistency) == (1.0, 1.0, 4.0)


PAPER = ("voc_wsss", "voc_sss_image_labels", "voc_sss", "coco_wsss", "l2id_wsss")


@pytest.mark.parametrize("name", PAPER)
def test_each_experiment_has_a_target_and_a_recipe_for_the_cpu(name: str) -> None:
    text, lite = (" ".join((inspect.getdoc(RECIPES[of]) or "").split()) for of in (name, f"{name}_lite"))
    assert re.search(r"Paper: \d\d\.\d+ % mIoU on val", text)
    assert "Not yet run" in text
    assert "--num-workers 8" in text
    assert re.search(r"not yet run|see docs/results", lite)
    assert "two CPU cores" in lite
    assert (get_recipe(name).setting, get_recipe(name).data.pixel_labeled_subset) == (
        get_recipe(f"{name}_lite").setting,
        get_recipe(f"{name}_lite").data.pixel_labeled_subset,
    )


def test_semi_supervision_is_as_in_the_paper() -> None:
    both, alone = get_recipe("voc_sss_image_labels"), get_recipe("voc_sss")
    for config in (both, alone):
        assert (config.data.pixel_oversampling, config.weights.pixel_labels) == (5, 2.0)
        weakly = voc_wsss()
        for section in ("views", "model", "cvlr", "losses", "weights", "optim", "train", "evaluation"):
            assert getattr(config, section) == getattr(weakly, section)
    assert (both.setting, alone.setting) == ("sss_image_labels", "sss")
    released = (0.8, 0.9, 0.6)
    for config in (alone, get_recipe("voc_sss_lite")):
        thresholds = config.calibration
        assert (thresholds.confidence_threshold, thresholds.background_threshold, thresholds.floor) == released


def test_transformers_differ_by_encoder_optimizer_and_teacher() -> None:
    names = [name for name in RECIPES if "_dinov" in name]
    assert len(names) == 8
    for name in names:
        config, plain = get_recipe(name), get_recipe(name.partition("_dinov")[0])
        patch = 14 if "dinov2" in config.model.encoder else 16
        assert (config.setting, config.data.crop_size % patch) == (plain.setting, 0)
        assert (config.optim.name, config.calibration.source) == ("adamw", "ema")
        assert (config.model.frozen_stages == "all") == name.endswith("_frozen")
        text = " ".join((inspect.getdoc(RECIPES[name]) or "").split())
        assert "Hardware" in text
        assert "xpect" in text
        assert "Not yet run by us" in text


def test_the_long_tail_is_balanced() -> None:
    for name in RECIPES:
        assert (get_recipe(name).data.class_balance > 0) == name.startswith(("l2id", "coco_wsss_released"))


def test_the_cpu_recipes_avoid_dilated_convolutions() -> None:
    for config in (*(get_recipe(f"{name}_lite") for name in PAPER), demo()):
        assert config.model.encoder == "efficientnet_lite0"
        assert config.model.output_stride == 16


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'voc_wss'; the nearest one is 'voc_wsss'; known are .*demo"):
        get_recipe("voc_wss")
    with pytest.raises(ConfigError, match=r"unknown recipe '@@'; known are voc_wsss, "):
        get_recipe("@@")
