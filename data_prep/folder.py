# PYTHON_ARGCOMPLETE_OK
"""Your own images as tar shards: with masks, with image labels, with both, or with neither.

    slrnet prepare folder --images DIR --masks DIR --classes cat,dog --val-fraction 0.1 --out DIR
    slrnet prepare folder --images DIR --labels labels.csv --split val=val.txt --out DIR
    slrnet prepare folder --images DIR --annotations EXPORT --val-fraction 0.1 --out DIR
    slrnet prepare folder --images DIR --labels-from-folders --dry-run
    slrnet prepare folder --images DIR --masks DIR --classes cat,dog --unlabeled --out DIR

Images are all image files of the folder and the folders in it; links are followed. An image's key is its path without
suffix, `a/b.jpg` being `a_b`. Its mask has the same path below --masks, ending in .png; masks that tools name otherwise
(`b_mask.png`, `b.jpg.png`, `B.PNG`, `b.tif`) are found where one mask and one image fit, which is said. Masks are

- indexed or gray, with class ids as values: 0 is the background, 1, 2, ... are --classes in their order, 255 is void;
- or in colors, with --palette FILE: a line `name #rrggbb` (or `name r g b`) per class, one of them `background`, and a
  line `void #rrggbb` where there is void; or CVAT's labelmap.txt. The file then names the classes;
- or of one class, with --binary-masks: each value other than 0 is the class.

In place of masks, --annotations takes what labelme, CVAT (for images 1.1), Label Studio (JSON), Supervisely and tools
that write COCO's JSON export; `data_prep.annotations` has a module for each, which says what is read. Images are found
by the path or file name that the tool gives. An image that it lists without shapes is background, one that it does not
list has no annotation. Tags, flags and choices are image labels. Labels `background`, `void` and `ignore` are no
classes: the first is class 0, the pixels of the others are void.

--labels is a table, CSV or .xlsx, with the columns `image` (path below --images, or key) and `labels` (names separated
by `;`), or one column of 0 and 1 for each class, and `split` if wanted. With --labels-from-folders the first folders
are the labels, below folders `train`, `val` and `test` if all lie in those. Image labels come from there, else from the
classes in the mask. An image that has neither is refused; with --unlabeled it is taken as an unlabeled image, with
--skip-unmatched left out. Splits are train, val and test: from the table or the folders, from list files
(--split NAME=FILE, one image a line; the rest is `train`), or by --val-fraction. --subset NAME=FILE marks images, for
instance those whose masks a semi-supervised training may see.

What is left out is counted and named. --dry-run reads and checks everything, says what was understood, and writes
nothing.

JPEG files are copied as they are, unless their EXIF data turn them; other images become JPEG files of quality 95.
Masks are copied too, where they are PNG files of ids. With --longest-side N images beyond N pixels are scaled down to
it, and their masks by nearest pixels: crops of 321 pixels gain little from a camera's 4,000, which are read in every
epoch.

Images of more than 8 bits a sample (16-bit PNG and TIFF, floats) are scaled to 8 bits by one range for the whole set.
--depth names it: bits (`--depth 12`: 4095 becomes white), values (`--depth=-160..240`), values by type of sample
(`--depth uint16=12,float32=0..1`), or `percentiles` (`percentiles:1..99`) of all images. By default (`auto`) it is the
smallest of 8, 10, 12, 14 and 16 bits (0..1, 0..255 or 0..65535 for floats) that holds all values; sets that this would
leave nearly black, white or flat, and those with negative values or several types, are refused. dataset.json records
the range, and trained networks scale by it what they predict. A TIFF's fourth band is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.annotated_images import AnnotatedImages, annotation_mask, match_annotations
from data_prep.annotations import ImageAnnotation, Tool, read_annotations
from data_prep.class_folders import labels_of_folders
from data_prep.class_names import given_classes, read_classes
from data_prep.conversion import (
    Output,
    Source,
    add_common_arguments,
    add_longest_side,
    convert_items,
    parse_named_files,
    required,
)
from data_prep.depths import AUTO, check_depth, choose_depth
from data_prep.found_files import find_pictures, paths_by_key
from data_prep.image_names import ImageNames
from data_prep.label_table import ImageLabels, read_label_table
from data_prep.mask_files import MaskReader, MaskValues, check_masks
from data_prep.mask_pairs import masks_among, pair_masks
from data_prep.palettes import Palette, read_palette
from data_prep.shard_writer import Item, Sample, check_output, listed
from data_prep.source_files import ImageForm, check_fraction, check_size, checked_ids, copied, split_words
from data_prep.splits import checked_splits, splits_of
from data_prep.workers import ConversionPool
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX, voc_palette
from slrnet.data.depth import Depth
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DataError, DatasetInfo
from slrnet.storage.shown import say

__all__ = ["FolderInput", "add_arguments", "convert", "make"]

REMEDY = "replace it or take it away"


@dataclass(frozen=True, kw_only=True)
class FolderInput:
    """What to read, and how it is meant; the names are those of the options."""

    images: Path
    """Folder with the images."""
    masks: Path | None = None
    """Folder with the masks; it may be the same, or lie in it."""
    labels: Path | None = None
    """Table of image labels, CSV or .xlsx."""
    labels_from_folders: bool = False
    """Whether the folders below `images` are the image labels."""
    annotations: Path | None = None
    """What an annotation tool exported, a file or an unpacked folder; not with `masks`."""
    annotation_tool: Tool | Literal["auto"] = "auto"
    """Which tool; "auto" for the one whose form the files have."""
    other_labels_void: bool = False
    """Whether the pixels of annotated shapes whose label is not among the classes become void."""
    palette: Path | None = None
    """File with the colors and names of the classes, for masks in colors."""
    binary_masks: bool = False
    """Whether each value of a mask other than 0 is the only class."""
    classes: Sequence[str] | None = None
    """Names of the foreground classes in the order of their ids; not with `palette`. Without masks they may be left
    out: then they are the names of the image labels."""
    classes_file: Path | None = None
    """File with these names, one a line, instead."""
    split: Mapping[str, Path] = field(default_factory=dict)
    """List files of splits."""
    val_fraction: float = 0.0
    """Share of the images that becomes `val`, chosen by key and seed; not with other ways to split."""
    unlabeled: bool = False
    """Whether images with neither a mask nor image labels are taken, as unlabeled ones."""
    skip_unmatched: bool = False
    """Whether images, masks and names in tables and lists that nothing else belongs to are left out."""
    longest_side: int = 0
    """Larger images are scaled down to it, pixels; 0 keeps all sizes."""
    depth: str = AUTO
    """How images of more than 8 bits become 8-bit ones, see `data_prep.depths`."""

    def check(self) -> None:
        """Raises `DataError` if something is missing, out of range, or given in two ways."""
        if not self.images.is_dir():
            raise DataError(f"--images {self.images} is no folder; give the folder with the images")
        if not (self.masks or self.labels or self.annotations or self.unlabeled or self.labels_from_folders):
            raise DataError(
                "neither --masks nor --labels nor --annotations is given; one of them must say what the images show, "
                "or --labels-from-folders that their folders do, or --unlabeled that nothing is known of them"
            )
        if self.labels is not None and self.labels_from_folders:
            raise DataError("--labels and --labels-from-folders both give image labels; use one of the two")
        if self.masks is not None and self.annotations is not None:
            raise DataError("--masks and --annotations both say which pixels are what; give one of them")
        if self.annotations is not None and find_spec("pycocotools") is None:
            raise DataError("--annotations needs pycocotools, which is not installed; run `pip install 'slrnet[coco]'`")
        check_depth(self.depth)
        check_fraction(self.val_fraction)
        checked_splits(dict.fromkeys(self.split, "a name"), "--split")

    def words(self) -> dict[str, Any]:
        """The options that differ from their defaults, for `Output.named`."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        given["classes"] = None if self.classes is None else ",".join(self.classes)
        return {
            f"--{entry.name.replace('_', '-')}": given[entry.name]
            for entry in fields(self)
            if given[entry.name] != entry.default
        }


