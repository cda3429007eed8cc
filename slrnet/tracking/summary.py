"""The result of a training or an evaluation as text, and which of its figures become curves.

Figures come by their MLflow names, as shares in [0, 1]; the names of the K classes begin with the background.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from slrnet.config import Config
from slrnet.tracking.protocol import metric_key

__all__ = ["MOST_CURVES", "class_quality", "curves", "description", "quality_table", "result_text"]

MOST_CURVES = 30
"""Most classes that each get a curve of their IoU: MLflow's page draws a chart for each, and hangs with thousands."""
_FEW = 10
"""Rows of a description's table if there are more than `MOST_CURVES` classes."""
_KINDS = ("iou", "fdr", "fnr")
_SETTINGS = {"wsss": "image labels", "sss_image_labels": "masks and image labels", "sss": "masks and unlabeled images"}


def curves(metrics: Mapping[str, float], classes: tuple[str, ...]) -> dict[str, float]:
    """The figures of an epoch that become curves: no counts of images; of classes only the IoU, up to `MOST_CURVES`."""
    groups = ("pseudo_mask", "val")
    hidden = _KINDS if len(classes) > MOST_CURVES else _KINDS[1:]
    left_out = {metric_key(group, kind, name) for group in groups for kind in hidden for name in classes}
    left_out |= {f"{group}/images" for group in groups}
    return {key: value for key, value in metrics.items() if key not in left_out}


def class_quality(metrics: Mapping[str, float], group: str, classes: tuple[str, ...]) -> dict[str, list[float]]:
    """IoU, FDR and FNR as shares, in the order of the classes; NaN if not measured. `group`: `pseudo_mask` or `val`."""
    return {kind: [metrics.get(metric_key(group, kind, name), math.nan) for name in classes] for kind in _KINDS}


def description(config: Config, *, data: str, labels: str, commit: str, folder: Path) -> str:
    """The first lines of a run's description, Markdown, with the data set's name and a text about its labels."""
    model = config.model
    return (
        f"- setting **{config.setting}** ({_SETTINGS[config.setting]}): {labels}\n"
        f"- data **{data}**, recipe **{config.recipe}**\n"
        f"- encoder **{model.encoder}**, output stride {model.output_stride}, crop {config.data.crop_size}, "
        f"{config.train.epochs} epochs of batches of {config.train.batch_size}\n"
        f"- commit {commit[:12]}, folder `{folder}`"
    )


def result_text(metrics: Mapping[str, float], classes: tuple[str, ...], *, epoch: int, folder: Path, data: str) -> str:
    """The table of a run's best epoch (number `epoch`, from 1) and the commands that come next, Markdown.

    Of very many classes, the table has those with the lowest IoU. `data` is the location of the data set.
    """
    shown, which = classes, ""
    if len(classes) > MOST_CURVES:
        groups = [class_quality(metrics, group, classes)["iou"] for group in ("val", "pseudo_mask")]
        iou = next((scores for scores in groups if not all(map(math.isnan, scores))), [])
        known = sorted((score, place) for place, score in enumerate(iou) if score == score)
        shown = tuple(classes[place] for _, place in known[:_FEW]) or classes[:1]
        which = f" The {len(shown)} classes with the lowest IoU of {len(classes)}; all are in the pictures `quality`."
    table = quality_table(metrics, shown)
    run, where = shlex.quote(str(folder)), shlex.quote(data)
    return (
        f"Best checkpoint: epoch {epoch}.{which}\n\n```text\n{table}\n```\n\nNext:\n\n```sh\n"
        f"slrnet evaluate --checkpoint {run} --data {where} --split val --protocol ms\n"
        f"slrnet report {run} --data {where}\nslrnet app {run}\n```"
    )


def quality_table(metrics: Mapping[str, float], classes: tuple[str, ...]) -> str:
    """Formats IoU, FDR and FNR of pseudo masks and validation masks per class, in percent; no empty columns.

    `tabulate` has no headings over several columns, so the table is formatted here.
    """
    groups = [name for name in ("pseudo_mask", "val") if any(key.startswith(name + "/") for key in metrics)]
    width = max(len("mean"), *(len(name) for name in classes))
    head = " " * width + "".join(f"  {group:^22}" for group in groups)
    units = f"{'%':<{width}}" + "  {:>6}  {:>6}  {:>6}".format("IoU", "FDR", "FNR") * len(groups)

    def row(name: str, keys: list[str]) -> str:
        cells = (f"{100 * metrics[key]:.1f}" if key in metrics else "-" for key in keys)
        return f"{name:<{width}}" + "".join(f"  {cell:>6}" for cell in cells)

    rows = [row(name, [metric_key(group, kind, name) for group in groups for kind in _KINDS]) for name in classes]
    miou = {group: next((key for key in metrics if key.startswith(f"{group}/miou")), "") for group in groups}
    means = row("mean", [key for group in groups for key in (miou[group], f"{group}/mfdr", f"{group}/mfnr")])
    rule = "-" * len(units)
    note = "means of FDR and FNR are over the foreground classes (paper Eq. 10, 11)"
    return "\n".join([head.rstrip(), units, rule, *rows, rule, means, note])
