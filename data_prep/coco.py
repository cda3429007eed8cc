# PYTHON_ARGCOMPLETE_OK
"""COCO 2014 or 2017 as tar shards.

    slrnet prepare coco --root COCO --out DIR [--year 2014] [--fraction 0.5]

Reads {train,val}YEAR/*.jpg (in --root or its folder `images`) and annotations/instances_{train,val}YEAR.json. Needs the
extra `coco` (pycocotools). What is made:

- Splits `train` and `val`. With --fraction a share of train is drawn by the seed: the paper's Experiment II trains on
  half of it. Images without objects are kept, as pure background.
- Classes are the categories in the order of their ids, which have gaps, under the ids 1, 2, ...
- Image labels are the categories of an image's annotations, those of crowds too; nothing else reaches them. So a class
  may be labeled whose every pixel lies in a crowd or under another object.
- Masks: every annotation is rasterized by pycocotools. Where several claim a pixel the one of the smallest area counts,
  of equal areas the one with the largest id. A crowd is void (255). Polygons of less than three points cover nothing.
  Masks serve for measuring, unless a training is granted them.

The annotation file is read piece by piece, and never lies in memory whole. Images are copied as they are stored.
"""

from __future__ import annotations

import argparse
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.conversion import Output, Source, add_common_arguments, convert_items, required
from data_prep.shard_writer import Item, Sample, check_output
from data_prep.source_files import ImageForm, seeded_share
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DataError, DatasetInfo

__all__ = ["Annotations", "add_arguments", "class_mask", "convert", "make", "read_annotations"]

YEARS = (2014, 2017)
SPLITS = ("train", "val")
FORM = ImageForm()


def convert(root: str | Path, output: Output, *, year: int | None = None, fraction: float = 1.0) -> DatasetInfo:
    """Makes shards of a folder in COCO's layout.

    Args:
        root: The folder, with train2017, val2017 and annotations, or those of 2014.
        output: What to write.
        year: 2014 or 2017; None for the one that is there.
        fraction: Share of the training images that is kept, above 0 and up to 1, chosen by key and seed.

    Raises:
        DataError: something about the folder, its files or the options is refused; nothing is written then.
    """
    check_output(output.folder)
    if find_spec("pycocotools") is None:
        raise DataError("COCO's masks need pycocotools, which is not installed; run `pip install 'slrnet[coco]'`")
    if not 0 < fraction <= 1:
        raise DataError(f"--fraction is {fraction}; allowed are shares above 0 and up to 1")
    root = Path(root).absolute()
    year = _year(root) if year is None else year
    words = {"--root": root, "--year": year, "--fraction": None if fraction == 1 else fraction}
    annotations = root / "annotations"
    contents = {split: read_annotations(annotations / f"instances_{split}{year}.json") for split in SPLITS}
    folders = {split: _image_folder(root, f"{split}{year}") for split in SPLITS}
    items = [
        item
        for split, content in contents.items()
        for item in _items(content, folders[split], split, fraction if split == "train" else 1.0, output.seed)
    ]
    categories = _categories(contents.values())
    source = _CocoFolder(
        place=str(root),
        class_names=(BACKGROUND, *(name for _, name in categories)),
        files={split: content.path for split, content in contents.items()},
        class_of={category: place for place, (category, _) in enumerate(categories, start=1)},
    )
    return convert_items(source, items, output.named(f"coco{year}", "data_prep/coco.py", words))


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What an annotation file says, and where in it each annotation stands."""

    path: Path
    """The file."""
    images: Mapping[int, tuple[str, int, int]]
    """File name, width and height by image id."""
    categories: Mapping[int, str]
    """Names by category id."""
    image_ids: npt.NDArray[np.int64]
    """(A,) the image of each annotation, ascending."""
    category_ids: npt.NDArray[np.int64]
    """(A,) its category."""
    places: npt.NDArray[np.int64]
    """(A, 2) its first byte in the file and how many bytes it takes."""

    def of_image(self, image_id: int) -> slice:
        """Rows of an image's annotations."""
        first, last = np.searchsorted(self.image_ids, [image_id, image_id + 1])
        return slice(int(first), int(last))


