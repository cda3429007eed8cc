"""Puts what is known of runs into one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from slrnet.checkpoints.checkpoint import Checkpoint
from slrnet.data.manifest import load_dataset
from slrnet.evaluation.examine import (
    Bins,
    Examination,
    Example,
    GammaSweep,
    Subject,
    choose_by_iou,
    examine,
    measured_images,
    read_examples,
    sweep_gamma,
)
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.evaluation.protocols import protocol_name, pseudo_mask_protocol
from slrnet.inference.forward import fit_image
from slrnet.models.slrnet import SLRNet
from slrnet.storage.remote import is_remote
from slrnet.tools.codes import classes_of, code_maps, draw_code_maps, most_used
from slrnet.tools.report.charts import HEIGHT, WIDTH, Chart, Series, draw_chart, limits_of
from slrnet.tools.report.runs import Run, training_command, val_key
from slrnet.tracking.protocol import metric_key
from slrnet.tracking.provenance import environment_tags
from slrnet.viz.overlay import draw_overlay

__all__ = ["MAX_BYTES", "Findings", "findings_of", "gamma_advice", "look", "render"]

MAX_BYTES = 10_000_000
"""Largest size of a page."""
WIDTHS = (1100, 900, 700, 520, 400, 300)
"""Widths of its widest pictures, pixels, tried from the first on until the page is small enough."""
MAX_MATRIX = 40
"""Most classes whose confusion matrix can be read."""
MAX_EPOCHS, MAX_PANELS = 12, 4
"""Most epochs and images of the way from mask to pseudo label."""
CLEAR_GAIN = 0.005
"""Gain in the harmonic mean of fidelity and completeness below which another gamma is not suggested."""


@dataclass
class Findings:
    """What looking at a checkpoint with its data gave; with why a part is absent."""

    examination: Examination | None = None
    best: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    sweep: GammaSweep | None = None
    code_pictures: dict[str, Image.Image] = field(default_factory=dict)
    palette: Any = None
    """(256, 3) uint8 colours by class id."""
    absent: dict[str, str] = field(default_factory=dict)
    """Reasons by part: `masks`, `sweep`, `codes`."""
    note: str = ""
    """A warning about the data."""


def findings_of(run: Run, *, data: Path | None, device: str | None, images: int, at_most: int | None) -> Findings:
    """Measures a run on a data set, or on that of its training if it is still there.

    Args:
        run: the run.
        data: folder with shards; None for those of the training.
        device: device of the network; None for a GPU where there is one.
        images: see `look`.
        at_most: see `look`.

    Raises:
        DataError: the data set is damaged or has other classes.
    """
    location = str(data or run.checkpoint.config.data.path)
    if data is None and not is_remote(location) and not (Path(location) / "dataset.json").is_file():
        reason = "the training's data are not at hand; give their folder with --data"
        return Findings(absent={"masks": reason, "codes": reason, "sweep": reason})
    subject = Subject.of(run.checkpoint, load_dataset(location), device)
    return look(subject, images=images, at_most=at_most)


def look(subject: Subject, *, images: int, at_most: int | None = None) -> Findings:
    """Measures a checkpoint for the page.

    Args:
        subject: network and data.
        images: best ones, worst ones, and images with code maps; so many of each.
        at_most: images that are measured, of validation and of training each; None for all.

    Raises:
        DataError: a sample is damaged.
    """
    config, info = subject.checkpoint.config, subject.shards.info
    found = Findings(palette=info.palette_array())
    if info.fingerprint != subject.checkpoint.state.data_fingerprint:
        found.note = (
            f"The data in {subject.shards.location} are not those of the training: their fingerprints differ, "
            "although the classes are the same."
        )
    split = config.data.val_split
    if split not in subject.shards.splits or not subject.shards.split(split).has_masks.any():
        reason = f"the data in {subject.shards.location} have no masks in split {split!r} to compare with"
        found.absent |= {"masks": reason, "codes": reason}
    else:
        found.examination = examine(subject, split, at_most=at_most)
        for name, hardest in (("best", False), ("worst", True)):
            chosen = choose_by_iou(found.examination.scores, images, hardest=hardest)
            setattr(found, name, read_examples(subject, split, chosen))
        _draw_codes(subject, found)
    _sweep(subject, found, at_most)
    return found


def gamma_advice(sweep: GammaSweep, gamma: float) -> str:
    """What the pseudo labels of other values of gamma suggest for `calibration.confidence_threshold`.

    Args:
        sweep: of a run's training images.
        gamma: the run's.
    """
    means = [_harmonic(*pair) for pair in zip(sweep.fidelity, sweep.completeness, strict=True)]
    if all(map(math.isnan, means)):
        return "No gamma that was tried gives any foreground label, so that the curve suggests nothing."
    own, best = sweep.gammas.index(gamma), int(np.nanargmax(means))

    def says(place: int) -> str:
        return (
            f"{100 * sweep.fidelity[place]:.1f} % of the foreground labels are right, and "
            f"{100 * sweep.completeness[place]:.1f} % of the foreground gets its right label"
        )

    now = f"At the run's gamma of {gamma:g}, {says(own)}."
    if means[best] - (0 if math.isnan(means[own]) else means[own]) < CLEAR_GAIN:
        advice = "No other gamma has a harmonic mean of both that is higher by half a point: leave it."
    else:
        advice = (
            f"Their harmonic mean is highest at {sweep.gammas[best]:g}: {says(best)}. So try "
            f"calibration.confidence_threshold={sweep.gammas[best]:g}, a {'lower' if best < own else 'higher'} gamma."
        )
    return f"{now} {advice} The weights were trained with {gamma:g}; only a training with another gamma can prove it."


def render(runs: Sequence[Run], findings: Sequence[Findings]) -> str:
    """The page about runs, a column each.

    Args:
        runs: at least one.
        findings: of each run.

    Raises:
        ValueError: it would be larger than 10 MB even with the smallest pictures.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slrnet.tools.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _percent
    template = environment.get_template("page.html.jinja")
    columns = [_column(run, found) for run, found in zip(runs, findings, strict=True)]
    charts = _charts(runs, findings)
    shown = {"columns": columns, "charts": charts, "chart_size": (WIDTH, HEIGHT), "made_with": environment_tags()}
    for width in WIDTHS:
        page = template.render(**shown, data_uri=partial(_data_uri, width=width))
        if len(page.encode()) <= MAX_BYTES:
            return page
    raise ValueError(
        f"the page of {len(runs)} runs is larger than {MAX_BYTES // 10**6} MB even with pictures {WIDTHS[-1]} pixels "
        "wide; give fewer runs, or fewer --images"
    )


