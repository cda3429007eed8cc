"""Your own images as tar shards: with masks, with a table of labels, or with both.

    python data_prep/folder.py --images DIR --masks DIR --classes cat,dog --val-fraction 0.1 --out DIR
    python data_prep/folder.py --images DIR --labels labels.csv --split val=val.txt --out DIR

Images are all files of the folder and the folders in it; an image's key is its path without suffix, `a/b.jpg` being
`a_b`. Its mask has the same path below --masks, ending in .png:

- indexed or grey, with class ids as values: 0 is the background, 1, 2, ... are --classes in their order, 255 is void;
- or in colours, with --palette FILE: a line `name #rrggbb` (or `name r g b`) per class, the background first, and a
  line `void #rrggbb` where there is void. The file then names the classes.

--labels is a CSV file with the columns `image` (path below --images, or key) and `labels` (names separated by `;`), and
`split` if wanted. Image labels come from it where it is given, else from the classes in the mask. Splits come from its
column, from list files (--split NAME=FILE, one image a line; the rest is `train`), or by --val-fraction.

JPEG files are copied as they are, unless their EXIF data turn them; other images become JPEG files of quality 95.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_writer import (
    Sample,
    add_arguments,
    check_output,
    map_parallel,
    report_problems,
    run_command,
    write_dataset,
)
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX, voc_palette
from slrnet.data.images import encode_mask, upright_rgb
from slrnet.data.manifest import DataError, DatasetInfo

__all__ = ["LabelTable", "Palette", "convert", "read_label_table", "read_palette"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
EXIF_ORIENTATION = 0x0112
JPEG_QUALITY = 95


def convert(
    images: str | Path,
    out: str | Path,
    *,
    masks: str | Path | None = None,
    labels: str | Path | None = None,
    palette: str | Path | None = None,
    classes: Sequence[str] | None = None,
    splits: Mapping[str, Path] | None = None,
    val_fraction: float = 0.0,
    name: str = "folder",
    made_by: str | None = None,
    samples_per_shard: int = 128,
    shards: int | None = None,
    seed: int = 0,
    processes: int = 1,
) -> DatasetInfo:
    """Makes shards of a folder of images.

    Args:
        images: Folder with the images.
        out: Folder to make; it must not exist or be empty.
        masks: Folder with the masks.
        labels: CSV file with image labels.
        palette: File with the colours and names of the classes, for masks in colours.
        classes: Names of the foreground classes in the order of their ids; not with `palette`. Without masks they may
            be left out: then they are the names in `labels`, sorted.
        splits: List files of splits other than `train`.
        val_fraction: Share of the images that becomes `val`, chosen by key and seed; not with other ways to split.
        name: Short name of the data set.
        made_by: The command that makes the data set, without `--out`.
        samples_per_shard: Samples that a shard holds at most, when `shards` is not given.
        shards: Number of shards of every split.
        seed: Seed of the split and of the order in which samples are dealt to shards.
        processes: Worker processes; the output is the same for any number.

    Raises:
        DataError: something about the folders, the files or the options is refused; nothing is written then.
    """
    check_output(out)
    if masks is None and labels is None:
        raise DataError("neither --masks nor --labels is given; one of them must say what the images show")
    colours = read_palette(palette) if palette is not None else None
    table = read_label_table(labels) if labels is not None else None
    names = _class_names(classes, colours, table, has_masks=masks is not None)
    source = _Source(
        images=Path(images).absolute(),
        masks=None if masks is None else Path(masks).absolute(),
        names=names,
        colours=colours,
    )
    items = _items(source, table, splits or {}, val_fraction=val_fraction, seed=seed)
    scanned = map_parallel(source.scan, items, processes=processes, label="reading")
    report_problems([result for result in scanned if isinstance(result, str)], str(source.images))
    return write_dataset(
        out,
        [result for result in scanned if isinstance(result, Sample)],
        source.encode,
        name=name,
        classes=names,
        palette=source.palette,
        made_by=made_by or shlex.join(["python", "data_prep/folder.py", "--images", str(source.images)]),
        samples_per_shard=samples_per_shard,
        shards=shards,
        seed=seed,
        processes=processes,
    )


@dataclass(frozen=True)
class Palette:
    """Classes by colour: `names` (background first), `colours` (K, 3) uint8, `void` (3,) or None."""

    names: tuple[str, ...]
    colours: npt.NDArray[np.uint8]
    void: npt.NDArray[np.uint8] | None

    def ids(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(H, W) class ids of a mask in colours, (H, W, 3) uint8.

        Raises:
            DataError: it has a colour that is not in the palette.
        """
        codes = _codes(pixels)
        found = np.full(codes.shape, -1, dtype=np.int16)
        found[codes == _codes(self.void)] = IGNORE_INDEX if self.void is not None else -1
        for label, code in enumerate(_codes(self.colours)):
            found[codes == code] = label
        if (found < 0).any():
            row, column = np.argwhere(found < 0)[0]
            colour = "#" + bytes(pixels[row, column].tolist()).hex()
            raise DataError(f"has the colour {colour} at row {row}, column {column}, which the palette file lacks")
        return found.astype(np.uint8)


