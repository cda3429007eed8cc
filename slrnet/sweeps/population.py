"""Population-based training (Jaderberg et al. 2017): the settings of trials change while they train.

All members train to the same epoch. Then the worst ones take over the checkpoint and the settings of a good one, with
the settings changed a little, and all train on. The decisions depend only on metrics, seed and epoch, and are on disk
before anything is copied, so a killed sweep resumes with the same outcome.

Ray Tune's own `PopulationBasedTraining` copies the checkpoints that trials report to Tune, but these belong to Ray
Train's workers. `Tuner.restore` does not bring back its state, and it waits forever if the last trial of a round dies.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import TypeAdapter

from slrnet.checkpoints.run_store import FILES
from slrnet.storage.files import read_json, write_json
from slrnet.storage.folders import whole_folder
from slrnet.sweeps.plan import QUANTILE, SweepPlan
from slrnet.sweeps.space import Domain
from slrnet.sweeps.trials import Trial, score_of, trial_rows

__all__ = ["Change", "Member", "Population", "exploit", "member_name", "train_population"]

RESAMPLING = 0.25
"""Probability that a setting is drawn again instead of moving a little."""
_RECORD = "population.json"

Round: TypeAlias = Callable[[int, Mapping[int, "Member"]], Mapping[int, str]]
"""Trains members, given the last epoch and the members by index, and returns the errors of those that failed."""


@dataclass(frozen=True)
class Change:
    """Settings that a member has from the end of an epoch on."""

    epoch: int
    """Finished epochs; 0 at the start."""
    values: Mapping[str, Any]
    """Settings by key."""
    source: int | None = None
    """The member whose weights it took over; None at the start."""


@dataclass(frozen=True)
class Member:
    """One training of a population."""

    index: int
    schedule: tuple[Change, ...]
    """Its settings in order of time: those that it starts with, and one change for each take-over."""
    rows: Mapping[int, Mapping[str, int | float]]  # whole numbers stay whole when they are read back
    """Metrics by epoch of its present weights: after a take-over, those of their former owner."""
    error: str = ""
    """Why it failed; a failed member leaves the population."""

    @property
    def values(self) -> Mapping[str, Any]:
        """Its present settings."""
        return self.schedule[-1].values


@dataclass(frozen=True)
class Population:
    """All members, between two rounds."""

    members: tuple[Member, ...]
    rounds: int = 0
    """Finished rounds."""
    copied: bool = True
    """Whether the take-overs of the last round have copied their checkpoints."""

    @property
    def alive(self) -> tuple[Member, ...]:
        """Members without an error."""
        return tuple(member for member in self.members if not member.error)

    def takers(self, epoch: int) -> list[Member]:
        """Members whose last change is a take-over after an epoch, > 0."""
        return [member for member in self.alive if member.schedule[-1].epoch == epoch]

    def save(self, folder: Path) -> None:
        """Writes the population into a sweep's folder, whole or not at all."""
        write_json(folder / _RECORD, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Population | None:
        """Reads the population in a sweep's folder, if there is one."""
        path = folder / _RECORD
        return TypeAdapter(cls).validate_python(read_json(path)) if path.is_file() else None


def boundaries(epochs: int, *, first: int, every: int) -> tuple[int, ...]:
    """The epochs at which rounds end: `first`, every few from there, and the last one."""
    return (*range(first, epochs, every), epochs)


def start_population(domains: Sequence[Domain], *, size: int, first: Mapping[str, Any], seed: int) -> Population:
    """Draws the settings of a population before its first round; the first member has those in `first`."""
    rng = random.Random(seed)
    drawn = [{domain.key: domain.draw(rng) for domain in domains} for _ in range(size)]
    drawn[0] |= first
    return Population(tuple(Member(index, (Change(0, values),), {}) for index, values in enumerate(drawn)))


def exploit(
    population: Population, domains: Sequence[Domain], *, metric: str, epoch: int, seed: int, quantile: float = QUANTILE
) -> Population:
    """The population of the next round, after an epoch that all have finished; no checkpoint has been copied.

    The worst members by `metric` (a missing value is the worst of all) take over from the best ones. `quantile` is the
    share of either, between one member and half. `domains` are the settings that change, and their ranges.
    """
    rng = random.Random(f"{seed}/{epoch}")
    scores = {member.index: score_of(member.rows.get(epoch, {}), metric) for member in population.alive}
    ranked = sorted(population.alive, key=lambda member: (scores[member.index], -member.index))
    count = min(max(1, int(quantile * len(ranked))), len(ranked) // 2)
    changed = {}
    for member in ranked[:count]:
        source = rng.choice(ranked[-count:])
        if scores[source.index] > scores[member.index]:
            change = Change(epoch, _explore(source.values, domains, rng), source.index)
            changed[member.index] = replace(member, schedule=(*member.schedule, change), rows=source.rows)
    members = tuple(changed.get(member.index, member) for member in population.members)
    return replace(population, members=members, copied=not changed)


def train_population(plan: SweepPlan, train_round: Round, *, say: Callable[[str], None]) -> list[Trial]:
    """Trains a population to the end, from the start or from the state in the sweep's folder.

    `train_round` need not repeat what it trained before a kill. `say` receives the lines to show.
    """
    options, folder = plan.options, plan.folder
    population = Population.load(folder) or start_population(
        plan.space, size=options.num_samples, first=plan.recipe_point, seed=options.seed
    )
    assert options.grace_epochs is not None
    ends = boundaries(plan.config.train.epochs, first=options.grace_epochs, every=options.perturb_every)
    for until in ends[population.rounds :]:
        if not population.copied:
            _copy_checkpoints(plan, population, ends[population.rounds - 1])
            population = replace(population, copied=True)
        population.save(folder)
        errors = train_round(until, {member.index: member for member in population.alive})
        population = _after_round(plan, population, errors, until)
        if until != ends[-1]:
            population = exploit(population, plan.space, metric=options.metrics[0], epoch=until, seed=options.seed)
            for member in population.takers(until):
                taker, giver = member_name(plan, member.index), member_name(plan, member.schedule[-1].source)
                settings = member.values.items()
                shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings)
                say(f"after epoch {until} {taker} continues with the weights of {giver}, with {shown}")
        population = replace(population, rounds=population.rounds + 1)
        population.save(folder)
    return [_trial_of(plan, member) for member in population.members]


def member_name(plan: SweepPlan, index: int | None) -> str:
    """Name of a member's run and folder; empty for none."""
    return "" if index is None else f"{plan.options.name}-{index:02d}"


def _explore(values: Mapping[str, Any], domains: Sequence[Domain], rng: random.Random) -> dict[str, Any]:
    changed = dict(values)
    for domain in domains:
        again = rng.random() < RESAMPLING
        changed[domain.key] = domain.draw(rng) if again else domain.neighbor(changed[domain.key], rng)
    return changed


def _after_round(plan: SweepPlan, population: Population, errors: Mapping[int, str], until: int) -> Population:
    """The population with the metrics and errors of a round."""
    members = {member.index: member for member in population.members}
    for member in population.alive:
        logged = trial_rows(plan.trial(member_name(plan, member.index)).folder)
        begun = max(member.rows, default=0)  # earlier epochs belong to the weights, whoever trained them
        rows = {**member.rows, **{epoch: row for epoch, row in logged.items() if begun < epoch <= until}}
        members[member.index] = replace(member, rows=rows, error=errors.get(member.index, ""))
    return replace(population, members=tuple(members.values()))


def _copy_checkpoints(plan: SweepPlan, population: Population, epoch: int) -> None:
    """Copies the checkpoints of the take-overs after an epoch; nobody both gives and takes in the same round."""
    for member in population.takers(epoch):
        places = member.schedule[-1].source, member.index
        source, target = (plan.trial(member_name(plan, index)).folder / "checkpoints" for index in places)
        with whole_folder(target, own=FILES) as incoming:
            shutil.copytree(source, incoming, dirs_exist_ok=True)


def _trial_of(plan: SweepPlan, member: Member) -> Trial:
    trial = Trial(
        name=member_name(plan, member.index),
        values=member.values,
        planned=plan.config.train.epochs,
        error=member.error,
        schedule=tuple(
            {"epoch": change.epoch, "values": dict(change.values), "from": member_name(plan, change.source)}
            for change in member.schedule
        ),
    )
    return trial.measured(member.rows, plan.options.metrics[0])