def _sweep(subject: Subject, found: Findings, at_most: int | None) -> None:
    config = subject.checkpoint.config
    split = config.data.train_split
    if split not in subject.shards.splits or not subject.shards.split(split).has_masks.any():
        found.absent["sweep"] = (
            f"the data in {subject.shards.location} have no masks in split {split!r} to compare with"
        )
    elif not config.evaluation.pseudo_mask_images:
        found.absent["sweep"] = "evaluation.pseudo_mask_images is 0: the run measures no pseudo masks"
    elif not measured_images(subject):
        found.absent["sweep"] = "the run trains on every true mask of its training images: none is left to compare with"
    else:
        found.sweep = sweep_gamma(subject, at_most=at_most)


def _draw_codes(subject: Subject, found: Findings) -> None:
    model, config = subject.model, subject.checkpoint.config
    if not isinstance(model, SLRNet) or model.cvlr is None:
        found.absent["codes"] = "the network has no low-rank module, so it has no codes"
        return
    classes = subject.checkpoint.state.classes
    for example in found.best:
        pixels = torch.from_numpy(example.image).permute(2, 0, 1).contiguous().to(subject.device)
        maps = code_maps(model, fit_image(pixels, config), subject.normalize, [config.cvlr.num_iters])
        named = model.cvlr.class_codes
        atoms = classes_of(maps, classes, None) if named else most_used(maps)
        found.code_pictures[example.key] = draw_code_maps(
            example.image, maps, names=classes if named else None, atoms=atoms
        )


