"""Population-based training (Jaderberg et al. 2017): the settings of trials change while they train.

All members train to the same epoch. Then the worst ones take over the checkpoint and the settings of a good one, the
settings changed a little, and all train on: weights are inherited, and a member's settings become a schedule. The
decisions are a function of figures, seed and epoch, and are on the disk before anything is copied, so that a sweep that
was killed goes on as it would have.

Ray's own scheduler of that name is not used: it copies checkpoints that trials hand over to Tune, and those here
belong to Ray Train's workers; its state is not among what `Tuner.restore` brings back; and in its synchronous form the
others wait for ever when the last member of a round dies. Who trains a round is up to the caller.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from slrnet.storage.files import write_json
from slrnet.sweeps.plan import SweepPlan
from slrnet.sweeps.space import Domain
from slrnet.sweeps.trials import Mode, Trial, mode_of, trial_from_rows, trial_rows

__all__ = [
    "Change",
    "Member",
    "Population",
    "Round",
    "boundaries",
    "exploit",
    "member_name",
    "start_population",
    "train_population",
]

RESAMPLING = 0.25
"""Probability that a setting is drawn anew instead of being moved a little."""
_RECORD = "population.json"

Round: TypeAlias = Callable[[int, Mapping[int, Mapping[str, Any]]], Mapping[int, str]]
"""Trains members, given the last epoch and the settings of each, and returns the errors of those that failed."""


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
    """Its settings, in the order of time."""
    rows: Mapping[int, Mapping[str, float]]
    """Figures by epoch of the weights that it has: after a take-over, those of their former owner."""
    error: str = ""
    """Why it failed; it then takes no further part."""

    @property
    def values(self) -> Mapping[str, Any]:
        """Its present settings."""
        return self.schedule[-1].values


@dataclass(frozen=True)
class Population:
    """All members, between two rounds."""

    members: tuple[Member, ...]
    rounds: int = 0
    """Finished ones."""
    copied: bool = True
    """Whether the checkpoints that changed hands after the last round are where they belong."""

    @property
    def alive(self) -> tuple[Member, ...]:
        """Members without an error."""
        return tuple(member for member in self.members if not member.error)

    def save(self, folder: Path) -> None:
        """Writes the population into a sweep's folder, whole or not at all."""
        write_json(folder / _RECORD, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Population | None:
        """The population that a sweep's folder holds, if any."""
        path = folder / _RECORD
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        members = tuple(
            Member(
                found["index"],
                tuple(Change(**change) for change in found["schedule"]),
                {int(epoch): row for epoch, row in found["rows"].items()},
                found["error"],
            )
            for found in record["members"]
        )
        return cls(members, record["rounds"], record["copied"])


def boundaries(epochs: int, *, first: int, every: int) -> tuple[int, ...]:
    """The epochs at which rounds end: `first`, every few from there, and the last one."""
    return (*range(first, epochs, every), epochs)


def start_population(domains: Sequence[Domain], *, size: int, first: Mapping[str, Any], seed: int) -> Population:
    """A population before its first round.

    Args:
        domains: whose values are drawn.
        size: members.
        first: settings of the first member; what it lacks is drawn.
        seed: of the draws.
    """
    rng = random.Random(seed)
    drawn = [{domain.key: domain.draw(rng) for domain in domains} for _ in range(size)]
    drawn[0] |= first
    return Population(tuple(Member(index, (Change(0, values),), {}) for index, values in enumerate(drawn)))


def exploit(
    population: Population,
    domains: Sequence[Domain],
    *,
    metric: str,
    epoch: int,
    quantile: float,
    seed: int,
) -> Population:
    """Lets the worst members take over from the best ones.

    Args:
        population: whose members have finished `epoch`.
        domains: the settings that may change, and within which ends.
        metric: figure to compare by; one that is missing is the worst.
        epoch: that all have finished.
        quantile: share of the members that take over, and from which they do: at least one, at most half.
        seed: of the sweep.

    Returns:
        The population with the settings of the next round. No checkpoint has been copied.
    """
    rng = random.Random(f"{seed}/{epoch}")
    scores = {member.index: _score(member, metric, mode_of(metric), epoch) for member in population.alive}
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


def train_population(
    plan: SweepPlan,
    train_round: Round,
    *,
    say: Callable[[str], None],
    record: Callable[[Population], None] = lambda population: None,
) -> list[Trial]:
    """Trains a population to the end, or from where its folder says that it stands.

    Args:
        plan: of the sweep.
        train_round: trains members to the end of an epoch; what it trained before a kill it need not train again.
        say: receives lines for people.
        record: is told of the population whenever settings have changed.
    """
    options, folder = plan.options, plan.folder
    population = Population.load(folder) or start_population(
        plan.space, size=options.num_samples, first=plan.recipe_point, seed=options.seed
    )
    assert options.grace_epochs is not None
    ends = boundaries(plan.config.train.epochs, first=options.grace_epochs, every=options.perturb_every)
    for until in ends[population.rounds :]:
        if not population.copied:
            _copy_checkpoints(plan, population)
            population = replace(population, copied=True)
        population.save(folder)
        record(population)
        errors = train_round(until, {member.index: member.values for member in population.alive})
        population = _after_round(plan, population, errors, until)
        if until != ends[-1]:
            common: dict[str, Any] = {"metric": options.metrics[0], "quantile": options.quantile, "seed": options.seed}
            population = exploit(population, plan.space, epoch=until, **common)
            for line in _describe_changes(plan, population, until):
                say(line)
        population = replace(population, rounds=population.rounds + 1)
        population.save(folder)
    return [_trial_of(plan, member) for member in population.members]


def member_name(plan: SweepPlan, index: int) -> str:
    """Name of a member's run and folder."""
    return f"{plan.options.name}-{index:02d}"


def _score(member: Member, metric: str, mode: Mode, epoch: int) -> float:
    value = member.rows.get(epoch, {}).get(metric, math.nan)
    return (value if mode == "max" else -value) if math.isfinite(value) else -math.inf


def _explore(values: Mapping[str, Any], domains: Sequence[Domain], rng: random.Random) -> dict[str, Any]:
    changed = dict(values)
    for domain in domains:
        again = rng.random() < RESAMPLING
        changed[domain.key] = domain.draw(rng) if again else domain.neighbor(changed[domain.key], rng)
    return changed


def _after_round(plan: SweepPlan, population: Population, errors: Mapping[int, str], until: int) -> Population:
    """The population with the figures of the round, and the errors."""
    members = []
    for member in population.members:
        if not member.error:
            own = trial_rows(plan.folder / "trials" / member_name(plan, member.index))
            begun = max(member.rows, default=0)  # epochs before belong to the weights, whoever trained them
            rows = {**member.rows, **{epoch: row for epoch, row in own.items() if begun < epoch <= until}}
            member = replace(member, rows=rows, error=errors.get(member.index, ""))
        members.append(member)
    return replace(population, members=tuple(members))


def _copy_checkpoints(plan: SweepPlan, population: Population) -> None:
    """Gives members the checkpoints of those they took over from, who give and do not take in the same round."""
    newest = max(member.schedule[-1].epoch for member in population.members)
    for member in population.alive:
        change = member.schedule[-1]
        if change.source is None or change.epoch != newest:
            continue
        source, target = (
            plan.folder / "trials" / member_name(plan, index) / "checkpoints" for index in (change.source, member.index)
        )
        incoming = target.with_name(".checkpoints.incoming")
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.copytree(source, incoming)
        shutil.rmtree(target, ignore_errors=True)
        incoming.rename(target)


def _describe_changes(plan: SweepPlan, population: Population, epoch: int) -> list[str]:
    lines = []
    for member in population.alive:
        change = member.schedule[-1]
        if change.source is not None and change.epoch == epoch:
            settings = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                 for key, value in change.values.items())  # fmt: skip
            lines.append(
                f"after epoch {epoch} {member_name(plan, member.index)} goes on from the weights of "
                f"{member_name(plan, change.source)}, with {settings}"
            )
    return lines


def _trial_of(plan: SweepPlan, member: Member) -> Trial:
    trial = trial_from_rows(
        member_name(plan, member.index),
        member.values,
        member.rows,
        metric=plan.options.metrics[0],
        planned=plan.config.train.epochs,
        error=member.error,
    )
    schedule = tuple(
        {
            "epoch": change.epoch,
            "values": dict(change.values),
            "from": "" if change.source is None else member_name(plan, change.source),
        }
        for change in member.schedule
    )
    return replace(trial, schedule=schedule)
