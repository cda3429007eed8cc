# PYTHON_ARGCOMPLETE_OK
"""The weakly supervised track of the L2ID challenge (ILSVRC DET images, 200 classes) as tar shards.

    slrnet prepare l2id --root ILSVRC --val-images LID_track1/val --val-masks track1_val_annotations_raw --out DIR

What is read, as the archives unpack:

- --root, of ILSVRC2015_DET or a later year: Data/DET/train/**/KEY.JPEG and Annotations/DET/train/**/KEY.xml.
- The devkit's map_det.txt, a line `n02672831 1 accordion` a class: synset, id, name. It is looked for in
  devkit/data of --root and of the folder above; --map-file names it elsewhere.
- The challenge's validation images KEY.JPEG, and its raw masks KEY.png: indexed or gray, ids 0 (background) to 200 as
  in map_det.txt, 255 where ambiguous.

Split `train` is every training image with an XML annotation (349,319 of 456,567); its image labels are the synsets of
its objects, and it has no mask. An image without one is known to lack some classes only, and is left out. Split `val`
is every validation mask with its image; its image labels are the classes in the mask.

Images beyond --longest-side are scaled down to it, their masks too, by nearest pixels: a few photographs of 5,000
pixels would else set the memory of an evaluation. JPEG files are copied as they are stored, without regard to EXIF
orientation, as the masks belong to the stored pixels; CMYK images and other formats become RGB JPEG files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.conversion import Output, Source, add_common_arguments, add_longest_side, convert_items, required
from data_prep.found_files import key_of
from data_prep.shard_writer import Item, Sample, check_output
from data_prep.source_files import (
    ImageForm,
    check_size,
    checked_ids,
    measure_mask,
    read_objects,
)
from data_prep.text_files import read_lines
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DataError, DatasetInfo
from slrnet.storage.shown import say

__all__ = ["add_arguments", "convert", "make", "read_map"]

LONGEST_SIDE = 1000
MAP_FILE = Path("devkit", "data", "map_det.txt")
MASK_REMEDY = "take the challenge's raw masks (track1_val_annotations_raw)"


def convert(
    root: str | Path,
    output: Output,
    *,
    val_images: str | Path,
    val_masks: str | Path,
    map_file: str | Path | None = None,
    longest_side: int = LONGEST_SIDE,
) -> DatasetInfo:
    """Makes shards of ILSVRC's detection images and the challenge's validation masks.

    Args:
        root: Folder with Data/DET/train and Annotations/DET/train.
        output: What to write.
        val_images: Folder with the validation images.
        val_masks: Folder with their raw masks.
        map_file: The devkit's map_det.txt; None to look for it.
        longest_side: Larger images are scaled down to it, pixels; 0 keeps all sizes.

    Raises:
        DataError: something about the folders, their files or the options is refused; nothing is written then.
    """
    check_output(output.folder)
    root = Path(root).absolute()
    path = _find_map(root) if map_file is None else Path(map_file).absolute()
    items = [*_train_items(root), *_val_items(Path(val_images).absolute(), Path(val_masks).absolute())]
    synsets = read_map(path)
    source = _L2idFolder(
        place=str(root),
        class_names=(BACKGROUND, *synsets.values()),
        synsets=list(synsets),
        form=ImageForm(longest_side=longest_side or None, remedy="fetch it again, or use --skip-damaged"),
    )
    words: dict[str, object] = {"--root": root, "--val-images": Path(val_images), "--val-masks": Path(val_masks)}
    words |= {"--map-file": path, "--longest-side": str(longest_side)}
    return convert_items(source, items, output.named("l2id", "data_prep/l2id.py", words))


def read_map(path: Path) -> dict[str, str]:
    """Class names by synset, in the order of the ids 1, 2, ...

    Raises:
        DataError: the file cannot be read, or is no list of synset, id and name.
    """
    classes: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(read_lines(path, "map of synsets"), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 3 or not words[1].isdecimal() or int(words[1]) in classes:
            raise DataError(f"{path}, line {number}: {line!r} is not `synset id name` with an id of its own")
        classes[int(words[1])] = (words[0], "_".join(words[2:]))
    pairs = [classes[label] for label in sorted(classes)]
    synsets = dict(pairs)
    if sorted(classes) != list(range(1, len(classes) + 1)) or not 1 <= len(classes) < IGNORE_INDEX:
        raise DataError(f"{path} has {len(classes)} classes; ids must run from 1 to at most 254 without gaps")
    if len(synsets) < len(pairs) or len({BACKGROUND, *synsets.values()}) <= len(pairs):
        raise DataError(f"{path} has a synset or a name twice; take the devkit's file")
    return synsets


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item(Item):
    image: str
    label: str
    """Where its labels come from: the XML annotation of a training image, the mask of a validation image."""


@dataclass(frozen=True, kw_only=True)
class _L2idFolder(Source[_Item]):
    synsets: list[str]
    """Those of the classes 1, 2, ..."""
    form: ImageForm

    def scan(self, item: _Item) -> Sample:
        image, label = Path(item.image), Path(item.label)
        size, as_is = self.form.measure(image)
        if label.suffix == ".xml":
            classes = self._labels(label)
        else:
            mask = self._mask(label)
            check_size(label, mask, image, size, remedy=MASK_REMEDY)
            present = checked_ids(label, mask, len(self.class_names), remedy=MASK_REMEDY)
            classes = tuple(value for value in present if 0 < value < IGNORE_INDEX)
        return Sample.of(item, size, classes, source=(item.image, item.label), image_as_is=as_is)

    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        image, label = (Path(path) for path in sample.source)
        data = self.form.jpeg(image, as_is=sample.image_as_is)
        if label.suffix == ".xml":
            return data, None
        return data, encode_mask(self._mask(label), self.palette)

    def _mask(self, path: Path) -> npt.NDArray[np.uint8]:
        return self.form.mask(measure_mask(path, remedy=MASK_REMEDY)[0])

    def _labels(self, path: Path) -> tuple[int, ...]:
        """Ids of the classes of an annotation's objects."""
        synsets = read_objects(path, remedy="fetch it again")
        if unknown := sorted(synsets.difference(self.synsets)):
            raise DataError(f"{path} has objects of {unknown[:5]}, which the map of synsets lacks; see --map-file")
        return tuple(sorted(self.synsets.index(synset) + 1 for synset in synsets))


