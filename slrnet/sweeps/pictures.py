"""Pictures of a sweep, as .png and .svg: Optuna's for searches, our own for schedules and the paper's ablations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slrnet.storage.files import written_whole
from slrnet.sweeps.ablations import Ablation
from slrnet.sweeps.trials import AblationRow, Trial, is_wide, mode_of, scored, study_of

__all__ = ["draw_ablation", "draw_schedules", "draw_search"]


def draw_search(trials: Sequence[Trial], metrics: Sequence[str], folder: Path, *, with_importances: bool) -> None:
    """Draws a search with Optuna; trials without the metrics are left out.

    `trials` shows the first metric by setting, `curves` by epoch, `front` the first two metrics against each other, and
    `importances` the share of the first metric's variance that a setting explains; it needs several different trials.
    """
    import matplotlib as mpl
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import matplotlib as optuna_plots

    mpl.use("agg")  # these plots go through pyplot, which otherwise looks for a display
    measured = scored(trials, metrics[:1])
    names = [f"{metric}, %" for metric in metrics[:2]]
    # Optuna warns that its plots are experimental, and of settings with a single value.
    with mpl.rc_context(), warnings.catch_warnings(action="ignore"):
        study = study_of(measured, metrics[:1])
        _save(optuna_plots.plot_slice(study, target_name=names[0]), folder / "trials")
        curves = optuna_plots.plot_intermediate_values(study)
        curves.set(xlabel="epoch", ylabel=names[0])
        curves.xaxis.get_major_locator().set_params(integer=True)
        if len(curves.lines) == len(measured) > 1:
            curves.legend(curves.lines, [trial.name for trial in measured], bbox_to_anchor=(1.05, 1), loc="upper left")
        _save(curves, folder / "curves")
        if with_importances:
            evaluator = FanovaImportanceEvaluator(seed=0)
            importances = optuna_plots.plot_param_importances(study, evaluator=evaluator, target_name=names[0])
            _save(importances, folder / "importances")
        if len(metrics) > 1:
            both = study_of(scored(trials, metrics[:2]), metrics[:2])
            _save(optuna_plots.plot_pareto_front(both, target_names=names), folder / "front")


def draw_schedules(trials: Sequence[Trial], path: Path) -> None:
    """Draws the settings of a population by epoch; a dot shows where a trial took over weights and settings."""
    keys = list(trials[0].schedule[0]["values"])
    axes = _panels(len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for number, trial in enumerate(trials):
            epochs = [change["epoch"] for change in trial.schedule]
            values = [change["values"][key] for change in trial.schedule]
            axis.step([*epochs, trial.epochs], [*values, values[-1]], where="post", label=trial.name)
            axis.scatter(epochs[1:], values[1:], color=f"C{number % 10}")
        if is_wide([change["values"][key] for trial in trials for change in trial.schedule]):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="epoch", ylabel=key)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    _save(axes, path)


def draw_ablation(ablation: Ablation, rows: Sequence[AblationRow], metrics: Sequence[str], path: Path) -> None:
    """Draws an ablation's means and their spread over seeds: lines for a plot of the paper, points for a table.

    Scores go into one panel, beside the paper's where it gives numbers, and error rates into another.
    """
    groups = [[metric for metric in metrics if mode_of(metric) == mode] for mode in ("max", "min")]
    groups = [group for group in groups if group]
    axes = _panels(len(groups))
    plotted = all(row.variant.x is not None for row in rows)
    places = [row.variant.x if plotted else place for place, row in enumerate(rows)]
    for axis, group in zip(axes, groups, strict=True):
        for metric in group:
            heights, errors = [100 * row.means[metric] for row in rows], [100 * row.spreads[metric] for row in rows]
            axis.errorbar(places, heights, errors, fmt="o-" if plotted else "o", capsize=3, label=metric)
        paper = [(place, row.variant.paper) for place, row in enumerate(rows) if row.variant.paper is not None]
        if paper and mode_of(group[0]) == "max":
            axis.scatter(*zip(*paper, strict=True), marker="D", color="black", label="paper: mIoU on VOC val")
        if ablation.logarithmic:
            axis.set_xscale("log", base=2)
        slanted = {} if plotted else {"rotation": 30, "ha": "right"}
        axis.set_xticks(places, [row.variant.label for row in rows], **slanted)
        axis.minorticks_off()
        if ablation.chosen is not None:
            axis.axvline(ablation.chosen, color="0.6", linestyle=":", label="the paper's choice")
        axis.set(xlabel=ablation.axis, ylabel="%")
        axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes[0].figure.suptitle(f"{ablation.title}; {_seeds_text(rows)}", fontsize="medium")
    _save(axes, path)


def _seeds_text(rows: Sequence[AblationRow]) -> str:
    counts = sorted({row.seeds for row in rows}) or [0]
    shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean and standard deviation of {shown} seeds" if counts[-1] > 1 else "one seed"


def _panels(count: int) -> list[Any]:
    """Panels side by side, at most three in a row."""
    from matplotlib.figure import Figure

    columns, rows = min(3, count), -(-count // 3)
    figure = Figure(figsize=(max(7.0, 4.5 * columns), 4.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return axes[:count]


def _save(axes: Any, path: Path) -> None:
    """Saves the figure of one or several axes as `path`.png and `path`.svg, each whole or not at all."""
    import numpy as np
    from matplotlib import pyplot

    figure = np.ravel(axes)[0].figure
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        with written_whole(path.with_name(f"{path.name}.{suffix}")) as incoming:
            figure.savefig(incoming, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
