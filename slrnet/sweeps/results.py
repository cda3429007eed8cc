"""What a sweep found: trials, the best of them, trade-offs between two figures, importances, tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from slrnet.config import Config
from slrnet.storage.files import write_json, written_whole
from slrnet.sweeps.ablations import Ablation, get_ablation
from slrnet.tracking.run_log import read_log

__all__ = [
    "AblationRow",
    "Mode",
    "Trial",
    "ablation_rows",
    "ablation_table",
    "best_trial",
    "draw_ablation",
    "draw_curves",
    "draw_front",
    "draw_importances",
    "draw_schedules",
    "draw_trials",
    "epochs_trained",
    "importances",
    "mode_of",
    "pareto_front",
    "replay_text",
    "trial_from_rows",
    "trial_rows",
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
    planned: int = 0
    """Epochs that it was to train."""
    curve: tuple[float | None, ...] = ()
    """The sweep's first metric after each epoch; None where it was not measured."""
    schedule: tuple[Mapping[str, Any], ...] = ()
    """Of population-based training: `epoch` after which settings changed, the new `values`, and `from` whose weights it
    went on, empty at the start."""

    def record(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def trial_rows(folder: Path) -> dict[int, dict[str, float]]:
    """Figures of validation and pseudo masks by epoch, from the log in a trial's folder; empty without one.

    The log, and not what Tune heard: a trial may die between an epoch's end and its report.
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
    """A trial from its figures by epoch, which count for nothing where it has an error.

    Args:
        name: of its MLflow run.
        values: its settings.
        rows: from `trial_rows`.
        metric: the sweep's first.
        planned: epochs that it was to train.
        error: why it failed.
    """
    epochs = max(rows, default=0)
    if error:
        return Trial(name=name, values=values, status="failed", epochs=epochs, metrics={}, error=error, planned=planned)
    sign = 1 if mode_of(metric) == "max" else -1
    scored = [row for _, row in sorted(rows.items()) if math.isfinite(row.get(metric, math.nan))]
    return Trial(
        name=name,
        values=values,
        status="finished" if epochs >= planned else "stopped early",
        epochs=epochs,
        metrics=max(scored, key=lambda row: sign * row[metric], default={}),
        planned=planned,
        curve=tuple(rows.get(epoch, {}).get(metric) for epoch in range(1, epochs + 1)),
    )


def epochs_trained(trials: Sequence[Trial]) -> dict[str, float]:
    """`trained` and `planned` epochs of the trials without an error, and the share `saved` by stopping early."""
    counted = [trial for trial in trials if trial.status != "failed"]
    trained, planned = sum(trial.epochs for trial in counted), sum(trial.planned for trial in counted)
    return {"trained": trained, "planned": planned, "saved": 1 - trained / planned if planned else 0.0}


def replay_text(trials: Sequence[Trial], replay: Mapping[str, int], metric: str) -> str:
    """One line: what early stopping would have saved, and whether it would have kept the best trial.

    Args:
        trials: trained to the end.
        replay: epochs that each would have got, by name.
        metric: the sweep's first.
    """
    trained, planned = sum(replay.values()), sum(trial.epochs for trial in trials if trial.name in replay)
    best = best_trial(trials, metric)
    assert best is not None
    got = replay[best.name]
    fate = "would have been trained to its end" if got >= best.epochs else f"would have been stopped after epoch {got}"
    return (
        f"The same curves under ASHA: {trained} of {planned} epochs trained, {100 * (1 - trained / planned):.1f} % "
        f"saved; the best trial {best.name} {fate}."
    )


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
        Shares that sum to 1; empty without the extra `sweep`, with fewer than four trials that have the figure, or
        where it is the same in all of them.
    """
    scored = [trial for trial in trials if math.isfinite(trial.metrics.get(metric, math.nan))]
    different = len({trial.metrics[metric] for trial in scored}) > 1
    if find_spec("optuna") is None or len(scored) < _FEWEST or not different:
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
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values)) or [""]
    figure, axes = _axes(len(keys))
    scored = [trial for trial in trials if math.isfinite(trial.metrics.get(metric, math.nan))]
    best = best_trial(trials, metric)
    for axis, key in zip(axes, keys, strict=False):
        with_key = [trial for trial in scored if key in trial.values]
        places = _places(axis, [_plain(trial.values[key]) for trial in with_key])
        for status, marker in (("finished", "o"), ("stopped early", "x")):
            chosen = [i for i, trial in enumerate(with_key) if trial.status == status]
            heights = [100 * with_key[i].metrics[metric] for i in chosen]
            axis.scatter([places[i] for i in chosen], heights, marker=marker, label=status)
        if best in with_key:
            at, height = places[with_key.index(best)], 100 * best.metrics[metric]
            axis.scatter([at], [height], s=140, facecolors="none", edgecolors="black", label="best")
        axis.set_xlabel(key)
    _label(axes, metric)
    _save(figure, path)


