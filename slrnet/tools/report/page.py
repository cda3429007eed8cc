"""Renders runs and their measurements as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from slrnet.checkpoints.checkpoint import Checkpoint
from slrnet.data.catalog import class_keys
from slrnet.evaluation.examine import Bins, Examination, Example
from slrnet.evaluation.masks import Quality, quality_metrics
from slrnet.tools.report.charts import SIZE, Chart, Series, draw_chart
from slrnet.tools.report.measurements import Measurements, gamma_advice
from slrnet.tools.report.runs import Run, metrics_by_protocol, training_command, val_key
from slrnet.tracking.provenance import environment_tags
from slrnet.viz.overlay import draw_overlay
from slrnet.viz.panels import class_legend

__all__ = ["MAX_BYTES", "environment", "render"]

MAX_BYTES = 10_000_000
"""Largest size of a page."""
WIDTHS = (1100, 900, 700, 520, 400, 300)
"""Widths of the widest pictures, pixels, tried in this order until the page is small enough."""
MAX_MATRIX = 40
"""Most classes whose confusion matrix can be read."""
MAX_EPOCHS, MAX_PANELS = 12, 4
"""Most epochs and images of the way from mask to pseudo label."""
MAX_POINTS = 300
"""Most points of the curve of the training loss."""


def environment(charts: Sequence[Chart]) -> tuple[jinja2.Environment, dict[str, Any]]:
    """The templates, and what they need to draw: charts with common axes among those of one title, and pictures."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("slrnet.tools.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"percent": _percent, "general": "{:g}".format, "by_protocol": metrics_by_protocol}
    drawing = {"placed": partial(draw_chart, others=charts), "chart_size": SIZE}
    return templates, drawing | {"data_uri": partial(_data_uri, width=WIDTHS[1])}


def render(runs: Sequence[Run], measured: Sequence[Measurements], *, max_bytes: int = MAX_BYTES) -> str:
    """Renders the page about runs, at least one, with the measurements of each; every run has a column.

    Raises:
        ValueError: the page would be larger than `max_bytes` even with the smallest pictures.
    """
    columns = [_column(run, own) for run, own in zip(runs, measured, strict=True)]
    templates, drawing = environment(
        [chart for column in columns for charts in column["charts"].values() for chart in charts]
    )
    template = templates.get_template("page.html.jinja")
    content = {"columns": columns, "made_with": environment_tags()} | drawing
    for width in WIDTHS:
        page = template.render(**content | {"data_uri": partial(_data_uri, width=width)})
        if len(page.encode()) <= max_bytes:
            return page
    raise ValueError(
        f"the page of {len(runs)} runs is larger than {max_bytes / 10**6:g} MB even with pictures {WIDTHS[-1]} pixels "
        "wide; give fewer runs, or fewer --images"
    )


# What the template shows of a run.


def _column(run: Run, measured: Measurements) -> dict[str, Any]:
    checkpoint, examination = run.checkpoint, measured.examination
    classes, scores = checkpoint.state.classes, _scores(checkpoint, examination)
    kinds = ("val/iou", "val/fdr", "val/fnr", "pseudo_mask/iou")
    means = (val_key(checkpoint.config), "val/mfdr", "val/mfnr", "pseudo_mask/miou")
    return {
        "run": run,
        "measured": measured,
        "command": training_command(checkpoint),
        "val_key": means[0],
        "class_rows": [
            (name, [scores.get(f"{kind}/{key}") for kind in kinds])
            for name, key in zip(classes, class_keys(classes), strict=True)
        ],
        "means": [scores.get(key) for key in means],
        "matrix": _matrix(examination),
        "examples": {
            title: [(example, *_overlays(example, measured.palette, classes)) for example in examples]
            for title, examples in measured.examples.items()
        },
        "panels": list(_chosen_panels(run)),
        "charts": {"curves": _curves(run), "balance": _balance(run), "calibration": _calibration(measured)},
        "advice": measured.sweep and gamma_advice(measured.sweep, checkpoint.config.calibration.confidence_threshold),
    }


def _scores(checkpoint: Checkpoint, examination: Examination | None) -> dict[str, float]:
    """The training's own figures by name; what it did not measure is from the examination."""
    if examination is None:
        return dict(checkpoint.state.metrics)
    quality = Quality(examination.matrix, examination.protocol, len(examination.scores))
    own = quality_metrics("val", quality, checkpoint.state.classes)
    if "val/miou" in own:
        own[val_key(checkpoint.config)] = own["val/miou"]
    return own | dict(checkpoint.state.metrics)


def _matrix(examination: Examination | None) -> list[list[float | None]] | None:
    """By true class: the shares of its pixels that are predicted as each class; None for a class without pixels."""
    if examination is None or examination.matrix.num_classes > MAX_MATRIX:
        return None
    counts = examination.matrix.counts[:, : examination.matrix.num_classes].double()
    return [(row / row.sum()).tolist() if row.sum() else [None] * len(row) for row in counts]


