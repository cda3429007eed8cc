"""The trials of a sweep: reading them, the best of them, trade-offs between metrics, importances."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from slrnet.sweeps.ablations import Ablation, Variant
from slrnet.tracking.run_log import read_log

__all__ = [
    "AblationRow",
    "Margin",
    "Mode",
    "Trial",
    "Trials",
    "is_wide",
    "mode_of",
    "paired_margin",
    "score_of",
    "trial_rows",
]

Mode = Literal["max", "min"]
"""Whether a higher or a lower value of a metric is better."""
_FEWEST = 4
"""Trials below which importances say nothing."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sweep."""

    name: str
    """Name of its MLflow run."""
    values: Mapping[str, Any]
    """The settings that it tried, by key."""
    status: Literal["finished", "stopped early", "failed"] = "failed"
    """`stopped early` by the scheduler; `failed` with an error, and then without a score."""
    epochs: int = 0
    """Epochs that it trained."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of its best epoch by the sweep's first metric, as shares; empty where it failed."""
    error: str = ""
    """Why it failed."""
    planned: int = 0
    """Epochs that it was to train."""
    curve: tuple[float | None, ...] = ()
    """The sweep's first metric after each epoch; None where it was not measured."""
    schedule: tuple[Mapping[str, Any], ...] = ()
    """For population-based training, each change of settings: `epoch` after which it came, the new `values`, and
    `from`, the trial whose weights it took over, empty at the start."""

    def measured(self, rows: Mapping[int, Mapping[str, float]], metric: str) -> Trial:
        """The trial with what its metrics by epoch say, as from `trial_rows`; one with an error gets no score.

        `metric` is the sweep's first one.
        """
        epochs = max(rows, default=0)
        if self.error:
            return replace(self, epochs=epochs)
        best = max((row for _, row in sorted(rows.items())), key=lambda row: score_of(row, metric), default={})
        return replace(
            self,
            status="finished" if epochs >= self.planned else "stopped early",
            epochs=epochs,
            metrics={} if score_of(best, metric) == -math.inf else best,
            curve=tuple(rows.get(epoch, {}).get(metric) for epoch in range(1, epochs + 1)),
        )


def trial_rows(folder: Path) -> dict[int, dict[str, float]]:
    """Reads the validation and pseudo-mask metrics of a trial's epochs from the log in its folder; empty without one.

    They come from the log, not from Tune's reports: a trial may die between an epoch's end and its report.
    """
    path = folder / "logs" / "rank-0.jsonl"
    if not path.is_file():
        return {}
    return {
        record["epoch"]: {key: value for key, value in record.items() if key.startswith(("val/", "pseudo_mask/"))}
        for record in read_log(path)
        if record["event"] == "epoch"
    }


def mode_of(metric: str) -> Mode:
    """Whether a higher value is better; error rates and losses are better when lower."""
    return "min" if any(word in metric for word in ("fdr", "fnr", "loss")) else "max"


def score_of(metrics: Mapping[str, float], metric: str) -> float:
    """A metric with the sign that makes higher better; -inf where it is missing or not finite."""
    value = metrics.get(metric, math.nan)
    return (value if mode_of(metric) == "max" else -value) if math.isfinite(value) else -math.inf


@dataclass(frozen=True)
class AblationRow:
    """A variant over its seeds: mean and sample standard deviation of each metric, as shares."""

    variant: Variant
    means: Mapping[str, float]
    """By metric; NaN where no seed has it."""
    spreads: Mapping[str, float]
    """By metric; 0 with one seed."""
    seeds: int
    """Trials that have the first metric."""
    by_seed: Mapping[int, float] = field(default_factory=dict)
    """The first metric by seed."""


@dataclass(frozen=True)
class Margin:
    """By how much one variant is above another on the seeds that both have: mean of the differences, seed by seed."""

    mean: float
    """As a share; NaN without a common seed."""
    half_width: float
    """Half of the 90 % interval of the mean by Student's t; NaN with fewer than two seeds."""
    seeds: int
    """Number of common seeds."""


