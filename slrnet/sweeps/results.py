"""The results of a sweep: tables, a summary, files, and pictures.

Pictures are .png and .svg: Optuna's for searches, our own for schedules and the paper's ablations.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from slrnet.checkpoints.checkpoint import prune_checkpoints
from slrnet.evaluation.masks import protocol_name
from slrnet.storage.files import write_json, write_text, written_whole
from slrnet.storage.shown import in_markdown
from slrnet.sweeps.ablations import ABLATIONS, Ablation
from slrnet.sweeps.plan import SweepPlan
from slrnet.sweeps.trials import AblationRow, Trial, Trials, is_wide, mode_of, paired_margin, score_of

__all__ = ["ablation_table", "margin_table", "prune_trials", "replay_text", "trial_table", "write_results"]

_ALL_PAIRS = 4
"""Most variants for which each pair is compared; of more, each is compared with the first."""


def trial_table(trials: Trials) -> str:
    """Trials as a Markdown table, best first by the first metric; metrics in percent."""
    keys, metrics = trials.settings, trials.metrics
    rows = [
        [
            trial.name,
            *(f"{value:.4g}" if isinstance(value, float) else value for value in map(trial.values.get, keys)),
            *(_percent(trial.metrics.get(metric)) for metric in metrics),
            trial.epochs,
            trial.status + (f": {in_markdown(trial.error)}" if trial.error else ""),
        ]
        for trial in sorted(trials.all, key=lambda trial: -score_of(trial.metrics, metrics[0]))
    ]
    return _markdown(["trial", *keys, *(f"{metric}, %" for metric in metrics), "epochs", "status"], rows)


def prune_trials(plan: SweepPlan, trials: Trials) -> str:
    """Removes checkpoints of a sweep's finished trials, here and in its object store; says in a line what stays.

    The trials that no other one beats keep their best checkpoint; those of an ablation all do. Failed trials keep all
    of theirs, from which a resumed sweep continues.
    """
    best = trials.by(1).all if plan.ablation else trials.front().all if len(trials.metrics) > 1 else [trials.best]
    named, before = {trial.name for trial in best if trial is not None}, _checkpoint_bytes(plan, trials)
    for trial in trials.all:
        if trial.status == "failed":
            continue
        kept, best_stays = plan.trial(trial.name), trial.name in named
        if (store := kept.store) is not None:
            store.keep(best=best_stays)
        else:
            prune_checkpoints(kept.folder / "checkpoints", last=0, best=best_stays)
    after = _checkpoint_bytes(plan, trials)
    return (
        f"checkpoints: the best one each of {len(named)} of {len(trials.all)} trials, {after / 1e9:.1f} GB; others of "
        f"{(before - after) / 1e9:.1f} GB are removed (--keep-checkpoints keeps them)"
    )


def _checkpoint_bytes(plan: SweepPlan, trials: Trials) -> int:
    places = [plan.trial(trial.name) for trial in trials.all]
    if plan.options.remote:
        return sum(kept.store.checkpoint_bytes() for kept in places if kept.store is not None)
    files = (path for kept in places for path in kept.folder.glob("checkpoints/checkpoint-*/*"))
    return sum(path.stat().st_size for path in files)


def replay_text(trials: Trials, replay: Mapping[str, int]) -> str:
    """Says in one line what early stopping would have saved, and whether it would have kept the best trial.

    `replay` has the epochs that early stopping would have given each of the complete trials, by name.
    """
    trained, planned = sum(replay.values()), sum(trial.epochs for trial in trials.all if trial.name in replay)
    best = trials.best
    assert best is not None
    epochs = replay[best.name]
    fate = "trained to its end" if epochs >= best.epochs else f"stopped after epoch {epochs}"
    return (
        f"The same curves under ASHA: {trained} of {planned} epochs trained, {100 * (1 - trained / planned):.1f} % "
        f"saved; the best trial {best.name} would have been {fate}.\n"
    )


def ablation_table(ablation: Ablation, rows: Sequence[AblationRow]) -> str:
    """An ablation as Markdown: our means and their spread over seeds beside the paper's figures, in percent."""
    cells = [
        [
            row.variant.label,
            "" if row.variant.paper is None else f"{row.variant.paper:.2f}",
            *(_percent(mean, row.spreads[metric] if row.seeds > 1 else None) for metric, mean in row.means.items()),
            row.seeds,
        ]
        for row in rows
    ]
    head = [ablation.axis, "paper: mIoU, VOC val, %", *(f"{metric}, %" for metric in rows[0].means), "seeds"]
    return f"## {ablation.title}\n\n{_markdown(head, cells)}"


