"""What a sweep found: trials, the best of them, trade-offs between two figures, importances, tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from slrnet.ablations import Ablation, get_ablation
from slrnet.config import Config
from slrnet.data.files import write_json, written_whole

__all__ = [
    "AblationRow",
    "Mode",
    "Trial",
    "ablation_rows",
    "ablation_table",
    "best_trial",
    "draw_ablation",
    "draw_trials",
    "importances",
    "mode_of",
    "pareto_front",
    "trial_table",
    "write_results",
]

Mode = Literal["max", "min"]
"""Whether more of a figure is better."""
_FEWEST = 4
"""Finished trials from which importances are worked out."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sweep."""

    name: str
    """Of its MLflow run."""
    values: Mapping[str, Any]
    """The settings that it tried, by key."""
    status: Literal["finished", "stopped early", "failed"]
    """`stopped early` by the scheduler; `failed` with an error, and then without a score."""
    epochs: int
    """Epochs that it trained."""
    metrics: Mapping[str, float]
    """Figures of its best epoch by the sweep's first metric; empty where it failed."""
    error: str = ""
    """Why it failed."""

    def record(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def mode_of(metric: str) -> Mode:
    """Whether more of a figure is better: error rates and losses want to be small."""
    return "min" if any(word in metric for word in ("fdr", "fnr", "loss")) else "max"


def best_trial(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The trial with the best value of a figure; None where no trial has it."""
    scored = [trial for trial in trials if math.isfinite(trial.metrics.get(metric, math.nan))]
    sign = 1 if mode_of(metric) == "max" else -1
    return max(scored, key=lambda trial: sign * trial.metrics[metric], default=None)


def pareto_front(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """The trials that no other one beats or equals in all figures and beats in one; by the first figure."""
    signs = [1 if mode_of(metric) == "max" else -1 for metric in metrics]
    points = {
        trial.name: [sign * trial.metrics[metric] for sign, metric in zip(signs, metrics, strict=True)]
        for trial in trials
        if all(math.isfinite(trial.metrics.get(metric, math.nan)) for metric in metrics)
    }

    def beaten(point: Sequence[float]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, point, strict=True)) and list(other) != list(point)
            for other in points.values()
        )

    front = [trial for trial in trials if trial.name in points and not beaten(points[trial.name])]
    return sorted(front, key=lambda trial: trial.metrics[metrics[0]])


def importances(trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """Share of a figure's variance that each setting explains (fANOVA), largest first.

    Returns:
        Shares that sum to 1; empty without the extra `sweep`, or with fewer than four trials that have the figure.
    """
    scored = [trial for trial in trials if math.isfinite(trial.metrics.get(metric, math.nan))]
    if find_spec("optuna") is None or len(scored) < _FEWEST:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize" if mode_of(metric) == "max" else "minimize")
    domains = {key: _distribution([trial.values[key] for trial in scored]) for key in scored[0].values}
    for trial in scored:
        values = {key: _plain(value) for key, value in trial.values.items()}
        study.add_trial(optuna.create_trial(params=values, distributions=domains, value=trial.metrics[metric]))
    found = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    return {key: float(value) for key, value in found.items()}


def trial_table(trials: Sequence[Trial], metrics: Sequence[str]) -> str:
    """Trials as a Markdown table, best first by the first metric; shares in percent."""
    sign = -1 if mode_of(metrics[0]) == "max" else 1
    scores = {trial.name: sign * trial.metrics.get(metrics[0], math.nan) for trial in trials}
    ranked = sorted(trials, key=lambda trial: scores[trial.name] if math.isfinite(scores[trial.name]) else math.inf)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    head = ["trial", *keys, *(f"{metric}, %" for metric in metrics), "epochs", "status"]
    rows = [
        [
            trial.name,
            *(_shown(trial.values.get(key)) for key in keys),
            *(_percent(trial.metrics.get(metric)) for metric in metrics),
            str(trial.epochs),
            trial.status + (f": {trial.error}" if trial.error else ""),
        ]
        for trial in ranked
    ]
    return _markdown(head, rows)


def draw_trials(trials: Sequence[Trial], metric: str, path: Path) -> None:
    """Draws a figure against each setting, a point a trial; written whole, in the format of the path's suffix."""
    keys = list(trials[0].values) if trials else []
    scored = [trial for trial in trials if math.isfinite(trial.metrics.get(metric, math.nan))]
    figure, axes = _axes(max(1, len(keys)))
    for axis, key in zip(axes, keys, strict=False):
        values = [_plain(trial.values[key]) for trial in scored]
        for status, marker in (("finished", "o"), ("stopped early", "x")):
            chosen = [i for i, trial in enumerate(scored) if trial.status == status]
            heights = [100 * scored[i].metrics[metric] for i in chosen]
            axis.scatter([values[i] for i in chosen], heights, marker=marker, label=status)
        axis.set_xlabel(key)
        if key == "weights.consistency" and all(isinstance(value, float) and value > 0 for value in values):
            axis.set_xscale("log")
    axes[0].set_ylabel(f"{metric}, %")
    axes[0].legend(fontsize="small")
    _save(figure, path)


@dataclass(frozen=True)
class AblationRow:
    """A variant over its seeds: mean and sample standard deviation of each figure, as shares."""

    label: str
    """Of the variant."""
    paper: float | None
    """The paper's mIoU, percent."""
    x: float | None
    """Position on a plot's axis."""
    means: Mapping[str, float]
    """By metric; NaN where no seed has it."""
    spreads: Mapping[str, float]
    """By metric; 0 with one seed."""
    seeds: int
    """Trials that have the first metric."""


def ablation_rows(ablation: Ablation, trials: Sequence[Trial], metrics: Sequence[str]) -> list[AblationRow]:
    """Puts an ablation's trials (settings `variant` and `train.seed`) together, in the paper's order.

    Variants without a trial are left out.
    """
    rows = []
    for index, variant in enumerate(ablation.variants):
        own = [trial for trial in trials if trial.values["variant"] == index]
        if not own:
            continue
        found = {m: [t.metrics[m] for t in own if math.isfinite(t.metrics.get(m, math.nan))] for m in metrics}
        means = {metric: statistics.mean(values) if values else math.nan for metric, values in found.items()}
        spreads = {metric: statistics.stdev(values) if len(values) > 1 else 0.0 for metric, values in found.items()}
        rows.append(AblationRow(variant.label, variant.paper, variant.x, means, spreads, len(found[metrics[0]])))
    return rows


def ablation_table(ablation: Ablation, rows: Sequence[AblationRow], metrics: Sequence[str]) -> str:
    """An ablation as Markdown: our means with the spread over seeds beside the paper's figures, in percent."""
    head = [ablation.axis, "paper: mIoU, VOC val, %", *(f"{metric}, %" for metric in metrics), "seeds"]
    cells = [
        [
            row.label,
            "" if row.paper is None else f"{row.paper:.2f}",
            *(_percent(row.means[metric], row.spreads[metric] if row.seeds > 1 else None) for metric in metrics),
            str(row.seeds),
        ]
        for row in rows
    ]
    return f"## {ablation.title}\n\n{_markdown(head, cells)}"


def draw_ablation(ablation: Ablation, rows: Sequence[AblationRow], metrics: Sequence[str], path: Path) -> None:
    """Draws an ablation: lines with the spread over seeds where the paper has a plot, bars where it has a table."""
    figure, axes = _axes(1)
    axis = axes[0]
    for number, metric in enumerate(metrics):
        heights = [100 * row.means[metric] for row in rows]
        errors = [100 * row.spreads[metric] for row in rows]
        if all(row.x is not None for row in rows):
            axis.errorbar([row.x for row in rows], heights, yerr=errors, marker="o", capsize=3, label=metric)
        else:
            places = [place + 0.8 * (number + 0.5) / len(metrics) - 0.4 for place in range(len(rows))]
            axis.bar(places, heights, width=0.8 / len(metrics), yerr=errors, capsize=3, label=metric)
            axis.set_xticks(range(len(rows)), [row.label for row in rows], rotation=30, ha="right")
    if ablation.logarithmic:
        axis.set_xscale("log", base=2)
        axis.set_xticks([row.x for row in rows], [row.label for row in rows])
    axis.set_xlabel(ablation.axis)
    axis.set_ylabel("%")
    axis.set_title(ablation.title, fontsize="medium")
    axis.legend(fontsize="small")
    _save(figure, path)


def write_results(
    trials: Sequence[Trial], metrics: Sequence[str], folder: Path, *, ablation: str, best_config: Config | None
) -> str:
    """Writes what a sweep found: `trials.json`, `summary.md`, pictures, `importances.json` and `best_config.json`.

    Args:
        trials: all of them.
        metrics: that were optimised.
        folder: is made if missing; each file appears whole.
        ablation: name of the ablation, or empty for a search.
        best_config: of the best trial of a search.

    Returns:
        The summary, Markdown.
    """
    write_json(folder / "trials.json", {"trials": [trial.record() for trial in trials]})
    if best_config is not None:
        _write_text(folder / "best_config.json", best_config.to_json())
    summary = (_ablation_results if ablation else _search_results)(trials, metrics, folder, ablation)
    _write_text(folder / "summary.md", summary)
    return summary


def _ablation_results(trials: Sequence[Trial], metrics: Sequence[str], folder: Path, name: str) -> str:
    ablation = get_ablation(name)
    metrics = tuple(dict.fromkeys([*metrics, "val/mfdr", "val/mfnr", "pseudo_mask/miou"]))
    rows = ablation_rows(ablation, trials, metrics)
    for suffix in ("png", "svg"):
        draw_ablation(ablation, rows, metrics, folder / f"{name}.{suffix}")
    return ablation_table(ablation, rows, metrics) + "\n" + trial_table(trials, metrics)


def _search_results(trials: Sequence[Trial], metrics: Sequence[str], folder: Path, _: str) -> str:
    for suffix in ("png", "svg"):
        draw_trials(trials, metrics[0], folder / f"trials.{suffix}")
    parts = [trial_table(trials, metrics)]
    found = importances(trials, metrics[0])
    if found:
        write_json(folder / "importances.json", found)
        shares = "\n".join(f"- {key}: {100 * value:.0f} %" for key, value in found.items())
        parts.append(f"Share of the variance of {metrics[0]} that a setting explains (fANOVA):\n\n{shares}\n")
    if len(metrics) > 1:
        front = trial_table(pareto_front(trials, metrics), metrics)
        parts.append(f"Beaten by no other trial in all of {', '.join(metrics)}:\n\n{front}")
    return "\n".join(parts)


def _write_text(path: Path, text: str) -> None:
    with written_whole(path) as incoming:
        incoming.write_text(text, encoding="utf-8")


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        low, high = float(min(values)), float(max(values))
        return FloatDistribution(low, high if high > low else low + 1.0)
    return CategoricalDistribution(sorted({_plain(value) for value in values}, key=str))


def _plain(value: Any) -> Any:
    """Numbers stay numbers; lists and the like become text, which plots and importances take as categories."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return str(value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float | None, spread: float | None = None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _axes(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    figure = Figure(figsize=(max(6.0, 3.2 * count), 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as incoming:
        figure.savefig(incoming, dpi=150)
