# PYTHON_ARGCOMPLETE_OK
"""COCO 2014 or 2017, or an export in COCO's form, as tar shards.

    slrnet prepare coco --root COCO --out DIR [--year 2014] [--fraction 0.5]
    slrnet prepare coco --root EXPORT --out DIR [--val-fraction 0.1]
    slrnet prepare coco --images DIR --json FILE --out DIR [--val-fraction 0.1]

Needs the extra `coco` (pycocotools). What is read below --root:

- COCO: annotations/instances_{train,val}YEAR.json, images in {train,val}YEAR (also in the folder `images`).
- CVAT: annotations/instances_{default,Train,Validation,...}.json, images in images, images/SUBSET or SUBSET.
- Roboflow: {train,valid,test}/_annotations.coco.json, images beside it.

--images and --json name one annotation file and its images, wherever they are. What is made:

- Splits `train`, `val` and `test`, by the names of the files or folders; those that are there. With --val-fraction a
  share of train becomes `val`. With --fraction a share of train is drawn by the seed: the paper's Experiment II trains
  on half of it. Images without objects are kept, as pure background.
- A key is the image's file name as the annotation file has it, without suffix; `/`, dots and spaces become `_`.
- Classes are the categories in the order of their ids, which may have gaps and start at 0, under the ids 1, 2, ... A
  category without annotations that groups the others (Roboflow's first) or is called `background` is left out.
- Image labels are the categories of an image's annotations, those of crowds too; nothing else reaches them. So a class
  may be labeled whose every pixel lies in a crowd or under another object.
- Masks: every annotation is rasterized by pycocotools. Where several claim a pixel the one of the smallest area counts,
  of equal areas the one with the largest id. A crowd is void (255). Polygons of less than three points cover nothing.
  Masks serve for measuring, unless a training is granted them. An image that has a box without a polygon or run
  lengths gets image labels, but no mask.
- Images are copied as they are stored. If their EXIF data turn them, their size in the annotation file says whether
  the annotations belong to the stored image or to the upright one, which is then made. For squares and for images that
  are upside down or mirrored it does not; then --orientation must (COCO's own are `stored`).

The annotation file is read piece by piece, and never lies in memory whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.ExifTags import Base

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.coco_files import Annotations, Category, Id, read_annotations, read_spans
from data_prep.coco_layout import YEARS, Part, find_parts, unlisted_images
from data_prep.coco_masks import class_mask, drawable, is_box_alone
from data_prep.conversion import Output, Source, add_common_arguments, convert_items
from data_prep.found_files import key_of
from data_prep.shard_writer import Item, Sample, check_output, listed
from data_prep.source_files import ImageForm, check_fraction, drawn_split, seeded_share
from data_prep.text_files import read_lines
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.images import encode_mask, open_image
from slrnet.data.manifest import DataError, DatasetInfo
from slrnet.storage.shown import say

__all__ = ["Annotations", "add_arguments", "class_mask", "convert", "make", "read_annotations"]

Orientation = Literal["auto", "stored", "upright"]
REMEDY = "fetch it again, or leave it out with --skip-damaged"
FORMS = {"stored": ImageForm(remedy=REMEDY), "upright": ImageForm(upright=True, remedy=REMEDY)}


def convert(
    root: str | Path | None,
    output: Output,
    *,
    year: int | None = None,
    images: str | Path | None = None,
    json: str | Path | None = None,
    fraction: float = 1.0,
    val_fraction: float = 0.0,
    orientation: Orientation = "auto",
) -> DatasetInfo:
    """Makes shards of a folder in the layout of COCO, CVAT or Roboflow, or of one annotation file.

    Args:
        root: The folder; None with `images` and `json`.
        output: What to write.
        year: 2014 or 2017; None for the one that is there, if any is.
        images: Folder with the images of `json`.
        json: An annotation file.
        fraction: Share of the training images that is kept, above 0 and up to 1, chosen by key and seed.
        val_fraction: Share of the training images that becomes `val`, from 0 to below 1, chosen by key and seed.
        orientation: To which image annotations belong where EXIF data turn it and its size does not tell: the stored
            one or the upright one; "auto" refuses such images, except of a `year`, whose are stored.

    Raises:
        DataError: something about the folder, its files or the options is refused; nothing is written then.
    """
    check_output(output.folder)
    if find_spec("pycocotools") is None:
        raise DataError("COCO's masks need pycocotools, which is not installed; run `pip install 'slrnet[coco]'`")
    if not 0 < fraction <= 1:
        raise DataError(f"--fraction is {fraction}; allowed are shares above 0 and up to 1")
    check_fraction(val_fraction)
    words: dict[str, object] = {"--root": None if root is None else Path(root), "--year": year}
    words |= {"--images": None if images is None else Path(images), "--json": None if json is None else Path(json)}
    parts, year = _parts(root, images, json, year)
    words |= {"--year": year, "--fraction": None if fraction == 1 else fraction, "--val-fraction": val_fraction}
    words |= {"--orientation": None if orientation == "auto" else orientation}
    contents = [read_annotations(part.path) for part in parts]
    categories = _categories(contents)
    source = _CocoFolder(
        place=str(parts[0].path if root is None else Path(root).absolute()),
        class_names=(BACKGROUND, *(category.name for category in categories)),
        files={content.path: content.encoding for content in contents},
        class_of={category.id: place for place, category in enumerate(categories, start=1)},
        orientation="stored" if year and orientation == "auto" else orientation,
    )
    items = [item for part, content in zip(parts, contents, strict=True) for item in _items(part, content)]
    _say_unlisted(parts, items)
    items = _dealt(items, fraction, val_fraction, output.seed)
    name = f"coco{year}" if year else "coco"
    return convert_items(
        source,
        items,
        output.named(name, "data_prep/coco.py", words),
        read_keys=_KeyReader({item.key for item in items}),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item(Item):
    path: str
    size: tuple[int, int]
    """Width and height as annotated."""
    categories: tuple[Id, ...]
    file: Path
    """The annotation file."""
    spans: bytes
    """Where its annotations stand: int64 pairs of first byte and length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """What a sample is made from."""

    item: _Item
    form: str
    """Whether the image is `stored` or made `upright`."""
    turned: bool
    """Whether EXIF data turn the image."""
    has_mask: bool


