"""Looks at a prepared data set: `slrnet browse`.

For every split it writes SPLIT.jpg, a contact sheet of images beside their masks with the names of their labels, and
for all of them report.txt, which is printed too: the kinds of labels, a histogram of the classes, warnings and errors.
Images whose bytes occur twice are found by their hash; a duplicate in two splits is an error, for a score on images
that were trained on is worthless.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.manifest import DatasetInfo, ShardSet, SplitView, load_dataset
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.storage.files import write_text, written_whole
from slrnet.viz.overlay import draw_overlay

__all__ = [
    "Duplicate",
    "SplitSurvey",
    "browse",
    "contact_sheet",
    "find_duplicates",
    "report",
    "survey_split",
    "warnings_of",
]

KINDS = {
    (True, True): "mask and image labels",
    (True, False): "mask alone",
    (False, True): "image labels alone",
    (False, False): "no label",
}
"""What a sample grants, by whether it has a mask and image labels."""

MUCH_VOID = 0.25
"""Share of void pixels above which a warning is due; VOC's borders take about 0.05."""
MOST_LISTED = 5

_TILE, _GAP, _LINE, _COLUMNS, _SWATCH = 200, 8, 18, 3, 11
_PAGE, _INK, _GREY = (255, 255, 255), (34, 34, 34), (120, 120, 120)


@dataclass(frozen=True, kw_only=True)
class SplitSurvey:
    """What a split holds: labels by the manifest, pixels by a sample of its masks."""

    name: str
    """Name of the split."""
    kinds: dict[str, int]
    """Number of samples by the kind of their labels."""
    images: npt.NDArray[np.int64]
    """(K-1,) images whose labels name class c + 1."""
    measured: int
    """Masks that the shares of pixels come from."""
    pixels: npt.NDArray[np.float64]
    """(K,) share of each class, background first, of the pixels that are not void; zeros without masks."""
    void: float
    """Share of void pixels."""
    all_void: tuple[str, ...]
    """Keys of measured samples whose masks are void throughout."""
    beyond_labels: tuple[str, ...]
    """Keys of measured samples whose masks show a class that their image labels lack."""

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Duplicate:
    """Two samples with the same image, each as (split, key), the one that was met first in front."""

    first: tuple[str, str]
    second: tuple[str, str]

    @property
    def crosses_splits(self) -> bool:
        """Whether they are in different splits."""
        return self.first[0] != self.second[0]

    def __str__(self) -> str:
        """Both samples for people."""
        return " = ".join(f"{split}/{key}" for split, key in (self.first, self.second))


def survey_split(shard_set: ShardSet, name: str, *, measured: int, seed: int = 0) -> SplitSurvey:
    """Counts labels and measures masks.

    Args:
        shard_set: The data set.
        name: One of its splits.
        measured: Masks to decode at most, drawn by the seed.
        seed: Of the drawing.

    Raises:
        DataError: there is no such split, or a sample that is read is damaged.
    """
    view, num_classes = shard_set.split(name), shard_set.info.num_classes
    chosen = choose_subset(view, measured, seed=seed, among=view.with_masks)
    counts = np.zeros(256, dtype=np.int64)
    all_void, beyond = [], []
    for index, _, mask in _samples(shard_set, view, chosen):
        assert mask is not None
        found = np.bincount(mask.ravel(), minlength=256)
        counts += found
        if found[IGNORE_INDEX] == mask.size:
            all_void.append(view.key(index))
        labelled = np.append(True, view.image_labels([index])[0] > 0)
        if view.has_image_labels[index] and (found[:num_classes] > 0)[~labelled].any():
            beyond.append(view.key(index))
    known = counts[:num_classes].sum()
    return SplitSurvey(
        name=name,
        kinds=_kinds(view),
        images=view.image_labels().sum(axis=0).astype(np.int64),
        measured=len(chosen),
        pixels=counts[:num_classes] / max(1, known),
        void=float(counts[IGNORE_INDEX] / max(1, counts.sum())),
        all_void=tuple(all_void),
        beyond_labels=tuple(beyond),
    )


def find_duplicates(shard_set: ShardSet) -> list[Duplicate]:
    """Samples whose JPEG files are equal byte for byte; reads all images of all splits.

    Raises:
        DataError: a sample is damaged.
    """
    met: dict[bytes, tuple[str, str]] = {}
    found = []
    total = sum(shard_set.info.counts.values())
    with tqdm(total=total, desc="hashing", unit="image", disable=None) as bar:
        for name in shard_set.splits:
            view = shard_set.split(name)
            index = SampleIndex(shard_set=shard_set, split=view)
            with ShardFiles(index) as files:
                for sample in range(view.num_samples):
                    with index.naming(sample):
                        data = files.read(sample, masks=False)["jpg"]
                    digest = hashlib.sha256(data).digest()[:16]
                    here = (name, view.key(sample))
                    if digest in met:
                        found.append(Duplicate(met[digest], here))
                    met.setdefault(digest, here)
                    bar.update()
    return found


