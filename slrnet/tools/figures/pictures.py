"""Figures 2 (right), 3, 5 and 7 of the paper, drawn from checkpoints (`slrnet figures`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from slrnet.checkpoints.checkpoint import Checkpoint, load_checkpoint
from slrnet.data.manifest import load_dataset
from slrnet.evaluation.examine import (
    EvaluationTarget,
    Examination,
    Example,
    ImageScore,
    choose_by_iou,
    examine,
    read_examples,
)
from slrnet.models.network import Network
from slrnet.storage.files import written_whole
from slrnet.tools.codes import COLORS, code_maps, heat, low_rank_module, observe_low_rank
from slrnet.views.geometry import View, apply_view
from slrnet.viz.lettering import drawable_names, font_families
from slrnet.viz.overlay import Pixels, draw_overlay
from slrnet.viz.panels import Color, Tile, class_legend

__all__ = ["code_figure", "feature_figure", "iteration_figure", "mask_figure", "write_figure"]

PAGE_WIDTH = 7.2
"""Width of a figure, inches: that of the paper's text."""


def write_figure(
    what: str,
    checkpoints: Sequence[Path],
    out: Path,
    *,
    number: int,
    num_iters: Sequence[int],
    data: Path | None,
    measured: int | None,
    device: str | None,
) -> list[Path]:
    """Draws a figure of validation images chosen by IoU, as PNG and PDF; returns the files.

    Args:
        what: "fig2", "fig3", "fig5" or "fig7".
        checkpoints: the checkpoint or run; for fig7 two checkpoints, or a run that holds two.
        out: folder to write to.
        number: images (fig2, fig7), rows (fig3) or classes (fig5) to draw.
        num_iters: values of T in fig7.
        data: folder with shards; None for that of the training.
        measured: largest number of images to choose from; None for all.
        device: device of the network; None for a GPU if there is one.

    Raises:
        ValueError: the checkpoints do not fit the figure.
    """
    loaded = _checkpoints(what, checkpoints)
    shards = load_dataset(data or loaded[-1].config.data.path)
    targets = [EvaluationTarget.of(checkpoint, shards, device) for checkpoint in loaded]
    examination = examine(targets[-1], targets[-1].config.data.val_split, at_most=measured)
    with mpl.rc_context({"font.family": font_families(drawable_names(targets[-1].checkpoint.state.classes))}):
        figure = _draw(what, targets, examination, number=number, num_iters=num_iters)
    files = [out / f"{what}.{kind}" for kind in ("png", "pdf")]
    for file in files:
        with written_whole(file) as incoming:
            figure.savefig(incoming, dpi=220)
    return files


def _draw(
    what: str, targets: Sequence[EvaluationTarget], examination: Examination, *, number: int, num_iters: Sequence[int]
) -> Figure:
    if what == "fig3":
        return mask_figure(targets[0], examination, number=number)
    if what == "fig5":
        return code_figure(targets[0], examination, number=number)
    scores = choose_by_iou(examination.scores, number, hardest=False)
    examples = read_examples(targets[-1], examination.split, scores)
    if what == "fig2":
        return feature_figure(targets[0], examples)
    return iteration_figure(targets, examples, scores, num_iters)


def _checkpoints(what: str, paths: Sequence[Path]) -> list[Checkpoint]:
    """The checkpoints that a figure is of, early first."""
    if what != "fig7":
        if len(paths) != 1:
            raise ValueError(f"{len(paths)} checkpoints are given; {what} is of one")
        return [load_checkpoint(paths[0])]
    kept = sorted((paths[0] / "checkpoints").glob("checkpoint-*")) if len(paths) == 1 else list(paths)
    checkpoints = sorted((load_checkpoint(path) for path in kept), key=lambda checkpoint: checkpoint.state.step)
    if len(paths) == 1 and len(checkpoints) > 2:
        checkpoints = [checkpoints[0], checkpoints[-1]]
    if len({checkpoint.state.epoch for checkpoint in checkpoints}) < 2 or len(checkpoints) > 2:
        raise ValueError(
            f"fig7 needs an early and a late checkpoint of a training, and {', '.join(map(str, paths))} "
            f"gives {len(checkpoints)}; name two checkpoints of different epochs, or a run's folder that holds two"
        )
    return checkpoints