# What the template shows of a run.


def _column(run: Run, found: Findings) -> dict[str, Any]:
    checkpoint = run.checkpoint
    return {
        "run": run,
        "found": found,
        "settings": _settings(checkpoint),
        "command": training_command(checkpoint),
        "fields": {k: v for k, v in checkpoint.config.flat().items() if not k.startswith("tracking.")},
        "protocols": _protocols(checkpoint.config),
        "class_rows": list(_class_rows(checkpoint, found.examination)),
        "means": _means(checkpoint, found.examination),
        "matrix": _matrix(found.examination),
        "examples": {
            title: [(example, *_overlays(example, found.palette, checkpoint.state.classes)) for example in examples]
            for title, examples in (("Best", found.best), ("Worst", found.worst))
        },
        "panels": _chosen_panels(run),
        "advice": found.sweep and gamma_advice(found.sweep, checkpoint.config.calibration.confidence_threshold),
        "evaluations": list(_evaluation_rows(run)),
    }


def _settings(checkpoint: Checkpoint) -> dict[str, str]:
    config, state = checkpoint.config, checkpoint.state
    views = ", ".join(f"{scale:g}" for scale in config.views.scales)
    low_rank = f"{config.cvlr.method}, T = {config.cvlr.num_iters}, d = {config.cvlr.dim}"
    score = state.metrics.get(val_key(config))
    return {
        "setting": config.setting,
        "recipe": config.recipe,
        "network": f"{config.model.architecture}, {config.model.encoder}, stride {config.model.output_stride}",
        "low-rank module": low_rank if config.cvlr.enabled else "none",
        "views": f"scales {views}",
        "gamma": f"{config.calibration.confidence_threshold:g} (background {config.calibration.background_threshold:g}"
        f", floor {config.calibration.floor:g})",
        "lambda_reg": f"{config.weights.consistency:g}",
        "crop, batch": f"{config.data.crop_size} pixels, {config.train.batch_size} images",
        "checkpoint": f"epoch {state.epoch} of {config.train.epochs}, step {state.step}",
        "val mIoU": f"{_percent(score)} % ({protocol_name(config.evaluation)})"
        if score is not None
        else "not measured",
        "classes": str(len(state.classes)),
        "data": f"fingerprint {state.data_fingerprint[:12]}",
    }


def _protocols(config: Any) -> dict[str, str]:
    return {"val": protocol_name(config.evaluation), "pseudo": pseudo_mask_protocol(config)}


def _class_rows(checkpoint: Checkpoint, examination: Examination | None) -> Iterator[tuple[str, list[float | None]]]:
    """Name, and val IoU, FDR, FNR, pseudo-mask IoU of each class: the training's own figures, else those of now."""
    metrics = checkpoint.state.metrics
    measured = _by_class(examination.matrix) if examination else {}
    for index, name in enumerate(checkpoint.state.classes):
        values = []
        for kind in ("iou", "fdr", "fnr"):
            own = measured[kind][index] if measured else None
            values.append(metrics.get(metric_key("val", kind, name), own))
        yield name, [*values, metrics.get(metric_key("pseudo_mask", "iou", name))]


def _by_class(matrix: ConfusionMatrix) -> dict[str, list[float | None]]:
    kinds = {"iou": matrix.iou(), "fdr": matrix.fdr(), "fnr": matrix.fnr()}
    return {k: [None if math.isnan(v) else v for v in values.tolist()] for k, values in kinds.items()}


