"""The trials of a sweep: reading them, the best of them, trade-offs between metrics, importances."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from slrnet.sweeps.ablations import Ablation, Variant
from slrnet.tracking.run_log import read_log

__all__ = [
    "AblationRow",
    "Mode",
    "Trial",
    "ablation_rows",
    "best_trial",
    "epochs_trained",
    "importances",
    "is_wide",
    "mode_of",
    "pareto_front",
    "score_of",
    "scored",
    "settings_of",
    "study_of",
    "trial_from_rows",
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
    status: Literal["finished", "stopped early", "failed"]
    """`stopped early` by the scheduler; `failed` with an error, and then without a score."""
    epochs: int
    """Epochs that it trained."""
    metrics: Mapping[str, float]
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


def trial_from_rows(
    name: str,
    values: Mapping[str, Any],
    rows: Mapping[int, Mapping[str, float]],
    *,
    metric: str,
    planned: int,
    error: str = "",
) -> Trial:
    """Builds a trial from its metrics by epoch, as from `trial_rows`; a trial with an error gets no score.

    `metric` is the sweep's first one; the other arguments are fields of `Trial`.
    """
    epochs = max(rows, default=0)
    trial = Trial(name=name, values=values, status="failed", epochs=epochs, metrics={}, error=error, planned=planned)
    if error:
        return trial
    best = max((row for _, row in sorted(rows.items())), key=lambda row: score_of(row, metric), default={})
    return replace(
        trial,
        status="finished" if epochs >= planned else "stopped early",
        metrics={} if score_of(best, metric) == -math.inf else best,
        curve=tuple(rows.get(epoch, {}).get(metric) for epoch in range(1, epochs + 1)),
    )


def mode_of(metric: str) -> Mode:
    """Whether a higher value is better; error rates and losses are better when lower."""
    return "min" if any(word in metric for word in ("fdr", "fnr", "loss")) else "max"


def score_of(metrics: Mapping[str, float], metric: str) -> float:
    """A metric with the sign that makes higher better; -inf where it is missing or not finite."""
    value = metrics.get(metric, math.nan)
    return (value if mode_of(metric) == "max" else -value) if math.isfinite(value) else -math.inf


def scored(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """The trials that have finite values of all these metrics."""
    return [trial for trial in trials if all(score_of(trial.metrics, metric) > -math.inf for metric in metrics)]


def best_trial(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The trial with the best value of a metric; None where no trial has it."""
    return max(scored(trials, [metric]), key=lambda trial: score_of(trial.metrics, metric), default=None)


def study_of(trials: Sequence[Trial], metrics: Sequence[str]) -> Any:
    """An Optuna study of one or more trials that have all the metrics, its objectives, in the trials' order.

    Objectives and intermediate values are in percent. Numbers have a logarithmic axis where they are `is_wide`; other
    settings are categories.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = ["maximize" if mode_of(metric) == "max" else "minimize" for metric in metrics]
    study = optuna.create_study(directions=directions)
    tried = {key: [trial.values[key] for trial in trials if key in trial.values] for key in settings_of(trials)}
    distributions = {key: _distribution(values) for key, values in tried.items()}
    for trial in trials:
        curve = {epoch: 100 * value for epoch, value in enumerate(trial.curve, 1) if value is not None}
        study.add_trial(
            optuna.create_trial(
                params={key: _plain(value) for key, value in trial.values.items()},
                distributions={key: distributions[key] for key in trial.values},
                values=[100 * trial.metrics[metric] for metric in metrics],
                intermediate_values=curve,
            )
        )
    return study


def pareto_front(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """The trials that no other one beats in one metric without losing in another, sorted by the first metric."""
    measured = scored(trials, metrics)
    front = [measured[best.number] for best in study_of(measured, metrics).best_trials]
    return sorted(front, key=lambda trial: trial.metrics[metrics[0]])


def importances(trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """The share of a metric's variance that each setting explains (fANOVA), largest first.

    Returns:
        Shares that sum to 1; empty with fewer than four trials that have the metric, or if it is the same in all.
    """
    measured = scored(trials, [metric])
    if len(measured) < _FEWEST or len({trial.metrics[metric] for trial in measured}) == 1:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    evaluator = FanovaImportanceEvaluator(seed=0)
    return dict(get_param_importances(study_of(measured, [metric]), evaluator=evaluator))


def epochs_trained(trials: Sequence[Trial]) -> dict[str, float]:
    """`trained` and `planned` epochs of the trials without an error, and the share `saved` by stopping early."""
    counted = [trial for trial in trials if trial.status != "failed"]
    trained, planned = sum(trial.epochs for trial in counted), sum(trial.planned for trial in counted)
    return {"trained": trained, "planned": planned, "saved": 1 - trained / planned if planned else 0.0}


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


def ablation_rows(ablation: Ablation, trials: Sequence[Trial], metrics: Sequence[str]) -> list[AblationRow]:
    """Groups an ablation's trials (settings `variant` and `train.seed`) by variant, in the paper's order.

    Variants without a trial are left out.
    """
    rows = []
    for index, variant in enumerate(ablation.variants):
        own = [trial for trial in trials if trial.values["variant"] == index]
        scores = {m: [trial.metrics[m] for trial in scored(own, [m])] for m in metrics}
        means = {metric: statistics.mean(values) if values else math.nan for metric, values in scores.items()}
        spreads = {metric: statistics.stdev(values) if len(values) > 1 else 0.0 for metric, values in scores.items()}
        if own:
            rows.append(AblationRow(variant, means, spreads, len(scores[metrics[0]])))
    return rows


def settings_of(trials: Sequence[Trial]) -> list[str]:
    """Keys of the settings of all trials, in the order in which they appear."""
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


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
