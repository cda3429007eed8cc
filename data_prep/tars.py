# PYTHON_ARGCOMPLETE_OK
"""Tars of samples that other programs wrote, such as `webdataset.ShardWriter`, as a data set.

    slrnet prepare tars --tars DIR --classes cat,dog --out DIR

Reads all files *.tar of the folder. As in WebDataset, the files of a sample lie side by side in a tar and share their
name up to its first dot:

- KEY.jpg or KEY.jpeg, the image;
- KEY.png, the mask, where there is one: indexed or gray, with class ids as values: 0 is the background, 1, 2, ... are
  --classes in their order, 255 is void;
- KEY.json, where there is one: an object whose entry `classes` lists the foreground classes that the image shows, by
  name or by id, or is null where they are not known;
- KEY.cls, where there is one: the image's only class as a number, counted from 0 among --classes.

Other files are left out, and named: also those with more dots in their names, such as `000.left.jpg`, which WebDataset
takes for another kind of file of the sample `000`. Image labels come from the JSON or .cls file, else from the classes
in the mask. A sample with none of the three is refused; with --unlabeled it is taken as an unlabeled image.

The split comes from the tar's name: `train-000000.tar`, `photos_val_07.tar` and `test.tar` hold samples of `train`,
`val` and `test`; tars of other names hold samples of `train`. With --val-fraction the samples of all tars are dealt to
`train` and `val` instead. Samples are copied into new shards with a manifest: training reads a sample by its place in a
tar, which needs headers of a fixed form, and the order in new shards is random.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.conversion import Output, Source, add_common_arguments, add_longest_side, convert_items
from data_prep.found_files import key_of
from data_prep.shard_writer import Item, Sample, check_output, listed
from data_prep.source_files import (
    ImageForm,
    check_fraction,
    check_size,
    checked_ids,
    copied,
    drawn_split,
    measure_mask,
    split_words,
)
from data_prep.splits import OTHER_NAMES, SPLITS
from data_prep.text_files import read_json, read_text
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DataError, DatasetInfo
from slrnet.storage.shown import say

__all__ = ["PackedFile", "add_arguments", "convert", "make", "read_tar"]

SUFFIXES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "json": "json", "cls": "cls"}
"""Files that are read, by suffix, and what they are."""
KNOWN_FILES = ", ".join(f"KEY.{suffix}" for suffix in SUFFIXES)
REMEDY = "write the tar again, or leave its samples out with --skip-damaged"


def convert(
    tars: str | Path,
    output: Output,
    *,
    classes: Sequence[str],
    val_fraction: float = 0.0,
    unlabeled: bool = False,
    longest_side: int = 0,
) -> DatasetInfo:
    """Makes shards of tars in WebDataset's form.

    Args:
        tars: Folder with the tars.
        output: What to write.
        classes: Names of the foreground classes in the order of their ids 1, 2, ...
        val_fraction: Share of the samples that becomes `val`, chosen by key and seed; 0 takes splits from tars' names.
        unlabeled: Whether samples with neither a mask nor labels are taken, as unlabeled images.
        longest_side: Larger images are scaled down to it, pixels; 0 keeps all sizes.

    Raises:
        DataError: something about the tars, their samples or the options is refused; nothing is written then.
    """
    check_output(output.folder)
    folder, names = Path(tars).absolute(), (BACKGROUND, *classes)
    if len(set(names)) < len(names) or not 2 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"--classes has the names {list(classes)}; 1 to 254 different ones are needed")
    check_fraction(val_fraction)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"--tars {folder} holds no files *.tar; give the folder that holds them")
    left_out = [path.name for path in sorted(folder.iterdir()) if path not in paths]
    samples = [(path, key, files) for path in paths for key, files in read_tar(path, left_out)]
    items = [
        _Item(
            key=key,
            split=drawn_split(key, val_fraction, output.seed) if val_fraction else _split_of(path),
            tar=str(path),
            files=files,
        )
        for path, key, files in samples
    ]
    _report(folder, items, left_out)
    form = ImageForm(longest_side=longest_side or None, remedy=REMEDY)
    source = _Tars(place=str(folder), class_names=names, unlabeled=unlabeled, form=form)
    words = {
        "--tars": folder,
        "--classes": ",".join(classes),
        "--val-fraction": val_fraction,
        "--unlabeled": unlabeled,
        "--longest-side": longest_side,
    }
    return convert_items(source, items, output.named("tars", "data_prep/tars.py", words))


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file within a tar, which opens and reads like a `Path`."""

    tar: str
    """Path of the tar."""
    name: str
    """Name within the tar."""
    offset: int
    """First byte of its content in the tar."""
    size: int
    """Bytes of its content."""

    def __str__(self) -> str:
        """The tar and the name, for messages."""
        return f"{self.tar}: {self.name}"

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The content as a file to read from."""
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The content."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_tar(path: Path, left_out: list[str]) -> Iterator[tuple[str, dict[str, PackedFile]]]:
    """Yields key and files of each sample of a tar; the files by what they are: `jpg`, `png`, `json`, `cls`.

    A folder in a name becomes a part of the key: `a/b.jpg` has the key `a_b`.

    Args:
        path: The tar.
        left_out: Gets the names of other members.

    Raises:
        DataError: the tar is damaged or cut off, or has two files of a kind for a sample.
    """
    key, files, end = "", dict[str, PackedFile](), 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                parent, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                kind = SUFFIXES.get(suffix.lower())
                if not member.isfile() or member.issparse() or kind is None or not stem:
                    left_out.extend([] if member.isdir() else [f"{path.name}: {member.name}"])
                    continue
                own = key_of(str(PurePosixPath(parent.lstrip("/"), stem)))
                if own != key and files:
                    yield key, files
                    files = {}
                key = own
                if kind in files:
                    raise DataError(f"{path} has the files {files[kind].name} and {member.name} for one sample")
                files[kind] = PackedFile(str(path), member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar: {error}; write it again") from None
    if files:
        yield key, files
    with path.open("rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise DataError(f"{path} is damaged or cut off at byte {end}: no end of a tar is there; write it again")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item(Item):
    tar: str
    files: Mapping[str, PackedFile]


@dataclass(frozen=True, kw_only=True)
class _Tars(Source[_Item]):
    unlabeled: bool
    form: ImageForm

    def scan(self, item: _Item) -> Sample:
        image, mask = item.files.get("jpg"), item.files.get("png")
        if image is None:
            there = ", ".join(file.name for file in item.files.values())
            raise DataError(f"{item.tar}: sample {item.key!r} has no image .jpg or .jpeg, only {there}; {REMEDY}")
        size, image_as_is = self.form.measure(image)
        classes, mask_as_is = self._labels(item), False
        if mask is not None:
            stored, mask_as_is = measure_mask(mask, remedy=REMEDY)
            ids = self.form.mask(stored)
            mask_as_is = mask_as_is and ids is stored
            check_size(mask, ids, image, size, remedy=REMEDY)
            present = checked_ids(mask, ids, len(self.class_names), remedy="see --classes")
            if classes is None:
                classes = tuple(label for label in present if 0 < label < IGNORE_INDEX)
        if classes is None and not self.unlabeled:
            raise DataError(
                f"{image} has no mask, and neither .json nor .cls says what it shows; add one of them, or take such "
                "samples as unlabeled images with --unlabeled"
            )
        return Sample.of(item, size, classes, source=item.files, image_as_is=image_as_is, mask_as_is=mask_as_is)

    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        image, mask = sample.source["jpg"], sample.source.get("png")
        data = self.form.jpeg(image, as_is=sample.image_as_is)
        if mask is None:
            return data, None
        if sample.mask_as_is:
            return data, copied(mask, remedy=REMEDY)
        return data, encode_mask(self.form.mask(measure_mask(mask, remedy=REMEDY)[0]), self.palette)

    def _labels(self, item: _Item) -> tuple[int, ...] | None:
        """Classes that a sample's JSON or .cls file names, ascending; None where none is known."""
        if (file := item.files.get("json")) is not None:
            record = read_json(file, "labels")
            classes = record.get("classes") if isinstance(record, dict) else None
            if classes is not None:
                if not isinstance(classes, list):
                    raise DataError(f"{file} has the classes {classes!r:.40}; a list of names or ids is allowed")
                return tuple(sorted({self._class_id(file, value) for value in classes}))
        if (file := item.files.get("cls")) is not None:
            text = read_text(file, "class").strip()
            if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(self.class_names) - 1:
                raise DataError(
                    f"{file} has the class {text[:40]!r}; allowed are 0 to {len(self.class_names) - 2}, the place "
                    "among --classes"
                )
            return (int(text) + 1,)
        return None

    def _class_id(self, file: PackedFile, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < len(self.class_names):
            return value
        if isinstance(value, str) and value in self.class_names[1:]:
            return self.class_names.index(value)
        raise DataError(
            f"{file} has the class {value!r:.40}; allowed are the names {', '.join(self.class_names[1:])} and their "
            f"ids 1 to {len(self.class_names) - 1}"
        )


def _report(folder: Path, items: Sequence[_Item], left_out: Sequence[str]) -> None:
    """Says what no sample has; raises `DataError` for keys that occur twice, or if there are none."""
    if left_out:
        say(f"left out {len(left_out)} files that are no {KNOWN_FILES}: {listed(left_out)}")
    if not items:
        raise DataError(f"the tars of {folder} hold no {KNOWN_FILES}")
    counts = Counter((item.split, item.key) for item in items)
    twice = [key for (_, key), count in counts.items() if count > 1]
    if twice:
        files = [str(file) for item in items if item.key == twice[0] for file in item.files.values()]
        raise DataError(
            f"the tars of {folder} have {len(twice)} keys in several places: {listed(files)}; the files of "
            "a sample lie side by side in one tar, and each has its own name up to the first dot: write the tars again"
        )


def _split_of(path: Path) -> str:
    """The split that a tar's name states; `train` if it states none.

    Raises:
        DataError: the name states another split in other words.
    """
    match = re.search(r"(?:^|[-_.])([A-Za-z]+)(?:[-_.]?\d+)?$", path.stem)
    word = match.group(1) if match else ""
    meant = OTHER_NAMES.get(word.lower(), word.lower())
    if word not in SPLITS and meant in ("val", "test"):
        raise DataError(f"{path} seems to hold the split {meant!r}; rename it, {word!r} as {meant!r}")
    return word if word in SPLITS else "train"


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--tars", type=Path, metavar="DIR", help="folder with the tars")
    add("--classes", metavar="A,B", help="names of the classes 1, 2, ...")
    add("--val-fraction", type=float, default=0.0, metavar="X", help="share of the samples for `val`")
    add("--unlabeled", action="store_true", help="take samples with neither a mask nor labels as unlabeled images")
    add_longest_side(parser, default=0)
    add_common_arguments(parser, name="tars")


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    if args.tars is None or args.classes is None:
        raise DataError("--tars and --classes are needed: the folder with the tars, and the names of their classes")
    options = {name: getattr(args, name) for name in ("val_fraction", "unlabeled", "longest_side")}
    return convert(args.tars, Output.of_arguments(args), classes=split_words(args.classes) or [], **options)


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "tars", *sys.argv[1:]]))
