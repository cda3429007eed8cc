"""A figure of the paper from checkpoints: which one, of which images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from slrnet.checkpoints.checkpoint import Checkpoint, load_checkpoint
from slrnet.data.manifest import load_dataset
from slrnet.evaluation.examine import EvaluationTarget, Examination, choose_by_iou, examine, read_examples
from slrnet.storage.files import written_whole
from slrnet.tools.figures.pictures import code_figure, feature_figure, iteration_figure, mask_figure

__all__ = ["write_figure"]


def write_figure(
    what: str,
    checkpoints: Sequence[Path],
    out: Path,
    *,
    number: int,
    num_iters: Sequence[int],
    data: Path | None = None,
    measured: int | None = None,
    device: str | None = None,
) -> list[Path]:
    """Draws a figure of the paper, of images of the validation split that are chosen by IoU, as PNG and PDF.

    Args:
        what: "fig2", "fig3", "fig5" or "fig7".
        checkpoints: the checkpoint or run; for fig7 two checkpoints, or a run that holds two.
        out: folder to write to.
        number: images (fig2, fig7), rows (fig3) or classes (fig5) to draw.
        num_iters: values of T in fig7.
        data: folder with shards; None for that of the training.
        measured: largest number of images to choose from; None for all.
        device: device of the network; None for a GPU if there is one.

    Returns:
        The files.

    Raises:
        ValueError: the checkpoints do not fit the figure.
    """
    loaded = _checkpoints(what, checkpoints)
    config = loaded[-1].config
    shards = load_dataset(data or config.data.path)
    targets = [EvaluationTarget.of(checkpoint, shards, device) for checkpoint in loaded]
    examination = examine(targets[-1], config.data.val_split, at_most=measured)
    figure = _draw(what, targets, examination, number, num_iters)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{what}.{kind}" for kind in ("png", "pdf")]
    for file in files:
        with written_whole(file) as incoming:
            figure.savefig(incoming, dpi=220)
    return files


def _draw(
    what: str, targets: Sequence[EvaluationTarget], examination: Examination, number: int, num_iters: Sequence[int]
) -> Figure:
    target = targets[-1]
    if what == "fig3":
        return mask_figure(target, examination, number=number)
    if what == "fig5":
        return code_figure(target, examination, number=number)
    scores = choose_by_iou(examination.scores, number, hardest=False)
    examples = read_examples(target, examination.split, scores)
    if what == "fig2":
        return feature_figure(target, examples)
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
    early, late = checkpoints
    if early.state.classes != late.state.classes:
        raise ValueError(f"{early.path} and {late.path} know different classes; name two of one training")
    return checkpoints
