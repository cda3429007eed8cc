"""The closing table, what becomes a curve, and a run's description."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from slrnet.config import apply_overrides
from slrnet.data.catalog import class_keys
from slrnet.recipes import RECIPES, get_recipe
from slrnet.tracking.mlflow import MAX_TAG_LENGTH
from slrnet.tracking.summary import (
    MOST_CURVES,
    class_quality,
    class_tags,
    curves,
    description,
    mean_without,
    next_commands,
    parameters,
    quality_table,
    result_text,
)

METRICS = {
    "pseudo_mask/miou": 0.5,
    "pseudo_mask/mfdr": 0.25,
    "pseudo_mask/mfnr": 0.125,
    "pseudo_mask/iou/background": 0.75,
    "pseudo_mask/fdr/background": 0.1,
    "pseudo_mask/fnr/background": 0.2,
    "pseudo_mask/iou/tv-monitor": 0.25,
    "pseudo_mask/fdr/tv-monitor": 0.25,
    "pseudo_mask/fnr/tv-monitor": 0.125,
    "val/miou_ss_gated_by_scores": 0.1234,
    "val/mfnr": 1.0,
    "val/images": 5,
    "val/iou/tv-monitor": 0.1234,
    "val/fnr/tv-monitor": 1.0,
    "train/epoch_loss": 2.0,
}


def test_table() -> None:
    lines = quality_table(METRICS, ("background", "tv/monitor")).splitlines()
    assert [line.split() for line in lines[:2]] == [["pseudo_mask", "val"], ["%", *["IoU", "FDR", "FNR"] * 2]]
    assert lines[3:5] == [
        "background    75.0    10.0    20.0       -       -       -",
        "tv/monitor    25.0    25.0    12.5    12.3       -   100.0",
    ]
    assert lines[6] == "mean          50.0    25.0    12.5    12.3       -   100.0"
    assert lines[2] == lines[5] == "-" * len(lines[3])
    assert lines[1].index("FDR") + 3 == lines[3].index("10.0") + 4  # right-aligned under its heading


def test_what_was_not_measured_has_no_columns() -> None:
    only_val = {name: value for name, value in METRICS.items() if not name.startswith("pseudo_mask")}
    lines = quality_table(only_val, ("background", "tv/monitor")).splitlines()
    assert lines[0].split() == ["val"]
    assert lines[4].split() == ["tv/monitor", "12.3", "-", "100.0"]


def test_without_masks_to_compare_with_there_is_no_table_and_what_needs_none_comes_next() -> None:
    assert quality_table({"val/images": 0, "train/epoch_loss": 1.0}, ("background", "cat")).startswith(
        "no scores: no image"
    )
    measured, unmeasured = (next_commands("run", "data", metrics) for metrics in (METRICS, {"val/images": 0}))
    assert [command.split()[1] for command in measured] == ["evaluate", "report", "review"]
    assert [command.split()[1] for command in unmeasured] == ["watch", "predict", "review"]


def test_classes_in_other_scripts_keep_their_own_figures_and_names() -> None:
    classes = ("background", "猫", "狗")
    scores = {"val/iou/background": 0.5, "val/iou/class_1": 0.25, "val/iou/class_2": 0.75, "val/miou_ss": 0.5}
    lines = quality_table(scores, classes).splitlines()
    assert lines[3:6] == [
        "background    50.0       -       -",
        "猫            25.0       -       -",
        "狗            75.0       -       -",
    ]
    assert quality_table(scores, classes, [2]).splitlines()[3].split() == ["狗", "75.0", "-", "-"]
    assert class_quality(scores, "val", classes)["iou"] == [0.5, 0.25, 0.75]
    assert class_tags(classes) == {"class.class_1": "猫", "class.class_2": "狗"}


def test_the_mean_without_some_classes() -> None:
    """Of .7 and .5 and .3; a class that occurs nowhere has no figure, and its name may need a key."""
    classes = ("background", "ant", "person", "tv monitor", "nowhere")
    metrics = {"val/iou/background": 0.7, "val/iou/ant": 0.5, "val/iou/tv_monitor": 0.3}
    metrics = {name.replace("tv_monitor", class_keys(classes)[3]): value for name, value in metrics.items()}
    for left_out, expected in (((), 0.5), (("tv monitor",), 0.6), (("ant", "tv monitor", "nowhere"), 0.7)):
        assert mean_without(metrics, classes, left_out) == pytest.approx(expected)
    assert math.isnan(mean_without(metrics, classes, classes))
    with pytest.raises(ValueError, match="there is no class 'persons' to leave out; the classes are background, ant, "):
        mean_without(metrics, classes, ["persons"])


def test_curves_of_few_classes_and_of_many() -> None:
    few = curves(METRICS, ("background", "tv/monitor"))
    assert set(METRICS) - set(few) == {
        "val/images",
        *(f"pseudo_mask/{kind}/{name}" for kind in ("fdr", "fnr") for name in ("background", "tv-monitor")),
        "val/fnr/tv-monitor",
    }
    others = tuple(f"class {i}" for i in range(MOST_CURVES))
    many = curves(METRICS, ("background", "tv/monitor", *others))
    assert set(few) - set(many) == {"pseudo_mask/iou/background", "pseudo_mask/iou/tv-monitor", "val/iou/tv-monitor"}


def test_a_description_says_what_was_trained() -> None:
    text = description(
        get_recipe("voc_sss_lite"), data="voc6", labels="150 masks", commit="0123456789abcdef", folder=Path("runs/a")
    )
    for part in ("**sss** (masks and unlabeled images): 150 masks", "**voc6**", "**efficientnet_lite0**", "runs/a"):
        assert part in text
    assert "commit 0123456789ab," in text


@pytest.mark.parametrize("classes", [2, 20, 80, 200])
def test_a_result_fits_into_a_description(classes: int) -> None:
    names = ("background", *(f"class_{i:03d}" for i in range(classes)))
    metrics = {f"val/{kind}/{name}": i / 1000 for kind in ("iou", "fdr", "fnr") for i, name in enumerate(names)}
    text = result_text(metrics, names, epoch=7, folder=Path("my runs/a"), data="/data/voc")
    assert len(text) < MAX_TAG_LENGTH - 1000
    assert "epoch 7" in text
    assert "slrnet evaluate --checkpoint 'my runs/a' --data /data/voc" in text
    shown = [name for name in names if f"\n{name}" in text]
    assert shown == list(names if classes <= MOST_CURVES else names[:10])  # the lowest
    assert result_text({}, names, epoch=1, folder=Path("a"), data="b")


def test_few_parameters_and_every_change_among_them() -> None:
    for recipe in RECIPES:
        config = apply_overrides(get_recipe(recipe), ["optim.momentum=0.5", "weights.consistency=3"])
        listed = parameters(config)
        assert len(listed) <= 30, recipe
        assert (listed["optim.momentum"], listed["weights.consistency"]) == (0.5, 3.0), recipe
        assert "losses.validity" not in listed, recipe
        assert parameters(config, {"losses.validity"})["losses.validity"] == config.losses.validity, recipe