def draw_tiles(
    rows: Sequence[Sequence[Tile | None]],
    *,
    names: Sequence[str] = (),
    legend: Sequence[tuple[str, Color | None]] = (),
    scale: bool = False,
) -> Figure:
    """Draws tiles in rows and columns at the paper's width, with matplotlib for the sake of PDF's text.

    Args:
        rows: tiles, equally many in each row; None leaves a place empty.
        names: texts at the left of the rows; empty for none.
        legend: names and RGB colors, 0 to 255, of the classes shown.
        scale: whether to draw the scale of codes below, from 0 to 1.
    """
    width, line, per_line = (PAGE_WIDTH - (0.3 if names else 0.04)) / len(rows[0]), 0.2, 6
    shapes = [[tile.picture.shape for tile in row if tile] for row in rows]
    heights = [width * max(shape[0] / shape[1] for shape in row) + line for row in shapes]
    total = sum(heights) + line * -(-len(legend) // per_line) + (0.4 if scale else 0.1)
    figure = Figure(figsize=(PAGE_WIDTH, total), layout="constrained")
    places = figure.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, tile in zip(places.flat, (tile for row in rows for tile in row), strict=True):
        axes.set(xticks=[], yticks=[], frame_on=False, anchor="N")
        if tile is not None:
            axes.imshow(tile.picture, interpolation="lanczos")
            axes.set_title(tile.caption, fontsize=8, pad=2)
    for axes, name in zip(places[:, 0], names, strict=False):
        axes.set_ylabel(name, fontsize=8)
    if legend:
        colors = {name: np.array(color) / 255 for name, color in legend}
        patches = [Patch(facecolor=own, edgecolor="#555555", linewidth=0.5, label=name) for name, own in colors.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=per_line, fontsize=8, frameon=False)
    if scale:
        bar = figure.colorbar(ScalarMappable(cmap=COLORS), ax=places, location="bottom", shrink=0.28, aspect=22)
        bar.ax.tick_params(labelsize=7, length=2, pad=1)
    return figure


def feature_figure(target: EvaluationTarget, examples: Sequence[Example]) -> Figure:
    """Fig. 2, right: the features that enter the low-rank module and those that leave it.

    A row for each image and view. Colors are the three main components of both kinds and all views of the image
    together, so that equal features have equal colors. Activation is the length of a feature vector, in each map from
    its smallest (dark) to its largest (yellow).

    Raises:
        ValueError: the network has no low-rank module.
    """
    inference, scales, rows = target.inference, target.config.views.scales, []
    stride = inference.model.encoder.size_step
    for example in examples:
        image = inference.fit(torch.from_numpy(example.image).permute(2, 0, 1).to(inference.device))
        views = [apply_view(image, View(scale=scale, flip=None), stride=stride) for scale in scales]
        pairs = features_around(inference.model, views)
        colors = iter(feature_rgb([feature for pair in pairs for feature in pair]))
        for place, (before, after) in enumerate(pairs):
            row = [Tile(example.image, example.key if place == 0 else "")]
            row += [Tile(next(colors), "features before"), Tile(next(colors), "features after")]
            row += [Tile(_activation(before), "activation before"), Tile(_activation(after), "activation after")]
            rows.append(row)
    return draw_tiles(rows, names=[f"scale {scale:g}" for scale in scales] * len(examples))


def mask_figure(target: EvaluationTarget, examination: Examination, *, number: int) -> Figure:
    """Fig. 3: image, truth and prediction in `number` rows; the highest IoU on the left, the lowest on the right."""
    palette = target.shards.info.palette_array()
    halves = [
        read_examples(target, examination.split, choose_by_iou(examination.scores, number, hardest=hardest))
        for hardest in (False, True)
    ]
    rows, shown = [], list[Pixels]()
    for pair in zip(*halves, strict=True):
        row = []
        for example in pair:
            masks = {
                "truth": example.truth,
                f"prediction, foreground IoU {100 * example.foreground_iou:.0f}": example.mask,
            }
            row.append(Tile(example.image, example.key))
            row += [Tile(np.asarray(draw_overlay(example.image, m, palette)), text) for text, m in masks.items()]
            shown += masks.values()
        rows.append(row)
    classes = drawable_names(target.checkpoint.state.classes)
    return draw_tiles(rows, legend=class_legend(shown, palette, classes, foreground_only=True))


def code_figure(target: EvaluationTarget, examination: Examination, *, number: int) -> Figure:
    """Fig. 5: for at most `number` classes the code of the class's atom on its best image, three a row.

    Raises:
        ValueError: the network has no low-rank module, or one whose atoms are no classes.
    """
    if not low_rank_module(target.inference.model).class_codes:
        raise ValueError(
            f"{target.checkpoint.path} has no low-rank module whose atoms are classes, so Fig. 5 cannot be drawn; "
            "slrnet codes draws the codes of other atoms"
        )
    chosen = dict(list(best_of_each_class(examination.scores).items())[:number])
    examples = {one.key: one for one in read_examples(target, examination.split, list(chosen.values()))}
    palette = target.shards.info.palette_array()
    tiles: list[Tile | None] = []
    for index, score in chosen.items():
        example, name = examples[score.key], drawable_names(target.checkpoint.state.classes)[index]
        (codes,) = code_maps(target.inference, example.image).codes.values()
        only = np.where(example.truth == index, index, 0).astype(np.uint8)
        truth = np.asarray(draw_overlay(example.image, only, palette))
        tiles += [Tile(truth, f"{name}, truth"), Tile(heat(codes[index]), name)]
    tiles += [None] * (-len(tiles) % 6)
    return draw_tiles([tiles[start : start + 6] for start in range(0, len(tiles), 6)], scale=True)


def iteration_figure(
    targets: Sequence[EvaluationTarget],
    examples: Sequence[Example],
    scores: Sequence[ImageScore],
    num_iters: Sequence[int],
) -> Figure:
    """Fig. 7: the code of each image's main class after `num_iters` iterations, at an early and a late checkpoint.

    Raises:
        ValueError: a network has no low-rank module.
    """
    rows, names = [], []
    for target in targets:
        for example, score in zip(examples, scores, strict=True):
            maps = code_maps(target.inference, example.image, num_iters).codes
            name = drawable_names(target.checkpoint.state.classes)[score.main_class]
            codes = [Tile(heat(maps[count][score.main_class]), f"T = {count}") for count in num_iters]
            rows.append([Tile(example.image, f"{example.key}: {name}"), *codes])
            names.append(f"epoch {target.checkpoint.state.epoch}")
    return draw_tiles(rows, names=names, scale=True)


def best_of_each_class(scores: Sequence[ImageScore]) -> dict[int, ImageScore]:
    """Chooses for each foreground class the image on which its IoU is highest, of those whose true mask holds it."""
    classes = np.flatnonzero(np.sum([score.true_pixels[1:] for score in scores], axis=0)) + 1
    holders = {index: [score for score in scores if score.true_pixels[index]] for index in classes.tolist()}
    return {index: held[int(np.argmax([score.iou[index] for score in held]))] for index, held in holders.items()}


def features_around(model: Network, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns per view the features (C, h, w) of an image around the low-rank module; see `observe_low_rank`."""
    _, (before, *_), result = observe_low_rank(model, views)
    return [(one[0].float().cpu(), two[0].float().cpu()) for one, two in zip(before, result.features, strict=True)]


def feature_rgb(maps: Sequence[Tensor]) -> list[Pixels]:
    """Colors of feature maps (C, h, w) by their three main components, common to all maps: per map (h, w, 3).

    Each component spans its range between the 1st and the 99th percentile; with fewer than three channels the others
    stay gray.
    """
    flat = torch.cat([one.flatten(1) for one in maps], dim=1).double()
    flat = flat - flat.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(flat @ flat.T)
    basis = vectors[:, -3:].flip(1)  # (C, at most 3)
    # The sign of an eigenvector is arbitrary; this one is the same on every machine.
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    parts = (basis.T @ flat).numpy()
    low, high = np.percentile(parts, [1, 99], axis=1)
    shares = ((parts - low[:, None]) / np.maximum(high - low, 1e-12)[:, None]).clip(0, 1)
    shares = np.concatenate([shares, np.full((3 - len(shares), shares.shape[1]), 0.5)])
    colors = np.rint(255 * shares.T).astype(np.uint8)
    ends = np.cumsum([one[0].numel() for one in maps])
    return [part.reshape(*one.shape[1:], 3) for part, one in zip(np.split(colors, ends[:-1]), maps, strict=True)]


def _activation(features: Tensor) -> Pixels:
    length = features.norm(dim=0).numpy()
    return heat((length - length.min()) / max(float(np.ptp(length)), 1e-12))