def warnings_of(survey: SplitSurvey, info: DatasetInfo, *, training: bool) -> list[str]:
    """What about a split may be a mistake.

    Args:
        survey: Of the split.
        info: Of the data set.
        training: Whether it is trained on; other splits are measured on.
    """
    found = []
    missing = [name for name, images in zip(info.classes[1:], survey.images, strict=True) if not images]
    labelled = survey.num_samples - survey.kinds.get(KINDS[False, False], 0)
    if not labelled:
        found.append("no image has a label of any kind")
    elif missing:
        found.append(f"{len(missing)} of {info.num_classes - 1} classes are in no image: {_listed(missing)}")
    masks = survey.kinds.get(KINDS[True, True], 0) + survey.kinds.get(KINDS[True, False], 0)
    if not training and masks < survey.num_samples:
        found.append(f"{survey.num_samples - masks} images have no mask, so nothing can be measured on them")
    if survey.void > MUCH_VOID:
        found.append(f"{survey.void:.0%} of the pixels are void")
    if survey.all_void:
        found.append(f"{len(survey.all_void)} masks are void throughout: {_listed(survey.all_void)}")
    if survey.beyond_labels:
        count = len(survey.beyond_labels)
        found.append(f"{count} masks show classes that their image labels lack: {_listed(survey.beyond_labels)}")
    return [f"{survey.name}: {text}" for text in found]


def report(
    info: DatasetInfo, surveys: Sequence[SplitSurvey], warnings: Sequence[str], duplicates: Sequence[Duplicate]
) -> tuple[str, list[str]]:
    """Puts all that was found into words.

    Args:
        info: Of the data set.
        surveys: Of its splits.
        warnings: From `warnings_of`.
        duplicates: From `find_duplicates`.

    Returns:
        The text, and the errors in it.
    """
    crossing = [str(pair) for pair in duplicates if pair.crosses_splits]
    within = [str(pair) for pair in duplicates if not pair.crosses_splits]
    notes = [*warnings, *([f"{len(within)} duplicates within a split: {_listed(within)}"] if within else [])]
    errors = [f"{len(crossing)} duplicates in two splits: {_listed(crossing)}"] if crossing else []
    lines = [f"{info.name}: {info.num_classes} classes, fingerprint {info.fingerprint[:12]}", ""]
    for survey in surveys:
        lines.append(f"{survey.name}: {survey.num_samples} images")
        lines += [f"  {count:>8}  {kind}" for kind, count in survey.kinds.items()]
        lines += [""]
    lines += _histogram(info, surveys)
    lines += ["", *(f"warning: {text}" for text in notes), *(f"error: {text}" for text in errors)]
    if not notes and not errors:
        lines.append("no warnings")
    return "\n".join(lines) + "\n", errors


