"""Population-based training without Ray: who takes over from whom, what changes, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from slrnet.config import Config, apply_overrides
from slrnet.sweeps.plan import SweepOptions, SweepPlan, plan_sweep
from slrnet.sweeps.population import (
    Change,
    Member,
    Population,
    boundaries,
    exploit,
    member_name,
    start_population,
    train_population,
)
from slrnet.sweeps.space import parse_domain

SPACE = (
    parse_domain("weights.consistency=loguniform:0.5:8"),
    parse_domain("calibration.confidence_threshold=uniform:0.3:0.9"),
)
METRIC = "val/miou_ss"


def population(*scores: float, epoch: int = 2) -> Population:
    values = {"weights.consistency": 2.0, "calibration.confidence_threshold": 0.5}
    rows = [{METRIC: score} if math.isfinite(score) else {} for score in scores]
    return Population(tuple(Member(i, (Change(0, values),), {epoch: row}) for i, row in enumerate(rows)))


def takers(after: Population) -> dict[int, int | None]:
    return {member.index: member.schedule[-1].source for member in after.members if len(member.schedule) > 1}


def decide(before: Population, *, quantile: float = 0.25, seed: int = 0, metric: str = METRIC) -> Population:
    return exploit(before, SPACE, metric=metric, epoch=2, quantile=quantile, seed=seed)


def test_rounds_end_after_pretraining_and_with_the_last_epoch() -> None:
    assert boundaries(10, first=3, every=3) == (3, 6, 9, 10)
    assert boundaries(6, first=2, every=2) == (2, 4, 6)
    assert boundaries(3, first=3, every=1) == (3,)


def test_the_worst_takes_over_from_the_best() -> None:
    before = population(0.1, 0.4, 0.2, 0.3)
    after = decide(before)
    assert takers(after) == {0: 1}
    assert not after.copied
    loser, winner = after.members[0], after.members[1]
    assert loser.rows == winner.rows, "figures go with the weights"
    assert loser.values != winner.values
    assert winner == before.members[1]


def test_of_error_rates_the_largest_is_the_worst() -> None:
    before = population(0.1, 0.4, 0.2, 0.3)
    rows = [replace(member, rows={2: {"val/mfdr": member.rows[2][METRIC]}}) for member in before.members]
    assert takers(decide(replace(before, members=tuple(rows)), metric="val/mfdr")) == {1: 0}


def test_half_of_the_members_at_most_take_over() -> None:
    sources = takers(decide(population(0.1, 0.2, 0.3, 0.4, 0.5), quantile=0.5))
    assert set(sources) == {0, 1}
    assert set(sources.values()) <= {3, 4}


def test_without_a_figure_a_member_is_the_worst_and_nothing_is_taken_from_it() -> None:
    assert takers(decide(population(0.1, math.nan, 0.2, 0.3))) == {1: 3}
    assert takers(decide(population(math.nan, math.nan))) == {}


def test_equals_and_the_dead_change_nothing() -> None:
    assert takers(decide(population(0.2, 0.2))) == {}
    before = population(0.1, 0.4, 0.3)
    dead = replace(before, members=(replace(before.members[0], error="died"), *before.members[1:]))
    assert takers(decide(dead)) == {2: 1}


def test_changed_settings_stay_in_their_domains_and_come_from_the_seed() -> None:
    before = population(0.1, 0.4)
    settings = [decide(before, seed=seed).members[0].values for seed in range(40)]
    assert settings == [decide(before, seed=seed).members[0].values for seed in range(40)]
    weights = {values["weights.consistency"] for values in settings}
    gammas = {values["calibration.confidence_threshold"] for values in settings}
    assert {2.0 * 1.2, 2.0 / 1.2} < weights, "moved, and now and then drawn anew"
    assert all(0.5 <= weight <= 8 for weight in weights)
    assert all(0.3 <= gamma <= 0.9 for gamma in gammas)


def test_the_first_member_has_the_recipes_settings() -> None:
    first = {"weights.consistency": 4.0}
    made = start_population(SPACE, size=3, first=first, seed=1)
    assert made.members[0].values["weights.consistency"] == 4.0
    assert len({member.values["weights.consistency"] for member in made.members}) == 3
    assert made == start_population(SPACE, size=3, first=first, seed=1)


def test_a_population_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Population.load(tmp_path) is None
    made = decide(population(0.1, 0.4))
    counted = replace(made.members[0], rows={2: {METRIC: 0.25, "pseudo_mask/images": 4}})
    made = replace(made, members=(counted, *made.members[1:]))
    made.save(tmp_path)
    loaded = Population.load(tmp_path)
    assert loaded == made
    assert repr(loaded) == repr(made), "whole numbers stay whole, as results are compared as texts"


class Stub:
    """Trains nothing: a member's score is its index times its epoch, its checkpoint the history of its weights."""

    def __init__(self, plan: SweepPlan, *, kill_at: int | None = None, fails: Mapping[int, int] | None = None) -> None:
        self.plan, self.kill_at, self.fails = plan, kill_at, fails or {}
        self.rounds: list[tuple[int, list[int]]] = []

    def __call__(self, until: int, members: Mapping[int, Member]) -> dict[int, str]:
        self.rounds.append((until, list(members)))
        errors = {}
        for number, index in enumerate(members):
            if until == self.kill_at and number == 2:
                raise KeyboardInterrupt
            if self.fails.get(index) == until:
                errors[index] = "its process ended"
                continue
            self.train(index, until)
        return errors

    def train(self, index: int, until: int) -> None:
        folder = self.plan.folder / "trials" / member_name(self.plan, index)
        state = folder / "checkpoints" / "state.json"
        weights = json.loads(state.read_text()) if state.is_file() else []
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        state.parent.mkdir(exist_ok=True)
        with (folder / "logs" / "rank-0.jsonl").open("a") as log:
            for epoch in range(len(weights) + 1, until + 1):
                weights.append(index)
                line = {"time": "", "event": "epoch", "epoch": epoch, METRIC: (index + 1) * epoch / 100, "step": epoch}
                log.write(json.dumps(line) + "\n")
        state.write_text(json.dumps(weights))


