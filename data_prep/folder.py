# PYTHON_ARGCOMPLETE_OK
"""Your own images as tar shards: with masks, with a table of labels, with both, or with neither.

    slrnet prepare folder --images DIR --masks DIR --classes cat,dog --val-fraction 0.1 --out DIR
    slrnet prepare folder --images DIR --labels labels.csv --split val=val.txt --out DIR
    slrnet prepare folder --images DIR --masks DIR --classes cat,dog --unlabeled --out DIR

Images are all files of the folder and the folders in it; an image's key is its path without suffix, `a/b.jpg` being
`a_b`. Its mask has the same path below --masks, ending in .png:

- indexed or gray, with class ids as values: 0 is the background, 1, 2, ... are --classes in their order, 255 is void;
- or in colors, with --palette FILE: a line `name #rrggbb` (or `name r g b`) per class, the background first, and a
  line `void #rrggbb` where there is void. The file then names the classes.

--labels is a CSV file with the columns `image` (path below --images, or key) and `labels` (names separated by `;`), and
`split` if wanted. Image labels come from it where it is given, else from the classes in the mask. An image that has
neither a mask nor a line in the table is refused; with --unlabeled it is taken as an unlabeled image. Splits come
from the table's column, from list files (--split NAME=FILE, one image a line; the rest is `train`), or by
--val-fraction. --subset NAME=FILE marks images, for instance those whose masks a semi-supervised training may see.

JPEG files are copied as they are, unless their EXIF data turn them; other images become JPEG files of quality 95.
Masks are copied too, unless they are in colors. With --longest-side N images beyond N pixels are scaled down to it,
and their masks by nearest pixels: crops of 321 pixels gain little from a camera's 4,000, which are read in every epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.conversion import (
    Output,
    Source,
    add_common_arguments,
    add_longest_side,
    convert_items,
    parse_named_files,
    required,
)
from data_prep.found_files import find_images, mask_of, read_keys, read_splits
from data_prep.label_table import LabelTable, read_label_table
from data_prep.palettes import Palette, read_palette
from data_prep.shard_writer import Item, Sample, check_output
from data_prep.source_files import (
    ImageForm,
    check_fraction,
    check_size,
    checked_ids,
    copied,
    drawn_split,
    measure_mask,
    opened,
    split_words,
)
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX, voc_palette
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DataError, DatasetInfo

__all__ = ["add_arguments", "convert", "make"]

REMEDY = "replace it or take it away"


def convert(
    images: str | Path,
    output: Output,
    *,
    masks: str | Path | None = None,
    labels: str | Path | None = None,
    palette: str | Path | None = None,
    classes: Sequence[str] | None = None,
    splits: Mapping[str, Path] | None = None,
    val_fraction: float = 0.0,
    unlabeled: bool = False,
    longest_side: int = 0,
) -> DatasetInfo:
    """Makes shards of a folder of images.

    Args:
        images: Folder with the images.
        output: What to write.
        masks: Folder with the masks.
        labels: CSV file with image labels.
        palette: File with the colors and names of the classes, for masks in colors.
        classes: Names of the foreground classes in the order of their ids; not with `palette`. Without masks they may
            be left out: then they are the names in `labels`, sorted.
        splits: List files of splits other than `train`.
        val_fraction: Share of the images that becomes `val`, chosen by key and seed; not with other ways to split.
        unlabeled: Whether images with neither a mask nor a line in `labels` are taken, as unlabeled ones.
        longest_side: Larger images are scaled down to it, pixels; 0 keeps all sizes.

    Raises:
        DataError: something about the folders, the files or the options is refused; nothing is written then.
    """
    check_output(output.folder)
    if masks is None and labels is None and not unlabeled:
        raise DataError(
            "neither --masks nor --labels is given; one of them must say what the images show, or --unlabeled that "
            "nothing is known of them"
        )
    images = Path(images).absolute()
    colors = read_palette(palette) if palette is not None else None
    table = read_label_table(labels) if labels is not None else None
    source = _Folder(
        place=str(images),
        images=images,
        masks=None if masks is None else Path(masks).absolute(),
        class_names=_class_names(classes, colors, table, has_masks=masks is not None),
        colors=colors,
        form=ImageForm(upright=True, longest_side=longest_side or None, remedy=REMEDY),
    )
    paths = find_images(images)
    split_of = _splits(paths, table, splits or {}, val_fraction, output.seed)
    items = _items(source, table, paths, split_of, unlabeled=unlabeled)
    del paths, split_of  # they would take memory for every image until the end
    words = {
        "--images": images,
        "--masks": source.masks,
        "--labels": None if labels is None else Path(labels),
        "--palette": None if palette is None else Path(palette),
        "--classes": None if classes is None else ",".join(classes),
        "--split": splits,
        "--val-fraction": val_fraction,
        "--unlabeled": unlabeled,
        "--longest-side": longest_side,
    }
    output = output.named("folder", "data_prep/folder.py", words)
    return convert_items(source, items, output, read_keys=read_keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item(Item):
    """An image; paths are text, as those go to the worker processes and back faster."""

    path: str
    mask: str | None
    labels: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Folder(Source[_Item]):
    images: Path
    masks: Path | None
    colors: Palette | None
    form: ImageForm

    @property
    def palette(self) -> npt.NDArray[np.uint8]:
        colors = voc_palette()
        if self.colors is not None:
            colors[: len(self.colors.colors)] = self.colors.colors
        return colors

    def scan(self, item: _Item) -> Sample:
        path = Path(item.path)
        size, image_as_is = self.form.measure(path)
        mask_as_is = False
        classes: tuple[int, ...] | None = None
        if item.mask is not None:
            mask_path = Path(item.mask)
            mask, mask_as_is = self._read_mask(mask_path)
            check_size(mask_path, mask, path, size, remedy="make them of one size, the image seen upright")
            present = checked_ids(mask_path, mask, len(self.class_names), remedy="see --classes")
            classes = tuple(label for label in present if 0 < label < IGNORE_INDEX)
        if item.labels is not None:
            classes = tuple(sorted(self.class_names.index(name) for name in item.labels))
        files = (item.path, item.mask)
        return Sample.of(item, size, classes, source=files, image_as_is=image_as_is, mask_as_is=mask_as_is)

    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        path, mask = sample.source
        image = self.form.jpeg(Path(path), as_is=sample.image_as_is)
        if mask is None:
            return image, None
        mask_path = Path(mask)
        if sample.mask_as_is:
            return image, copied(mask_path, remedy=REMEDY)
        return image, encode_mask(self._read_mask(mask_path)[0], self.palette)

    def mask_of(self, image: Path) -> Path | None:
        """Path of an image's mask; None where there are no masks, or none of this image."""
        return None if self.masks is None else mask_of(image, self.images, self.masks)

    def _read_mask(self, path: Path) -> tuple[npt.NDArray[np.uint8], bool]:
        """Ids of a mask in the shards, and whether its file is copied into them."""
        stored, as_is = self._read_ids(path)
        ids = self.form.mask(stored)
        return ids, as_is and ids is stored

    def _read_ids(self, path: Path) -> tuple[npt.NDArray[np.uint8], bool]:
        if self.colors is None:
            return measure_mask(path, remedy="make it so, or name its colors with --palette FILE")
        with opened(path, remedy="make it again") as image:
            pixels = np.asarray(image.convert("RGB"))
        try:
            return self.colors.ids(pixels), False
        except DataError as error:
            raise DataError(f"{path} {error}") from None