def paired_margin(first: Mapping[int, float], second: Mapping[int, float]) -> Margin:
    """The margin of values `first` over `second`, each by seed."""
    from scipy.stats import t

    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    count = len(differences)
    if count < 2:
        return Margin(differences[0] if differences else math.nan, math.nan, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    return Margin(statistics.mean(differences), float(t.ppf(0.95, count - 1)) * error, count)


@dataclass(frozen=True)
class Trials:
    """Trials of a sweep and its metrics, of which the first one decides."""

    all: Sequence[Trial]
    metrics: Sequence[str]

    @property
    def settings(self) -> list[str]:
        """Keys of the settings of all trials, in the order in which they appear."""
        return list(dict.fromkeys(key for trial in self.all for key in trial.values))

    @property
    def best(self) -> Trial | None:
        """The trial with the best value of the first metric; None where no trial has it."""
        return max(self.by(1).all, key=lambda trial: score_of(trial.metrics, self.metrics[0]), default=None)

    def by(self, count: int) -> Trials:
        """The trials that have finite values of the first `count` metrics, and these metrics."""
        metrics = self.metrics[:count]
        return Trials([t for t in self.all if all(score_of(t.metrics, m) > -math.inf for m in metrics)], metrics)

    def study(self) -> Any:
        """An Optuna study of the trials, which all have all metrics, its objectives; in the trials' order.

        Objectives and intermediate values are in percent. Numbers have a logarithmic axis where they are `is_wide`;
        other settings are categories.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        directions = ["maximize" if mode_of(metric) == "max" else "minimize" for metric in self.metrics]
        study = optuna.create_study(directions=directions)
        tried = {key: [trial.values[key] for trial in self.all if key in trial.values] for key in self.settings}
        distributions = {key: _distribution(values) for key, values in tried.items()}
        for trial in self.all:
            curve = {epoch: 100 * value for epoch, value in enumerate(trial.curve, 1) if value is not None}
            study.add_trial(
                optuna.create_trial(
                    params={key: _plain(value) for key, value in trial.values.items()},
                    distributions={key: distributions[key] for key in trial.values},
                    values=[100 * trial.metrics[metric] for metric in self.metrics],
                    intermediate_values=curve,
                )
            )
        return study

    def front(self) -> Trials:
        """The trials that no other one beats in one metric without losing in another, sorted by the first metric."""
        measured = self.by(len(self.metrics))
        front = [measured.all[best.number] for best in measured.study().best_trials]
        return Trials(sorted(front, key=lambda trial: trial.metrics[self.metrics[0]]), self.metrics)

    def importances(self) -> dict[str, float]:
        """The share of the first metric's variance that each setting explains (fANOVA), largest first; they sum to 1.

        Empty with fewer than four trials that have the metric, or if it is the same in all.
        """
        measured = self.by(1)
        if len(measured.all) < _FEWEST or len({trial.metrics[self.metrics[0]] for trial in measured.all}) == 1:
            return {}
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        return dict(get_param_importances(measured.study(), evaluator=FanovaImportanceEvaluator(seed=0)))

    def epochs(self) -> dict[str, float]:
        """`trained` and `planned` epochs of the trials without an error, and the share `saved` by stopping early."""
        counted = [trial for trial in self.all if trial.status != "failed"]
        trained, planned = sum(trial.epochs for trial in counted), sum(trial.planned for trial in counted)
        return {"trained": trained, "planned": planned, "saved": 1 - trained / planned if planned else 0.0}

    def rows(self, ablation: Ablation) -> list[AblationRow]:
        """The trials of an ablation (settings `variant` and `train.seed`) by variant, in the paper's order.

        Variants without a trial are left out.
        """
        rows = []
        for index in sorted({trial.values["variant"] for trial in self.all}):
            own = [trial.metrics for trial in self.all if trial.values["variant"] == index]
            scores = {m: [metrics[m] for metrics in own if score_of(metrics, m) > -math.inf] for m in self.metrics}
            means = {metric: statistics.mean(values) if values else math.nan for metric, values in scores.items()}
            spreads = {metric: statistics.stdev(values) if values[1:] else 0.0 for metric, values in scores.items()}
            first = self.metrics[0]
            of = [trial for trial in self.by(1).all if trial.values["variant"] == index]
            by_seed = {trial.values["train.seed"]: trial.metrics[first] for trial in of}
            rows.append(AblationRow(ablation.variants[index], means, spreads, len(scores[first]), by_seed))
        return rows


def is_wide(values: Sequence[Any]) -> bool:
    """Whether values are positive numbers that differ by a factor of 8 or more, for a logarithmic axis."""
    return all(map(_is_number, values)) and 0 < 8 * min(values) <= max(values)


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not all(map(_is_number, values)):
        return CategoricalDistribution(sorted({_plain(value) for value in values}, key=str))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high if high > low else low + 1.0, log=is_wide(values))


def _plain(value: Any) -> Any:
    return value if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
