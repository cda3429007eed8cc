"""The result of a training or an evaluation as text, and which of its figures become curves.

Figures come by their MLflow names, as shares in [0, 1]; the names of the K classes begin with the background.
"""

from __future__ import annotations

import math
import shlex
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from slrnet.config import Config
from slrnet.data.catalog import class_keys
from slrnet.recipes import RECIPES, get_recipe
from slrnet.storage.shown import fenced, in_markdown

__all__ = [
    "MOST_CURVES",
    "class_quality",
    "class_tags",
    "curves",
    "description",
    "mean_without",
    "next_commands",
    "parameters",
    "quality_table",
    "result_text",
]

MOST_CURVES = 30
"""Most classes that each get a curve of their IoU: MLflow's page draws a chart for each, and hangs with thousands."""
_FEW = 10
"""Rows of a description's table if there are more than `MOST_CURVES` classes."""
_KINDS = ("iou", "fdr", "fnr")
_ALWAYS = (
    *("recipe", "setting", "data.path", "data.crop_size", "data.pixel_labeled_subset", "views.scales", "model.encoder"),
    *("cvlr.enabled", "cvlr.num_iters", "cvlr.dim", "calibration.confidence_threshold", "weights.consistency"),
    *("optim.lr", "train.epochs", "train.batch_size", "train.seed"),
)
_SETTINGS = {"wsss": "image labels", "sss_image_labels": "masks and image labels", "sss": "masks and unlabeled images"}


def curves(metrics: Mapping[str, float], classes: tuple[str, ...]) -> dict[str, float]:
    """The figures of an epoch that become curves: no counts of images; of classes only the IoU, up to `MOST_CURVES`."""
    groups = ("pseudo_mask", "val")
    hidden = _KINDS if len(classes) > MOST_CURVES else _KINDS[1:]
    left_out = {f"{group}/{kind}/{key}" for group in groups for kind in hidden for key in class_keys(classes)}
    left_out |= {f"{group}/images" for group in groups}
    return {key: value for key, value in metrics.items() if key not in left_out}


def class_tags(classes: Sequence[str]) -> dict[str, str]:
    """Tags `class.KEY` that tell a class's name, for classes whose key in the names of metrics is another."""
    pairs = zip(class_keys(classes), classes, strict=True)
    return {f"class.{key}": name for key, name in pairs if key != name}


def parameters(config: Config, searched: Collection[str] = ()) -> dict[str, object]:
    """The settings that a run's page lists: the main ones, those that differ from the recipe's, and those searched.

    The page writes them above each picture, so a hundred of them would leave no room; config.json has all.
    """
    base = (get_recipe(config.recipe) if config.recipe in RECIPES else Config()).flat()
    shown = {*_ALWAYS, *searched}
    return {key: value for key, value in config.flat().items() if key in shown or value != base[key]}


def class_quality(metrics: Mapping[str, float], group: str, classes: tuple[str, ...]) -> dict[str, list[float]]:
    """IoU, FDR and FNR as shares, in the order of the classes; NaN if not measured. `group`: `pseudo_mask` or `val`."""
    keys = class_keys(classes)
    return {kind: [metrics.get(f"{group}/{kind}/{key}", math.nan) for key in keys] for kind in _KINDS}


def mean_without(metrics: Mapping[str, float], classes: tuple[str, ...], left_out: Sequence[str]) -> float:
    """Mean validation IoU as a share over the classes that occur and are not left out; NaN if none is.

    Raises:
        ValueError: there is no class of that name.
    """
    if unknown := [name for name in left_out if name not in classes]:
        raise ValueError(f"there is no class {unknown[0]!r} to leave out; the classes are {', '.join(classes)}")
    scores = zip(classes, class_quality(metrics, "val", classes)["iou"], strict=True)
    counted = [score for name, score in scores if name not in left_out and not math.isnan(score)]
    return sum(counted) / len(counted) if counted else math.nan


def description(config: Config, *, data: str, labels: str, commit: str, folder: Path) -> str:
    """The first lines of a run's description, Markdown, with the data set's name and a text about its labels."""
    model = config.model
    labels, data, recipe, encoder, place = map(in_markdown, (labels, data, config.recipe, model.encoder, str(folder)))
    return (
        f"- setting **{config.setting}** ({_SETTINGS[config.setting]}): {labels}\n"
        f"- data **{data}**, recipe **{recipe}**\n"
        f"- encoder **{encoder}**, output stride {model.output_stride}, crop {config.data.crop_size}, "
        f"{config.train.epochs} epochs of batches of {config.train.batch_size}\n"
        f"- commit {commit[:12]}, folder {place}"
    )


