"""Results of a sweep: tables, pictures, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pyarrow import fs

from slrnet.config import Config, apply_overrides, load_config
from slrnet.recipes import get_recipe
from slrnet.sweeps.ablations import ABLATIONS
from slrnet.sweeps.plan import SweepOptions, SweepPlan
from slrnet.sweeps.results import ablation_table, margin_table, prune_trials, replay_text, trial_table, write_results
from slrnet.sweeps.space import parse_domain
from slrnet.sweeps.trials import AblationRow, Trial, Trials, paired_margin
from tests.fixtures.trials import curves, trial


def plan_of(storage: Path, *metrics: str, ablation: str = "", space: Any = ()) -> SweepPlan:
    options = SweepOptions(name="sweep", storage=storage, metrics=metrics)
    return SweepPlan(config=get_recipe("voc_wsss_lite"), options=options, space=space, ablation=ablation, seeds=())


def rows_of(*by_seed: dict[int, float]) -> list[AblationRow]:
    ablation = ABLATIONS["views_by_cvlr"]
    trials = [
        trial(f"{variant}{seed}", {"variant": variant, "train.seed": seed}, miou=score)
        for variant, scores in enumerate(by_seed)
        for seed, score in scores.items()
    ]
    return Trials(trials, ["val/miou"]).rows(ablation)


def test_margins_are_paired_by_seed() -> None:
    """.1, .2 and .1 more: .1333 with a standard error of .0333, times t = 2.92 of two degrees of freedom: .0973."""
    rows = rows_of({0: 0.4, 1: 0.4, 2: 0.6, 9: 0.9}, {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.1})
    margin = paired_margin(rows[1].by_seed, rows[0].by_seed)
    assert (margin.mean, margin.seeds) == (pytest.approx(0.13333, abs=1e-5), 3)
    assert margin.half_width == pytest.approx(0.09733, abs=1e-5)
    assert math.isnan(paired_margin(rows[2].by_seed, rows[0].by_seed).half_width)  # one seed has no interval
    assert math.isnan(paired_margin({}, rows[0].by_seed).mean)
    lines = margin_table(rows, "val/miou").splitlines()
    assert lines[2] == "| variant | minus | val/miou, points | 90 % interval | seeds |"
    assert lines[4:] == ["| 1 view, CVLR | 1 view, no CVLR | +13.33 | +3.60 to +23.07 | 3 |"]


def test_few_variants_are_compared_in_pairs_and_many_with_the_first() -> None:
    pair = {0: 0.1, 1: 0.3}
    assert len(margin_table(rows_of(pair, pair, pair, pair), "val/miou").splitlines()) == 4 + 6
    many = [replace(row, variant=row.variant) for row in rows_of(pair, pair, pair, pair)]
    assert len(margin_table([*many, many[0]], "val/miou").splitlines()) == 4 + 4
    assert margin_table(rows_of({0: 0.1}, {0: 0.2}), "val/miou") == ""


def test_the_table_is_ranked_and_names_failures() -> None:
    trials = [trial("low", {"cvlr.dim": 8}, miou=0.25), trial("high", {"cvlr.dim": 16}, "stopped early", miou=0.5)]
    broken = Trial(name="broken", values={"cvlr.dim": 4}, status="failed", epochs=0, metrics={}, error="loss | nan")
    lines = trial_table(Trials([broken, *trials], ["val/miou"])).splitlines()
    assert lines[0] == "| trial | cvlr.dim | val/miou, % | epochs | status |"
    assert lines[2:] == [
        "| high | 16 | 50.00 | 3 | stopped early |",
        "| low | 8 | 25.00 | 3 | finished |",
        "| broken | 4 | - | 0 | failed: loss &#124; nan |",
    ]


def ablation_trials() -> list[Trial]:
    """fig4-right: MVMC with two seeds, KL with one, CPS failed."""
    scores = {(0, 0): 0.5, (0, 1): 0.6, (1, 0): 0.4}
    return [
        trial(f"{variant}{seed}", {"variant": variant, "train.seed": seed}, miou=score)
        for (variant, seed), score in scores.items()
    ] + [trial("20", {"variant": 2, "train.seed": 0}, "failed")]


def test_seeds_are_put_together() -> None:
    ablation = ABLATIONS["fig4-right"]
    rows = Trials(ablation_trials(), ["val/miou"]).rows(ablation)
    assert [(row.variant.label, row.seeds) for row in rows] == [("MVMC", 2), ("KL Div.", 1), ("CPS", 0)]
    assert rows[0].means["val/miou"] == pytest.approx(0.55)
    assert rows[0].spreads["val/miou"] == pytest.approx(0.0707, abs=1e-4)
    table = ablation_table(ablation, rows)
    assert "| MVMC | | 55.00 ± 7.07 | 2 |" in table
    assert "| KL Div. | | 40.00 | 1 |" in table
    assert "| CPS | | - | 0 |" in table


def test_the_papers_figures_stand_beside() -> None:
    """Of the variants that were run."""
    failed = trial("e", {"variant": 4, "train.seed": 0}, "failed")
    rows = Trials([failed], ["val/miou"]).rows(ABLATIONS["table8"])
    assert "| EMAU | 61.76 | - | 0 |" in ablation_table(ABLATIONS["table8"], rows)
    assert [row.variant.label for row in rows] == ["EMAU"]


@pytest.mark.slow
def test_a_search_leaves_files(tmp_path: Path) -> None:
    trials = [
        trial(str(i), {"weights.consistency": 0.5 + i, "cvlr.method": "cvlr"}, miou=i / 10, mfdr=0.5 - i / 20)
        for i in range(5)
    ]
    plan = plan_of(tmp_path, "val/miou", "val/mfdr")
    summary = write_results(plan, Trials(trials, plan.options.metrics), replay={})
    names = {path.name for path in (plan.folder / "results").iterdir()}
    pictures = {f"{name}.{suffix}" for name in ("trials", "curves", "front") for suffix in ("png", "svg")}
    assert names >= {"trials.json", "summary.md", "best_config.json", *pictures}
    assert (plan.folder / "results" / "summary.md").read_text() == summary
    assert "Beaten by no other trial" in summary
    assert load_config(plan.folder / "results" / "best_config.json") == plan.trial_config(trials[4].values)
    assert len(json.loads((plan.folder / "results" / "trials.json").read_text())["trials"]) == 5
    with Image.open(plan.folder / "results" / "trials.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("name", ["fig4-right", "fig6-right"])
def test_an_ablation_leaves_files(name: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "val/miou", ablation=name)
    assert "±" in write_results(plan, Trials(ablation_trials(), plan.options.metrics), replay={})
    files = {path.name for path in (plan.folder / "results").iterdir()}
    assert files == {"trials.json", "summary.md", f"{name}.png", f"{name}.svg"}


def test_the_fate_of_the_best_trial_under_early_stopping() -> None:
    trials = Trials(curves([0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.3, 0.3]), ["val/miou"])
    text = replay_text(trials, {"t0": 2, "t1": 4})
    assert "6 of 8 epochs trained, 25.0 % saved" in text
    assert "best trial t0 would have been stopped after epoch 2" in text
    assert "best trial t0 would have been trained to its end" in replay_text(trials, {"t0": 4, "t1": 2})


def test_a_summary_tells_of_epochs_the_recipe_early_stopping_and_schedules(tmp_path: Path) -> None:
    schedule = tuple({"epoch": epoch, "values": {"optim.lr": 1.0 / (1 + epoch)}, "from": ""} for epoch in (0, 2))
    trials = [replace(trial, schedule=schedule) for trial in curves([0.1, 0.25, 0.2], [0.1, 0.2, 0.3, 0.5])]
    plan = plan_of(tmp_path, "val/miou", space=(parse_domain("weights.consistency=loguniform:0.5:8"),))
    plan = replace(plan, config=apply_overrides(plan.config, ["weights.consistency=1"]))
    summary = write_results(plan, Trials(trials, plan.options.metrics), replay={"t0": 2, "t1": 4})
    assert "Epochs trained: 7 of 8 planned, 12.5 % saved" in summary
    assert "(t0) have 25.00 %, the best trial t1 50.00 %: +25.00 points" in summary
    assert "6 of 7 epochs trained" in summary
    record = json.loads((plan.folder / "results" / "trials.json").read_text())
    assert record["epochs"]["saved"] == 0.125
    assert record["epochs_under_asha"] == {"t0": 2, "t1": 4}
    with Image.open(plan.folder / "results" / "schedules.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(("ablation", "kept"), [("", {"best/1"}), ("fig4", {"best/1", "fair/1"})])
@pytest.mark.parametrize("remote", ["", "s3://runs/all"])
def test_finished_trials_that_lose_keep_no_checkpoint(
    remote: str, ablation: str, kept: set[str], tmp_path: Path, s3: Any
) -> None:
    from slrnet.checkpoints.checkpoint import TrainState, save_checkpoint

    s3.create_dir("runs")
    plan = plan_of(tmp_path, "val/miou", ablation=ablation)
    plan = replace(plan, options=replace(plan.options, remote=remote))
    for name in ("best", "fair", "broken"):
        for epoch in (1, 2):
            told: dict[str, Any] = {"classes": ("background", "cat"), "data_fingerprint": "-", "world_size": 1}
            state = TrainState(epoch=epoch, step=epoch, metrics={"val/miou_ss": 1 / epoch}, **told)
            folder = plan.trial(name).folder / "checkpoints"
            save_checkpoint(folder, config=Config(), state=state, model={}, optimizer={})
        if (store := plan.trial(name).store) is not None:
            store.upload()
    trained = [trial("best", miou=0.6), trial("fair", miou=0.5), trial("broken", status="failed")]
    line = prune_trials(plan, Trials(trained, ["val/miou"]))
    paths = [path.as_posix() for path in plan.trial("best").storage.glob("*/checkpoints/checkpoint-*/state.json")]
    if remote:
        listed = s3.get_file_info(fs.FileSelector("runs/all/sweep/trials", recursive=True))
        paths = [info.path for info in listed if info.base_name == "state.json"]
    left = {f"{path.split('/')[-4]}/{int(path.split('/')[-2][-4:])}" for path in paths}
    assert left == kept | {"broken/1", "broken/2"}
    assert f"the best one each of {len(kept)} of 3 trials" in line
