"""Predicts masks of image files (`slrnet predict`), and makes the predictor of a checkpoint."""

from __future__ import annotations

import glob
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from slrnet.checkpoints.checkpoint import Checkpoint, load_checkpoint, restore_network
from slrnet.checkpoints.run_store import local_run
from slrnet.config import Protocol
from slrnet.data.annotation_files import TOLERANCE, AnnotationFormat, AnnotationWriter
from slrnet.data.depth import Depth
from slrnet.data.images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    encode_mask,
    left_out,
    open_image,
    rgb_pixels,
    upright_rgb,
    upright_size,
)
from slrnet.data.manifest import DataError
from slrnet.inference.predictor import Prediction, Predictor
from slrnet.storage.files import write_json, written_whole
from slrnet.storage.names import short_name
from slrnet.storage.shown import say
from slrnet.viz.overlay import Pixels, draw_overlay

__all__ = ["Written", "batches", "find_images", "load_predictor", "predict_files", "predict_images"]

OVERLAY_PIXELS = 6_000_000
"""Larger images get a smaller overlay, because drawing takes about twenty times the image's memory."""


def load_predictor(
    checkpoint: str | Path | Checkpoint, *, protocol: Protocol | None = None, device: torch.device | str | None = None
) -> Predictor:
    """Makes the predictor of a checkpoint or a run; `slrnet.load` is this function.

    Args:
        checkpoint: folder of a checkpoint, or of a run for its best one, their location in an object store, or a
            checkpoint in memory.
        protocol: `ss`, `ms` or `ms_crf`; None for `evaluation.protocol` of the checkpoint's settings.
        device: the network's device; None for a GPU if there is one.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: see `Predictor`.
    """
    if not isinstance(checkpoint, Checkpoint):
        where = local_run(str(checkpoint)) if "://" in str(checkpoint) else Path(checkpoint).expanduser()
        checkpoint = load_checkpoint(where)
    model = restore_network(checkpoint, device)
    state, depth = checkpoint.state, Depth.parse(checkpoint.state.depth)
    return Predictor(
        model,
        config=checkpoint.config,
        classes=state.classes,
        protocol=protocol,
        depth=depth,
        colors=state.palette,
    )


def find_images(places: Sequence[str]) -> dict[str, Path]:
    """Finds the images that files, folders, and patterns name, by the names of their outputs.

    An image's name is that of its file without the suffix, and with it where several differ in the suffix alone.

    Raises:
        ValueError: a place holds no image, or two images have the same name.
    """
    named, by_stem = dict[str, Path](), dict[str, dict[Path, None]]()
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            images = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(place, recursive=True))
        if not images:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{place} is no file, no folder with images and matches nothing; images end with {known}")
        for image in map(Path.resolve, images):
            by_stem.setdefault(image.stem, {})[image] = None
    for stem, images_of_stem in by_stem.items():
        for image in images_of_stem:
            full = stem if len(images_of_stem) == 1 else image.name
            if (name := short_name(full)) != full:
                say(f"{image}: its name is too long for a suffix; its outputs are called {name}", error=True)
            if named.setdefault(name, image) != image:
                raise ValueError(f"several images are called {name!r}; predict them into different folders (--out)")
    return named


