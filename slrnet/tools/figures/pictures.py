"""Figures 2 (right), 3, 5 and 7 of the paper, drawn from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from slrnet.evaluation.examine import Examination, Example, ImageScore, Subject, choose_by_iou, read_examples
from slrnet.inference.forward import fit_image
from slrnet.models.slrnet import SLRNet
from slrnet.ops.maps import channels_last
from slrnet.tools.codes import code_maps, heat
from slrnet.views.geometry import View, apply_view
from slrnet.viz.overlay import draw_overlay

__all__ = [
    "Tile",
    "best_of_each_class",
    "code_figure",
    "draw_grid",
    "feature_figure",
    "feature_rgb",
    "features_around",
    "iteration_figure",
    "mask_figure",
]

Pixels = npt.NDArray[np.uint8]

PAGE_WIDTH = 7.2
"""Width of a figure, inches: that of the paper's text."""


@dataclass(frozen=True)
class Tile:
    """A picture in a figure."""

    picture: Pixels
    """(H, W, 3)."""
    title: str = ""
    """Text above it."""


def draw_grid(
    rows: Sequence[Sequence[Tile | None]],
    *,
    names: Sequence[str] = (),
    legend: Sequence[tuple[str, Sequence[int]]] = (),
    scale: bool = False,
) -> Figure:
    """Draws tiles in rows and columns at the paper's width.

    Args:
        rows: of equally many tiles; None leaves a place empty.
        names: of the rows, written at their left; empty for none.
        legend: names and RGB colours, 0 to 255, of the classes shown.
        scale: draw the scale of codes below, from 0 to 1.
    """
    left, top, line = (0.3 if names else 0.04), 0.06, 0.2
    width = (PAGE_WIDTH - left - 0.04) / len(rows[0])
    shapes = [[tile.picture.shape for tile in row if tile] for row in rows]
    heights = [width * max((shape[0] / shape[1] for shape in row), default=0.1) + line for row in shapes]
    per_line = max(1, int(PAGE_WIDTH / 1.15))
    bottom = 0.08 + line * -(-len(legend) // per_line) + (0.3 if scale else 0)
    total = top + sum(heights) + bottom
    figure = Figure(figsize=(PAGE_WIDTH, total))
    y = total - top
    for place, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, tile in enumerate(row):
            if tile is not None:
                tall = (width - 0.06) * tile.picture.shape[0] / tile.picture.shape[1]
                box = (left + column * width + 0.03, y - line - tall, width - 0.06, tall)
                axes = figure.add_axes(_inches(box, total))
                axes.imshow(tile.picture, interpolation="lanczos", aspect="auto")
                axes.set_axis_off()
                axes.set_title(tile.title, fontsize=8, pad=2)
        if names:
            middle = (y - line - (height - line) / 2) / total
            figure.text(0.15 / PAGE_WIDTH, middle, names[place], fontsize=8, rotation=90, ha="center", va="center")
        y -= height
    _draw_legend(figure, legend, per_line)
    if scale:
        axes = figure.add_axes(_inches((PAGE_WIDTH / 2 - 1, bottom - 0.17, 2, 0.09), total))
        axes.imshow(heat(np.linspace(0, 1, 200, dtype=np.float32)[None]), aspect="auto", extent=(0, 1, 0, 1))
        axes.set_yticks([])
        axes.tick_params(labelsize=7, length=2, pad=1)
    return figure


def feature_figure(subject: Subject, examples: Sequence[Example]) -> Figure:
    """Fig. 2, right: the features that enter the low-rank module and those that leave it.

    A row for each image and view. Colours are the three main components of both kinds and all views of the image
    together, so that equal features have equal colours; activation is the length of a feature vector, in each map from
    its smallest (dark) to its largest (yellow).

    Raises:
        ValueError: the network has no low-rank module.
    """
    config = subject.checkpoint.config
    rows, names = [], []
    for example in examples:
        image = fit_image(_tensor(example, subject), config)
        views = [View(scale=scale, flip=None) for scale in config.views.scales]
        stride = subject.normalize.output_stride
        inputs = [channels_last(subject.normalize(apply_view(image, view, stride=stride))) for view in views]
        pairs = features_around(_slrnet(subject), inputs)
        colours = feature_rgb([feature for pair in pairs for feature in pair])
        for place, (before, after) in enumerate(pairs):
            rows.append(
                [
                    Tile(example.image, example.key if place == 0 else ""),
                    Tile(colours[2 * place], "features before"),
                    Tile(colours[2 * place + 1], "features after"),
                    Tile(_activation(before), "activation before"),
                    Tile(_activation(after), "activation after"),
                ]
            )
            names.append(f"scale {views[place].scale:g}")
    return draw_grid(rows, names=names)


def mask_figure(subject: Subject, examination: Examination, *, number: int) -> Figure:
    """Fig. 3: image, truth and prediction; on the left the images with the highest IoU, on the right the lowest.

    Args:
        subject: network and data.
        examination: of the split that the images come from.
        number: rows.
    """
    classes, palette = subject.checkpoint.state.classes, subject.shards.info.palette_array()
    halves = [
        read_examples(subject, examination.split, choose_by_iou(examination.scores, number, hardest=hardest))
        for hardest in (False, True)
    ]
    rows, shown = [], set[int]()
    for simple, hard in zip(*halves, strict=True):
        row = []
        for example in (simple, hard):
            row += [
                Tile(example.image, example.key),
                Tile(np.asarray(draw_overlay(example.image, example.truth, palette)), "truth"),
                Tile(
                    np.asarray(draw_overlay(example.image, example.mask, palette)),
                    f"prediction, mIoU {100 * example.miou:.0f}",
                ),
            ]
            shown |= {*np.unique(example.mask).tolist(), *np.unique(example.truth).tolist()} - {0, 255}
        rows.append(row)
    return draw_grid(rows, legend=[(classes[index], palette[index].tolist()) for index in sorted(shown)])


def code_figure(subject: Subject, examination: Examination, *, number: int) -> Figure:
    """Fig. 5: for each class the code of its atom on the image where the class is predicted best, three a row.

    Args:
        subject: network and data.
        examination: of the split that the images come from.
        number: most classes.

    Raises:
        ValueError: the network has no low-rank module, or one whose atoms are no classes.
    """
    model = _slrnet(subject)
    if model.cvlr is None or not model.cvlr.class_codes:
        raise ValueError(
            f"{subject.checkpoint.path} has no low-rank module whose atoms are classes, so Fig. 5 cannot be drawn; "
            "slrnet codes draws the codes of other atoms"
        )
    chosen = dict(list(best_of_each_class(examination.scores).items())[:number])
    examples = {one.key: one for one in read_examples(subject, examination.split, list(chosen.values()))}
    palette, config = subject.shards.info.palette_array(), subject.checkpoint.config
    tiles: list[Tile | None] = []
    for index, score in chosen.items():
        example, name = examples[score.key], subject.checkpoint.state.classes[index]
        maps = _code_maps(subject, example, [config.cvlr.num_iters])
        only = np.where(example.truth == index, index, 0).astype(np.uint8)
        code = maps[config.cvlr.num_iters][index]
        tiles += [Tile(np.asarray(draw_overlay(example.image, only, palette)), f"{name}, truth"), _code(code, name)]
    tiles += [None] * (-len(tiles) % 6)
    return draw_grid([tiles[start : start + 6] for start in range(0, len(tiles), 6)], scale=True)


def iteration_figure(
    subjects: Sequence[Subject], examples: Sequence[Example], scores: Sequence[ImageScore], num_iters: Sequence[int]
) -> Figure:
    """Fig. 7: the code of each image's main class after several numbers of iterations, at an early and a late epoch.

    Args:
        subjects: checkpoints of one training, early first.
        examples: images.
        scores: of the images, for their main classes.
        num_iters: values of T, each >= 1.

    Raises:
        ValueError: a network has no low-rank module.
    """
    rows, names = [], []
    for subject in subjects:
        for example, score in zip(examples, scores, strict=True):
            maps = _code_maps(subject, example, num_iters)
            name = subject.checkpoint.state.classes[score.main_class]
            codes = [_code(maps[count][score.main_class], f"T = {count}") for count in num_iters]
            rows.append([Tile(example.image, f"{example.key}: {name}"), *codes])
            names.append(f"epoch {subject.checkpoint.state.epoch}")
    return draw_grid(rows, names=names, scale=True)


def best_of_each_class(scores: Sequence[ImageScore]) -> dict[int, ImageScore]:
    """By foreground class, ascending, the image whose true mask holds it and on which its IoU is highest."""
    found: dict[int, ImageScore] = {}
    for score in scores:
        for index in (np.flatnonzero(score.true_pixels[1:]) + 1).tolist():
            if index not in found or score.iou[index] > found[index].iou[index]:
                found[index] = score
    return dict(sorted(found.items()))


@torch.no_grad()
def features_around(model: SLRNet, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The features of one image before and after the low-rank module, per view (C, h, w), on the CPU.

    Args:
        model: in evaluation mode.
        views: per view (1, 3, H, W), normalised.

    Raises:
        ValueError: the network has no low-rank module.
    """
    if model.cvlr is None:
        raise ValueError("the network was trained without a low-rank module (cvlr.enabled is false): nothing to draw")
    seen: list[tuple[Any, Any]] = []
    handle = model.cvlr.register_forward_hook(lambda _, given, result: seen.append((given[0], result.features)))
    try:
        model(list(views))
    finally:
        handle.remove()
    before, after = seen[0]
    return [(one[0].float().cpu(), two[0].float().cpu()) for one, two in zip(before, after, strict=True)]


def feature_rgb(maps: Sequence[Tensor]) -> list[Pixels]:
    """Colours of feature maps (C, h, w) by their three main components, common to all maps: per map (h, w, 3).

    Each component spans its range between the 1st and the 99th percentile; with fewer than three channels the others
    stay grey.
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
    colours = np.rint(255 * shares.T).astype(np.uint8)
    ends = np.cumsum([one[0].numel() for one in maps])
    return [part.reshape(*one.shape[1:], 3) for part, one in zip(np.split(colours, ends[:-1]), maps, strict=True)]


def _activation(features: Tensor) -> Pixels:
    length = features.norm(dim=0).numpy()
    return heat((length - length.min()) / max(float(np.ptp(length)), 1e-12))


def _code(codes: npt.NDArray[np.float32], title: str) -> Tile:
    return Tile(heat(codes), title)


def _code_maps(subject: Subject, example: Example, num_iters: Sequence[int]) -> dict[int, npt.NDArray[np.float32]]:
    image = fit_image(_tensor(example, subject), subject.checkpoint.config)
    return code_maps(_slrnet(subject), image, subject.normalize, num_iters).codes


def _slrnet(subject: Subject) -> SLRNet:
    if not isinstance(subject.model, SLRNet):
        raise ValueError(f"{subject.checkpoint.path} is a {type(subject.model).__name__}; name a checkpoint of SLRNet")
    return subject.model


def _tensor(example: Example, subject: Subject) -> Tensor:
    return torch.from_numpy(example.image).permute(2, 0, 1).contiguous().to(subject.device)


def _inches(box: tuple[float, float, float, float], height: float) -> tuple[float, float, float, float]:
    return box[0] / PAGE_WIDTH, box[1] / height, box[2] / PAGE_WIDTH, box[3] / height


def _draw_legend(figure: Figure, legend: Sequence[tuple[str, Sequence[int]]], per_line: int) -> None:
    if legend:
        patches = [
            Patch(facecolor=[value / 255 for value in colour], edgecolor="#555555", linewidth=0.5, label=name)
            for name, colour in legend
        ]
        figure.legend(handles=patches, loc="lower center", ncols=min(per_line, len(patches)), fontsize=8, frameon=False)