def _means(checkpoint: Checkpoint, examination: Examination | None) -> list[float | None]:
    metrics = checkpoint.state.metrics
    matrix = examination.matrix if examination else None
    own = (matrix.miou(), matrix.mfdr(), matrix.mfnr()) if matrix else (None, None, None)
    keys = (val_key(checkpoint.config), "val/mfdr", "val/mfnr")
    found = [metrics.get(key, value) for key, value in zip(keys, own, strict=True)]
    return [*found, metrics.get("pseudo_mask/miou")]


def _matrix(examination: Examination | None) -> list[list[float | None]] | None:
    """By true class: the shares of its pixels that are predicted as each class; None for a class without pixels."""
    if examination is None or examination.matrix.num_classes > MAX_MATRIX:
        return None
    counts = examination.matrix.counts[:, : examination.matrix.num_classes].double()
    return [(row / row.sum()).tolist() if row.sum() else [None] * len(row) for row in counts]


def _overlays(
    example: Example, palette: Any, classes: Sequence[str]
) -> tuple[dict[str, Image.Image], list[tuple[str, str]]]:
    """Image, prediction and truth; and name and colour of the classes that they show."""
    shown = sorted({*np.unique(example.mask).tolist(), *np.unique(example.truth).tolist()} - {0, 255})
    pictures = {
        "image": Image.fromarray(example.image),
        "prediction": draw_overlay(example.image, example.mask, palette),
        "truth": draw_overlay(example.image, example.truth, palette),
    }
    return pictures, [(classes[index], "#" + bytes(palette[index].tolist()).hex()) for index in shown]


def _chosen_panels(run: Run) -> list[tuple[str, list[tuple[int, Image.Image]]]]:
    chosen = []
    for key, pictures in list(run.panels.items())[:MAX_PANELS]:
        epochs = sorted(pictures)
        places = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), MAX_EPOCHS)).round().astype(int))
        chosen.append((key, [(epochs[place], pictures[epochs[place]]) for place in places]))
    return chosen


def _evaluation_rows(run: Run) -> Iterator[dict[str, Any]]:
    for record in run.evaluations.values():
        found = {record.get("protocol", "unknown"): record.get("metrics", {}), **record.get("before_crf", {})}
        for protocol, metrics in found.items():
            yield {
                "protocol": f"{protocol}, {record.get('split')}, {record.get('images')} images",
                "epoch": record.get("epoch"),
                "values": [metrics.get(f"val/{name}") for name in ("miou", "mfdr", "mfnr")],
            }


# Charts, with the same axes for all runs.


def _charts(runs: Sequence[Run], findings: Sequence[Findings]) -> list[dict[str, list[Chart]]]:
    """The charts of each run, by section."""
    plans = [_plans(run, found) for run, found in zip(runs, findings, strict=True)]
    drawn: list[dict[str, list[Chart]]] = [{} for _ in runs]
    for section in ("curves", "balance", "calibration"):
        for place in range(max((len(plan[section]) for plan in plans), default=0)):
            alike = [plan[section][place] for plan in plans if place < len(plan[section])]
            together = [series for plan in alike for series in plan["series"]]
            shared: dict[str, Any] = {"x_limits": limits_of(together, 0), "y_limits": limits_of(together, 1)}
            for own, plan in zip(drawn, plans, strict=True):
                if place < len(plan[section]):
                    own.setdefault(section, []).append(draw_chart(**{**shared, **plan[section][place]}))
    return drawn


def _plans(run: Run, found: Findings) -> dict[str, list[dict[str, Any]]]:
    """Arguments of `draw_chart` by section."""
    return {
        "curves": _curve_plans(run),
        "balance": [_balance_plan(run)] if run.curves.get("pseudo_mask/mfdr") or run.curves.get("val/mfdr") else [],
        "calibration": _calibration_plans(run, found),
    }