@dataclass(frozen=True, kw_only=True)
class _CocoFolder(Source[_Item]):
    files: Mapping[Path, str]
    """Encodings of the annotation files."""
    class_of: Mapping[Id, int]
    """Class 1, 2, ... by category id."""
    orientation: Orientation

    def scan(self, item: _Item) -> Sample:
        annotations = self._annotations(item)
        form, turned = self._form(item, annotated=bool(annotations))
        size, as_is = FORMS[form].measure(Path(item.path))
        if size != item.size:
            raise DataError(
                f"{item.path} is {size[0]}x{size[1]} pixels, {item.file.name} says "
                f"{item.size[0]}x{item.size[1]}; take both from the same release"
            )
        for annotation in annotations:
            self._check(annotation, item)
        classes = tuple(self.class_of[category] for category in item.categories)
        has_mask = not any(map(is_box_alone, annotations))
        source = _Files(item=item, form=form, turned=turned, has_mask=has_mask)
        return Sample.of(item, size, classes, source=source, image_as_is=as_is)

    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        files: _Files = sample.source
        image = FORMS[files.form].jpeg(Path(files.item.path), as_is=sample.image_as_is)
        if not files.has_mask:
            return image, None
        mask = class_mask(self._annotations(files.item), sample.height, sample.width, self.class_of)
        return image, encode_mask(mask, self.palette)

    def notes(self, samples: Sequence[Sample]) -> list[str]:
        turned = [sample.source.form for sample in samples if sample.source.turned]
        boxes = sum(not sample.source.has_mask for sample in samples)
        notes = []
        if turned:
            notes.append(
                f"EXIF data turn {len(turned)} images: the annotations of {turned.count('upright')} belong to upright "
                f"images, those of {turned.count('stored')} to stored ones"
            )
        if boxes:
            notes.append(
                f"{boxes} images have boxes without polygons or run lengths: they get image labels and no mask; export "
                "polygons or masks to have one"
            )
        return notes

    def _annotations(self, item: _Item) -> list[dict[str, Any]]:
        return read_spans(item.file, self.files[item.file], np.frombuffer(item.spans, dtype=np.int64).reshape(-1, 2))

    def _form(self, item: _Item, *, annotated: bool) -> tuple[str, bool]:
        """The form of the image that its annotations belong to, and whether EXIF data turn the image."""
        with open_image(Path(item.path), remedy=REMEDY) as image:
            orientation, stored = image.getexif().get(Base.Orientation, 1), image.size
        if image.format == "TIFF" or orientation not in range(2, 9):  # a TIFF is turned as it is read
            return "stored", False
        upright = stored[::-1] if orientation >= 5 else stored
        if stored != upright and item.size in (stored, upright):
            return ("stored" if item.size == stored else "upright"), True
        if self.orientation == "auto" and annotated:
            raise DataError(
                f"{item.path} is turned by its EXIF data (orientation {orientation}), and its size does not tell "
                "whether its annotations belong to the stored image or to the upright one; choose with --orientation"
            )
        return ("upright" if self.orientation == "upright" else "stored"), True

    def _check(self, annotation: Mapping[str, Any], item: _Item) -> None:
        """Raises `DataError` unless an annotation can be drawn, or is a box."""
        try:
            if not is_box_alone(annotation):
                drawable(annotation, item.size[1], item.size[0])
        except ValueError as error:
            raise DataError(
                f"{item.file}: annotation {annotation.get('id')!r:.40} of image {annotation.get('image_id')!r:.40} "
                f"({item.size[0]}x{item.size[1]} pixels) {error}; correct or remove it"
            ) from None


