"""The results of a sweep: tables, a summary and files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from slrnet.config import Config
from slrnet.storage.files import write_json, write_text
from slrnet.sweeps.ablations import ABLATIONS, Ablation
from slrnet.sweeps.pictures import draw_ablation, draw_schedules, draw_search
from slrnet.sweeps.trials import (
    AblationRow,
    Trial,
    ablation_rows,
    best_trial,
    epochs_trained,
    importances,
    pareto_front,
    score_of,
    settings_of,
)

__all__ = ["ablation_table", "replay_text", "trial_table", "write_results"]


def trial_table(trials: Sequence[Trial], metrics: Sequence[str]) -> str:
    """Trials as a Markdown table, best first by the first metric; metrics in percent."""
    ranked = sorted(trials, key=lambda trial: -score_of(trial.metrics, metrics[0]))
    keys = settings_of(trials)
    rows = [
        [
            trial.name,
            *(_shown(trial.values.get(key)) for key in keys),
            *(_percent(trial.metrics.get(metric)) for metric in metrics),
            trial.epochs,
            trial.status + (f": {trial.error}" if trial.error else ""),
        ]
        for trial in ranked
    ]
    return _markdown(["trial", *keys, *(f"{metric}, %" for metric in metrics), "epochs", "status"], rows)


def replay_text(trials: Sequence[Trial], replay: Mapping[str, int], metric: str) -> str:
    """Says in one line what early stopping would have saved, and whether it would have kept the best trial.

    `replay` has the epochs that early stopping would have given each of the complete trials, by name.
    """
    trained, planned = sum(replay.values()), sum(trial.epochs for trial in trials if trial.name in replay)
    best = best_trial(trials, metric)
    assert best is not None
    epochs = replay[best.name]
    fate = "trained to its end" if epochs >= best.epochs else f"stopped after epoch {epochs}"
    return (
        f"The same curves under ASHA: {trained} of {planned} epochs trained, {100 * (1 - trained / planned):.1f} % "
        f"saved; the best trial {best.name} would have been {fate}.\n"
    )


def ablation_table(ablation: Ablation, rows: Sequence[AblationRow], metrics: Sequence[str]) -> str:
    """An ablation as Markdown: our means and their spread over seeds beside the paper's figures, in percent."""
    cells = [
        [
            row.variant.label,
            "" if row.variant.paper is None else f"{row.variant.paper:.2f}",
            *(_percent(row.means[metric], row.spreads[metric] if row.seeds > 1 else None) for metric in metrics),
            row.seeds,
        ]
        for row in rows
    ]
    head = [ablation.axis, "paper: mIoU, VOC val, %", *(f"{metric}, %" for metric in metrics), "seeds"]
    return f"## {ablation.title}\n\n{_markdown(head, cells)}"


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
    """Writes a sweep's results: `trials.json`, `summary.md`, pictures, `importances.json` and `best_config.json`.

    Args:
        trials: all trials.
        metrics: the metrics that were optimized.
        folder: created if missing; each file is written whole or not at all.
        ablation: name of the ablation, or empty for a search.
        best_config: settings of a search's best trial.
        replay: epochs that early stopping would have given each trial, where all were trained to the end.
        default: the recipe's own settings; the best trial is compared with the trial that has them.

    Returns:
        The summary, Markdown.
    """
    record = {"trials": [asdict(trial) for trial in trials], "epochs": epochs_trained(trials)}
    write_json(folder / "trials.json", record | ({"epochs_under_asha": dict(replay)} if replay else {}))
    if best_config is not None:
        write_text(folder / "best_config.json", best_config.to_json())
    if ablation:
        summary = _ablation_results(trials, metrics, folder, ablation)
    else:
        summary = _search_results(trials, metrics, folder, replay or {}, default or {})
    write_text(folder / "summary.md", summary)
    return summary


def _ablation_results(trials: Sequence[Trial], metrics: Sequence[str], folder: Path, name: str) -> str:
    ablation = ABLATIONS[name]
    metrics = tuple(dict.fromkeys([*metrics, "val/mfdr", "val/mfnr", "pseudo_mask/miou"]))
    rows = ablation_rows(ablation, trials, metrics)
    draw_ablation(ablation, rows, metrics, folder / name)
    return ablation_table(ablation, rows, metrics) + "\n" + trial_table(trials, metrics)


def _search_results(
    trials: Sequence[Trial],
    metrics: Sequence[str],
    folder: Path,
    replay: Mapping[str, int],
    default: Mapping[str, Any],
) -> str:
    first, epochs, shares = metrics[0], epochs_trained(trials), importances(trials, metrics[0])
    draw_search(trials, metrics, folder, with_importances=bool(shares))
    parts = [
        trial_table(trials, metrics),
        _default_text(trials, default, first),
        f"Epochs trained: {epochs['trained']:.0f} of {epochs['planned']:.0f} planned, {100 * epochs['saved']:.1f} % "
        "saved by stopping early; failed trials are not counted.\n",
    ]
    if trials[0].schedule:
        draw_schedules(trials, folder / "schedules")
    if replay:
        parts.append(replay_text(trials, replay, first))
    if shares:
        write_json(folder / "importances.json", shares)
        listed = "\n".join(f"- {key}: {100 * value:.0f} %" for key, value in shares.items())
        parts.append(f"Share of the variance of {first} that a setting explains (fANOVA):\n\n{listed}\n")
    if len(metrics) > 1:
        front = trial_table(pareto_front(trials, metrics), metrics)
        parts.append(f"Beaten by no other trial in all of {', '.join(metrics)}:\n\n{front}")
    return "\n".join(part for part in parts if part)


def _default_text(trials: Sequence[Trial], default: Mapping[str, Any], metric: str) -> str:
    """Compares the best trial with the one that has the recipe's own settings; empty where none has them."""
    own = best_trial([trial for trial in trials if default and dict(trial.values) == dict(default)], metric)
    best = best_trial(trials, metric)
    if own is None or best is None:
        return ""
    difference = 100 * (best.metrics[metric] - own.metrics[metric])
    return (
        f"The recipe's own settings ({own.name}) have {_percent(own.metrics[metric])} %, the best trial {best.name} "
        f"{_percent(best.metrics[metric])} %: {difference:+.2f} points, chosen on the images that measured it.\n"
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float | None, spread: float | None = None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    text = tabulate(cells, head, tablefmt="github", disable_numparse=True) + "\n"
    return re.sub(r"(?<= ) +|(?<=---)-+", "", text)  # without padding: MLflow's descriptions have 5,000 characters
