"""Surveys a prepared data set: labels, masks, images, and contact sheets (`slrnet browse`).

Labels and sizes come from the manifest, shares of pixels from some of the masks. One pass over all images finds those
that occur twice, that look alike in two splits, and that are nearly constant; it decodes JPEG files at an eighth of
their size, in about 3 ms for one of 500 x 375 pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from PIL import Image, ImageOps
from scipy.sparse import csr_array
from tabulate import tabulate
from tqdm import tqdm

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.images import MOST_PIXELS, open_image
from slrnet.data.manifest import DataError, DatasetInfo, ShardSet, SplitView, load_dataset
from slrnet.data.samples import SampleIndex, ShardFiles, SkippedSample
from slrnet.storage.files import write_text, written_whole
from slrnet.storage.names import printable
from slrnet.viz.lettering import drawable_names
from slrnet.viz.overlay import draw_overlay
from slrnet.viz.panels import Tile, class_legend, draw_grid

__all__ = [
    "Browsed",
    "ImageSurvey",
    "SplitSurvey",
    "browse",
    "contact_sheet",
    "set_warnings",
    "survey_images",
    "survey_split",
    "warnings_of",
]

KINDS = {
    (True, True): "mask and image labels",
    (True, False): "mask alone",
    (False, True): "image labels alone",
    (False, False): "no label",
}
"""Kinds of labels, by whether a sample has a mask and image labels."""

MUCH_VOID = 0.25
"""Share of void pixels above which there is a warning; VOC's borders take about 0.05."""
MOST_LISTED = 10
"""Most keys or classes that a warning lists."""
NARROW = 16
"""Fewest gray levels of 255 between an image's darkest and brightest pixel; below it is nearly constant."""
ALIKE_BITS, ALIKE_LEVELS = 6, 10.0
"""Two images look alike if at most so many of the 64 bits of their hashes differ, and their small gray pictures by at
most so many levels of 255 on average."""
SMALL, LARGE, LONG = 32, 8, 5
"""An image's size is odd if a side is below 32 pixels, one side is more than 5 times the other, or it has 64 times the
pixels of the median image, or a 64th."""
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
    without_pixels: tuple[str, ...] = ()
    """Keys of measured samples whose image labels name a class without a pixel in the mask."""
    binary: tuple[str, ...] = ()
    """Keys of measured samples whose masks hold 0 and 255 alone."""
    one_class: tuple[str, ...] = ()
    """Keys of measured samples with a class on every pixel that is not void."""
    num_labeled: int = 0
    """Number of images whose labels are known."""
    never_alone: tuple[tuple[int, int], ...] = ()
    """Classes that no image shows without another one, each with the class that is there most often."""
    odd_sizes: tuple[str, ...] = ()
    """Keys and sizes of images whose size is odd."""
    damaged: tuple[SkippedSample, ...] = ()
    """Samples of `measured` that could not be read, which are not in it."""

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return sum(self.kinds.values())


def survey_split(shard_set: ShardSet, name: str, *, measured: int, seed: int = 0) -> SplitSurvey:
    """Counts the labels of split `name`, and measures at most `measured` masks, which `seed` chooses.

    Raises:
        DataError: there is no such split.
    """
    view, num_classes = shard_set.split(name), shard_set.info.num_classes
    chosen = choose_subset(view, measured, seed=seed, among=view.with_masks)
    counts = np.zeros(256, dtype=np.int64)
    found: dict[str, list[str]] = {"all_void": [], "beyond_labels": [], "without_pixels": [], "binary": []}
    found["one_class"] = []
    loader = EvalLoader(shard_set, split=name, indices=chosen, on_error="skip")
    for sample in loader:
        assert sample.pixel_labels is not None
        own = np.bincount(sample.pixel_labels.numpy().ravel(), minlength=256)
        counts += own
        shown, named = own[1:num_classes] > 0, sample.image_labels.numpy() > 0
        solid = own.sum() - own[IGNORE_INDEX]
        faults = {
            "all_void": not solid,
            "beyond_labels": sample.has_image_labels and (shown & ~named).any(),
            "without_pixels": sample.has_image_labels and (named & ~shown).any(),
            "binary": 0 < own[0] == solid < own.sum(),
            "one_class": 0 < solid == own[1:num_classes].max(),
        }
        for fault, is_there in faults.items():
            found[fault] += [sample.key] if is_there else []
    pairs = list(zip(view.column("has_mask").to_pylist(), view.column("has_image_labels").to_pylist(), strict=True))
    return SplitSurvey(
        name=name,
        kinds={kind: number for pair, kind in KINDS.items() if (number := pairs.count(pair))},
        images=np.bincount(pc.list_flatten(view.column("classes")).to_numpy(), minlength=num_classes)[1:],
        measured=len(chosen) - len(loader.skipped),
        damaged=tuple(loader.skipped),
        pixels=counts[:num_classes] / max(1, counts[:num_classes].sum()),
        void=float(counts[IGNORE_INDEX] / max(1, counts.sum())),
        num_labeled=len(view.with_image_labels),
        never_alone=_never_alone(view),
        odd_sizes=_odd_sizes(view),
        **{fault: tuple(keys) for fault, keys in found.items()},
    )


