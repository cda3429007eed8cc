"""Commands that show what a network sees: `slrnet predict`, `report`, `review`, `app` and others."""

from __future__ import annotations

import argparse
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from slrnet.cli.arguments import (
    ANNOTATION_FORMATS,
    DEVICE,
    SKIP_DAMAGED,
    TOLERANCE,
    add_protocol,
    annotation_folder,
    checkpoint,
    command,
    data_location,
    one_of,
    option,
    output_file,
    output_folder,
    place,
    positive,
    sole,
)
from slrnet.storage.shown import LEFT_OUT, say
from slrnet.tools.figures import FIGURES

if TYPE_CHECKING:
    from slrnet.checkpoints.checkpoint import Checkpoint
    from slrnet.data.manifest import ShardSet
    from slrnet.tools.review.desk import ReviewDesk

__all__ = ["app", "codes", "dashboard", "figures", "predict", "report", "review", "watch"]


@command(
    checkpoint(),
    option("images", nargs="+", metavar="IMAGE", help="files, folders or quoted patterns"),
    option("--out", type=output_folder, required=True, metavar="DIR", help="folder for the masks"),
    add_protocol,
    DEVICE,
    option("--batch-size", type=positive, default=1, metavar="N", help="images at a time (default: 1)"),
    option("--depth", metavar="DEPTH", help="of images of more than 8 bits (default: that of the training data)"),
    option("--max-pixels", type=positive, metavar="N", help="larger images are left out (default: 500 million)"),
    option("--overwrite", action="store_true", help="replace masks that exist"),
    SKIP_DAMAGED,
    option(
        "--also",
        action="append",
        default=[],
        choices=ANNOTATION_FORMATS,
        help="also write annotations for other tools; repeatable",
    ),
    TOLERANCE,
)
@sole
def predict(options: argparse.Namespace) -> int:
    """Make masks of images: `slrnet predict CHECKPOINT IMAGE... --out DIR`.

    IMAGE is a file, a folder (its images, not those of folders in it) or a quoted pattern such as 'photos/**/*.jpg'.
    Each image NAME gives NAME.png, a palette PNG of class ids, NAME.overlay.jpg for people, and an entry in
    predictions.json: its classes, their share of the pixels and their scores. The colors are those of the data set that
    the checkpoint was trained on. Images that cannot be read are named and left out; the others are done.

    Large images are predicted in tiles, up to --max-pixels, with about 12 bytes of memory for each pixel. Images of
    more than 8 bits are scaled as those of the training data were; --depth (12, 0..1, uint16=0..4095) names another
    range, or the one that a checkpoint does not know.

    `--also coco` writes coco.json (exact run lengths), `--also coco-polygons` coco-polygons.json, `--also labelme` a
    file labelme/NAME.json for each image, with polygons. Needs the extra `coco`. Corrected annotations come back with
    `slrnet prepare folder --annotations`.
    """
    from slrnet.data.depth import Depth
    from slrnet.data.images import MAX_PIXELS
    from slrnet.tools.predict import predict_files

    depth = None if options.depth is None else Depth.parse(options.depth)
    limits = {"batch_size": options.batch_size, "depth": depth, "max_pixels": options.max_pixels or MAX_PIXELS}
    tools = {"formats": tuple(dict.fromkeys(options.also)), "tolerance": options.tolerance}
    choice = {"protocol": options.protocol, "device": options.device, "overwrite": options.overwrite}
    masks, failed, predictor = predict_files(
        options.checkpoint, options.images, options.out, **choice, **limits, **tools
    )
    unread = f"; {failed} images were left out" if failed else ""
    say(f"{len(masks)} masks in {options.out}{predictor.config.weights_note}{unread}")
    return LEFT_OUT if failed and not options.skip_damaged else 0


