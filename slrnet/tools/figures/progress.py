"""What a run learned, for people: validation masks of its best checkpoint, and pseudo labels over the epochs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.data.batch import EvalSample
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.images import open_image, rgb_pixels
from slrnet.data.manifest import load_dataset
from slrnet.evaluation.examine import EvaluationTarget
from slrnet.storage.files import written_whole
from slrnet.viz.overlay import Mask, draw_overlay
from slrnet.viz.panels import Tile, class_legend, draw_grid

__all__ = ["draw_history", "draw_validation", "write_pictures"]


def write_pictures(run: Path) -> list[Path]:
    """Draws `validation.png` and, if the run has pseudo labels, `history.png` into its folder; returns the files.

    Raises:
        CheckpointError: the run has no checkpoint.
        DataError: its data set is not where the training read it.
    """
    pictures = {"validation": draw_validation(run), "history": draw_history(run)}
    drawn = {run / f"{name}.png": picture for name, picture in pictures.items() if picture is not None}
    for path, picture in drawn.items():
        with written_whole(path) as incoming:
            picture.save(incoming, format="PNG")
    return list(drawn)


def draw_validation(run: Path, *, number: int = 8) -> Image.Image:
    """Draws the first `number` validation images, their masks by the best checkpoint, and the true masks, two a row."""
    checkpoint = load_checkpoint(run)
    split, shards = checkpoint.config.data.val_split, load_dataset(checkpoint.config.data.path)
    target, info = EvaluationTarget.of(checkpoint, shards), shards.info
    images, shown = list[list[Tile]](), list[Mask]()
    for sample in EvalLoader(shards, split=split, indices=range(min(number, shards.split(split).num_samples))):
        masks = _masks(target, sample)
        picture = sample.image.permute(1, 2, 0).contiguous().numpy()
        overlays = {name: np.asarray(draw_overlay(picture, mask, info.palette_array())) for name, mask in masks.items()}
        images.append([Tile(picture, sample.key), *(Tile(overlay, name) for name, overlay in overlays.items())])
        shown += masks.values()
    rows = [[tile for image in images[start : start + 2] for tile in image] for start in range(0, len(images), 2)]
    title = f"Validation images; masks of the best checkpoint, epoch {checkpoint.state.epoch}"
    return draw_grid(rows, title=title, legend=class_legend(shown, info.palette_array(), info.classes))


def draw_history(run: Path, *, number: int = 4) -> Image.Image | None:
    """Draws the pseudo labels of `number` training images after each measured epoch; None if the run has none."""
    epochs = defaultdict[str, list[Tile]](list)
    for path in sorted((run / "history").rglob("[!.]*-epoch-*.png")):
        key, _, epoch = path.relative_to(run / "history").with_suffix("").as_posix().rpartition("-epoch-")
        with open_image(path) as picture:
            epochs[key].append(Tile(rgb_pixels(picture), f"epoch {int(epoch)}"))
    return draw_grid(list(epochs.values())[:number], title="Pseudo labels of training images") if epochs else None


def _masks(target: EvaluationTarget, sample: EvalSample) -> dict[str, Mask]:
    masks: dict[str, Mask] = {"mask": target.predict(sample).argmax(dim=0).numpy().astype(np.uint8)}
    return masks if sample.pixel_labels is None else masks | {"truth": sample.pixel_labels.numpy()}