def read_annotations(path: Path) -> Annotations:
    """Reads an annotation file (instances_*.json) and notes where its annotations stand, without keeping them.

    Raises:
        DataError: the file is missing or not of that form.
    """
    images: dict[int, tuple[str, int, int]] = {}
    categories: dict[int, str] = {}
    columns = {name: array("q") for name in ("image", "category", "start", "length")}
    try:
        with path.open("rb") as file:
            for name, start, length, value in _elements(file):
                if name == "images":
                    images[int(value["id"])] = (_text(value["file_name"]), int(value["width"]), int(value["height"]))
                elif name == "categories":
                    categories[int(value["id"])] = _text(value["name"])
                elif name == "annotations":
                    numbers = (int(value["image_id"]), int(value["category_id"]), start, length)
                    for column, number in zip(columns.values(), numbers, strict=True):
                        column.append(number)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; fetch COCO's annotations and unpack them") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no file of COCO's instance annotations ({type(error).__name__}: {error}); fetch it again"
        ) from None
    image_ids, category_ids, starts, lengths = (np.array(column, dtype=np.int64) for column in columns.values())
    if strangers := sorted(set(category_ids.tolist()) - set(categories)):
        raise DataError(f"{path} has annotations of the categories {strangers[:5]}, which it does not list; correct it")
    if strangers := sorted(set(image_ids.tolist()) - set(images)):
        raise DataError(f"{path} has annotations of the images {strangers[:5]}, which it does not list; correct it")
    order = np.argsort(image_ids, kind="stable")
    return Annotations(
        path=path,
        images=images,
        categories=categories,
        image_ids=image_ids[order],
        category_ids=category_ids[order],
        places=np.stack([starts, lengths], axis=1)[order],
    )


def class_mask(
    annotations: Sequence[Mapping[str, Any]], height: int, width: int, class_of: Mapping[int, int]
) -> npt.NDArray[np.uint8]:
    """Rasterizes an image's annotations; the module's docstring says what counts where they overlap.

    Args:
        annotations: Objects of COCO's annotation file: polygons, or run lengths as numbers or packed.
        height: Of the image, pixels.
        width: Of the image, pixels.
        class_of: Class by category id.

    Returns:
        (height, width) uint8 class ids, 255 in crowds.
    """
    from pycocotools import mask as coco_mask  # the extra is needed for masks alone

    pieces = []
    for annotation in annotations:
        runs = _run_lengths(annotation["segmentation"], height, width)
        if runs is not None:
            pieces.append((-int(coco_mask.area(runs)), int(annotation["id"]), annotation, runs))
    mask = np.zeros((height, width), dtype=np.uint8)
    for _, _, annotation, runs in sorted(pieces, key=lambda piece: piece[:2]):
        label = IGNORE_INDEX if annotation.get("iscrowd") else class_of[annotation["category_id"]]
        mask[coco_mask.decode(runs) > 0] = label
    return mask


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item(Item):
    path: str
    size: tuple[int, int]
    """Width and height as annotated."""
    categories: tuple[int, ...]
    places: bytes
    """Where its annotations stand: int64 pairs of first byte and length."""


@dataclass(frozen=True, kw_only=True)
class _CocoFolder(Source[_Item]):
    files: Mapping[str, Path]
    """Annotation file by split."""
    class_of: Mapping[int, int]
    """Class 1, 2, ... by category id."""

    def scan(self, item: _Item) -> Sample:
        size, as_is = FORM.measure(Path(item.path))
        if size != item.size:
            raise DataError(
                f"{item.path} is {size[0]}x{size[1]} pixels, {self.files[item.split].name} says "
                f"{item.size[0]}x{item.size[1]}; take both from the same release"
            )
        for annotation in self._annotations(item.split, item.places):
            _check_segmentation(annotation, size, self.files[item.split])
        classes = tuple(self.class_of[category] for category in item.categories)
        return Sample.of(item, size, classes, source=(item.path, item.places), image_as_is=as_is)

    def encode(self, sample: Sample) -> tuple[bytes, bytes]:
        path, places = sample.source
        annotations = self._annotations(sample.split, places)
        mask = class_mask(annotations, sample.height, sample.width, self.class_of)
        return FORM.jpeg(Path(path), as_is=sample.image_as_is), encode_mask(mask, self.palette)

    def _annotations(self, split: str, places: bytes) -> list[dict[str, Any]]:
        annotations = []
        with self.files[split].open("rb") as file:
            for start, length in np.frombuffer(places, dtype=np.int64).reshape(-1, 2).tolist():
                file.seek(start)
                annotations.append(json.loads(file.read(length)))
        return annotations


# Finding things.


def _year(root: Path) -> int:
    there = [year for year in YEARS if (root / "annotations" / f"instances_train{year}.json").is_file()]
    if len(there) != 1:
        what = "no annotations/instances_train2014.json or ..2017.json" if not there else "annotations of both years"
        raise DataError(f"--root {root} has {what}; " + ("choose with --year" if there else "give COCO's folder"))
    return there[0]


def _image_folder(root: Path, name: str) -> Path:
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return folder
    raise DataError(
        f"--root {root} has no folder {name} with images, nor images/{name}; unpack COCO's {name}.zip there"
    )


def _categories(contents: Iterable[Annotations]) -> list[tuple[int, str]]:
    """Ids and names of the categories, in the order of the ids."""
    first, *others = contents
    for other in others:
        if dict(other.categories) != dict(first.categories):
            raise DataError(f"{first.path} and {other.path} have different categories; take both from one release")
    names = list(first.categories.values())
    if not 1 <= len(names) < IGNORE_INDEX or len(set(names)) < len(names) or BACKGROUND in names:
        raise DataError(f"{first.path} has {len(names)} categories; 1 to 254 of different names are allowed")
    return sorted(first.categories.items())