@command(
    checkpoint("runs", nargs="+", metavar="RUN_OR_CHECKPOINT"),
    option("--out", type=output_file, default="report.html", metavar="FILE", help="default: %(default)s"),
    option("--data", type=place, metavar="DIR", help="folder with shards (default: that of each training)"),
    option("--images", type=positive, default=4, metavar="N", help="best, worst images, code maps each (default: 4)"),
    option("--measured", type=positive, metavar="N", help="images to measure at most (default: all)"),
    DEVICE,
)
@sole
def report(options: argparse.Namespace) -> None:
    """Write an HTML page about one run or several: `slrnet report RUN_OR_CHECKPOINT... [--out FILE.html]`.

    Settings, curves, scores per class, confusions, best and worst images, the way from mask to pseudo label over the
    epochs, code maps, calibration. The file needs no network and nothing beside it. It says what a run does not have,
    and why.
    """
    from slrnet.storage.files import write_text
    from slrnet.tools.report.measurements import measure_run
    from slrnet.tools.report.page import render
    from slrnet.tools.report.runs import read_run

    runs = [read_run(path) for path in options.runs]
    choice = {"data": options.data, "device": options.device, "images": options.images, "at_most": options.measured}
    write_text(options.out, render(runs, [measure_run(run.checkpoint, **choice) for run in runs]))
    say(f"{options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")


@command(
    option("folder", type=place, metavar="RUN", help="a run's folder, finished or not"),
    option("--out", type=output_file, metavar="FILE", help="write the page to a file, once, instead of serving it"),
    option("--port", type=int, default=7862, metavar="N", help="port on 127.0.0.1 (default: %(default)s)"),
)
def watch(options: argparse.Namespace) -> None:
    """Open a page of pictures and curves of a run in motion: `slrnet watch RUN`.

    Score, losses, quality of the masks by epoch, and the pictures of training images on their way to the pseudo label,
    from the run's folder alone. Serves on 127.0.0.1 only, until Ctrl-C; the browser loads it again every 10 seconds.
    """
    from slrnet.storage.files import write_text
    from slrnet.tools.dashboard import check_port
    from slrnet.tools.watch import render, see, serve

    folder = options.folder.resolve()
    if options.out:
        write_text(options.out, render(see(folder)))
        say(options.out)
        return
    check_port(options.port)
    see(folder)
    say(f"{folder}: http://127.0.0.1:{options.port}/ (Ctrl-C ends it)")
    serve(folder, options.port)


@command(
    option("what", choices=(*FIGURES, "tables"), help="what to make"),
    checkpoint("checkpoints", nargs="+", metavar="CHECKPOINT"),
    option("--data", type=place, metavar="DIR", help="folder with shards (default: that of the training)"),
    option("--out", type=output_folder, required=True, metavar="DIR", help="folder for PNG and PDF, or for tables.md"),
    option("--images", type=positive, metavar="N", help=f"images, rows or classes (default: {FIGURES})"),
    option("--measured", type=positive, metavar="N", help="images to choose from (default: all)"),
    option(
        "--num-iters", type=positive, nargs="+", default=[1, 2, 3, 6], metavar="T", help="T in fig7 (default: 1 2 3 6)"
    ),
    DEVICE,
)
@sole
def figures(options: argparse.Namespace) -> None:
    """Draw the paper's figures and tables: `slrnet figures fig2|fig3|fig5|fig7|tables CHECKPOINT... --out DIR`.

    fig2 draws the features before and after the low-rank module, fig3 the masks of simple and hard images, fig5 the
    codes of the classes, each of one checkpoint. fig7 draws codes over T at an early and a late epoch: of two
    checkpoints of a training, or of the first and the last one that a run's folder holds. Images are those of the
    validation split, chosen by IoU. tables writes tables 1 to 6 with our figures from the records in the folders that
    are given.
    """
    if options.what == "tables":
        from slrnet.storage.files import write_text
        from slrnet.tools.figures.tables import read_results, write_tables

        results, unused = read_results(options.checkpoints)
        for line in unused:
            say(f"left out: {line}", error=True)
        if not results:
            raise ValueError(
                f"there is no result below {', '.join(map(str, options.checkpoints))}; make some with `slrnet evaluate "
                "--checkpoint RUN`"
            )
        paths = [options.out / "tables.md"]
        write_text(paths[0], write_tables(results))
    else:
        from slrnet.tools.figures.pictures import write_figure

        shown = {"number": options.images or FIGURES[options.what], "num_iters": options.num_iters}
        source = {"data": options.data, "measured": options.measured, "device": options.device}
        paths = write_figure(options.what, options.checkpoints, options.out, **shown, **source)
    for path in paths:
        say(path)