# Finding things.


def _find_map(root: Path) -> Path:
    for folder in (root, root.parent):
        if (folder / MAP_FILE).is_file():
            return folder / MAP_FILE
    raise DataError(
        f"neither {root / MAP_FILE} nor {root.parent / MAP_FILE} exists; name the devkit's map_det.txt with --map-file"
    )


def _train_items(root: Path) -> list[_Item]:
    """Training images that have an annotation."""
    images, labels = root / "Data" / "DET" / "train", root / "Annotations" / "DET" / "train"
    for folder in (images, labels):
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; --root is the folder ILSVRC that the DET archive unpacks to")
    return _items("train", images, labels, ".xml", without="whose classes nobody listed")


def _val_items(images: Path, masks: Path) -> list[_Item]:
    """Validation images that have a mask."""
    for option, folder in (("--val-images", images), ("--val-masks", masks)):
        if not folder.is_dir():
            raise DataError(f"{option} {folder} is no folder; give that of the L2ID challenge, track 1")
    if not next(_files(masks, ".png"), ""):
        raise DataError(f"--val-masks {masks} holds no masks KEY.png; {MASK_REMEDY}")
    return _items("val", images, masks, ".png", without="without a mask")


def _items(split: str, images: Path, labels: Path, suffix: str, *, without: str) -> list[_Item]:
    """The images that a file of labels belongs to; prints how many are left out."""
    labeled = sorted(_files(labels, suffix))
    left_out = sorted(set(_files(images, ".JPEG")) - set(labeled))
    such = f", such as {', '.join(left_out[:3])}" if left_out else ""
    say(f"{split}: {len(labeled)} images; left out {len(left_out)} {without}{such}")
    return [
        _Item(
            key=key_of(os.path.basename(name)),
            split=split,
            image=f"{images}/{name}.JPEG",
            label=f"{labels}/{name}{suffix}",
        )
        for name in labeled
    ]


def _files(folder: Path, suffix: str) -> Iterator[str]:
    """Paths of all files of a kind, below the folder and without their suffix."""
    for parent, _, names in os.walk(folder):
        below = os.path.relpath(parent, folder)
        for name in names:
            if name.endswith(suffix):
                yield os.path.normpath(os.path.join(below, name[: -len(suffix)]))


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder ILSVRC with Data/DET and Annotations/DET")
    parser.add_argument("--val-images", type=Path, metavar="DIR", help="the challenge's validation images")
    parser.add_argument("--val-masks", type=Path, metavar="DIR", help="their raw masks")
    parser.add_argument("--map-file", type=Path, metavar="FILE", help="the devkit's map_det.txt")
    add_longest_side(parser, default=LONGEST_SIDE)
    add_common_arguments(parser, name="l2id")


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    required(args, "root", "val_images", "val_masks")
    options = {name: getattr(args, name) for name in ("val_images", "val_masks", "map_file", "longest_side")}
    return convert(args.root, Output.of_arguments(args), **options)


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "l2id", *sys.argv[1:]]))