def _never_alone(view: SplitView) -> tuple[tuple[int, int], ...]:
    """Classes that never are the only one of an image, each with its most frequent companion."""
    classes = view.column("classes")
    places = pc.list_parent_indices(classes).to_numpy(), pc.list_flatten(classes).to_numpy()
    shown = csr_array((np.ones(len(places[0]), dtype=np.int64), places), shape=(view.num_samples, view.num_classes))
    together = (shown.T @ shown).toarray()
    alone, images = shown[shown.sum(axis=1) == 1].sum(axis=0), together.diagonal().copy()
    np.fill_diagonal(together, 0)
    return tuple((int(i), int(together[i].argmax())) for i in np.flatnonzero((images > 0) & (alone == 0)))


def _odd_sizes(view: SplitView) -> tuple[str, ...]:
    widths, heights = (view.column(name).to_numpy().astype(np.int64) for name in ("width", "height"))
    if not len(widths):
        return ()
    ratio = widths * heights / np.median(widths * heights)
    short, long = np.minimum(widths, heights), np.maximum(widths, heights)
    odd = (short < SMALL) | (ratio > LARGE**2) | (ratio < LARGE**-2) | (long > LONG * short)
    return tuple(f"{view.key(i)} ({widths[i]} x {heights[i]})" for i in np.flatnonzero(odd).tolist())


@dataclass(frozen=True, kw_only=True)
class ImageSurvey:
    """What reading all images of all splits finds."""

    duplicates: tuple[tuple[SampleName, SampleName], ...] = ()
    """Samples whose JPEG files are equal byte for byte: the first one, and each that follows."""
    alike: tuple[tuple[SampleName, SampleName], ...] = ()
    """Samples of two splits that look alike, equal files left out: each of the later split once."""
    constant: tuple[SampleName, ...] = ()
    """Samples with fewer than `NARROW` gray levels between the darkest and the brightest pixel."""
    damaged: tuple[SkippedSample, ...] = ()
    """Samples that could not be read."""


class _Look(NamedTuple):
    """An image in small."""

    levels: int
    """Between the darkest and the brightest pixel of a color, 0 to 255."""
    gray: npt.NDArray[np.uint8]
    """(8, 9) gray levels; the hash says where they grow from left to right."""


def survey_images(shard_set: ShardSet) -> ImageSurvey:
    """Reads all images of all splits once; see `ImageSurvey`.

    Comparing two splits of m and n images takes m x n comparisons of 64 bits, 1e9 in about ten seconds, and memory for
    m + n images.
    """
    first: dict[bytes, SampleName] = {}
    duplicates, constant, damaged = [], [], []
    looks: dict[str, list[tuple[str, npt.NDArray[np.uint8]]]] = {split: [] for split in shard_set.splits}
    with tqdm(total=sum(shard_set.info.counts.values()), desc="looking", unit="image", disable=None) as bar:
        for split in shard_set.splits:
            view = shard_set.split(split)
            index = SampleIndex(shard_set=shard_set, split=view, on_error="skip")
            with ShardFiles(index) as files:
                for sample in range(view.num_samples):
                    bar.update()
                    try:
                        data = files.contents(files.locate(sample, masks=False))["jpg"]
                        digest, look = hashlib.sha256(data).digest(), _look(data)
                    except DataError as error:
                        damaged.append(index.damage(sample, error))
                        continue
                    name = (split, view.key(sample))
                    if (earlier := first.setdefault(digest, name)) != name:
                        duplicates.append((earlier, name))
                    if look.levels < NARROW:
                        constant.append(name)
                    elif earlier == name:
                        looks[split].append((name[1], look.gray))
    alike = [pair for one, two in combinations(looks, 2) for pair in _alike(one, looks[one], two, looks[two])]
    return ImageSurvey(
        duplicates=tuple(duplicates), alike=tuple(alike), constant=tuple(constant), damaged=tuple(damaged)
    )


def _look(data: memoryview) -> _Look:
    with open_image(data, formats=("JPEG",), max_pixels=MOST_PIXELS) as image:
        image.draft("RGB", (64, 64))  # at least so large
        small = image.convert("RGB")
    pixels = np.asarray(small)
    levels = int((pixels.max(axis=(0, 1)).astype(int) - pixels.min(axis=(0, 1))).max())
    return _Look(levels, np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX)))