# Finding things.


def _class_names(
    classes: Sequence[str] | None, colors: Palette | None, table: LabelTable | None, *, has_masks: bool
) -> tuple[str, ...]:
    if colors is not None and classes is not None:
        raise DataError("--classes and --palette both name the classes; give one of the two")
    named = set() if table is None else {name for labels in table.labels.values() for name in labels}
    if colors is not None:
        names = colors.names
    elif classes is not None:
        names = (BACKGROUND, *classes)
    elif table is not None and not has_masks:
        names = (BACKGROUND, *sorted(named))
    else:
        raise DataError(
            "nothing names the classes; name the classes 1, 2, ... with --classes (or --palette for masks in colors)"
        )
    if len(set(names)) < len(names) or not 2 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"there are {len(names) - 1} classes {list(names[1:4])}...; 1 to 254 different ones are needed")
    if table is not None and (unknown := sorted(named - set(names[1:]))):
        raise DataError(f"{table.path} has the labels {unknown[:5]}; the classes are {', '.join(names[1:])}")
    return names


def _items(
    source: _Folder,
    table: LabelTable | None,
    paths: Mapping[str, Path],
    split_of: Mapping[str, str],
    *,
    unlabeled: bool,
) -> list[_Item]:
    items = []
    for key, path in paths.items():
        labels, mask = None if table is None else table.labels.get(key), source.mask_of(path)
        if labels is None and not unlabeled and mask is None:
            without = f"{path} has no mask" + ("" if table is None else f" and no line in {table.path}")
            raise DataError(f"{without}; add it, or take such images as unlabeled ones with --unlabeled")
        place = None if mask is None else str(mask)
        items.append(_Item(key=key, path=str(path), mask=place, split=split_of[key], labels=labels))
    return items


def _splits(
    paths: Mapping[str, Path],
    table: LabelTable | None,
    splits: Mapping[str, Path],
    val_fraction: float,
    seed: int,
) -> dict[str, str]:
    """Splits of all images, by list, table or draw."""
    if sum([bool(splits), val_fraction > 0, table is not None and table.splits is not None]) > 1:
        raise DataError("splits are given in several ways; use one of --split, --val-fraction and the column `split`")
    check_fraction(val_fraction)
    if table is not None and (strangers := sorted(set(table.labels) - set(paths))):
        raise DataError(
            f"{table.path} lists {len(strangers)} image(s) that are not there, such as {strangers[:3]}; "
            "remove their lines"
        )
    named = read_splits(splits, paths) | dict((table and table.splits) or {})
    return {key: named.get(key) or drawn_split(key, val_fraction, seed) for key in paths}


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="folder with the images")
    add("--masks", type=Path, metavar="DIR", help="folder with PNG masks of the same paths")
    add("--labels", type=Path, metavar="FILE", help="CSV file with image labels")
    add("--palette", type=Path, metavar="FILE", help="colors of the classes, for masks in colors")
    add("--classes", metavar="A,B", help="names of the classes 1, 2, ...")
    add("--split", action="append", default=[], metavar="NAME=FILE", help="list of a split; repeatable")
    add("--val-fraction", type=float, default=0.0, metavar="X", help="share of the images for `val`")
    add("--unlabeled", action="store_true", help="take images with neither a mask nor a line as unlabeled ones")
    add("--unlabelled", action="store_true", dest="unlabeled", help=argparse.SUPPRESS)
    add_longest_side(parser, default=0)
    add_common_arguments(parser, name="folder")


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    required(args, "images")
    names = ("masks", "labels", "palette", "val_fraction", "unlabeled", "longest_side")
    options = {name: getattr(args, name) for name in names}
    options |= {"classes": split_words(args.classes), "splits": parse_named_files("--split", args.split)}
    return convert(args.images, Output.of_arguments(args), **options)


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "folder", *sys.argv[1:]]))