@dataclass(frozen=True)
class LabelTable:
    """What a CSV file says: `labels` by image name, and `splits` by image name where it has that column."""

    path: Path
    labels: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, str] | None


def read_palette(path: str | Path) -> Palette:
    """Reads a palette file; the module's docstring has its form.

    Raises:
        DataError: the file cannot be read, or a line is not of that form, or a name or colour occurs twice.
    """
    names: list[str] = []
    colours: list[tuple[int, int, int]] = []
    void = None
    for number, line in enumerate(_lines(path, "palette file"), start=1):
        words = line.split()
        if not words or line.lstrip().startswith("//"):
            continue
        colour = _colour(words[1:])
        if colour is None:
            raise DataError(f"{path}, line {number}: {line!r} is not `name #rrggbb` or `name r g b` with 0 to 255")
        if words[0] == "void":
            void = np.array(colour, dtype=np.uint8)
            continue
        names.append(words[0])
        colours.append(colour)
    every = [*colours, *([] if void is None else [tuple(void.tolist())])]
    if len(set(names)) < len(names) or len(set(every)) < len(every):
        raise DataError(f"{path} has a name or a colour twice; each class needs its own")
    if not 2 <= len(names) <= IGNORE_INDEX or names[0] != BACKGROUND:
        raise DataError(f"{path} names {len(names)} classes; it needs {BACKGROUND!r} first and 1 to 254 others")
    return Palette(tuple(names), np.array(colours, dtype=np.uint8), void)


def read_label_table(path: str | Path) -> LabelTable:
    """Reads a CSV file of labels; the module's docstring has its form.

    Raises:
        DataError: the file cannot be read, lacks a column, or has an image twice.
    """
    reader = csv.DictReader(_lines(path, "table of labels"))
    columns = reader.fieldnames or []
    if missing := [column for column in ("image", "labels") if column not in columns]:
        raise DataError(f"{path} has the columns {list(columns)}; {missing} must be among them")
    labels: dict[str, tuple[str, ...]] = {}
    splits: dict[str, str] = {}
    for number, row in enumerate(reader, start=2):
        key = _key(Path((row["image"] or "").strip()))
        if not key or key in labels:
            raise DataError(f"{path}, line {number}: image {row['image']!r} is empty or occurs twice")
        labels[key] = tuple(dict.fromkeys(name.strip() for name in (row["labels"] or "").split(";") if name.strip()))
        splits[key] = (row.get("split") or "").strip() or "train"
    return LabelTable(Path(path), labels, splits if "split" in columns else None)


