"""Trials of a sweep: reading them, the best, the front, importances."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slrnet.sweeps.trials import Trial, Trials, mode_of, trial_rows
from tests.fixtures.trials import curves, trial

POINTS = [
    trial("a", mfdr=0.5, mfnr=0.2),
    trial("b", mfdr=0.3, mfnr=0.4),
    trial("c", mfdr=0.5, mfnr=0.3),
    trial("d", mfdr=0.2, mfnr=0.6),
    trial("e", mfdr=float("nan"), mfnr=0.0),
    trial("f", status="failed"),
]


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val/miou_ss", "max"), ("val/mfdr", "min"), ("pseudo_mask/mfnr", "min"), ("train/loss", "min")],
)
def test_error_rates_want_to_be_small(metric: str, mode: str) -> None:
    assert mode_of(metric) == mode


def test_the_best() -> None:
    trials = [trial("a", miou=0.3), trial("b", miou=0.4), trial("c"), trial("d", miou=float("nan"))]
    assert Trials(trials, ["val/miou"]).best is trials[1]
    assert Trials(POINTS, ["val/mfdr"]).best is POINTS[3]
    assert Trials(POINTS[-1:], ["val/mfdr"]).best is None


def test_the_front_by_hand() -> None:
    """c is beaten by a in one figure and equal in the other; e and f have no figures."""
    assert [trial.name for trial in Trials(POINTS, ["val/mfdr", "val/mfnr"]).front().all] == ["d", "b", "a"]


def test_equal_trials_stay_on_the_front() -> None:
    twins = [trial("a", mfdr=0.1, mfnr=0.1), trial("b", mfdr=0.1, mfnr=0.1)]
    assert Trials(twins, ["val/mfdr", "val/mfnr"]).front().all == twins


@pytest.mark.slow
def test_importances_find_the_setting_that_acts() -> None:
    trials = [
        trial(
            str(i), {"optim.lr": (i * 7 % 12) / 12, "views.flip": bool(i % 2), "cvlr.dim": 64}, miou=(i * 7 % 12) / 24
        )
        for i in range(12)
    ]
    shares = Trials(trials, ["val/miou"]).importances()
    assert next(iter(shares)) == "optim.lr"
    assert shares["optim.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert Trials(trials[:3], ["val/miou"]).importances() == {}, "too few"
    equals = [replace(trial, metrics={"val/miou": 0.2}) for trial in trials]
    assert Trials(equals, ["val/miou"]).importances() == {}, "nothing to explain"


def test_a_trial_is_its_best_epoch_and_keeps_its_curve() -> None:
    (only,) = curves([0.1, 0.3, 0.2])
    assert (only.status, only.epochs, only.planned) == ("stopped early", 3, 4)
    assert only.metrics == {"val/miou": 0.3}
    assert only.curve == (0.1, 0.3, 0.2)
    broken = Trial(name="b", values={}, planned=4, error="nan").measured({1: {"val/miou": 0.1}}, "val/miou")
    assert (broken.status, broken.epochs, broken.metrics) == ("failed", 1, {})


def test_figures_come_from_the_log_each_epoch_once(tmp_path: Path) -> None:
    lines = [
        {"event": "epoch", "epoch": 1, "val/miou_ss": 0.1, "train/epoch_loss": 2.0},
        {"event": "step", "step": 1, "loss": 1.0},
        {"event": "epoch", "epoch": 1, "val/miou_ss": 0.2},
        {"event": "epoch", "epoch": 2, "pseudo_mask/miou": 0.3},
    ]
    (tmp_path / "logs").mkdir()
    text = "\n".join(json.dumps({"time": "", **line}) for line in lines)
    (tmp_path / "logs" / "rank-0.jsonl").write_text(text + '\n{"event": "ep')
    assert trial_rows(tmp_path) == {1: {"val/miou_ss": 0.2}, 2: {"pseudo_mask/miou": 0.3}}
    assert trial_rows(tmp_path / "nowhere") == {}


def test_the_share_of_epochs_saved() -> None:
    broken = trial("broken", status="failed")
    trials = [*curves([0.1, 0.2, 0.3, 0.4], [0.1, 0.1]), broken]
    assert Trials(trials, ["val/miou"]).epochs() == {"trained": 6, "planned": 8, "saved": 0.25}
    assert Trials([broken], ["val/miou"]).epochs()["saved"] == 0