@dataclass(frozen=True)
class _KeyReader:
    """Reads the keys in a list of images: of their paths in the annotation file, of other paths, or keys."""

    known: set[str]

    def __call__(self, path: Path) -> list[str]:
        names = [Path(line.strip().replace("\\", "/")) for line in read_lines(path, "list of images") if line.strip()]
        return [key if (key := key_of(str(name))) in self.known else key_of(name.name) for name in names]


# Finding things.


def _parts(
    root: str | Path | None, images: str | Path | None, json: str | Path | None, year: int | None
) -> tuple[list[Part], int | None]:
    if root is not None and images is None and json is None:
        return find_parts(Path(root).absolute(), year)
    if root is not None or images is None or json is None or year is not None:
        raise DataError("give --root (and --year, if need be), or --images and --json together")
    if not Path(images).is_dir():
        raise DataError(f"--images {images} is no folder")
    return [Part("train", Path(json).absolute(), (Path(images).absolute(),))], None


def _categories(contents: Sequence[Annotations]) -> list[Category]:
    """The categories that become classes, in the order of their ids; says which do not."""
    first, *others = contents
    for other in others:
        if [category[:2] for category in other.categories] != [category[:2] for category in first.categories]:
            raise DataError(f"{first.path} and {other.path} have different categories; take both from one release")
    used = {first.categories[place].id for content in contents for place in set(content.category_places.tolist())}
    kept = [
        category for category in first.categories if category.id in used or not _is_group(category, first.categories)
    ]
    for category in first.categories:
        if category not in kept:
            say(f"left out the category {category.name!r} (id {category.id}): it has no annotations")
    names = [category.name for category in kept]
    if BACKGROUND in names:
        raise DataError(
            f"{first.path} has annotations of a category {BACKGROUND!r}, which is what no annotation covers; "
            "rename it, or remove its annotations"
        )
    if not 1 <= len(names) < IGNORE_INDEX or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(
            f"{first.path} has {len(names)} categories{f', {twice[:5]} more than once' * bool(twice)}; 1 to 254 of "
            "different names are allowed"
        )
    return kept