def contact_sheet(shard_set: ShardSet, name: str, *, number: int, seed: int = 0) -> Image.Image:
    """Draws some samples of a split: the image, its mask where it has one, its key and its labels.

    Args:
        shard_set: The data set.
        name: One of its splits.
        number: Samples to draw at most, chosen by the seed.
        seed: Of the choice.

    Raises:
        DataError: there is no such split, or a sample that is read is damaged.
    """
    view, info = shard_set.split(name), shard_set.info
    chosen = choose_subset(view, number, seed=seed)
    width, height = 2 * _TILE + 3 * _GAP, _TILE + 2 * _LINE + 3 * _GAP
    columns = min(_COLUMNS, len(chosen))
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), _PAGE)
    for place, (index, image, mask) in enumerate(_samples(shard_set, view, chosen)):
        tile = _draw_tile(view, info, index, image, mask, size=(width, height))
        sheet.paste(tile, (place % columns * width, place // columns * height))
    return sheet


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
    text, errors = _examine(shard_set, measured=masks, seed=seed, hashes=duplicates)
    sheets = {f"{name}.jpg": contact_sheet(shard_set, name, number=samples, seed=seed) for name in shard_set.splits}
    out.mkdir(parents=True, exist_ok=True)
    for file, sheet in sheets.items():
        with written_whole(out / file) as incoming:
            sheet.save(incoming, quality=88)
    write_text(out / "report.txt", text)
    return text, errors, list(sheets)


def _examine(shard_set: ShardSet, *, measured: int, seed: int, hashes: bool) -> tuple[str, list[str]]:
    surveys = [survey_split(shard_set, name, measured=measured, seed=seed) for name in shard_set.splits]
    warnings = [
        text
        for survey in surveys
        for text in warnings_of(survey, shard_set.info, training=survey.name == "train" or len(surveys) == 1)
    ]
    return report(shard_set.info, surveys, warnings, find_duplicates(shard_set) if hashes else [])


def _samples(
    shard_set: ShardSet, view: SplitView, chosen: Sequence[int]
) -> Iterator[tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]]:
    """Index, image (H, W, 3) and mask (H, W) of each chosen sample."""
    index = SampleIndex(shard_set=shard_set, split=view, compare=True)
    with ShardFiles(index) as files:
        for sample in chosen:
            _, image, mask = files.load(sample)
            yield sample, image.permute(1, 2, 0).numpy(), None if mask is None else mask.numpy()


# Words.


def _kinds(view: SplitView) -> dict[str, int]:
    pairs = zip(view.has_masks.tolist(), view.has_image_labels.tolist(), strict=True)
    found = [KINDS[pair] for pair in pairs]
    return {kind: found.count(kind) for kind in KINDS.values() if kind in found}


def _histogram(info: DatasetInfo, surveys: Sequence[SplitSurvey]) -> list[str]:
    """A line a class: images in each split, share of the known pixels of its masks, and a bar for the first split."""
    longest = max(len(name) for name in info.classes)
    most = max(1, *surveys[0].images.tolist())
    header = f"{'class':<{longest}}" + "".join(f"  {survey.name + ' images':>14}  {'pixels':>7}" for survey in surveys)
    lines = [header, "-" * len(header)]
    for label, name in enumerate(info.classes):
        line = f"{name:<{longest}}"
        for survey in surveys:
            images = "" if label == 0 else str(survey.images[label - 1])
            line += f"  {images:>14}  " + (f"{survey.pixels[label]:>7.2%}" if survey.measured else f"{'-':>7}")
        bar = "" if label == 0 else "#" * round(30 * int(surveys[0].images[label - 1]) / most)
        lines.append(f"{line}  {bar}".rstrip())
    void = "".join(f"  {'':>14}  " + (f"{survey.void:>7.2%}" if survey.measured else f"{'-':>7}") for survey in surveys)
    measured = ", ".join(f"{survey.measured} of {survey.name}" for survey in surveys)
    return [*lines, f"{'void':<{longest}}{void}", f"Pixels are those of the masks measured: {measured}."]


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - MOST_LISTED
    return ", ".join(texts[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


# Pictures.


def _draw_tile(
    view: SplitView,
    info: DatasetInfo,
    index: int,
    image: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.uint8] | None,
    *,
    size: tuple[int, int],
) -> Image.Image:
    tile = Image.new("RGB", size, _PAGE)
    scale = min(_TILE / image.shape[0], _TILE / image.shape[1])
    fitted = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = np.asarray(Image.fromarray(image).resize(fitted, Image.Resampling.BOX))
    tile.paste(Image.fromarray(small), (_GAP, _GAP))
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(12)
    if mask is not None:
        ids = np.asarray(Image.fromarray(mask).resize(fitted, Image.Resampling.NEAREST))
        tile.paste(draw_overlay(small, ids, info.palette_array()), (_TILE + 2 * _GAP, _GAP))
    else:
        draw.text((1.5 * _TILE + 2 * _GAP, _GAP + fitted[1] / 2), "no mask", fill=_GREY, font=font, anchor="mm")
    top = _TILE + 2 * _GAP
    draw.text((_GAP, top), view.key(index), fill=_INK, font=font)
    labels = (np.flatnonzero(view.image_labels([index])[0]) + 1).tolist()
    if not labels:
        text = "background alone" if view.has_image_labels[index] else "labels not known"
        draw.text((_GAP, top + _LINE), text, fill=_GREY, font=font)
    left = float(_GAP)
    for place, label in enumerate(labels):
        if left + _SWATCH + 40 + font.getlength(info.classes[label]) > size[0] and place + 1 < len(labels):
            draw.text((left, top + _LINE), f"+{len(labels) - place}", fill=_GREY, font=font)
            break
        draw.rectangle((left, top + _LINE + 2, left + _SWATCH, top + _LINE + 2 + _SWATCH), fill=info.palette[label])
        draw.text((left + _SWATCH + 4, top + _LINE), info.classes[label], fill=_INK, font=font)
        left += _SWATCH + 14 + font.getlength(info.classes[label])
    return tile