def _curve_plans(run: Run) -> list[dict[str, Any]]:
    curves, protocols = run.curves, _protocols(run.checkpoint.config)
    groups = [
        ("Pseudo masks of training images", "pseudo", "pseudo_mask/", ("miou", "mfdr", "mfnr", "coverage")),
        ("Validation", "val", "val/", (val_key(run.checkpoint.config).removeprefix("val/"), "mfdr", "mfnr")),
    ]
    names = {"mfdr": "mFDR", "mfnr": "mFNR", "coverage": "coverage"}
    plans: list[dict[str, Any]] = []
    for title, protocol, prefix, keys in groups:
        series = [
            Series(names.get(key, "mIoU"), [(x, 100 * y) for x, y in curves.get(prefix + key, [])]) for key in keys
        ]
        plans.append({"title": title, "series": series, "y_label": "%", "note": protocols[protocol]})
    losses = [
        Series("of a step", _thinned(curves.get("train/loss", [])), dots=False),
        Series("mean of an epoch", curves.get("train/epoch_loss", [])),
    ]
    note = "sum of the weighted parts, on random crops"
    plans.append({"title": "Training loss", "series": losses, "y_label": "loss", "note": note})
    return [plan | {"x_label": "epoch"} for plan in plans]


def _balance_plan(run: Run) -> dict[str, Any]:
    protocols = _protocols(run.checkpoint.config)
    series = []
    for name, prefix in (("pseudo masks", "pseudo_mask"), ("validation", "val")):
        fnr = dict(run.curves.get(f"{prefix}/mfnr", []))
        epochs = [(x, y) for x, y in run.curves.get(f"{prefix}/mfdr", []) if x in fnr]
        points = [(100 * y, 100 * fnr[x]) for x, y in epochs]
        labels = [f"{x:g}" if x in (epochs[0][0], epochs[-1][0]) else "" for x, _ in epochs]
        series.append(Series(name, points, labels=labels))
    return {
        "title": "Fidelity against completeness",
        "series": series,
        "x_label": "mFDR, % (less is more faithful)",
        "y_label": "mFNR, % (less is more complete)",
        "note": f"numbers are epochs; pseudo masks: {protocols['pseudo']}; validation: {protocols['val']}",
    }


def _calibration_plans(run: Run, found: Findings) -> list[dict[str, Any]]:
    plans: list[dict[str, Any]] = []
    square: dict[str, Any] = {"x_limits": (0.0, 1.0), "y_limits": (0.0, 1.0)}
    if found.examination:
        one = found.examination
        note = f"{one.protocol}, {len(one.scores)} images; calibration error {100 * one.confidence.error():.1f} points"
        plans.append(_reliability("Validation: confidence and accuracy", one.confidence, "share of probability", note))
    if found.sweep:
        note = f"{found.sweep.protocol}, {found.sweep.images} training images, foreground"
        label = "probability / maximum over the image"
        plans.append(_reliability("Pseudo masks: what gamma cuts", found.sweep.confidence, label, note))
        pairs = {"fidelity": found.sweep.fidelity, "completeness": found.sweep.completeness}
        series = [Series(name, list(zip(found.sweep.gammas, pairs[name], strict=True))) for name in pairs]
        means = [(g, _harmonic(*pair)) for g, *pair in zip(found.sweep.gammas, *pairs.values(), strict=True)]
        texts: dict[str, Any] = {"title": "Pseudo labels by gamma", "x_label": "gamma", "y_label": "share of pixels"}
        plans.append(
            texts | {"series": [*series, Series("harmonic mean", means)], "note": f"{note}; all else as trained"}
        )
    return [plan | square for plan in plans]


def _reliability(title: str, bins: Bins, x_label: str, note: str) -> dict[str, Any]:
    series = [Series("accuracy", bins.points())]
    texts = {"title": title, "x_label": f"confidence: {x_label}", "y_label": "accuracy", "note": note}
    return {**texts, "series": series, "diagonal": True}


def _harmonic(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second > 0 else math.nan


def _thinned(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    return list(points[:: max(1, math.ceil(len(points) / most))])


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _data_uri(picture: Image.Image, share: float = 1.0, *, width: int) -> str:
    """A picture of at most `share` times `width` pixels as a data URI."""
    factor = min(1.0, share * width / picture.width)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    file = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "WEBP", quality=78, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