def draw_curves(trials: Sequence[Trial], metric: str, path: Path) -> None:
    """Draws a figure over the epochs, a line a trial, those that were stopped early in grey."""
    figure, axes = _axes(1)
    best = best_trial(trials, metric)
    for trial in trials:
        points = [(epoch, 100 * value) for epoch, value in enumerate(trial.curve, 1) if value is not None]
        stopped = trial.status == "stopped early"
        style: dict[str, Any] = {"color": "0.6", "linestyle": "--"} if stopped else {"alpha": 0.8}
        if trial is best:
            style = {"color": "black", "linewidth": 2.5, "label": f"best: {trial.name}"}
        if points:
            axes[0].plot(*zip(*points, strict=True), marker=".", **style)
    axes[0].set_xlabel("epoch")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    _label(axes, metric)
    _save(figure, path)


def draw_front(trials: Sequence[Trial], metrics: Sequence[str], path: Path) -> None:
    """Draws the first two figures against each other, with the line of trials that no other one beats in both."""
    x, y = metrics[:2]
    figure, axes = _axes(1)
    scored = [t for t in trials if all(math.isfinite(t.metrics.get(metric, math.nan)) for metric in (x, y))]
    axes[0].scatter([100 * t.metrics[x] for t in scored], [100 * t.metrics[y] for t in scored], label="trials")
    front = pareto_front(trials, (x, y))
    line = [100 * t.metrics[x] for t in front], [100 * t.metrics[y] for t in front]
    axes[0].plot(*line, color="black", marker="o", label="beaten by no other")
    axes[0].set_xlabel(f"{_broken(x, 60)}, %")
    _label(axes, y)
    _save(figure, path)


def draw_schedules(trials: Sequence[Trial], path: Path) -> None:
    """Draws the settings of a population over the epochs; a dot is where a trial took over weights and settings."""
    keys = list(trials[0].schedule[0]["values"])
    figure, axes = _axes(len(keys), same_height=False)
    for axis, key in zip(axes, keys, strict=False):
        for number, trial in enumerate(trials):
            epochs = [change["epoch"] for change in trial.schedule]
            values = [change["values"][key] for change in trial.schedule]
            colour = f"C{number % 10}"
            line = [*epochs, trial.epochs], [*values, values[-1]]
            axis.step(*line, where="post", color=colour, label=trial.name)
            axis.scatter(epochs[1:], values[1:], color=colour)
        if _spread_out([change["values"][key] for trial in trials for change in trial.schedule]):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("epoch")
        axis.set_ylabel(key)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    _save(figure, path)