def _alike(
    one: str,
    of_one: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    two: str,
    of_two: Sequence[tuple[str, npt.NDArray[np.uint8]]],
) -> list[tuple[SampleName, SampleName]]:
    """For images of split `two` one that looks alike in split `one`."""
    if not of_one or not of_two:
        return []
    grays = [np.stack([gray for _, gray in looks]).astype(np.int16) for looks in (of_one, of_two)]
    hashes = [np.packbits(gray[..., 1:] > gray[..., :-1], axis=None).view(np.uint64) for gray in grays]
    pairs = []
    for (key, _), code, gray in zip(of_two, hashes[1], grays[1], strict=True):
        for place in np.flatnonzero(np.bitwise_count(code ^ hashes[0]) <= ALIKE_BITS).tolist():
            if np.abs(gray - grays[0][place]).mean() <= ALIKE_LEVELS:
                pairs.append(((one, of_one[place][0]), (two, key)))
                break
    return pairs


def warnings_of(survey: SplitSurvey, info: DatasetInfo, *, training: bool) -> list[str]:
    """Lists what about a split may be a mistake, what it means and what to do; `training`: that it is trained on."""
    names, masks = info.classes[1:], survey.kinds.get(KINDS[True, True], 0) + survey.kinds.get(KINDS[True, False], 0)
    missing = [name for name, images in zip(names, survey.images, strict=True) if not images]
    everywhere = [n for n, images in zip(names, survey.images, strict=True) if 1 < survey.num_labeled == images]
    paired = [f"{info.classes[i]} (mostly with {info.classes[j]})" for i, j in survey.never_alone]
    unmeasured = survey.num_samples - masks
    unlabeled = set(survey.kinds) <= {KINDS[False, False]}
    texts = {
        "no image has a label of any kind: nothing can be learned from or measured on it; give --masks or --labels": (
            unlabeled
        ),
        f"{len(missing)} of {len(names)} classes are in no image: {_listed(missing)}; they cannot be learned or "
        "measured here: add images, or leave the classes out": bool(missing) and not unlabeled,
        f"{len(everywhere)} classes are in every image: {_listed(everywhere)}; image labels cannot tell them from the "
        "background: add images without them": bool(everywhere) and training,
        f"{len(paired)} classes never occur alone: {_listed(paired)}; image labels cannot tell a class from one "
        "that is always with it: add images of each alone, or masks": bool(paired) and training,
        f"{unmeasured} images have no mask, so nothing can be measured on them; add masks, or move them to train": (
            not training and unmeasured > 0
        ),
        f"{survey.void:.0%} of the pixels are void; losses and scores leave them out: check that 255 means void": (
            survey.void > MUCH_VOID
        ),
    }
    lists = {
        "masks are void everywhere": (survey.all_void, "they teach nothing: draw them, or leave them out"),
        "masks hold 0 and 255 alone": (
            survey.binary,
            "255 is void, so they show no class: if it means a class, make it 1 and prepare again",
        ),
        "masks are one class everywhere": (
            survey.one_class,
            "they teach no border: check that 0 is the background and that no class takes its place",
        ),
        "masks show classes that their image labels lack": (
            survey.beyond_labels,
            "training treats the class as absent there: correct the labels or the masks",
        ),
        "masks lack a class that their image labels name": (
            survey.without_pixels,
            "training looks for it there, measuring counts it as background: correct the labels or the masks",
        ),
        "images have an odd size": (
            survey.odd_sizes,
            f"a side below {SMALL} pixels, one {LONG} times the other, or {LARGE} times the usual: crops show padding, "
            "or a small part; check that they belong here, or see --longest-side",
        ),
    }
    found = [text for text, is_there in texts.items() if is_there]
    found += [f"{len(keys)} {what}: {_listed(keys)}; {advice}" for what, (keys, advice) in lists.items() if keys]
    return [f"{survey.name}: {text}" for text in found]