@dataclass(frozen=True, kw_only=True)
class _Item:
    key: str
    path: Path
    split: str
    labels: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Reads images and masks; picklable."""

    images: Path
    masks: Path | None
    names: tuple[str, ...]
    colours: Palette | None

    @property
    def palette(self) -> npt.NDArray[np.uint8]:
        colours = voc_palette()
        if self.colours is not None:
            colours[: len(self.colours.colours)] = self.colours.colours
        return colours

    def scan(self, item: _Item) -> Sample | str:
        """Reads and checks the files of one image: the sample to write, or what is wrong."""
        try:
            image = _read_upright(item.path)
            mask_path = self._mask_path(item.path)
            present: Sequence[int] = ()
            if mask_path is not None:
                mask = self._read_mask(mask_path)
                if mask.shape != (image.height, image.width):
                    raise DataError(
                        f"{mask_path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image {item.path.name} "
                        f"{image.width}x{image.height} upright; make them of one size"
                    )
                present = np.unique(mask).tolist()
        except DataError as error:
            return str(error)
        names = present if item.labels is None else [self.names.index(name) for name in item.labels]
        return Sample(
            key=item.key,
            split=item.split,
            width=image.width,
            height=image.height,
            classes=tuple(sorted(label for label in names if 0 < label < len(self.names))),
            source=str(item.path),
        )

    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        """Bytes of the JPEG and of the indexed PNG mask, if there is one."""
        path = Path(sample.source)
        mask_path = self._mask_path(path)
        mask = None if mask_path is None else encode_mask(self._read_mask(mask_path), self.palette)
        return _jpeg_bytes(path), mask

    def _mask_path(self, image: Path) -> Path | None:
        """Path of an image's mask; None where there are no masks, or where labels alone were given for this image."""
        if self.masks is None:
            return None
        path = (self.masks / image.relative_to(self.images)).with_suffix(".png")
        return path if path.is_file() else None

    def _read_mask(self, path: Path) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                if self.colours is not None:
                    return self.colours.ids(np.asarray(image.convert("RGB")))
                if image.mode not in ("P", "L"):
                    raise DataError(f"is a {image.mode} image; indexed or grey ids are expected, or --palette FILE")
                ids = np.asarray(image, dtype=np.uint8)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read: {error}; make it again") from None
        except DataError as error:
            raise DataError(f"{path} {error}") from None
        unknown = [int(label) for label in np.unique(ids) if label >= len(self.names) and label != IGNORE_INDEX]
        if unknown:
            raise DataError(f"{path} has ids {unknown}; allowed are 0 to {len(self.names) - 1} and 255; see --classes")
        return ids


# Finding things.


def _class_names(
    classes: Sequence[str] | None, colours: Palette | None, table: LabelTable | None, *, has_masks: bool
) -> tuple[str, ...]:
    if colours is not None:
        if classes is not None:
            raise DataError("--classes and --palette both name the classes; give one of the two")
        names = colours.names
    elif classes is not None:
        names = (BACKGROUND, *classes)
    elif has_masks:
        raise DataError("masks hold ids; name the classes 1, 2, ... with --classes (or --palette for masks in colours)")
    else:
        assert table is not None
        names = (BACKGROUND, *sorted({name for labels in table.labels.values() for name in labels}))
    if len(set(names)) < len(names) or not 2 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"there are {len(names) - 1} classes {list(names[1:4])}...; 1 to 254 different ones are needed")
    if table is not None:
        unknown = sorted({name for labels in table.labels.values() for name in labels} - set(names[1:]))
        if unknown:
            raise DataError(f"{table.path} has the labels {unknown[:5]}; the classes are {', '.join(names[1:])}")
    return names


def _items(
    source: _Source, table: LabelTable | None, splits: Mapping[str, Path], *, val_fraction: float, seed: int
) -> list[_Item]:
    paths = _find_images(source.images)
    ways = [bool(splits), val_fraction > 0, table is not None and table.splits is not None]
    if sum(ways) > 1:
        raise DataError("splits are given in several ways; use one of --split, --val-fraction and the column `split`")
    if not 0 <= val_fraction < 1:
        raise DataError(f"--val-fraction is {val_fraction}; allowed are shares from 0 to below 1")
    split_of = _read_splits(splits, paths)
    if table is not None:
        if strangers := sorted(set(table.labels) - set(paths)):
            raise DataError(f"{table.path} lists {len(strangers)} image(s) that are not there, such as {strangers[:3]}")
        split_of |= table.splits or {}
    items = []
    for key, path in paths.items():
        labels = None if table is None else table.labels.get(key)
        if labels is None and source._mask_path(path) is None:
            raise DataError(f"{path} has no mask" + ("" if table is None else f" and no line in {table.path}"))
        drawn = "val" if _share(key, seed) < val_fraction else "train"
        items.append(_Item(key=key, path=path, split=split_of.get(key, drawn), labels=labels))
    return items