def result_text(metrics: Mapping[str, float], classes: tuple[str, ...], *, epoch: int, folder: Path, data: str) -> str:
    """The table of a run's best epoch (number `epoch`, from 1) and the commands that come next, Markdown.

    Of very many classes, the table has those with the lowest IoU. `data` is the location of the data set.
    """
    shown, which = [*range(len(classes))], ""
    if len(classes) > MOST_CURVES:
        groups = [class_quality(metrics, group, classes)["iou"] for group in ("val", "pseudo_mask")]
        iou = next((scores for scores in groups if not all(map(math.isnan, scores))), [])
        known = sorted((score, place) for place, score in enumerate(iou) if score == score)
        shown = [place for _, place in known[:_FEW]] or [0]
        which = f" The {len(shown)} classes with the lowest IoU of {len(classes)}; all are in the pictures `quality`."
    table = quality_table(metrics, classes, shown)
    commands = "\n".join(next_commands(folder, data, metrics))
    best = f"Best checkpoint: epoch {epoch}.{which}"
    return f"{best}\n\n{fenced('text', table)}\n\nNext:\n\n{fenced('sh', commands)}"


def next_commands(folder: Path | str, data: str, metrics: Mapping[str, float]) -> list[str]:
    """What to run after a training with these metrics: measure it, look at it, correct its masks.

    Without masks to measure with: look at its pictures, let it predict, correct its masks.
    """
    run, where = shlex.quote(str(folder)), shlex.quote(data)
    looks = [f"slrnet watch {run}", f"slrnet predict {run} IMAGES --out MASKS"]
    if _measured(metrics):
        looks = [
            f"slrnet evaluate --checkpoint {run} --data {where} --split val --protocol ms",
            f"slrnet report {run} --data {where}",
        ]
    return [
        *looks,
        f"slrnet review {run} --data {where} --out {shlex.quote(f'{Path(folder).name}-review')}",
    ]


def quality_table(metrics: Mapping[str, float], classes: tuple[str, ...], shown: Sequence[int] | None = None) -> str:
    """Formats IoU, FDR and FNR of pseudo masks and validation masks per class, in percent; no empty columns or table.

    `shown` are the ids of the classes that get a row; None for all. `tabulate` has no headings over several columns, so
    the table is formatted here.
    """
    groups = _measured(metrics)
    if not groups:
        return "no scores: no image has a mask to compare with; its masks show how good it is"
    named = [
        (classes[place], class_keys(classes)[place]) for place in (range(len(classes)) if shown is None else shown)
    ]
    width = max(len("mean"), *(_columns(name) for name, _ in named))
    head = " " * width + "".join(f"  {group:^22}" for group in groups)
    units = f"{'%':<{width}}" + "  {:>6}  {:>6}  {:>6}".format("IoU", "FDR", "FNR") * len(groups)

    def row(name: str, keys: list[str]) -> str:
        cells = (f"{100 * metrics[key]:.1f}" if key in metrics else "-" for key in keys)
        return name + " " * (width - _columns(name)) + "".join(f"  {cell:>6}" for cell in cells)

    rows = [row(name, [f"{group}/{kind}/{key}" for group in groups for kind in _KINDS]) for name, key in named]
    miou = {group: next((key for key in metrics if key.startswith(f"{group}/miou")), "") for group in groups}
    means = row("mean", [key for group in groups for key in (miou[group], f"{group}/mfdr", f"{group}/mfnr")])
    rule = "-" * len(units)
    note = "means of FDR and FNR are over the foreground classes (paper Eq. 10, 11)"
    return "\n".join([head.rstrip(), units, rule, *rows, rule, means, note])


def _measured(metrics: Mapping[str, float]) -> list[str]:
    """The kinds of masks of which the metrics have scores."""
    scores = {name: (f"{name}/miou", f"{name}/iou/") for name in ("pseudo_mask", "val")}
    return [name for name, beginnings in scores.items() if any(key.startswith(beginnings) for key in metrics)]


def _columns(text: str) -> int:
    """Columns that a text takes on a terminal: two for each wide letter, none for an accent of its own."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)