def set_warnings(info: DatasetInfo, images: ImageSurvey, masks: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Lists what about a data set as a whole may be a mistake.

    Args:
        info: what the data set is.
        images: what reading the images found.
        masks: number of masks in each split.

    Returns:
        Warnings, and errors: images of two splits that are equal byte for byte.
    """
    within, across = (
        [" = ".join(map("/".join, pair)) for pair in images.duplicates if (pair[0][0] != pair[1][0]) is differ]
        for differ in (False, True)
    )
    alike, constant = [" ~ ".join(map("/".join, pair)) for pair in images.alike], list(map("/".join, images.constant))
    empty = [split for split, count in info.counts.items() if not count]
    measurable = [split for split, count in masks.items() if count and split != "train"]
    warnings = [
        f"split {printable(split)} is empty; nothing can be trained or measured on it: prepare the data set again"
        for split in empty
    ]
    if not measurable and len(info.counts) > 0:
        warnings.append(
            "no split but train has a mask, so no training can be measured and no best checkpoint chosen; prepare a "
            "split val with masks, for instance with --val-fraction 0.1"
        )
    lists = {
        "duplicates within a split": (within, "training draws them more often: leave all but one out"),
        "images look alike in two splits": (
            alike,
            "scores on images that were trained on are too good: look at the pairs, and keep frames of one scene in "
            "one split",
        ),
        f"images are nearly constant (fewer than {NARROW} of 256 levels)": (
            constant,
            "nothing can be seen in them: of more than 8 bits they need another scale, or they are empty",
        ),
    }
    warnings += [f"{len(found)} {what}: {_listed(found)}; {advice}" for what, (found, advice) in lists.items() if found]
    advice = "a score on images that were trained on is worthless: leave them out of one split"
    return warnings, [f"{len(across)} duplicates in two splits: {_listed(across)}; {advice}"] if across else []


def _report(info: DatasetInfo, surveys: Sequence[SplitSurvey], images: ImageSurvey) -> tuple[str, list[str]]:
    """The report's text, and the errors in it."""
    alone = len(surveys) == 1
    notes = [line for one in surveys for line in warnings_of(one, info, training=one.name == "train" or alone)]
    with_masks = (KINDS[True, True], KINDS[True, False])
    masks = {one.name: sum(one.kinds.get(kind, 0) for kind in with_masks) for one in surveys}
    of_set, errors = set_warnings(info, images, masks)
    notes += of_set
    lines = [f"{printable(info.name)}: {info.num_classes} classes, fingerprint {info.fingerprint[:12]}", ""]
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

    Samples that cannot be read are left out.

    Raises:
        DataError: there is no such split.
    """
    view, info = shard_set.split(name), shard_set.info
    tiles, masks, names = [], [], drawable_names(info.classes)
    chosen = choose_subset(view, number, seed=seed)
    for sample in EvalLoader(shard_set, split=name, indices=chosen, on_error="skip"):
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
    tiles = tiles or [Tile(np.full((_TILE, _TILE, 3), 255, dtype=np.uint8), "no sample can be read")]
    rows = [tiles[start : start + 2 * _COLUMNS] for start in range(0, len(tiles), 2 * _COLUMNS)]
    return draw_grid(rows, legend=class_legend(masks, info.palette_array(), names))


class Browsed(NamedTuple):
    """What `browse` found."""

    text: str
    """The report."""
    errors: list[str]
    """Lines of the report that say why the data set cannot be trusted."""
    num_damaged: int
    """Samples that could not be read."""
    sheets: list[str]
    """Names of the contact sheets."""


def browse(folder: Path, out: Path, *, samples: int, masks: int, seed: int, duplicates: bool) -> Browsed:
    """Surveys a data set, and writes report.txt and a contact sheet of each split.

    Args:
        folder: the data set's shards.
        out: folder to write to.
        samples: images on each sheet, >= 1.
        masks: masks to measure per split at most, >= 0.
        seed: seed that draws the images and the masks.
        duplicates: whether to read all images, see `survey_images`.

    Raises:
        DataError: the data set's description or manifest cannot be read.
    """
    shard_set = load_dataset(folder, check=True)
    surveys = [survey_split(shard_set, name, measured=masks, seed=seed) for name in shard_set.splits]
    images = survey_images(shard_set) if duplicates else ImageSurvey()
    text, errors = _report(shard_set.info, surveys, images)
    damaged = {(one.shard, one.key): one.reason for one in (*images.damaged, *(s for x in surveys for s in x.damaged))}
    if damaged:
        lines = [f"  {shard}: {key}: {reason}" for (shard, key), reason in damaged.items()]
        text = text.removesuffix("no warnings\n")
        text += f"damaged: {len(damaged)} samples cannot be read and are left out above; {_advice(shard_set)}:\n"
        text += "".join(f"{printable(line)}\n" for line in lines)
    sheets = {f"{name}.jpg": contact_sheet(shard_set, name, number=samples, seed=seed) for name in shard_set.splits}
    for file, sheet in sheets.items():
        with written_whole(out / file) as incoming:
            sheet.save(incoming, quality=88)
    write_text(out / "report.txt", text)
    return Browsed(text, errors, len(damaged), list(sheets))


def _advice(shard_set: ShardSet) -> str:
    return SampleIndex(shard_set=shard_set, split=shard_set.split(shard_set.splits[0])).advice


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
    return ", ".join(map(printable, texts[:MOST_LISTED])) + (f" and {more} more" if more > 0 else "")
