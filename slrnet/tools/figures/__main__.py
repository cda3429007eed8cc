# PYTHON_ARGCOMPLETE_OK
"""The paper's figures and tables: `python -m slrnet.tools.figures fig2|fig3|fig5|fig7|tables CHECKPOINT... --out DIR`.

fig2 draws the features before and after the low-rank module, fig3 the masks of simple and hard images, fig5 the codes
of the classes, each of one checkpoint. fig7 draws codes over T at an early and a late epoch: of two checkpoints of a
training, or of the first and the last one that a run's folder holds. Images are those of the validation split, chosen
by IoU. tables writes tables 1 to 6 with our figures from the records below the folders that are given.

Exit status: 0, or 2 for wrong arguments and damaged files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from slrnet.checkpoints.checkpoint import Checkpoint, load_checkpoint
from slrnet.checkpoints.run_store import run_argument
from slrnet.completion import parse
from slrnet.data.manifest import load_dataset
from slrnet.evaluation.examine import Examination, Subject, choose_by_iou, examine, read_examples
from slrnet.storage.files import written_whole
from slrnet.tools.figures.pictures import code_figure, feature_figure, iteration_figure, mask_figure
from slrnet.tools.figures.tables import read_results, write_tables
from slrnet.tools.predict import positive

__all__ = ["main"]

FIGURES = ("fig2", "fig3", "fig5", "fig7")
DEFAULT_IMAGES = {"fig2": 2, "fig3": 4, "fig5": 9, "fig7": 2}
"""Images, rows, classes and images of each epoch, for a figure that fits on a page."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 2 for wrong arguments and damaged files."""
    options = parse(_parser(), arguments)
    try:
        if options.what == "tables":
            written = _write_tables(options)
        else:
            written = _write_figure(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


def _write_tables(options: argparse.Namespace) -> list[Path]:
    results, unused = read_results(options.checkpoints)
    for line in unused:
        print(f"left out: {line}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / "tables.md"
    with written_whole(path) as incoming:
        incoming.write_text(write_tables(results), encoding="utf-8")
    return [path]


def _write_figure(options: argparse.Namespace) -> list[Path]:
    checkpoints = _checkpoints(options.what, options.checkpoints)
    config = checkpoints[-1].config
    shards = load_dataset(options.data or config.data.path)
    subjects = [Subject.of(checkpoint, shards, options.device) for checkpoint in checkpoints]
    examination = examine(subjects[-1], config.data.val_split, at_most=options.measured)
    figure = _draw(options.what, subjects, examination, options)
    options.out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = [options.out / f"{options.what}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        with written_whole(path) as incoming:
            figure.savefig(incoming, dpi=220)
    return paths


def _draw(what: str, subjects: Sequence[Subject], examination: Examination, options: argparse.Namespace) -> Figure:
    subject, number = subjects[-1], options.images or DEFAULT_IMAGES[what]
    if what == "fig3":
        return mask_figure(subject, examination, number=number)
    if what == "fig5":
        return code_figure(subject, examination, number=number)
    scores = choose_by_iou(examination.scores, number, hardest=False)
    examples = read_examples(subject, examination.split, scores)
    if what == "fig2":
        return feature_figure(subject, examples)
    return iteration_figure(subjects, examples, scores, options.num_iters)


def _checkpoints(what: str, paths: Sequence[Path]) -> list[Checkpoint]:
    """The checkpoints that a figure is of, early first."""
    if what != "fig7":
        if len(paths) != 1:
            raise ValueError(f"{len(paths)} checkpoints are given; {what} is of one")
        return [load_checkpoint(paths[0])]
    kept = sorted((paths[0] / "checkpoints").glob("checkpoint-*")) if len(paths) == 1 else list(paths)
    found = sorted((load_checkpoint(path) for path in kept), key=lambda checkpoint: checkpoint.state.step)
    if len(paths) == 1 and len(found) > 2:
        found = [found[0], found[-1]]
    if len({checkpoint.state.epoch for checkpoint in found}) < 2 or len(found) > 2:
        raise ValueError(
            f"fig7 needs an early and a late checkpoint of a training, and {', '.join(map(str, paths))} "
            f"gives {len(found)}; name two checkpoints of different epochs, or a run's folder that holds two"
        )
    if found[0].state.classes != found[1].state.classes:
        raise ValueError(f"{found[0].path} and {found[1].path} know different classes; name two of one training")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slrnet.tools.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*FIGURES, "tables"), help="what to make")
    parser.add_argument(
        "checkpoints",
        type=run_argument,
        nargs="+",
        metavar="CHECKPOINT",
        help="a checkpoint, or a run's folder (its best one)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with shards (default: that of the training)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for PNG and PDF, or for tables.md"
    )
    parser.add_argument("--images", type=positive, metavar="N", help=f"defaults: {DEFAULT_IMAGES}")
    parser.add_argument("--measured", type=positive, metavar="N", help="images to choose from (default: all)")
    parser.add_argument(
        "--num-iters", type=positive, nargs="+", default=[1, 2, 3, 6], metavar="T", help="of fig7 (default: 1 2 3 6)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