@command(
    checkpoint(),
    option("images", nargs="+", metavar="IMAGE", help="files, folders or quoted patterns"),
    option("--out", type=output_folder, required=True, metavar="DIR", help="folder for the pictures"),
    option("--num-iters", type=int, nargs="+", metavar="T", help="default: the checkpoint's"),
    option("--classes", nargs="+", metavar="NAME", help="default: those that the mask holds"),
)
@sole
def codes(options: argparse.Namespace) -> None:
    """Draw what the dictionary's atoms stand for: `slrnet codes CHECKPOINT IMAGE... --out DIR`.

    For each image, NAME.codes.png has a row for each number of iterations (`--num-iters 1 2 6`: the paper's Fig. 7)
    and a column for each atom: the code map C_k over the image, from dark (0) to yellow (1). With CVLR an atom is a
    class, and the classes that the image's mask holds are drawn (Fig. 5); of other methods the most used atoms are.
    """
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.tools.codes import write_code_maps
    from slrnet.tools.predict import find_images

    images, checkpoint = find_images(options.images), load_checkpoint(options.checkpoint)
    for path in write_code_maps(checkpoint, images, options.out, options.num_iters, options.classes):
        say(path)


@command(
    checkpoint(nargs="?", metavar="CHECKPOINT_OR_RUN", help="default: the newest run, see above"),
    option("--port", type=int, default=7860, metavar="N", help="port on 127.0.0.1 (default: %(default)s)"),
    DEVICE,
)
def app(options: argparse.Namespace) -> None:
    """Open a page that shows what a checkpoint sees in an image: `slrnet app [CHECKPOINT_OR_RUN]`.

    Drop an image, or take one of the validation images: mask, class scores, code maps per class, and what T, gamma and
    the refinement do to the pseudo label. Serves on 127.0.0.1 only, until Ctrl-C, and sends nothing anywhere. Without
    an argument it takes the newest run of $SLRNET_STORAGE, else of ~/slrnet_runs; when neither has one, that of `make
    demo` in the folder runs. Needs the extra `app`.
    """
    _require_app()
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.tools.dashboard import check_port, default_storages, newest_run

    checkpoint = load_checkpoint(options.checkpoint or newest_run(default_storages()))
    check_port(options.port)
    from slrnet.tools.app.analyzer import Analyzer, example_images
    from slrnet.tools.app.page import serve

    analyzer = Analyzer(checkpoint, device=options.device)
    say(f"{checkpoint.path}: http://127.0.0.1:{options.port} (Ctrl-C ends it)")
    folder = checkpoint.path.resolve()
    name, examples = f"{folder.parents[1].name}, {folder.name}", example_images(checkpoint)
    serve(analyzer, name=name, port=options.port, examples=examples)