def draw_importances(found: Mapping[str, float], metric: str, path: Path) -> None:
    """Draws the share of the variance that each setting explains, as bars."""
    figure, axes = _axes(1)
    names = list(found)[::-1]
    bars = axes[0].barh(names, [100 * found[name] for name in names])
    axes[0].bar_label(bars, fmt="%.0f %%", padding=3)
    axes[0].set_xlim(0, 110)
    axes[0].set_xlabel(f"share of the variance of\n{_broken(metric, 60)}, %")
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
    """Draws an ablation: lines with the spread over seeds where the paper has a plot, bars where it has a table.

    Scores stand in one panel, beside the paper's where it gives numbers, and error rates in another.
    """
    groups = [[metric for metric in metrics if mode_of(metric) == mode] for mode in ("max", "min")]
    groups = [group for group in groups if group]
    figure, axes = _axes(len(groups), same_height=False)
    for axis, group in zip(axes, groups, strict=True):
        if all(row.x is not None for row in rows):
            _draw_lines(axis, ablation, rows, group)
        else:
            _draw_bars(axis, rows, group, paper=mode_of(group[0]) == "max")
        axis.set_xlabel(ablation.axis)
        axis.set_ylabel("%")
        axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f"{ablation.title}; {_seeds_text(rows)}", fontsize="medium")
    _save(figure, path)


def _draw_lines(axis: Any, ablation: Ablation, rows: Sequence[AblationRow], metrics: Sequence[str]) -> None:
    places = [row.x for row in rows]
    for metric in metrics:
        heights, errors = [100 * row.means[metric] for row in rows], [100 * row.spreads[metric] for row in rows]
        axis.errorbar(places, heights, yerr=errors, marker="o", capsize=3, label=metric)
    if ablation.logarithmic:
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, [row.label for row in rows])
    axis.minorticks_off()
    if ablation.chosen is not None:
        axis.axvline(ablation.chosen, color="0.6", linestyle=":", label="the paper's choice")


def _draw_bars(axis: Any, rows: Sequence[AblationRow], metrics: Sequence[str], *, paper: bool) -> None:
    width = 0.8 / len(metrics)
    for number, metric in enumerate(metrics):
        places = [place + width * (number + 0.5) - 0.4 for place in range(len(rows))]
        heights, errors = [100 * row.means[metric] for row in rows], [100 * row.spreads[metric] for row in rows]
        bars = axis.bar(places, heights, width=width, yerr=errors, capsize=3, label=metric)
        axis.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontsize="small")
    known = [(place, row.paper) for place, row in enumerate(rows) if row.paper is not None]
    if paper and known:
        axis.scatter(*zip(*known, strict=True), marker="D", color="black", zorder=3, label="paper: mIoU on VOC val")
    axis.set_xticks(range(len(rows)), [row.label for row in rows], rotation=30, ha="right")


def _seeds_text(rows: Sequence[AblationRow]) -> str:
    counts = sorted({row.seeds for row in rows}) or [0]
    shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean and standard deviation of {shown} seeds" if counts[-1] > 1 else "one seed"


def write_results(
    trials: Sequence[Trial],
    metrics: Sequence[str],
    folder: Path,
    *,
    ablation: str,
    best_config: Config | None,
    replay: Mapping[str, int] | None = None,
    default: Mapping[str, Any] | None = None,
) -> str:
    """Writes what a sweep found: `trials.json`, `summary.md`, pictures, `importances.json` and `best_config.json`.

    Args:
        trials: all of them.
        metrics: that were optimised.
        folder: is made if missing; each file appears whole.
        ablation: name of the ablation, or empty for a search.
        best_config: of the best trial of a search.
        replay: epochs that early stopping would have left each trial, where all were trained to the end.
        default: the settings of the recipe, with which the best trial is compared if one has them.

    Returns:
        The summary, Markdown.
    """
    record = {"trials": [trial.record() for trial in trials], "epochs": epochs_trained(trials)}
    write_json(folder / "trials.json", record | ({"epochs_under_asha": dict(replay)} if replay else {}))
    if best_config is not None:
        _write_text(folder / "best_config.json", best_config.to_json())
    if ablation:
        summary = _ablation_results(trials, metrics, folder, ablation)
    else:
        summary = _search_results(trials, metrics, folder, replay or {}, default or {})
    _write_text(folder / "summary.md", summary)
    return summary


def _ablation_results(trials: Sequence[Trial], metrics: Sequence[str], folder: Path, name: str) -> str:
    ablation = get_ablation(name)
    metrics = tuple(dict.fromkeys([*metrics, "val/mfdr", "val/mfnr", "pseudo_mask/miou"]))
    rows = ablation_rows(ablation, trials, metrics)
    for suffix in ("png", "svg"):
        draw_ablation(ablation, rows, metrics, folder / f"{name}.{suffix}")
    return ablation_table(ablation, rows, metrics) + "\n" + trial_table(trials, metrics)