def _items(content: Annotations, folder: Path, split: str, fraction: float, seed: int) -> list[_Item]:
    """The images of a split in the order of their ids; with a fraction those whose keys draw the lowest numbers."""
    items = []
    for image_id, (file_name, width, height) in sorted(content.images.items()):
        if Path(file_name).name != file_name:
            raise DataError(f"{content.path} has the image name {file_name!r}; names of files in {folder} are allowed")
        rows = content.of_image(image_id)
        items.append(
            _Item(
                key=Path(file_name).stem,
                split=split,
                path=str(folder / file_name),
                size=(width, height),
                categories=tuple(sorted(set(content.category_ids[rows].tolist()))),
                places=content.places[rows].tobytes(),
            )
        )
    kept = max(1, round(len(items) * fraction)) if items else 0
    if kept == len(items):
        return items
    drawn = sorted(items, key=lambda item: seeded_share(item.key, seed))[:kept]
    print(f"{split}: {kept} of {len(items)} images drawn by seed {seed}", flush=True)
    return drawn


# Annotations.


def _run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """Packed run lengths of a segmentation of any form; None where it covers nothing."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        # pycocotools takes four numbers for a box.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def _check_segmentation(annotation: Mapping[str, Any], size: tuple[int, int], file: Path) -> None:
    """pycocotools trusts what it gets: a wrong size would write beyond the mask."""
    segmentation = annotation.get("segmentation")
    good = isinstance(annotation.get("id"), int)
    if isinstance(segmentation, list):
        good &= all(isinstance(polygon, list) and len(polygon) % 2 == 0 for polygon in segmentation)
        good = good and all(isinstance(number, int | float) for polygon in segmentation for number in polygon)
    elif isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        good &= segmentation.get("size") == [size[1], size[0]] and isinstance(counts, list | str)
        good = good and (not isinstance(counts, list) or sum(counts) == size[0] * size[1])
    else:
        good = False
    if not good:
        raise DataError(
            f"{file}: annotation {annotation.get('id')!r} of image {annotation.get('image_id')!r} has a segmentation "
            f"that is neither polygons nor run lengths of a {size[0]}x{size[1]} image; correct or remove it"
        )


# Reading of JSON piece by piece.


def _elements(file: BinaryIO) -> Iterator[tuple[str, int, int, Any]]:
    """Elements of the arrays in a JSON object: name of the array, first byte, number of bytes, value.

    Texts come as Latin-1, a character for each byte; `_text` mends them. Members that are no arrays are passed over.
    """
    reader = _JsonReader(file)
    reader.take("{")
    while True:
        name = reader.value()
        reader.take(":")
        if reader.peek() != "[":
            reader.value()
        else:
            reader.take("[")
            while reader.peek() != "]":
                start = reader.position
                value = reader.value()
                yield str(name), start, reader.position - start, value
                if reader.peek() != "]":
                    reader.take(",")
            reader.take("]")
        if reader.peek() == "}":
            return
        reader.take(",")


class _JsonReader:
    """Values of a JSON file, one after the other; holds a chunk of the file and the current value.

    ijson does not say where in the file a value stands. Annotations would have to be written to a second file, to be
    read again when their image is drawn, and images, categories and annotations take a pass over the file each.
    """

    CHUNK = 1 << 22
    LONGEST = 1 << 26
    """Bytes of a value; COCO's longest annotations have some 100,000."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._before = 0

    @property
    def position(self) -> int:
        """Byte of the file that comes next."""
        return self._before + self._at

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self, wanted: str) -> None:
        """Goes past a character."""
        if self.peek() != wanted:
            raise ValueError(f"byte {self.position} is {self.peek()!r}, not {wanted!r}")
        self._at += 1

    def value(self) -> Any:
        """Parses what comes next and goes past it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                wrong = f"byte {self._before + error.pos}: {error.msg}"
            else:
                # A number may go on in the next chunk; whole values have one of these behind them.
                if self._text[end : end + 1] in (*",:]}", *" \t\r\n") and end < len(self._text):
                    self._at = end
                    return value
                wrong = f"byte {self._before + end}: something other than a comma or bracket follows a value"
            if len(self._text) - self._at > self.LONGEST or not self._fill():
                raise ValueError(wrong)

    def _fill(self) -> bool:
        more = self._file.read(self.CHUNK)
        self._before += self._at
        self._text = self._text[self._at :] + more.decode("latin-1")
        self._at = 0
        return bool(more)


def _text(value: str) -> str:
    return value.encode("latin-1").decode("utf-8")


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder with train2017, val2017, annotations")
    parser.add_argument("--year", type=int, choices=YEARS, help="which COCO (default: the one that is there)")
    text = "share of train that is kept (default: %(default)s)"
    parser.add_argument("--fraction", type=float, default=1.0, metavar="X", help=text)
    add_common_arguments(parser, name="coco")


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    required(args, "root")
    return convert(args.root, Output.of_arguments(args), year=args.year, fraction=args.fraction)


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "coco", *sys.argv[1:]]))