@pytest.fixture
def plan(tiny_config: Config, tmp_path: Path) -> SweepPlan:
    config = apply_overrides(tiny_config, ["train.epochs=4", "train.pretrain_epochs=1"])
    options = SweepOptions(name="p", storage=tmp_path, scheduler="pbt", num_samples=4)
    return plan_sweep(config, options, space=SPACE)


def weights_of(plan: SweepPlan) -> list[list[int]]:
    paths = [plan.folder / "trials" / member_name(plan, index) / "checkpoints" / "state.json" for index in range(4)]
    return [json.loads(path.read_text()) for path in paths]


def test_checkpoints_change_hands_and_the_schedule_is_kept(plan: SweepPlan) -> None:
    said: list[str] = []
    stub = Stub(plan)
    trials = train_population(plan, stub, say=said.append)
    assert [until for until, _ in stub.rounds] == [2, 3, 4]
    assert weights_of(plan)[0] == [3, 3, 3, 0], "taken over after epoch 2, and after epoch 3 again"
    assert [trial.status for trial in trials] == ["finished"] * 4
    first = trials[0]
    assert [(change["epoch"], change["from"]) for change in first.schedule][:2] == [(0, ""), (2, "p-03")]
    assert first.curve == pytest.approx([0.04, 0.08, 0.12, 0.04]), "the figures of the weights that it has"
    assert first.values == first.schedule[-1]["values"]
    assert any("p-00 continues with the weights of p-03" in line for line in said)


@pytest.mark.parametrize("kill_at", [2, 3, 4])
def test_after_a_kill_it_ends_as_it_would_have(plan: SweepPlan, tmp_path: Path, kill_at: int) -> None:
    undisturbed = replace(plan, options=replace(plan.options, storage=tmp_path / "other"))
    expected = train_population(undisturbed, Stub(undisturbed), say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        train_population(plan, Stub(plan, kill_at=kill_at), say=lambda line: None)
    resumed = Stub(plan)
    assert train_population(plan, resumed, say=lambda line: None) == expected
    assert resumed.rounds[0][0] == kill_at, "finished rounds are not trained again"
    assert weights_of(plan) == weights_of(undisturbed)


def test_a_copy_that_was_cut_off_is_made_again(plan: SweepPlan) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_population(plan, Stub(plan, kill_at=3), say=lambda line: None)
    saved = Population.load(plan.folder)
    assert saved is not None
    replace(saved, copied=False).save(plan.folder)
    taker = plan.folder / "trials" / "p-00"
    (taker / "checkpoints" / "state.json").unlink()
    (taker / ".checkpoints.incoming").mkdir()
    trials = train_population(plan, Stub(plan), say=lambda line: None)
    assert trials[0].epochs == 4
    assert weights_of(plan)[0][:2] == [3, 3]


def test_a_failed_member_leaves_and_the_others_go_on(plan: SweepPlan) -> None:
    stub = Stub(plan, fails={3: 3})
    trials = train_population(plan, stub, say=lambda line: None)
    assert stub.rounds[-1] == (4, [0, 1, 2])
    assert (trials[3].status, trials[3].error, trials[3].metrics) == ("failed", "its process ended", {})
    assert [trial.status for trial in trials[:3]] == ["finished"] * 3