def _search_results(
    trials: Sequence[Trial],
    metrics: Sequence[str],
    folder: Path,
    replay: Mapping[str, int],
    default: Mapping[str, Any],
) -> str:
    parts = [trial_table(trials, metrics), _default_text(trials, default, metrics[0]), _epochs_text(trials)]
    found = importances(trials, metrics[0])
    for suffix in ("png", "svg"):
        draw_trials(trials, metrics[0], folder / f"trials.{suffix}")
        draw_curves(trials, metrics[0], folder / f"curves.{suffix}")
        if len(metrics) > 1:
            draw_front(trials, metrics, folder / f"front.{suffix}")
        if trials[0].schedule:
            draw_schedules(trials, folder / f"schedules.{suffix}")
        if found:
            draw_importances(found, metrics[0], folder / f"importances.{suffix}")
    if replay:
        parts.append(replay_text(trials, replay, metrics[0]) + "\n")
    if found:
        write_json(folder / "importances.json", found)
        shares = "\n".join(f"- {key}: {100 * value:.0f} %" for key, value in found.items())
        parts.append(f"Share of the variance of {metrics[0]} that a setting explains (fANOVA):\n\n{shares}\n")
    if len(metrics) > 1:
        front = trial_table(pareto_front(trials, metrics), metrics)
        parts.append(f"Beaten by no other trial in all of {', '.join(metrics)}:\n\n{front}")
    return "\n".join(part for part in parts if part)


def _default_text(trials: Sequence[Trial], default: Mapping[str, Any], metric: str) -> str:
    """The best trial against the one with the recipe's own settings; empty where none has them."""
    own = best_trial([trial for trial in trials if default and dict(trial.values) == dict(default)], metric)
    best = best_trial(trials, metric)
    if own is None or best is None:
        return ""
    difference = 100 * (best.metrics[metric] - own.metrics[metric])
    return (
        f"The recipe's own settings ({own.name}) have {_percent(own.metrics[metric])} %, the best trial {best.name} "
        f"{_percent(best.metrics[metric])} %: {difference:+.2f} points, chosen on the images that measured it.\n"
    )


def _epochs_text(trials: Sequence[Trial]) -> str:
    count = epochs_trained(trials)
    return (
        f"Epochs trained: {count['trained']:.0f} of {count['planned']:.0f} planned, {100 * count['saved']:.1f} % saved "
        "by stopping early; failed trials are not counted.\n"
    )


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


def _axes(count: int, *, same_height: bool = True) -> tuple[Any, list[Any]]:
    """Panels side by side, three in a row, four in two rows."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(7.0, 4.0 * columns), 4.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=same_height, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _places(axis: Any, values: Sequence[Any]) -> list[float]:
    """Where values stand on an axis: numbers by size, on a logarithmic one where they differ much, others in turn."""
    if all(isinstance(value, (int, float)) for value in values):
        if _spread_out(values):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        few = sorted(set(values))
        if len(few) <= 6 and all(isinstance(value, int) for value in few):
            axis.set_xticks(few, [str(value) for value in few])
            axis.minorticks_off()
        return list(values)
    names = sorted({str(value) for value in values})
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    return [float(names.index(str(value))) for value in values]


def _spread_out(values: Sequence[Any]) -> bool:
    """Whether a logarithmic axis shows numbers better."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    return len(numbers) == len(values) > 0 and min(numbers) > 0 and max(numbers) / min(numbers) >= 8


def _label(axes: Sequence[Any], metric: str) -> None:
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(f"{_broken(metric, 40)}, %")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), fontsize="small")


def _broken(name: str, longest: int) -> str:
    """A long name in lines that end at its underscores."""
    lines = [""]
    for part in name.replace("_", "_ ").split(" "):
        if lines[-1] and len(lines[-1] + part) > longest:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as incoming:
        figure.savefig(incoming, dpi=150)