def convert(given: FolderInput, output: Output) -> DatasetInfo:
    """Makes shards of a folder of images.

    Args:
        given: What to read.
        output: What to write.

    Raises:
        DataError: something about the folders, the files or the options is refused; nothing is written then.
    """
    if not output.dry_run or Path(output.folder) != Path():
        check_output(output.folder)
    given.check()
    images, masks = given.images.absolute(), None if given.masks is None else given.masks.absolute()
    colors = None if given.palette is None else read_palette(given.palette)
    chosen = _chosen_classes(given, colors)
    table = None if given.labels is None else read_label_table(given.labels, chosen)
    files = _find_files(images, masks)
    names = ImageNames(files.images, skip_unmatched=given.skip_unmatched)
    stated = table.of_images(names) if table is not None else None
    if given.labels_from_folders:
        stated = labels_of_folders(files.images, chosen)
    if chosen is None and stated is not None:
        _warn_of_typos(stated)
    annotated = _annotated(given, names, stated.class_names if chosen is None and stated is not None else chosen)
    if annotated is not None:
        stated = _joined(stated, annotated.labels, splits_given=bool(given.split) or given.val_fraction > 0)
    source = _Folder(
        place=str(images),
        class_names=_class_names(chosen, stated, has_masks=masks is not None, binary_masks=given.binary_masks),
        images=images,
        masks=masks,
        reader=MaskReader(palette=colors, binary=given.binary_masks),
        chosen_depth=given.depth,
        class_ids={} if annotated is None else annotated.class_ids,
        form=ImageForm(upright=True, longest_side=given.longest_side or None, remedy=REMEDY),
    )
    split_of = splits_of(
        files.images,
        lists=names.read_splits(given.split) if given.split else None,
        stated=None if stated is None else stated.splits,
        stated_by="" if stated is None else stated.what,
        val_fraction=given.val_fraction,
        seed=output.seed,
    )
    mask_of = _masks_of(files, skip_unmatched=given.skip_unmatched) if annotated is None else annotated.drawn
    items = _items(source, given, files.images, mask_of, stated, split_of)
    output = output.named("folder", "data_prep/folder.py", given.words())
    return convert_items(source, items, output, read_keys=names.read_keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item(Item):
    """An image; paths are text, as those go to the worker processes and back faster."""

    path: str
    mask: str | ImageAnnotation | None
    labels: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Folder(Source[_Item]):
    images: Path
    masks: Path | None
    reader: MaskReader
    class_ids: Mapping[str, int]
    """Class id by label of annotated shapes."""
    form: ImageForm
    chosen_depth: str

    @property
    def depth(self) -> Depth:
        return self.form.depth

    def prepared(self, items: Sequence[_Item], workers: ConversionPool) -> Self:
        depth = choose_depth(self.chosen_depth, [item.path for item in items], workers)
        return replace(self, form=replace(self.form, depth=depth))

    @property
    def palette(self) -> npt.NDArray[np.uint8]:
        colors = voc_palette()
        if self.reader.palette is not None:
            colors[: len(self.reader.palette.colors)] = self.reader.palette.colors
        return colors

    def scan(self, item: _Item) -> Sample:
        path = Path(item.path)
        size, image_as_is = self.form.measure(path)
        mask_as_is, values = False, None
        classes: tuple[int, ...] | None = None
        if isinstance(item.mask, ImageAnnotation):
            drawn = self._drawn(item.path, item.mask)
            check_size(path, drawn, path, size, remedy="turn the image upright and save it again")
            classes = tuple(label for label in np.unique(drawn).tolist() if 0 < label < IGNORE_INDEX)
        elif item.mask is not None:
            mask_path = Path(item.mask)
            mask, mask_as_is, colors = self._read_mask(mask_path)
            check_size(mask_path, mask, path, size, remedy="make them of one size, the image seen upright")
            present = checked_ids(mask_path, mask, len(self.class_names), remedy="see --classes")
            classes = tuple(label for label in present if 0 < label < IGNORE_INDEX)
            values = MaskValues(bytes(present), b"" if colors is None else colors[present].tobytes())
        if item.labels is not None:
            classes = tuple(sorted(self.class_names.index(name) for name in item.labels))
        files = (item.path, item.mask, values)
        return Sample.of(item, size, classes, source=files, image_as_is=image_as_is, mask_as_is=mask_as_is)

    def check(self, samples: Sequence[Sample]) -> None:
        if self.reader.palette is None and not self.reader.binary:
            masks = ((sample.source[1], sample.source[2]) for sample in samples if sample.source[2] is not None)
            check_masks(masks, len(self.class_names))

    def row(self, sample: Sample) -> dict[str, str]:
        path, mask, _ = sample.source
        files = {"image": os.path.relpath(path, self.images)}
        if isinstance(mask, ImageAnnotation):
            files["mask"] = f"{len(mask.shapes)} shapes"
        elif self.masks is not None:
            files["mask"] = "none" if mask is None else os.path.relpath(mask, self.masks)
        return files | super().row(sample)

    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        path, mask, _ = sample.source
        image = self.form.jpeg(Path(path), as_is=sample.image_as_is)
        if mask is None:
            return image, None
        if isinstance(mask, ImageAnnotation):
            return image, encode_mask(self._drawn(path, mask), self.palette)
        mask_path = Path(mask)
        if sample.mask_as_is:
            return image, copied(mask_path, remedy=REMEDY)
        return image, encode_mask(self._read_mask(mask_path)[0], self.palette)

    def _drawn(self, path: str, annotation: ImageAnnotation) -> npt.NDArray[np.uint8]:
        """Ids of an annotated image's mask in the shards."""
        return self.form.mask(annotation_mask(Path(path), annotation, self.class_ids))

    def _read_mask(self, path: Path) -> tuple[npt.NDArray[np.uint8], bool, npt.NDArray[np.uint8] | None]:
        """Ids of a mask in the shards, whether its file is copied into them, and the colors of its own palette."""
        stored, as_is, colors = self.reader.read(path)
        ids = self.form.mask(stored)
        return ids, as_is and ids is stored, colors


# Finding things.


@dataclass(frozen=True)
class _Files:
    """Paths below their folders: images by key, and masks."""

    images: Mapping[str, str]
    masks: Sequence[str]
    mask_folder: Path | None


def _find_files(images: Path, masks: Path | None) -> _Files:
    if masks is not None and not masks.is_dir():
        raise DataError(f"--masks {masks} is no folder")
    found = find_pictures(images, "--images", apart=masks)
    if masks is None:
        if like_masks := sorted(masks_among(found)):
            say(
                f"--images: {len(like_masks)} image(s) have names of masks: {listed(like_masks)}; they are taken as "
                "images, as --masks is not given",
            )
        return _Files(paths_by_key(images, found), (), None)
    if os.path.samefile(images, masks):
        mixed = masks_among(found)
        say(f"--masks is --images: {len(mixed)} of {len(found)} files are masks by their names")
        return _Files(paths_by_key(images, [path for path in found if path not in mixed]), sorted(mixed), masks)
    return _Files(paths_by_key(images, found), find_pictures(masks, "--masks", apart=images), masks)


def _annotated(given: FolderInput, names: ImageNames, classes: Sequence[str] | None) -> AnnotatedImages | None:
    if given.annotations is None:
        return None
    return match_annotations(
        read_annotations(given.annotations, given.annotation_tool),
        names,
        classes,
        skip_unmatched=given.skip_unmatched,
        other_labels_void=given.other_labels_void,
    )


def _joined(stated: ImageLabels | None, annotated: ImageLabels, *, splits_given: bool) -> ImageLabels:
    """Labels by table or folders where there are any, else by annotations; splits alike."""
    if splits_given and annotated.splits is not None:
        say(f"{annotated.what}: its splits are left out, as options give others")
        annotated = replace(annotated, splits=None)
    if stated is None:
        return annotated
    splits = annotated.splits if stated.splits is None else stated.splits
    what = f"{stated.what} and {annotated.what}"
    return replace(stated, what=what, labels={**annotated.labels, **stated.labels}, splits=splits)


def _chosen_classes(given: FolderInput, colors: Palette | None) -> tuple[str, ...] | None:
    """Names of the foreground classes by options; None if none names them."""
    options = {"--classes": given.classes, "--classes-file": given.classes_file, "--palette": colors}
    naming = [option for option, value in options.items() if value is not None]
    if len(naming) > 1:
        raise DataError(f"{' and '.join(naming)} name the classes; give one of them")
    if colors is not None:
        return colors.names[1:]
    if given.classes_file is not None:
        return given_classes(read_classes(given.classes_file), f"--classes-file {given.classes_file}")
    return None if given.classes is None else given_classes(given.classes, "--classes")


def _warn_of_typos(stated: ImageLabels) -> None:
    """Says which class, of one image alone, may be another one's name misspelled."""
    counts = Counter(name for names in stated.labels.values() for name in dict.fromkeys(names))
    for name in sorted(name for name, count in counts.items() if count == 1 and len(name) > 2):
        for other in sorted(other for other, count in counts.items() if count > 1 and _one_slip(name, other)):
            say(
                f"{stated.what}: warning: one image alone shows the class {name!r}, and {counts[other]} show "
                f"{other!r}; if that is what is meant, correct the label, or name the classes with --classes"
            )


def _one_slip(one: str, other: str) -> bool:
    """Whether two words differ by one letter, or by two neighbors in the other order."""
    pairs = enumerate(zip(one, other, strict=False))
    start = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    one, other = one[start:], other[start:]
    swapped = other[1::-1] + other[2:]
    return one[1:] == other[1:] or one[1:] == other or one == other[1:] or one == swapped


def _class_names(
    chosen: tuple[str, ...] | None, stated: ImageLabels | None, *, has_masks: bool, binary_masks: bool
) -> tuple[str, ...]:
    if chosen is None and (stated is None or has_masks):
        raise DataError(
            "nothing names the classes; name the classes 1, 2, ... with --classes (or --palette for masks in colors)"
        )
    names = stated.class_names if chosen is None and stated is not None else chosen or ()
    if not 1 <= len(names) < IGNORE_INDEX:
        what = "the image labels" if stated is None else stated.what
        raise DataError(f"{what} names {len(names)} classes beside the background; 1 to 254 are allowed: see --classes")
    if chosen is None and stated is not None:
        say(f"{stated.what} names the classes: {listed(list(names))}")
    if binary_masks and len(names) != 1:
        raise DataError(f"--binary-masks is for one class; {len(names)} are named: {listed(list(names))}")
    return (BACKGROUND, *names)


def _masks_of(files: _Files, *, skip_unmatched: bool) -> dict[str, str]:
    """Paths of masks by the key of their image."""
    pairs, strangers = pair_masks(files.images, files.masks)
    if strangers:
        remedy = "name each as its image (a/b.png for a/b.jpg), take them away, or leave them out with --skip-unmatched"
        if not skip_unmatched:
            raise DataError(f"--masks has {len(strangers)} mask(s) of no image: {listed(strangers)}; {remedy}")
        say(f"--masks: left out {len(strangers)} mask(s) of no image: {listed(strangers)}")
    return {key: f"{files.mask_folder}/{mask}" for key, mask in pairs.items()}


def _items(
    source: _Folder,
    given: FolderInput,
    paths: Mapping[str, str],
    mask_of: Mapping[str, str | ImageAnnotation],
    stated: ImageLabels | None,
    split_of: Mapping[str, str],
) -> list[_Item]:
    items, without = [], []
    for key, path in paths.items():
        labels, mask = None if stated is None else stated.labels.get(key), mask_of.get(key)
        if labels is None and mask is None and not given.unlabeled:
            without.append(path)
            continue
        place = f"{source.images}/{path}"
        items.append(_Item(key=key, path=place, mask=mask, split=split_of[key], labels=labels))
    if without:
        sources = [] if source.masks is None else ["no mask"]
        sources += [] if stated is None else [f"no label in {stated.what}"]
        text = f"{len(without)} image(s) have {' and '.join(sources)}: {listed(without)}"
        if not given.skip_unmatched:
            raise DataError(
                f"{text}; add them, take such images as unlabeled ones with --unlabeled, or leave them out with "
                "--skip-unmatched"
            )
        say(f"--images: left out: {text}")
    return items


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="folder with the images")
    add("--masks", type=Path, metavar="DIR", help="folder with masks of the same paths")
    add("--labels", type=Path, metavar="FILE", help="table of image labels, CSV or .xlsx")
    add("--labels-from-folders", action="store_true", help="the folders of the images are their labels")
    text = "file or folder that an annotation tool exported: labelme, CVAT, Label Studio, COCO, Supervisely"
    add("--annotations", type=Path, metavar="PATH", help=text)
    text = "which tool (default: by the form of the files)"
    add("--annotation-tool", choices=["auto", *get_args(Tool)], default="auto", help=text)
    text = "make shapes of labels that --classes does not name void, instead of stopping"
    add("--other-labels-void", action="store_true", help=text)
    add("--palette", type=Path, metavar="FILE", help="colors of the classes, for masks in colors")
    add("--binary-masks", action="store_true", help="each value of a mask other than 0 is the only class")
    add("--classes", metavar="A,B", help="names of the classes 1, 2, ...")
    add("--classes-file", type=Path, metavar="FILE", help="file with these names, one a line")
    add("--split", action="append", default=[], metavar="NAME=FILE", help="list of train, val or test; repeatable")
    add("--val-fraction", type=float, default=0.0, metavar="X", help="share of the images for `val`")
    add("--unlabeled", action="store_true", help="take images with neither a mask nor labels as unlabeled ones")
    add("--unlabelled", action="store_true", dest="unlabeled", help=argparse.SUPPRESS)
    text = "leave out images, masks and names in tables that nothing else belongs to, naming them, instead of stopping"
    add("--skip-unmatched", action="store_true", help=text)
    add_longest_side(parser, default=0)
    add("--depth", default=AUTO, metavar="DEPTH", help="of images of more than 8 bits (default: %(default)s)")
    add_common_arguments(parser, name="folder", dry_run=True)


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    required(args, "images")
    options = {entry.name: getattr(args, entry.name) for entry in fields(FolderInput)}
    options |= {"classes": split_words(args.classes), "split": parse_named_files("--split", args.split)}
    return convert(FolderInput(**options), Output.of_arguments(args))


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "folder", *sys.argv[1:]]))