def _find_images(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"--images {folder} is no folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"--images {folder} holds no images; known are {', '.join(sorted(SUFFIXES))}")
    found: dict[str, Path] = {}
    for path in paths:
        key = _key(path.relative_to(folder))
        if key in found:
            raise DataError(f"{path} and {found[key]} would both be {key!r}; rename one of them")
        found[key] = path
    return found


def _read_splits(splits: Mapping[str, Path], known: Mapping[str, Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, path in splits.items():
        for line in _lines(path, "list file"):
            if not line.strip():
                continue
            key = _key(Path(line.strip()))
            if key not in known:
                raise DataError(f"{path} lists {line.strip()!r}, which is not among the images")
            if key in found:
                raise DataError(f"image {line.strip()!r} is in the splits {found[key]!r} and {name!r}; keep one")
            found[key] = name
    return found


def _key(path: Path) -> str:
    """`a/b.c.jpg` as `a_b_c`: tar readers cut names at the first dot."""
    stem = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    return "_".join(stem.parts).replace(".", "_").replace(" ", "_")


def _share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone, so that new images move no old ones."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# Reading and writing of files.


def _lines(path: str | Path, what: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read the {what} {path}: {reason}") from None


def _colour(words: Sequence[str]) -> tuple[int, int, int] | None:
    try:
        if len(words) == 1 and len(words[0]) == 7 and words[0][0] == "#":
            red, green, blue = bytes.fromhex(words[0][1:])
        else:
            red, green, blue = (int(word) for word in words)
    except ValueError:
        return None
    return (red, green, blue) if all(0 <= value <= 255 for value in (red, green, blue)) else None


def _codes(colours: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.int64]:
    """One number per colour (..., 3); none for None."""
    if colours is None:
        return np.array(-1)
    wide = colours.astype(np.int64)
    codes: npt.NDArray[np.int64] = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return codes


def _read_upright(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read: {error}; replace it or take it away") from None


def _jpeg_bytes(path: Path) -> bytes:
    with Image.open(path) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if plain and image.getexif().get(EXIF_ORIENTATION, 1) == 1:
            return path.read_bytes()
        buffer = io.BytesIO()
        upright_rgb(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


# Command line.


def main() -> int:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with the images")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="folder with PNG masks of the same paths")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="CSV file with image labels")
    parser.add_argument("--palette", type=Path, metavar="FILE", help="colours of the classes, for masks in colours")
    parser.add_argument("--classes", metavar="A,B", help="names of the classes 1, 2, ...")
    parser.add_argument("--split", action="append", default=[], metavar="NAME=FILE", help="list of a split; repeatable")
    parser.add_argument("--val-fraction", type=float, default=0.0, metavar="X", help="share of the images for `val`")
    parser.add_argument("--name", default="folder", help="name of the data set (default: %(default)s)")
    add_arguments(parser)
    return run_command(parser, _make)


def _make(args: argparse.Namespace) -> DatasetInfo:
    if args.images is None:
        raise DataError("--images is missing; give the folder with the images")
    splits: dict[str, Path] = {}
    for text in args.split:
        name, equals, path = text.partition("=")
        if not equals or not name or not path or name in splits:
            raise DataError(f"--split {text!r} is not NAME=LISTFILE, or names a split twice")
        splits[name] = Path(path)
    classes = None if args.classes is None else [name.strip() for name in args.classes.split(",") if name.strip()]
    return convert(
        args.images,
        args.out,
        masks=args.masks,
        labels=args.labels,
        palette=args.palette,
        classes=classes,
        splits=splits,
        val_fraction=args.val_fraction,
        name=args.name,
        made_by=_command(args),
        samples_per_shard=args.samples_per_shard,
        shards=args.shards,
        seed=args.seed,
        processes=args.processes,
    )


def _command(args: argparse.Namespace) -> str:
    """The command without what changes no byte of the shards (--processes) and without --out."""
    words = ["python", "data_prep/folder.py", "--images", str(args.images.absolute()), "--name", args.name]
    for option in ("masks", "labels", "palette"):
        path = getattr(args, option)
        words += [] if path is None else [f"--{option}", str(path.absolute())]
    words += [] if args.classes is None else ["--classes", args.classes]
    words += [word for text in args.split for word in ("--split", text)]
    words += ["--val-fraction", str(args.val_fraction)] if args.val_fraction else []
    words += ["--samples-per-shard", str(args.samples_per_shard)] if args.shards is None else []
    words += [] if args.shards is None else ["--shards", str(args.shards)]
    return shlex.join([*words, "--seed", str(args.seed)])


if __name__ == "__main__":
    sys.exit(main())