def margin_table(rows: Sequence[AblationRow], metric: str) -> str:
    """Differences between variants in the first metric, seed by seed, as Markdown; empty if no two share two seeds.

    Each has the 90 % interval of its mean by Student's t, in points of percent.
    """
    count = len(rows)
    pairs = [(j, i) for i in range(count) for j in range(i + 1, count) if i == 0 or count <= _ALL_PAIRS]
    cells = []
    for better, worse in pairs:
        margin = paired_margin(rows[better].by_seed, rows[worse].by_seed)
        if margin.seeds > 1:
            low, high = margin.mean - margin.half_width, margin.mean + margin.half_width
            interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
            names = [rows[place].variant.label for place in (better, worse)]
            cells.append([*names, f"{100 * margin.mean:+.2f}", interval, margin.seeds])
    head = ["variant", "minus", f"{metric}, points", "90 % interval", "seeds"]
    return f"Differences seed by seed:\n\n{_markdown(head, cells)}" if cells else ""


def write_results(plan: SweepPlan, trials: Trials, *, replay: Mapping[str, int]) -> str:
    """Writes a sweep's results into its folder `results`, each file whole or not at all.

    They are `trials.json`, `summary.md` and pictures, and for a search `importances.json` and `best_config.json`. At
    least one of the trials has the first metric. `replay` has the epochs that early stopping would have given each
    trial, where all were trained to the end, or is empty. Returns the summary, Markdown.
    """
    folder = plan.folder / "results"
    record = {"trials": [asdict(trial) for trial in trials.all], "epochs": trials.epochs()}
    write_json(folder / "trials.json", record | ({"epochs_under_asha": dict(replay)} if replay else {}))
    if not plan.ablation:
        summary = _search_results(plan, trials, folder, replay)
    else:
        ablation = ABLATIONS[plan.ablation]
        metrics = tuple(dict.fromkeys([*trials.metrics, "val/mfdr", "val/mfnr", "pseudo_mask/miou"]))
        trials = Trials(trials.all, metrics)
        rows = trials.rows(ablation)
        _draw_ablation(ablation, rows, folder / plan.ablation)
        parts = [ablation_table(ablation, rows), margin_table(rows, metrics[0]), _protocol(plan), trial_table(trials)]
        summary = "\n".join(part for part in parts if part)
    write_text(folder / "summary.md", summary)
    return summary


def _protocol(plan: SweepPlan) -> str:
    """How the figures of an ablation came about."""
    config, metric = plan.config, plan.options.metrics[0]
    last = config.evaluation.every >= config.train.epochs
    chosen = "the last one" if last else f"the one with the best {metric}, chosen on the images that measured it"
    return (
        f"Of {config.train.epochs} epochs, figures are of {chosen}; means with the standard deviation over seeds. "
        f"Masks of validation by {protocol_name(config.evaluation)}, split {config.data.val_split} of "
        f"{config.data.path}.\n"
    )


