"""Commands that exchange networks and results with others: `slrnet export`, `convert-weights`, `voc-archive`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from slrnet.cli.arguments import (
    DEVICE,
    add_protocol,
    checkpoint,
    command,
    one_of,
    option,
    output_file,
    output_folder,
    sole,
)
from slrnet.config import Setting
from slrnet.storage.shown import say

__all__ = ["convert_weights", "export", "voc_archive"]


@command(
    checkpoint(),
    option(
        "--out",
        type=output_folder,
        required=True,
        metavar="DIR",
        help="folder for network.pt2, network.onnx, export.json",
    ),
    one_of(
        option("--no-onnx", action="store_true", help="torch.export alone, without the extra `export`"),
        option("--mlflow", metavar="NAME", help="also log the ONNX file to the training's run"),
    ),
)
@sole
def export(options: argparse.Namespace) -> None:
    """Write a network for other programs: `slrnet export RUN --out FOLDER`.

    Writes `torch.export` (network.pt2) and ONNX (network.onnx, the extra `export`) of one view: RGB images in [0, 1] of
    any size in, probabilities and class scores out, batch and size open. The program normalizes and resizes by itself.
    DINOv3 and Hiera get one size, the training crop's, as PyTorch cannot trace them for others.
    Both files are compared with the network before they take their names. `--mlflow` also logs the
    ONNX file to the training's run, as a model that `mlflow models serve` serves.

    Several scales, gating, the power of the background, tiles and the CRF are not in the programs: they need several
    passes or a CPU. `slrnet.load` has them. export.json and the last line name those that the run's settings use.
    """
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.tools.export import export_network, log_to_training_run

    checkpoint = load_checkpoint(options.checkpoint.expanduser())
    record = export_network(checkpoint, options.out, onnx=not options.no_onnx)
    served = ""
    if options.mlflow:
        uri = log_to_training_run(checkpoint, options.mlflow, options.out / "network.onnx")
        served = f"; serve it: mlflow models serve -m {uri} --env-manager local"
    say(json.dumps(record["largest_difference"]))
    if reason := record["input"].get("why_one_size"):
        say(f"images of one size alone, {record['input']['layout']}: {reason}; slrnet.load takes any size")
    if record["left_out"]:
        settings = ", ".join(f"{name}={value}" for name, value in record["left_out"].items())
        say(f"left out: {settings}; slrnet.load applies it")
    say(f"written to {options.out}{checkpoint.config.weights_note}{served}")


@command(
    option("file", type=Path, help="published .pth file"),
    option(
        "--out", type=output_folder, required=True, metavar="DIR", help="new folder for the run with its checkpoint"
    ),
    option("--classes", metavar="A,B", help="comma-separated names, background first (default: VOC's 21)"),
    option(
        "--setting",
        choices=get_args(Setting),
        help="labels it was trained on; name sss_image_labels for the one with masks and image labels, whose tensors "
        "are those of wsss (default: sss if it predicts the background, else wsss)",
    ),
)
@sole
def convert_weights(options: argparse.Namespace) -> None:
    """Turn a published checkpoint into one of ours: `slrnet convert-weights FILE --out DIR`.

    Reads the authors' checkpoints (WideResNet-38, any of the three settings) and those of 1-Stage with WideResNet-38,
    and writes a run whose checkpoint all commands take. Nothing in the file can run code.
    """
    from slrnet.checkpoints.checkpoint import save_checkpoint
    from slrnet.data.catalog import VOC_CLASSES
    from slrnet.tools.convert_weights import released_checkpoint

    if options.out.exists():
        raise ValueError(f"{options.out} exists; name a new folder")
    classes = options.classes.split(",") if options.classes else VOC_CLASSES
    read = released_checkpoint(options.file, classes=classes, setting=options.setting)
    folder = options.out / "checkpoints"
    path = save_checkpoint(folder, config=read.config, state=read.state, model=read.model, optimizer={})
    evaluation = read.config.evaluation
    say(
        f"{len(read.model)} tensors written to {path}, as trained in setting {read.config.setting}; to measure: gating "
        f"{evaluation.gating}, background to the power {evaluation.background_power:g}"
    )


@command(
    checkpoint(),
    option("images", type=Path, help="folder with ID.jpg, for instance VOC's JPEGImages"),
    option("--list", type=Path, metavar="FILE", help="an id a line, such as test.txt (default: all images)"),
    option("--out", type=output_file, required=True, metavar="FILE", help="archive to write, for instance results.tgz"),
    add_protocol,
    DEVICE,
)
@sole
def voc_archive(options: argparse.Namespace) -> None:
    """Make the archive that VOC's evaluation server takes: `slrnet voc-archive RUN IMAGES --out FILE`.

    IMAGES is a folder of JPEGs, or a VOC folder's JPEGImages with `--list test.txt` for the images to predict. The
    archive (.tgz) holds results/VOC2012/Segmentation/comp6_test_cls/ID.png: indexed PNGs of VOC's ids 0 to 20, of the
    images' own sizes. Before it takes its name it is read back and compared with the images: count, names, sizes, ids.
    """
    from slrnet.tools.predict import load_predictor
    from slrnet.tools.voc_archive import list_images, write_voc_archive

    if options.out.exists():
        raise ValueError(f"{options.out} exists; name a new file")
    images = list_images(options.images.expanduser(), options.list)
    predictor = load_predictor(options.checkpoint, protocol=options.protocol, device=options.device)
    write_voc_archive(predictor, images, options.out)
    say(f"{len(images)} masks by {predictor.protocol} in {options.out}, checked: names, sizes, ids")
