"""Surveys a prepared data set: labels, masks, duplicates, and contact sheets (`slrnet browse`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from PIL import Image, ImageOps
from tabulate import tabulate
from tqdm import tqdm

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DatasetInfo, ShardSet, load_dataset
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.storage.files import write_text, written_whole
from slrnet.viz.lettering import drawable_names
from slrnet.viz.overlay import draw_overlay
from slrnet.viz.panels import Tile, class_legend, draw_grid

__all__ = ["SplitSurvey", "browse", "contact_sheet", "find_duplicates", "survey_split", "warnings_of"]

KINDS = {
    (True, True): "mask and image labels",
    (True, False): "mask alone",
    (False, True): "image labels alone",
    (False, False): "no label",
}
"""Kinds of labels, by whether a sample has a mask and image labels."""

MUCH_VOID = 0.25
"""Share of void pixels above which there is a warning; VOC's borders take about 0.05."""
MOST_LISTED = 5
"""Most keys or classes that a warning lists."""
SampleName = tuple[str, str]
"""Split and key of a sample."""

_TILE, _COLUMNS = 200, 3
"""Largest side of a picture on a contact sheet, pixels, and the number of samples in a row."""


@dataclass(frozen=True, kw_only=True)
class SplitSurvey:
    """Labels of a split, counted in the manifest, and pixels, counted in some of its masks."""

    name: str
    kinds: dict[str, int]
    """Number of samples by the kind of their labels."""
    images: npt.NDArray[np.int64]
    """(K-1,) images whose labels name class c + 1."""
    measured: int
    """Number of masks that the shares of pixels come from."""
    pixels: npt.NDArray[np.float64]
    """(K,) share of each class, background first, of the pixels that are not void; zeros without masks."""
    void: float
    """Share of void pixels."""
    all_void: tuple[str, ...]
    """Keys of measured samples whose masks are void everywhere."""
    beyond_labels: tuple[str, ...]
    """Keys of measured samples whose masks show a class that their image labels lack."""

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return sum(self.kinds.values())


def survey_split(shard_set: ShardSet, name: str, *, measured: int, seed: int = 0) -> SplitSurvey:
    """Counts the labels of split `name`, and measures at most `measured` masks, which `seed` chooses.

    Raises:
        DataError: there is no such split, or a sample that is read is damaged.
    """
    view, num_classes = shard_set.split(name), shard_set.info.num_classes
    chosen = choose_subset(view, measured, seed=seed, among=view.with_masks)
    counts = np.zeros(256, dtype=np.int64)
    all_void, beyond = [], []
    for sample in EvalLoader(shard_set, split=name, indices=chosen):
        assert sample.pixel_labels is not None
        own = np.bincount(sample.pixel_labels.numpy().ravel(), minlength=256)
        counts += own
        if own[IGNORE_INDEX] == own.sum():
            all_void.append(sample.key)
        if sample.has_image_labels and (own[1:num_classes] > 0)[sample.image_labels.numpy() == 0].any():
            beyond.append(sample.key)
    pairs = list(zip(view.column("has_mask").to_pylist(), view.column("has_image_labels").to_pylist(), strict=True))
    return SplitSurvey(
        name=name,
        kinds={kind: number for pair, kind in KINDS.items() if (number := pairs.count(pair))},
        images=np.bincount(pc.list_flatten(view.column("classes")).to_numpy(), minlength=num_classes)[1:],
        measured=len(chosen),
        pixels=counts[:num_classes] / max(1, counts[:num_classes].sum()),
        void=float(counts[IGNORE_INDEX] / max(1, counts.sum())),
        all_void=tuple(all_void),
        beyond_labels=tuple(beyond),
    )


def find_duplicates(shard_set: ShardSet) -> list[tuple[SampleName, SampleName]]:
    """Finds pairs of samples whose JPEG files are equal byte for byte; reads all images of all splits.

    Raises:
        DataError: a sample is damaged.
    """
    first: dict[bytes, SampleName] = {}
    duplicates = []
    with tqdm(total=sum(shard_set.info.counts.values()), desc="hashing", unit="image", disable=None) as bar:
        for split in shard_set.splits:
            view = shard_set.split(split)
            index = SampleIndex(shard_set=shard_set, split=view)
            with ShardFiles(index) as files:
                for sample in range(view.num_samples):
                    with index.naming(sample):
                        digest = hashlib.sha256(files.contents(files.locate(sample, masks=False))["jpg"]).digest()
                    name = (split, view.key(sample))
                    if (earlier := first.setdefault(digest, name)) != name:
                        duplicates.append((earlier, name))
                    bar.update()
    return duplicates


def warnings_of(survey: SplitSurvey, info: DatasetInfo, *, training: bool) -> list[str]:
    """Lists what about a split may be a mistake; `training` says that it is for training, not for measuring."""
    warnings = []
    missing = [name for name, images in zip(info.classes[1:], survey.images, strict=True) if not images]
    if set(survey.kinds) <= {KINDS[False, False]}:
        warnings.append("no image has a label of any kind")
    elif missing:
        warnings.append(f"{len(missing)} of {info.num_classes - 1} classes are in no image: {_listed(missing)}")
    masks = survey.kinds.get(KINDS[True, True], 0) + survey.kinds.get(KINDS[True, False], 0)
    if not training and masks < survey.num_samples:
        warnings.append(f"{survey.num_samples - masks} images have no mask, so nothing can be measured on them")
    if survey.void > MUCH_VOID:
        warnings.append(f"{survey.void:.0%} of the pixels are void")
    if survey.all_void:
        warnings.append(f"{len(survey.all_void)} masks are void everywhere: {_listed(survey.all_void)}")
    if survey.beyond_labels:
        count = len(survey.beyond_labels)
        warnings.append(f"{count} masks show classes that their image labels lack: {_listed(survey.beyond_labels)}")
    return [f"{survey.name}: {text}" for text in warnings]