@command(
    checkpoint(metavar="RUN"),
    option("--out", type=output_folder, required=True, metavar="REVIEW", help="folder of the review; goes on if there"),
    option("--images", type=positive, default=45, metavar="N", help="images to review (default: %(default)s)"),
    option("--data", type=data_location, metavar="DIR", help="shards (default: those of the training)"),
    one_of(
        option("--hand-out", type=annotation_folder, metavar="FORM=DIR", help="write them for a tool, see above"),
        option("--corrected", type=place, metavar="EXPORT", help="take the masks that a tool exported"),
        option("--write", type=output_folder, metavar="SHARDS", help="write the data set for the next training"),
    ),
    option("--port", type=int, default=7861, metavar="N", help="port on 127.0.0.1 (default: %(default)s)"),
    DEVICE,
    interrupted="interrupted; decisions are kept, and the same command goes on",
)
@sole
def review(options: argparse.Namespace) -> None:
    """Correct the masks of which a run is least sure: `slrnet review RUN --out REVIEW`, then `--write SHARDS`.

    Ranks the training images whose masks the run's training may not see by doubt: low confidence, disagreement of the
    views, classification loss, each among images with as many classes. It reads no mask of them. Then it opens a page
    on 127.0.0.1 that shows the N most doubtful ones (needs the extra `app`): accept a mask, redraw it with a brush, or
    discard it; Ctrl-C ends the page.

    To use an annotation tool instead: `--hand-out coco-polygons=DIR` (CVAT: import as COCO 1.0) or `labelme=DIR`
    writes images and masks; `--corrected EXPORT` takes back what labelme, CVAT, Label Studio or a COCO tool exported.
    Both need the extra `coco`.

    `--write SHARDS` makes the data set for the next training: the old one, with the accepted and redrawn masks and a
    subset `reviewed` of them and of the masks that the training saw before. It prints the command that trains on it,
    from this run's weights.
    """
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.data.annotation_folder import check_annotation_folder
    from slrnet.tools.review.desk import open_desk

    checkpoint = load_checkpoint(options.checkpoint)
    if options.hand_out:
        form, folder = options.hand_out
        check_annotation_folder(checkpoint.state.classes, folder, form=form, tolerance=0.0, keep_void=True)
    elif not (options.corrected or options.write):
        _require_app()
    desk, shards = open_desk(options.out, checkpoint, data=options.data, number=options.images, device=options.device)
    if options.hand_out:
        desk.hand_out(form, folder)
        say(f"{len(desk.keys)} images with masks in {folder}; then --corrected EXPORT")
    elif options.corrected:
        taken = _take_corrections(desk, options.corrected)
        say(f"{taken} corrected masks of {len(desk.keys)} are in the review; then --write SHARDS")
    elif options.write:
        _write_reviewed(desk, shards, checkpoint, options)
    else:
        from slrnet.tools.dashboard import check_port
        from slrnet.tools.review.page import serve

        check_port(options.port)
        say(f"{len(desk.keys)} images: http://127.0.0.1:{options.port} (Ctrl-C ends it; then --write SHARDS)")
        serve(desk, name=checkpoint.path.resolve().parents[1].name, port=options.port)


def _require_app() -> None:
    if find_spec("nicegui") is None:
        raise ValueError("the page needs nicegui, which is not installed: pip install 'slrnet[app]'")


def _take_corrections(desk: ReviewDesk, export: Path) -> int:
    """Takes the masks that a tool exported into a review; returns their number."""
    from data_prep.annotated_images import annotation_mask, match_annotations
    from data_prep.annotations import read_annotations
    from data_prep.image_names import ImageNames

    names = ImageNames({key: f"{key}.jpg" for key in desk.keys})
    found = match_annotations(read_annotations(export), names, desk.classes[1:])
    masks = {
        key: annotation_mask(desk.folder / "images" / f"{key}.jpg", annotation, found.class_ids)
        for key, annotation in found.drawn.items()
    }
    for key, mask in masks.items():
        desk.decide(key, "redrawn", mask)
    return len(masks)


def _write_reviewed(desk: ReviewDesk, shards: ShardSet, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Writes the data set of the next training, and says how to start it."""
    from slrnet.tools.review.reviewed_shards import SUBSET, write_reviewed

    command = ["slrnet", "review", str(options.checkpoint), "--out", str(options.out)]
    number = write_reviewed(shards, checkpoint.config, desk.masks(), options.write, made_by=shlex.join(command))
    left = len(desk.keys) - len(desk.decisions)
    unseen = f"; {left} images of the review are undecided, and have no mask in it" if left else ""
    say(f"{options.write}: training may see the masks of {number} images (subset {SUBSET}){unseen}")
    setting = "sss" if checkpoint.config.setting == "sss" else "sss_image_labels"
    words = ["--init", str(options.checkpoint), "--data", str(options.write.resolve()), "--set", f"setting={setting}"]
    say("next: " + shlex.join(["slrnet", "train", *words, "--set", f"data.pixel_labeled_subset={SUBSET}"]))


@command(
    option("--storage", type=place, metavar="DIR", help="folder of runs (default: see above)"),
    option("--port", type=int, default=5000, metavar="N", help="port on 127.0.0.1 (default: %(default)s)"),
)
def dashboard(options: argparse.Namespace) -> int:
    """Open MLflow's page over the runs of a storage folder: `slrnet dashboard`; `make dashboard` runs it.

    Serves on loopback only, until Ctrl-C. Without --storage it takes $SLRNET_STORAGE, else ~/slrnet_runs; when neither
    has runs, those of `make demo` in the folder runs. When the server ends by itself, the exit status is the server's.
    """
    from slrnet.tools.dashboard import serve

    return serve(options.storage, options.port)