def _summarize(prediction: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    """An image's entry in predictions.json. The background has no score; in setting `sss` no class has."""
    height, width = prediction.mask.shape
    counts = Image.fromarray(prediction.mask).histogram()  # np.bincount would take eight bytes a pixel
    scores: list[float | None] = [None] * len(classes)
    if prediction.class_scores is not None:
        scores[1:] = [round(float(score), 4) for score in prediction.class_scores]
    return {
        "height": height,
        "width": width,
        "classes": {
            name: {"area": round(counts[i] / prediction.mask.size, 6), "score": scores[i]}
            for i, name in enumerate(classes)
            if counts[i]
        },
    }


def batches(images: Mapping[str, Path], size: int) -> Iterator[list[str]]:
    """Yields names of images of one size, in lists of at most `size`; an image that cannot be opened is alone.

    Only the headers are read.
    """
    by_size: dict[tuple[int, ...], list[str]] = {}
    for place, (name, path) in enumerate(images.items()):
        try:
            with open_image(path, max_pixels=sys.maxsize) as file:
                shape: tuple[int, ...] = upright_size(file)
        except DataError:
            shape = (place,)
        by_size.setdefault(shape, []).append(name)
    for names in by_size.values():
        yield from (names[start : start + size] for start in range(0, len(names), size))


class Written(NamedTuple):
    """What `predict_files` wrote."""

    masks: dict[str, Path]
    """The masks' paths by the images' names."""
    left_out: int
    """Number of images that could not be read."""
    predictor: Predictor


def predict_files(
    checkpoint: str | Path,
    places: Sequence[str],
    out: Path,
    *,
    protocol: Protocol | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Written:
    """Finds images, and writes their masks with a checkpoint's network.

    Args:
        checkpoint: see `load_predictor`.
        places: see `find_images`.
        out: folder to write to.
        protocol: see `load_predictor`.
        device: see `load_predictor`.
        overwrite: whether masks that exist are replaced.
        options: of `predict_images`.

    Raises:
        ValueError: see `find_images` and `load_predictor`; or a mask exists.
    """
    images = find_images(places)
    written = (out / f"{name}{ending}" for name in images for ending in (".png", ".overlay.jpg"))
    existing = [path for path in written if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists; give another --out, or allow it with --overwrite")
    predictor = load_predictor(checkpoint, protocol=protocol, device=device)
    done = predict_images(predictor, images, out, source=Path(checkpoint), **options)
    return Written({name: out / f"{name}.png" for name in done}, len(images) - len(done), predictor)


def predict_images(
    predictor: Predictor,
    images: Mapping[str, Path],
    out: Path,
    *,
    source: Path,
    batch_size: int = 1,
    depth: Depth | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[AnnotationFormat] = (),
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Writes masks and predictions.json (the classes of each image, their share of the pixels, and their scores).

    Args:
        predictor: the predictor.
        images: paths by name; NAME gives NAME.png, a palette PNG of class ids in the colors of the training's data
            set, and NAME.overlay.jpg to look at.
        out: folder to write to.
        source: the checkpoint that predictions.json names.
        batch_size: images of one size to predict at a time, >= 1.
        depth: how images of more than 8 bits are scaled; None as those that the checkpoint was trained on.
        max_pixels: larger images are left out.
        formats: annotations to write besides, see `annotation_files`; labelme's go to the folder `labelme`.
        tolerance: how much their polygons may move a border, pixels.

    Returns:
        The names of the images that have masks; a line on stderr says of each other one why it could not be read.
    """
    if predictor.inference.device.type == "cpu":
        from slrnet.cpu.allocator import keep_memory

        keep_memory()
    records: dict[str, Any] = {}
    tools = AnnotationWriter(
        out=out, labelme=out / "labelme", classes=predictor.classes, formats=formats, tolerance=tolerance
    )
    palette = predictor.palette
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        for batch in batches(images, batch_size):
            read = {name: _read(images[name], depth or predictor.depth, max_pixels) for name in batch}
            pixels = {name: image for name, image in read.items() if image is not None}
            for name, prediction in zip(pixels, predictor.predict_batch(list(pixels.values())), strict=True):
                step = math.ceil(math.sqrt(prediction.mask.size / OVERLAY_PIXELS))
                small, mask = pixels[name][::step, ::step], prediction.mask[::step, ::step]
                with written_whole(out / f"{name}.overlay.jpg") as incoming:
                    draw_overlay(small, mask, palette).save(incoming)
                with written_whole(out / f"{name}.png") as incoming:
                    incoming.write_bytes(encode_mask(prediction.mask, palette))
                if formats:
                    tools.add(name, _relative(images[name], tools.labelme), prediction.mask)
                records[name] = {"image": str(images[name])} | _summarize(prediction, predictor.classes)
            bar.update(len(batch))
    ordered = {name: records[name] for name in images if name in records}
    content = {"checkpoint": str(source), "protocol": predictor.protocol, "images": ordered}
    write_json(out / "predictions.json", content)
    tools.close()
    return list(ordered)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder.resolve())).as_posix()


def _read(path: Path, depth: Depth, max_pixels: int) -> Pixels | None:
    try:
        with open_image(path, remedy="it is left out", max_pixels=max_pixels) as file:
            if (clause := left_out(file)) is not None:
                say(f"{path} {clause}", error=True)
            return rgb_pixels(upright_rgb(file, depth))
    except DataError as error:
        say(error, error=True)
        return None