def _report(
    info: DatasetInfo, surveys: Sequence[SplitSurvey], duplicates: Sequence[tuple[SampleName, SampleName]]
) -> tuple[str, list[str]]:
    """The report's text, and the errors in it."""
    alone = len(surveys) == 1
    warnings = [line for one in surveys for line in warnings_of(one, info, training=one.name == "train" or alone)]
    across, within = (
        [" = ".join(map("/".join, pair)) for pair in duplicates if (pair[0][0] != pair[1][0]) is differ]
        for differ in (True, False)
    )
    notes = [*warnings, *([f"{len(within)} duplicates within a split: {_listed(within)}"] if within else [])]
    errors = [f"{len(across)} duplicates in two splits: {_listed(across)}"] if across else []
    lines = [f"{info.name}: {info.num_classes} classes, fingerprint {info.fingerprint[:12]}", ""]
    for survey in surveys:
        lines.append(f"{survey.name}: {survey.num_samples} images")
        lines += [*(f"  {count:>8}  {kind}" for kind, count in survey.kinds.items()), ""]
    lines += [_histogram(info, surveys), ""]
    lines += [*(f"warning: {text}" for text in notes), *(f"error: {text}" for text in errors)]
    if not notes and not errors:
        lines.append("no warnings")
    return "\n".join(lines) + "\n", errors


def contact_sheet(shard_set: ShardSet, name: str, *, number: int, seed: int = 0) -> Image.Image:
    """Draws at most `number` samples of split `name`: image under key, mask under labels, and a legend.

    Raises:
        DataError: there is no such split, or a sample that is read is damaged.
    """
    view, info = shard_set.split(name), shard_set.info
    tiles, masks, names = [], [], drawable_names(info.classes)
    for sample in EvalLoader(shard_set, split=name, indices=choose_subset(view, number, seed=seed)):
        labels = [names[i + 1] for i in np.flatnonzero(sample.image_labels)]
        caption = ", ".join(labels) or ("background alone" if sample.has_image_labels else "labels not known")
        image = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        small = ImageOps.contain(image, (_TILE, _TILE), Image.Resampling.BOX)
        tiles.append(Tile(np.asarray(small), sample.key))
        if sample.pixel_labels is None:
            tiles.append(Tile(np.full((small.height, small.width, 3), 255, dtype=np.uint8), f"no mask; {caption}"))
        else:
            mask = Image.fromarray(sample.pixel_labels.numpy())
            masks.append(np.asarray(mask.resize(small.size, Image.Resampling.NEAREST)))
            overlay = draw_overlay(np.asarray(small), masks[-1], info.palette_array())
            tiles.append(Tile(np.asarray(overlay), caption))
    rows = [tiles[start : start + 2 * _COLUMNS] for start in range(0, len(tiles), 2 * _COLUMNS)]
    return draw_grid(rows, legend=class_legend(masks, info.palette_array(), names))


def browse(
    folder: Path, out: Path, *, samples: int, masks: int, seed: int, duplicates: bool
) -> tuple[str, list[str], list[str]]:
    """Surveys a data set, and writes report.txt and a contact sheet of each split.

    Args:
        folder: the data set's shards.
        out: folder to write to.
        samples: images on each sheet, >= 1.
        masks: masks to measure per split at most, >= 0.
        seed: seed that draws the images and the masks.
        duplicates: whether to read all images to find duplicates.

    Returns:
        The report's text, its errors, and the names of the sheets.

    Raises:
        DataError: the data set cannot be read.
    """
    shard_set = load_dataset(folder, check=True)
    surveys = [survey_split(shard_set, name, measured=masks, seed=seed) for name in shard_set.splits]
    text, errors = _report(shard_set.info, surveys, find_duplicates(shard_set) if duplicates else [])
    sheets = {f"{name}.jpg": contact_sheet(shard_set, name, number=samples, seed=seed) for name in shard_set.splits}
    for file, sheet in sheets.items():
        with written_whole(out / file) as incoming:
            sheet.save(incoming, quality=88)
    write_text(out / "report.txt", text)
    return text, errors, list(sheets)


def _histogram(info: DatasetInfo, surveys: Sequence[SplitSurvey]) -> str:
    """A row for each class: images in each split, share of the pixels of its masks, and a bar for the first split."""
    head, columns = ["class"], [[*info.classes, "void"]]
    for survey in surveys:
        head += [f"{survey.name} images", "pixels"]
        shares = [f"{share:.2%}" if survey.measured else "-" for share in (*survey.pixels, survey.void)]
        columns += [["", *map(str, survey.images), ""], shares]
    bars = np.round(30 * surveys[0].images / max(1, surveys[0].images.max())).astype(int)
    columns.append(["", *("#" * bar for bar in bars), ""])
    sides = ("left", *["right"] * (len(head) - 1), "left")
    rows = list(zip(*columns, strict=True))
    table = tabulate(rows, [*head, ""], tablefmt="simple", colalign=sides, disable_numparse=True)
    measured = ", ".join(f"{survey.measured} of {survey.name}" for survey in surveys)
    return f"{table}\nPixels are those of the masks measured: {measured}."


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - MOST_LISTED
    return ", ".join(texts[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