def _search_results(plan: SweepPlan, trials: Trials, folder: Path, replay: Mapping[str, int]) -> str:
    best, epochs, shares = trials.best, trials.epochs(), trials.importances()
    assert best is not None
    write_text(folder / "best_config.json", plan.trial_config(best.values).to_json())
    _draw_search(trials, folder, with_importances=bool(shares))
    parts = [
        trial_table(trials),
        _default_text(trials, plan.recipe_point, best),
        f"Epochs trained: {epochs['trained']:.0f} of {epochs['planned']:.0f} planned, {100 * epochs['saved']:.1f} % "
        "saved by stopping early; failed trials are not counted.\n",
    ]
    if trials.all[0].schedule:
        _draw_schedules(trials.all, folder / "schedules")
    if replay:
        parts.append(replay_text(trials, replay))
    if shares:
        write_json(folder / "importances.json", shares)
        listed = "\n".join(f"- {key}: {100 * value:.0f} %" for key, value in shares.items())
        parts.append(f"Share of the variance of {trials.metrics[0]} that a setting explains (fANOVA):\n\n{listed}\n")
    if len(trials.metrics) > 1:
        front = trial_table(trials.front())
        parts.append(f"Beaten by no other trial in all of {', '.join(trials.metrics)}:\n\n{front}")
    return "\n".join(part for part in parts if part)


def _default_text(trials: Trials, default: Mapping[str, Any], best: Trial) -> str:
    """Compares the best trial with the one that has the recipe's own settings; empty where none has them."""
    metric = trials.metrics[0]
    own = Trials([trial for trial in trials.all if default and dict(trial.values) == dict(default)], [metric]).best
    if own is None:
        return ""
    difference = 100 * (best.metrics[metric] - own.metrics[metric])
    return (
        f"The recipe's own settings ({own.name}) have {_percent(own.metrics[metric])} %, the best trial {best.name} "
        f"{_percent(best.metrics[metric])} %: {difference:+.2f} points, chosen on the images that measured it.\n"
    )


def _percent(value: float | None, spread: float | None = None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    text = tabulate(cells, head, tablefmt="github", disable_numparse=True) + "\n"
    return re.sub(r"(?<= ) +|(?<=---)-+", "", text)  # without padding: MLflow's descriptions have 5,000 characters


# Pictures.


def _draw_search(trials: Trials, folder: Path, *, with_importances: bool) -> None:
    """Draws a search with Optuna; trials without the metrics are left out.

    `trials` shows the first metric by setting, `curves` by epoch, `front` the first two metrics against each other, and
    `importances` the share of the first metric's variance that a setting explains; it needs several different trials.
    """
    import matplotlib as mpl
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import matplotlib as optuna_plots

    mpl.use("agg")  # these plots go through pyplot, which otherwise looks for a display
    measured = trials.by(1)
    names = [f"{metric}, %" for metric in trials.metrics[:2]]
    # Optuna warns that its plots are experimental, and of settings with a single value.
    with mpl.rc_context(), warnings.catch_warnings(action="ignore"):
        study = measured.study()
        _save(optuna_plots.plot_slice(study, target_name=names[0]), folder / "trials")
        curves = optuna_plots.plot_intermediate_values(study)
        curves.set(xlabel="epoch", ylabel=names[0])
        curves.xaxis.get_major_locator().set_params(integer=True)
        if len(curves.lines) == len(measured.all) > 1:
            labels = [trial.name for trial in measured.all]
            curves.legend(curves.lines, labels, bbox_to_anchor=(1.05, 1), loc="upper left")
        _save(curves, folder / "curves")
        if with_importances:
            evaluator = FanovaImportanceEvaluator(seed=0)
            importances = optuna_plots.plot_param_importances(study, evaluator=evaluator, target_name=names[0])
            _save(importances, folder / "importances")
        if names[1:]:
            _save(optuna_plots.plot_pareto_front(trials.by(2).study(), target_names=names), folder / "front")


def _draw_schedules(trials: Sequence[Trial], path: Path) -> None:
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


def _draw_ablation(ablation: Ablation, rows: Sequence[AblationRow], path: Path) -> None:
    """Draws an ablation's means and their spread over seeds: lines for a plot of the paper, points for a table.

    Scores go into one panel, beside the paper's where it gives numbers, and error rates into another.
    """
    groups = [[metric for metric in rows[0].means if mode_of(metric) == mode] for mode in ("max", "min")]
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
    counts = sorted({row.seeds for row in rows})
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
    for suffix in ("png", "svg"):
        with written_whole(path.with_name(f"{path.name}.{suffix}")) as incoming:
            figure.savefig(incoming, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
