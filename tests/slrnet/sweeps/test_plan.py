"""Sweeps before they start: what is refused, what is decided, what is kept for going on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from slrnet.checkpoints.checkpoint import CheckpointError
from slrnet.config import Config, ConfigError, apply_overrides
from slrnet.storage.remote import RemoteError, cached
from slrnet.sweeps.plan import SweepOptions, SweepPlan, plan_sweep, resume_plan
from slrnet.sweeps.space import Domain, parse_domain

SPACE = (parse_domain("weights.consistency=loguniform:0.5:8"), parse_domain("cvlr.dim=choice:4,8"))


def options(storage: Path, **changes: Any) -> SweepOptions:
    return SweepOptions(**{"name": "s", "storage": storage, "searcher": "random", **changes})


def plan(config: Config, storage: Path, *, space: tuple[Domain, ...] = SPACE, **changes: Any) -> SweepPlan:
    return plan_sweep(config, options(storage, **changes), space=space)


def test_what_was_left_open_is_decided(tiny_config: Config, tmp_path: Path) -> None:
    made = plan(tiny_config, tmp_path)
    assert made.options.metrics == ("val/miou_ss",)
    assert made.options.grace_epochs == tiny_config.train.pretrain_epochs + 1
    assert made.options.scheduler == "asha"
    assert made.trials == 20
    assert made.recipe_point == {"weights.consistency": 4.0, "cvlr.dim": 8}
    outside = plan(tiny_config, tmp_path, space=(parse_domain("cvlr.dim=choice:4,16"),))
    assert outside.recipe_point == {}


def test_the_metric_has_the_protocol_in_its_name(tiny_config: Config, tmp_path: Path) -> None:
    config = apply_overrides(tiny_config, ["evaluation.background_power=0.5"])
    assert plan(config, tmp_path).options.metrics == ("val/miou_ss_background_power_0.5",)
    made = plan(config, tmp_path, metrics=("val/mfdr", "pseudo_mask/mfnr"))
    assert made.options.metrics == ("val/mfdr", "pseudo_mask/mfnr")
    assert made.options.scheduler == "none", "several figures give no order to stop trials by"


def test_a_grid_counts_its_points(tiny_config: Config, tmp_path: Path) -> None:
    space = (parse_domain("cvlr.num_iters=int:1:3"), parse_domain("cvlr.dim=choice:4,8"))
    assert plan(tiny_config, tmp_path, space=space, searcher="grid").trials == 6


@pytest.mark.parametrize(
    ("changes", "space", "message"),
    [
        ({"metrics": ("val/iou",)}, SPACE, "is not measured in a sweep; allowed are pseudo_mask/miou"),
        ({"grace_epochs": 1}, SPACE, "first 1 epochs have no pseudo labels"),
        ({"searcher": "grid"}, SPACE, "a grid needs choices"),
        ({}, (parse_domain("train.epochs=int:2:4"),), "use --scheduler none"),
        ({"num_workers": 5}, SPACE, "train.batch_size 4 is too small for 5 workers"),
    ],
)
def test_refused(
    tiny_config: Config, tmp_path: Path, changes: dict[str, Any], space: tuple[Domain, ...], message: str
) -> None:
    with (
        pytest.raises(ConfigError, match=message)
        if "num_workers" not in changes
        else pytest.raises(ValueError, match=message)
    ):
        plan(tiny_config, tmp_path, space=space, **changes)
    assert not list(tmp_path.iterdir())


def test_pseudo_masks_must_be_measured_to_be_searched_by(tiny_config: Config, tmp_path: Path) -> None:
    config = apply_overrides(tiny_config, ["evaluation.pseudo_mask_images=0", "evaluation.panel_images=0"])
    with pytest.raises(ConfigError, match="needs evaluation.pseudo_mask_images above 0"):
        plan(config, tmp_path, metrics=("pseudo_mask/miou",))


def test_a_plan_in_an_object_store_is_read_back_where_nothing_is_left_of_it(
    tiny_config: Config, s3: Any, tmp_path: Path
) -> None:
    s3.create_dir("runs")
    remote, storage = "s3://runs/all", cached("s3://runs/all")
    made = plan(tiny_config, storage, remote=remote)
    made.write()
    shutil.rmtree(tmp_path / "cache")
    assert resume_plan(storage, "s", remote=remote) == made
    assert made.options.lease == "s3://runs/all/s/lease.json"
    with pytest.raises(RemoteError, match="sweep s3://runs/all/s exists; continue that sweep with --resume s"):
        plan(tiny_config, storage, remote=remote)
    with pytest.raises(CheckpointError, match="s3://runs/all has no sweep 't' to resume"):
        resume_plan(storage, "t", remote=remote)
    with pytest.raises(ConfigError, match="pbt copies checkpoints .* object store; name a folder"):
        plan(tiny_config, storage, space=SPACE[:1], remote=remote, name="t", scheduler="pbt")


def test_every_epoch_must_be_measured(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.every is 2; .* set it to 1"):
        plan(apply_overrides(tiny_config, ["evaluation.every=2"]), tmp_path)


def test_a_plan_is_read_back_and_a_taken_name_refused(tiny_config: Config, tmp_path: Path) -> None:
    made = plan(tiny_config, tmp_path, num_samples=3)
    made.write()
    assert resume_plan(tmp_path, "s") == made
    with pytest.raises(CheckpointError, match="continue that sweep with --resume s"):
        plan(tiny_config, tmp_path)
    with pytest.raises(CheckpointError, match=r"no sweep 't' to resume; sweeps there: s;"):
        resume_plan(tmp_path, "t")


def test_trials_of_an_ablation(tiny_config: Config, tmp_path: Path) -> None:
    made = plan_sweep(tiny_config, options(tmp_path), ablation="fig4", seeds=(0, 3))
    assert made.trials == 10
    config = made.trial_config({"variant": 4, "train.seed": 3})
    assert (config.weights.consistency, config.train.seed) == (8.0, 3)
    assert made.options.scheduler == "none"
    assert "  8: weights.consistency=8" in made.describe()
    made.write()
    assert resume_plan(tmp_path, "s") == made


def test_trials_of_a_search(tiny_config: Config, tmp_path: Path) -> None:
    made = plan(tiny_config, tmp_path)
    config = made.trial_config({"weights.consistency": 2.5, "cvlr.dim": 4})
    assert (config.weights.consistency, config.cvlr.dim) == (2.5, 4)
    assert "cvlr.dim=choice:4,8" in made.describe()


def test_a_dry_run_times_a_step_and_multiplies(tiny_config: Config, tmp_path: Path) -> None:
    said = plan(tiny_config, tmp_path, num_samples=10).estimate(price_per_hour=2.0)
    assert "a step of 4 images takes" in said
    assert "10 trials x 4 steps x 1 worker(s): at most" in said
    assert "at 2 an hour" in said
    assert not list(tmp_path.iterdir())


def test_an_ablation_can_have_some_of_its_variants(tiny_config: Config, tmp_path: Path) -> None:
    made = plan_sweep(
        tiny_config, options(tmp_path), ablation="table8", seeds=(0, 1), variants=("w/o cvlr", "CVLR", "- EMAU")
    )
    assert [variant.label for variant in made.chosen_variants] == ["CVLR", "- w/o CVLR", "EMAU"]
    assert made.trials == 6
    assert "EMAU" in made.describe()
    assert "Ham." not in made.describe()
    made.write()
    assert resume_plan(tmp_path, "s") == made
    with pytest.raises(ConfigError, match=r"no variant 'CVL'; it has 'CVLR', "):
        plan_sweep(tiny_config, options(tmp_path, name="t"), ablation="table8", seeds=(0,), variants=("CVL",))
    with pytest.raises(ConfigError, match="give --ablation NAME"):
        plan_sweep(tiny_config, options(tmp_path, name="t"), space=SPACE, variants=("CVLR",))


def test_an_ablation_may_measure_only_at_the_end(tiny_config: Config, tmp_path: Path) -> None:
    config = apply_overrides(tiny_config, ["evaluation.every=2"])
    assert plan_sweep(config, options(tmp_path), ablation="fig4", seeds=(0,)).options.scheduler == "none"


WEIGHTS = (SPACE[0],)


def test_a_population_draws_at_random_and_waits_for_pretraining(tiny_config: Config, tmp_path: Path) -> None:
    made = plan(tiny_config, tmp_path, space=WEIGHTS, scheduler="pbt", searcher="auto", num_samples=4)
    assert (made.options.searcher, made.options.scheduler) == ("random", "pbt")
    assert made.options.grace_epochs == tiny_config.train.pretrain_epochs + 1
    assert "the worst 25 % take over" in made.describe()
    made.write()
    assert resume_plan(tmp_path, "s") == made


@pytest.mark.parametrize(
    ("changes", "space", "message"),
    [
        ({"searcher": "grid"}, WEIGHTS, "leave out searcher 'grid'"),
        ({"metrics": ("val/mfdr", "val/mfnr")}, WEIGHTS, "goes by one metric"),
        ({"num_samples": 1}, WEIGHTS, "use 2 samples or more"),
        ({"perturb_every": 0}, WEIGHTS, "allowed are 1 epoch or more"),
        ({"perturb_every": 0}, WEIGHTS, "perturb_every is 0; allowed are 1 epoch or more"),
        ({"grace_epochs": 1}, WEIGHTS, "have no pseudo labels"),
        ({}, SPACE, r"cvlr.dim cannot change while a network trains.*cvlr.dim=fixed"),
    ],
)
def test_what_a_population_cannot_do_is_refused(
    tiny_config: Config, tmp_path: Path, changes: dict[str, Any], space: tuple[Domain, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny_config, tmp_path, space=space, **{"scheduler": "pbt", **changes})