def _overlays(
    example: Example, palette: Any, classes: Sequence[str]
) -> tuple[dict[str, Image.Image], list[tuple[str, str]]]:
    """Image, prediction, and truth; and names and CSS colors of the classes that they show."""
    masks = {"prediction": example.mask, "truth": example.truth}
    overlays = {name: draw_overlay(example.image, mask, palette) for name, mask in masks.items()}
    legend = class_legend(masks.values(), palette, classes, foreground_only=True)
    named = [(name, "#" + bytes(color or ()).hex()) for name, color in legend]
    return {"image": Image.fromarray(example.image)} | overlays, named


def _chosen_panels(run: Run) -> Iterator[tuple[str, list[tuple[int, Image.Image]]]]:
    for key, pictures in list(run.panels.items())[:MAX_PANELS]:
        epochs = sorted(pictures.items())
        places = np.linspace(0, len(epochs) - 1, min(len(epochs), MAX_EPOCHS)).round().astype(int)
        yield key, [epochs[place] for place in places]


# Charts. Those of one title have the same axes in all runs.


def _curves(run: Run) -> list[Chart]:
    curves, means = run.curves, {"mFDR": "mfdr", "mFNR": "mfnr"}
    pseudo = {"mIoU": "miou", **means, "coverage": "coverage"}
    val = {"mIoU": val_key(run.checkpoint.config).removeprefix("val/"), **means}
    charts = []
    for title, prefix, keys in (("Pseudo masks of training images", "pseudo_mask", pseudo), ("Validation", "val", val)):
        points = {name: curves.get(f"{prefix}/{key}", []) for name, key in keys.items()}
        series = [Series(name, [(x, 100 * y) for x, y in curve]) for name, curve in points.items()]
        charts.append(Chart(title, series, "epoch", "%", run.protocols[prefix]))
    steps = curves.get("train/loss", [])
    losses = [
        Series("of a step", steps[:: max(1, math.ceil(len(steps) / MAX_POINTS))], dots=False),
        Series("mean of an epoch", curves.get("train/epoch_loss", [])),
    ]
    return [*charts, Chart("Training loss", losses, "epoch", "loss", "sum of the weighted parts, on random crops")]


def _balance(run: Run) -> list[Chart]:
    if not (run.curves.get("pseudo_mask/mfdr") or run.curves.get("val/mfdr")):
        return []
    series = []
    for name, prefix in (("pseudo masks", "pseudo_mask"), ("validation", "val")):
        fnr = dict(run.curves.get(f"{prefix}/mfnr", []))
        epochs = [(x, y) for x, y in run.curves.get(f"{prefix}/mfdr", []) if x in fnr]
        points = [(100 * y, 100 * fnr[x]) for x, y in epochs]
        labels = [f"{x:g}" if x in (epochs[0][0], epochs[-1][0]) else "" for x, _ in epochs]
        series.append(Series(name, points, labels=labels))
    x_label, y_label = "mFDR, % (less is more faithful)", "mFNR, % (less is more complete)"
    note = "numbers are epochs; pseudo masks: {pseudo_mask}; validation: {val}".format(**run.protocols)
    return [Chart("Fidelity against completeness", series, x_label, y_label, note)]


def _calibration(measured: Measurements) -> list[Chart]:
    charts = []
    if measured.examination:
        one = measured.examination
        note = f"{one.protocol}, {len(one.scores)} images; calibration error {100 * one.confidence.error():.1f} points"
        charts.append(_reliability("Validation: confidence and accuracy", one.confidence, "share of probability", note))
    if sweep := measured.sweep:
        note = f"{sweep.protocol}, {sweep.images} training images, foreground"
        label = "probability / maximum over the image"
        charts.append(_reliability("Pseudo masks: what gamma cuts", sweep.confidence, label, note))
        shares = {"fidelity": sweep.fidelity, "completeness": sweep.completeness, "harmonic mean": sweep.harmonic_means}
        series = [Series(name, list(zip(sweep.gammas, values, strict=True))) for name, values in shares.items()]
        note += "; all else as trained"
        charts.append(Chart("Pseudo labels by gamma", series, "gamma", "share of pixels", note, limits=(0.0, 1.0)))
    return charts


def _reliability(title: str, bins: Bins, x_label: str, note: str) -> Chart:
    series, x_label = [Series("accuracy", bins.points())], f"confidence: {x_label}"
    return Chart(title, series, x_label, "accuracy", note, limits=(0.0, 1.0), diagonal=True)


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _data_uri(picture: Image.Image, share: float = 1.0, *, width: int) -> str:
    """A picture of at most `share` times `width` pixels as a data URI."""
    factor = min(1.0, share * width / picture.width)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    file = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "WEBP", quality=78, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