def _is_group(category: Category, others: Sequence[Category]) -> bool:
    """Whether a category groups the others, or is called background."""
    groups = {other.supercategory for other in others if other.id != category.id}
    return category.name == BACKGROUND or (category.supercategory in ("", "none") and category.name in groups)


def _items(part: Part, content: Annotations) -> list[_Item]:
    """The images of an annotation file in the order of their ids."""
    items: dict[str, _Item] = {}
    for place, image in enumerate(content.images):
        rows = content.of_image(place)
        categories = sorted(set(content.category_places[rows].tolist()))
        item = _Item(
            key=key_of(str(part.relative(image.file_name))),
            split=part.split,
            path=str(part.image_path(image.file_name)),
            size=(image.width, image.height),
            categories=tuple(content.categories[place].id for place in categories),
            file=content.path,
            spans=content.spans[rows].tobytes(),
        )
        if item.key in items:
            raise DataError(
                f"{content.path} has the images {items[item.key].path} and {item.path}, which would both be "
                f"{item.key!r}; rename one of them"
            )
        items[item.key] = item
    return list(items.values())


def _say_unlisted(parts: Sequence[Part], items: Sequence[_Item]) -> None:
    """Says which images no annotation file lists; refuses images of two splits."""
    split_of: dict[str, str] = {}
    for item in items:
        if split_of.setdefault(item.path, item.split) != item.split:
            raise DataError(f"{item.path} is in the splits {split_of[item.path]!r} and {item.split!r}; keep one")
    if unlisted := unlisted_images(parts, map(Path, split_of)):
        paths = listed(list(map(str, unlisted)))
        say(f"left out {len(unlisted)} images that no annotation file lists: {paths}")


def _dealt(items: Sequence[_Item], fraction: float, val_fraction: float, seed: int) -> list[_Item]:
    """The images with their splits; with a fraction those of train whose keys draw the lowest numbers."""
    train = [item for item in items if item.split == "train"]
    others = [item for item in items if item.split != "train"]
    if val_fraction and any(item.split == "val" for item in others):
        raise DataError("--val-fraction draws from train, but there are validation images; leave it away")
    kept = max(1, round(len(train) * fraction)) if train else 0
    if kept < len(train):
        say(f"train: {kept} of {len(train)} images drawn by seed {seed}")
        train = sorted(train, key=lambda item: seeded_share(item.key, seed))[:kept]
    if val_fraction:
        train = [replace(item, split=drawn_split(item.key, val_fraction, seed)) for item in train]
    return [*train, *others]


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--root", type=Path, metavar="DIR", help="folder of COCO, or of an export of CVAT or Roboflow")
    add("--year", type=int, choices=YEARS, help="which COCO (default: the one that is there)")
    add("--images", type=Path, metavar="DIR", help="folder with the images of --json, instead of --root")
    add("--json", type=Path, metavar="FILE", help="annotation file of COCO's form")
    text = "share of train that is kept (default: %(default)s)"
    add("--fraction", type=float, default=1.0, metavar="X", help=text)
    add("--val-fraction", type=float, default=0.0, metavar="X", help="share of the images for `val`")
    text = "what annotations belong to where EXIF data turn an image and its size does not tell (default: auto)"
    add("--orientation", choices=("auto", "stored", "upright"), default="auto", help=text)
    add_common_arguments(parser, name="coco")


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    names = ("year", "images", "json", "fraction", "val_fraction", "orientation")
    return convert(args.root, Output.of_arguments(args), **{name: getattr(args, name) for name in names})


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "coco", *sys.argv[1:]]))
