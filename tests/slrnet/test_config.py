"""Configurations: what is refused and in which words, overrides from the command line, JSON there and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from slrnet.config import Config, ConfigError, DataConfig, apply_overrides, config_from_dict, load_config
from slrnet.recipes import RECIPES


def override(*texts: str) -> Config:
    return apply_overrides(Config(), texts)


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("train.epochs=7", 7),
            (" train.epochs = 7 ", 7),
            ("optim.lr=1e-3", 1e-3),
            ("optim.lr=1", 1.0),
            ("calibration.floor=.5", 0.5),
            ("optim.lr=+5.e-4", 5e-4),
            ("views.scales=1.,.5", (1.0, 0.5)),
            ("cvlr.enabled=false", False),
            ("cvlr.enabled=False", False),
            ("views.flip=True", True),
            ("views.scales=1.0,0.5", (1.0, 0.5)),
            ("views.scales=[1.0, 0.5, 0.25]", (1.0, 0.5, 0.25)),
            ("views.scales=1", (1.0,)),
            ("views.scales=1.5,", (1.5,)),
            ("model.aspp_dilations=2, 4, 6", (2, 4, 6)),
            ("model.encoder=timm:resnet18", "timm:resnet18"),
            ("model.encoder_weights=none", "none"),
            ("data.train_split=2012", "2012"),
            ("data.train_split=null", "null"),
            ("data.path=/a=b", "/a=b"),
            ("tracking.uri=", ""),
            ("recipe=mine", "mine"),
        ],
    )
    def test_values(self, text: str, expected: object) -> None:
        value = override(text)
        for name in text.partition("=")[0].strip().split("."):
            value = getattr(value, name)
        assert value == expected
        assert type(value) is type(expected)

    def test_the_last_of_several_counts_and_the_rest_stays(self) -> None:
        start = Config()
        config = apply_overrides(start, ["train.epochs=7", "optim.lr=0.5", "train.epochs=8"])
        assert config.flat() == start.flat() | {"train.epochs": 8, "optim.lr": 0.5}
        assert start == Config()

    def test_each_field_takes_its_own_value(self) -> None:
        for key, value in Config().flat().items():
            text = value if isinstance(value, str) else json.dumps(value)
            assert override(f"{key}={text}") == Config()

    @pytest.mark.parametrize(
        ("text", "nearest"),
        [
            ("train.epoch=3", "train.epochs"),
            ("trian.epochs=3", "train.epochs"),
            ("cvlr.num_iter=3", "cvlr.num_iters"),
            ("modle.encoder=x", "model.encoder"),
            ("crop_size=64", "data.crop_size"),
            ("encoder=resnet50", "model.encoder"),
            ("aspp=1", "model.aspp_dilations"),
            ("lr=1", "optim.lr"),
            ("modle.dim=8", "cvlr.dim"),
            ("train.epochs.more=3", "train.epochs"),
        ],
    )
    def test_an_unknown_key_is_refused_with_the_nearest(self, text: str, nearest: str) -> None:
        key = text.partition("=")[0]
        with pytest.raises(ConfigError) as caught:
            override(text)
        assert str(caught.value) == f"unknown config key {key!r}; the nearest one is {nearest!r}"

    def test_a_key_like_no_other_is_refused_with_all(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown config key 'zzz'; known are calibration\.background_"):
            override("zzz=1")

    def test_a_section_is_refused_with_its_fields(self) -> None:
        with pytest.raises(
            ConfigError, match=r"'tracking' is a section; .* tracking\.uri, .*, tracking\.gpu_interval$"
        ):
            override("tracking=here")

    def test_without_equals_sign(self) -> None:
        with pytest.raises(ConfigError, match=r"--set 'train\.epochs' has no '='; write section\.field=value"):
            override("train.epochs")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("train.epochs=abc", "train.epochs: Input should be a valid integer, got 'abc'"),
            ("train.epochs=", "train.epochs: Input should be a valid integer, got ''"),
            ("train.epochs=3.0", "train.epochs: Input should be a valid integer, got 3.0"),
            ("train.epochs=2.5", "train.epochs: Input should be a valid integer, got 2.5"),
            ('train.epochs="3"', "train.epochs: Input should be a valid integer, got '3'"),
            ("train.epochs=true", "train.epochs: Input should be a valid integer, got True"),
            ("train.epochs=null", "train.epochs: Input should be a valid integer, got None"),
            ("train.epochs=3,4", "train.epochs: Input should be a valid integer, got '3,4'"),
            ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1, got 0"),
            ("train.seed=-1", "train.seed: Input should be greater than or equal to 0, got -1"),
            ("train.seed=9223372036854775808", "train.seed: Input should be less than 9223372036854775808"),
            ("optim.lr=fast", "optim.lr: Input should be a valid number, got 'fast'"),
            ("optim.lr=true", "optim.lr: Input should be a valid number, got True"),
            ("optim.lr=0", "optim.lr: Input should be greater than 0, got 0"),
            ("optim.lr=NaN", "optim.lr: Input should be a finite number, got nan"),
            ("optim.lr=1e999", "optim.lr: Input should be a finite number, got inf"),
            ("optim.momentum=1", "optim.momentum: Input should be less than 1, got 1"),
            ("calibration.floor=NaN", "calibration.floor: Input should be "),
            ("calibration.floor=1.5", "calibration.floor: Input should be less than or equal to 1, got 1.5"),
            ("views.hue=0.6", "views.hue: Input should be less than or equal to 0.5, got 0.6"),
            ("views.flip=2", "views.flip: Input should be a valid boolean, unable to interpret input, got 2"),
            ("views.scales=1.0,x", "views.scales.1: Input should be a valid number, got 'x'"),
            ("views.scales=1,0", "views.scales.1: Input should be greater than 0, got 0"),
            ("views.scales=true", "views.scales.0: Input should be a valid number, got True"),
            ("views.scales=", "views.scales: Tuple should have at least 1 item after validation, not 0, got []"),
            (
                "views.scales=1,1,1,1,1,1,1,1,1",
                "views.scales: Tuple should have at most 8 items after valid",
            ),
            ("data.crop_scale=0.5", "data.crop_scale.1: an entry is missing here, got [0.5]"),
            ("data.crop_scale=0.9,0.5", "data: crop_scale is (0.9, 0.5); allowed are two shares with 0 < smallest"),
            ("data.crop_scale=0.9,1.1", "data: crop_scale is (0.9, 1.1); allowed are two shares with 0 < smallest"),
            ("calibration.refine_dilations=", "calibration.refine_dilations: Tuple should have at least 1 item"),
            ("calibration.refine_dilations=1.5", "calibration.refine_dilations.0: Input should be a valid integer"),
            (
                "train.precision=fp8",
                "train.precision: Input should be 'auto', 'fp32', 'bf16', 'fp16' or 'fp64', got 'fp8'",
            ),
            ("model.output_stride=4", "model.output_stride: Input should be 8, 16 or 32, got 4"),
            ("setting=full", "setting: Input should be 'wsss', 'sss_image_labels' or 'sss', got 'full'"),
            ("data.balance_limit=0.5", "data.balance_limit: Input should be greater than or equal to 1, got 0.5"),
            ("train.pretrain_epochs=20", "train: pretrain_epochs is 20 of 20 epochs; it must be smaller than epochs"),
        ],
    )
    def test_wrong_values_are_refused_by_name(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            override(text)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)

    def test_several_mistakes_are_told_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"^optim\.lr: .* got -1; train\.epochs: .* got 'x'$"):
            override("optim.lr=-1", "train.epochs=x")


class TestFit:
    @pytest.mark.parametrize(("size", "stride"), [(321, 8), (320, 8), (448, 32), (193, 16), (16, 8), (65, 32)])
    def test_crops_that_fit_the_stride(self, size: int, stride: int) -> None:
        config = override(f"data.crop_size={size}", f"model.output_stride={stride}", "views.scales=1")
        assert (config.data.crop_size, config.model.output_stride) == (size, stride)

    @pytest.mark.parametrize(
        ("size", "stride", "sizes"),
        [(322, 8, "320, 321, 328 or 329"), (95, 32, "64, 65, 96 or 97"), (5, 16, "16, 17, 32 or 33")],
    )
    def test_crops_that_do_not_are_refused_with_sizes_that_do(self, size: int, stride: int, sizes: str) -> None:
        with pytest.raises(ConfigError) as caught:
            override(f"data.crop_size={size}", f"model.output_stride={stride}", "views.scales=1")
        message = f"config: data.crop_size {size} does not fit model.output_stride {stride}; use {sizes}"
        assert str(caught.value) == message

    def test_a_view_under_two_cells_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"the smallest view has 15 pixels a side.*data\.crop_size \(64\)"):
            override("data.crop_size=64", "views.scales=1,0.24")

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (
                ["data.pixel_labeled_subset=some"],
                "setting 'wsss' sees no masks, but data.pixel_labeled_subset is 'some'",
            ),
            (["setting=sss"], "setting 'sss' trains on masks; name the subset whose masks it may see"),
            (["setting=sss_image_labels"], "setting 'sss_image_labels' trains on masks; name the subset"),
            (
                ["setting=sss", "data.pixel_labeled_subset=some", "evaluation.gating=scores"],
                "evaluation.gating 'scores' needs class scores, and setting 'sss' has none; use none",
            ),
            (
                ["setting=sss", "data.pixel_labeled_subset=some", "data.class_balance=0.5"],
                "data.class_balance is 0.5 and reads image labels, which setting 'sss' does not grant; set it to 0",
            ),
        ],
    )
    def test_labels_that_the_setting_does_not_grant_are_refused(self, texts: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            override(*texts)

    @pytest.mark.parametrize(
        ("text", "cure", "message"),
        [
            ("views.unwarp=probs", "calibration.fusion=probs", "views.unwarp 'probs' has no effect, because neither"),
            ("views.unwarp=probs", "losses.mask_consistency=probs", "views.unwarp 'probs' has no effect"),
            ("calibration.refine_image=distorted", "views.own_color=false", "needs one distortion per crop"),
            ("model.auxiliary_views=first", "cvlr.form=released", "model.auxiliary_views 'first' gives CVLR no codes"),
            (
                "calibration.masks=probe train.pretrain_epochs=0",
                "calibration.masks=decoder",
                "calibration.masks 'probe' learns its first masks in the epochs before pseudo labels",
            ),
            (
                "calibration.masks=probe model.architecture=deeplabv3plus setting=sss data.pixel_labeled_subset=some "
                "cvlr.enabled=false data.crop_size=320",
                "calibration.masks=decoder",
                "'probe' makes pseudo labels, and model.architecture 'deeplabv3plus' learns from none",
            ),
            ("calibration.feature_source=attention", "calibration.feature_share=0.5", "has no effect with calibration"),
            ("calibration.view_weights=1,2,1", "views.scales=1,0.5,0.5", "give one weight for each view"),
            ("cvlr.start_share=0.1 cvlr.start=default", "cvlr.start=identity", "goes with start 'identity'"),
            (
                "calibration.view_weights=1,2 calibration.supervision=cps",
                "calibration.supervision=mvmc",
                "so calibration.view_weights has no effect there",
            ),
            (
                "calibration.source=ema",
                "train.ema=0.99",
                "calibration.source 'ema' takes pseudo labels from the weights'",
            ),
            ("train.cosine_epochs=14", "train.epochs=19", "cosine_epochs is 14 and 15 epochs follow pretraining"),
        ],
    )
    def test_what_needs_another_setting_is_refused_without(self, text: str, cure: str, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            override(*text.split())
        assert override(*text.split(), cure) != Config()

    @pytest.mark.parametrize("setting", ["sss_image_labels", "sss"])
    def test_the_heads_predict_the_background_where_there_are_no_image_labels(self, setting: str) -> None:
        config = override(f"setting={setting}", "data.pixel_labeled_subset=some")
        assert config.predicts_background == (setting == "sss")
        assert not Config().predicts_background

    def test_every_accumulation_step_has_images(self) -> None:
        override("train.accumulation=3")  # shares of 5, 5 and 6
        with pytest.raises(ConfigError, match=r"train\.batch_size 16 is smaller than train\.accumulation 17"):
            override("train.accumulation=17")


class TestDictionaries:
    @pytest.mark.parametrize("name", RECIPES)
    def test_json_there_and_back(self, name: str, tmp_path: Path) -> None:
        config = RECIPES[name]()
        path = tmp_path / "config.json"
        path.write_text(config.to_json())
        assert load_config(path) == config
        assert config_from_dict(config.model_dump(mode="json")) == config

    def test_missing_fields_have_their_defaults(self) -> None:
        config = config_from_dict({"train": {"epochs": 30}})
        assert config.train.epochs == 30
        assert config.model_copy(update={"train": Config().train}) == Config()

    def test_unknown_keys_and_sections(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown config key 'train\.epoch'; the nearest one is 'train\.epochs'"):
            config_from_dict({"train": {"epoch": 30}})
        with pytest.raises(ConfigError, match="unknown config key 'trian'; the nearest one is 'train'"):
            config_from_dict({"trian": {"epochs": 30}})

    def test_a_section_that_is_a_number(self) -> None:
        with pytest.raises(ConfigError, match=r"^train: Input should be a valid dictionary .*, got 5$"):
            config_from_dict({"train": 5})

    def test_files_that_are_no_configuration(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        with pytest.raises(ConfigError, match=r"cannot read the config file .*config\.json: No such file"):
            load_config(path)
        path.write_bytes(b"\xff\xfe{}")
        with pytest.raises(ConfigError, match=rf"{tmp_path} is a folder, pipe .*; name the file, such as config\.json"):
            load_config(tmp_path)
        (tmp_path / "dataset.json").write_text('{"classes": [], "made_by": ""}')
        with pytest.raises(
            ConfigError, match=r"dataset\.json is no configuration, its keys are classes, made_by; a run"
        ):
            load_config(tmp_path / "dataset.json")
        with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
            load_config(path)
        path.write_text("[1]")
        with pytest.raises(ConfigError, match=r"config\.json holds a list; a config file holds one JSON object"):
            load_config(path)

    def test_flat_names_every_field_once(self) -> None:
        flat = Config().flat()
        assert flat["views.scales"] == [1.0, 0.5]
        assert flat["recipe"] == "custom"
        sections = {key.partition(".")[0] for key in flat}
        assert sections == set(Config.model_fields)
        assert sum(key.startswith("optim.") for key in flat) == len(Config().optim.model_dump())


def test_nothing_can_be_changed_in_place() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.recipe = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]
    assert isinstance(config.views.scales, tuple)


def test_constructors_refuse_too() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DataConfig(crop=3)  # type: ignore[call-arg]


def test_every_field_is_documented() -> None:
    def fields(model: type[Config], prefix: str = "") -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                assert field.annotation.__doc__
                fields(field.annotation, f"{prefix}{name}.")
            else:
                assert field.description, f"{prefix}{name} has no docstring"

    fields(Config)
