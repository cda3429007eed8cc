"""What all converters share: the options of what they write, the way from found images to shards, the command line."""

from __future__ import annotations

import argparse
import os
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from data_prep.shard_writer import Item, Sample, deal, listed, report_problems, verify, write_dataset
from data_prep.source_files import read_keys
from data_prep.workers import ConversionPool
from slrnet.data.catalog import voc_palette
from slrnet.data.depth import Depth
from slrnet.data.images import DamagedFile, open_image
from slrnet.data.manifest import DataError, DatasetInfo, load_dataset
from slrnet.storage.shown import LEFT_OUT, say

__all__ = [
    "DamagedLeftOut",
    "Output",
    "Source",
    "add_common_arguments",
    "add_longest_side",
    "convert_items",
    "parse_named_files",
    "required",
    "run_conversion",
]

AnyItem = TypeVar("AnyItem", bound=Item)


class DamagedLeftOut(DataError):
    """Images were left out because their files are damaged; the others are written.

    Attributes:
        info: what was written.
    """

    def __init__(self, info: DatasetInfo, problems: Sequence[str]) -> None:
        text = "\n  ".join(["damaged image(s) were left out, all others are written:", listed(problems, "\n  ")])
        super().__init__(f"{len(problems)} {text}\nrepair them, or take the data as it is with --skip-damaged")
        self.info = info


@dataclass(frozen=True)
class Output:
    """What every converter is told about the data set that it writes."""

    folder: str | Path
    """Folder to make; it must not exist or be empty."""
    _: KW_ONLY
    name: str | None = None
    """Short name of the data set; None for the converter's own."""
    subsets: Mapping[str, Path] = field(default_factory=dict)
    """List files of named subsets."""
    samples_per_shard: int = 128
    """Samples that a shard holds at most, when `shards` is not given."""
    shards: int | None = None
    """Number of shards of every split."""
    seed: int = 0
    """Seed of everything random: drawn splits and fractions, and the order in which samples are dealt to shards."""
    skip_damaged: bool = False
    """Leave out images whose files are damaged or do not fit, naming each; else those that do not fit are refused, and
    damaged ones are left out with an error after the others are written."""
    processes: int = 1
    """Worker processes; the output is the same for any number."""
    dry_run: bool = False
    """Read and check everything, say what was understood, and write nothing."""
    made_by: str | None = None
    """The command that makes the data set, without `--out`; None for that of the converter's arguments."""

    @classmethod
    def of_arguments(cls, args: argparse.Namespace) -> Output:
        """The output that the options of `add_common_arguments` ask for."""
        names = ("name", "samples_per_shard", "shards", "seed", "skip_damaged", "processes")
        options = {name: getattr(args, name) for name in names}
        options |= {"dry_run": getattr(args, "dry_run", False), "subsets": parse_named_files("--subset", args.subset)}
        return cls(args.out or Path(), **options)

    def named(self, name: str, script: str, words: Mapping[str, Any]) -> Output:
        """With a name, and the command that makes it; what changes no byte, such as --processes, is left out of that.

        Args:
            name: Name unless another one was given.
            script: File of the converter.
            words: Options of the converter and their values: paths, texts, numbers; True for an option without a value,
                a mapping for NAME=FILE pairs; None, False and what is empty are left out.
        """
        name = self.name or name
        common = {
            "--name": name,
            "--subset": self.subsets,
            "--samples-per-shard": self.samples_per_shard if self.shards is None else None,
            "--shards": self.shards,
            "--seed": str(self.seed),
            "--skip-damaged": self.skip_damaged,
        }
        parts = ["python", script, *(word for option in {**words, **common}.items() for word in _words(*option))]
        return replace(self, name=name, made_by=self.made_by or shlex.join(parts))


@dataclass(frozen=True, kw_only=True)
class Source(ABC, Generic[AnyItem]):
    """A folder in some layout. Picklable and small: it goes to every worker process."""

    place: str
    """What messages call it."""
    class_names: tuple[str, ...]
    """Names of all K classes, background first."""

    @property
    def palette(self) -> npt.NDArray[np.uint8]:
        """(256, 3) uint8 RGB by id."""
        return voc_palette()

    @property
    def depth(self) -> Depth:
        """How images of more than 8 bits become 8-bit ones."""
        return Depth()

    def prepared(self, items: Sequence[AnyItem], workers: ConversionPool) -> Self:
        """The source after what must be known of all images before the first one is read; by default itself.

        Raises:
            DataError: the images do not go together.
        """
        return self

    @abstractmethod
    def scan(self, item: AnyItem) -> Sample:
        """Reads and checks all files of one image.

        Raises:
            DataError: something is wrong with them.
        """

    def check(self, samples: Sequence[Sample]) -> None:
        """Compares what `scan` found in all images; raises `DataError` if it does not fit together."""

    def row(self, sample: Sample) -> dict[str, str]:
        """A sample as a row of the table that a dry run prints."""
        labels = None if sample.classes is None else ", ".join(self.class_names[label] for label in sample.classes)
        return {
            "key": sample.key,
            "split": sample.split,
            "size": f"{sample.width}x{sample.height}",
            "labels": "unknown" if labels is None else labels or "none",
        }

    @abstractmethod
    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        """Bytes of one sample's JPEG and of its indexed PNG mask, None where there is none."""

    def notes(self, samples: Sequence[Sample]) -> list[str]:
        """Lines to print about the samples that are written; none unless a source has something to say."""
        return []


def convert_items(
    source: Source[AnyItem],
    items: Sequence[AnyItem],
    output: Output,
    *,
    keep_background: bool = True,
    read_keys: Callable[[Path], list[str]] = read_keys,
) -> DatasetInfo:
    """Reads and checks all images of a source, then writes them.

    Args:
        source: Where they come from.
        items: One for each image.
        output: What to write; with name and command, see `Output.named`.
        keep_background: Whether images that are known to show none of the classes are written.
        read_keys: Reads the keys in a list file of a subset.

    Raises:
        DataError: a subset lists an image that is not there, or files do not fit and are not to be skipped; nothing is
            written then.
        DamagedLeftOut: all was written but images whose files are damaged, which are not to be skipped in silence.
    """
    assert output.name is not None
    assert output.made_by is not None
    known = {item.key for item in items} if output.subsets else set()
    for name, path in output.subsets.items():
        keys = frozenset(read_keys(path))
        if strangers := sorted(keys - known):
            raise DataError(
                f"--subset {name}={path} lists {len(strangers)} image(s) that are in no split, such as "
                f"{strangers[:3]}; remove them from the list"
            )
        items = [replace(item, subsets=(*item.subsets, name)) if item.key in keys else item for item in items]
    with ConversionPool(output.processes) as workers:
        source = source.prepared(items, workers)
        samples, damaged = _scanned(source, items, workers, skip_damaged=output.skip_damaged)
        if not keep_background:
            kept = [sample for sample in samples if sample.classes != ()]
            say(f"left out {len(samples) - len(kept)} images that show none of the chosen classes")
            samples = kept
        source.check(samples)
        for note in source.notes(samples):
            say(note)
        info = (_understood if output.dry_run else _written)(source, samples, output, workers)
    if damaged and not output.skip_damaged:
        raise DamagedLeftOut(info, damaged)
    return info


def _written(
    source: Source[AnyItem], samples: Sequence[Sample], output: Output, workers: ConversionPool
) -> DatasetInfo:
    assert output.name is not None
    assert output.made_by is not None
    return write_dataset(
        output.folder,
        samples,
        partial(_encode, source),
        name=output.name,
        classes=source.class_names,
        palette=source.palette,
        made_by=output.made_by,
        depth=str(source.depth),
        samples_per_shard=output.samples_per_shard,
        shards=output.shards,
        seed=output.seed,
        workers=workers,
    )


def _understood(source: Source[AnyItem], samples: Sequence[Sample], output: Output, _: ConversionPool) -> DatasetInfo:
    """Prints what would be written; returns its description, without a fingerprint."""
    names = source.class_names
    deal(
        samples, len(names), samples_per_shard=output.samples_per_shard, shards=output.shards, seed=output.seed
    )  # raises what writing would raise
    splits = Counter(sample.split for sample in samples)
    labeled = [sample.classes for sample in samples if sample.classes is not None]
    images = Counter(label for classes in labeled for label in classes)
    counts = {names[label]: str(images[label]) for label in range(1, len(names))}
    counts |= {
        "none of them": str(sum(not classes for classes in labeled)),
        "unknown": str(len(samples) - len(labeled)),
    }
    say(f"images: {len(samples)}: " + ", ".join(f"{splits[split]} {split}" for split in sorted(splits)))
    if subsets := Counter(name for sample in samples for name in sample.subsets):
        say("subsets: " + ", ".join(f"{subsets[name]} {name}" for name in sorted(subsets)))
    say("images by label: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    rows = [source.row(sample) for sample in sorted(samples, key=lambda sample: sample.key)[:5]]
    say(tabulate(rows, headers="keys", tablefmt="simple"))
    palette = tuple((int(red), int(green), int(blue)) for red, green, blue in source.palette[: len(names)])
    assert output.name is not None
    assert output.made_by is not None
    return DatasetInfo(
        name=output.name, classes=names, palette=palette, counts=splits, fingerprint="", made_by=output.made_by
    )


def _scanned(
    source: Source[AnyItem], items: Sequence[AnyItem], workers: ConversionPool, *, skip_damaged: bool
) -> tuple[list[Sample], list[str]]:
    """What is to be written, and what is wrong with the images that are left out; names each."""
    scanned = workers.map(partial(_scan, source), items, label="reading")
    problems = [result for result in scanned if isinstance(result, _Problem)]
    samples = [result for result in scanned if isinstance(result, Sample)]
    texts = [problem.text for problem in problems]
    if not skip_damaged and not (samples and all(problem.is_damage for problem in problems)):
        report_problems(texts, source.place, advice="repair them, or leave these images out with --skip-damaged")
    for text in texts:
        say(f"left out: {text}", error=True)
    if texts:
        say(f"left out {len(texts)} damaged images, {len(samples)} remain")
    return samples, texts


class _Problem(NamedTuple):
    """Why an image cannot be converted."""

    text: str
    is_damage: bool
    """Whether a file is damaged, which no option changes."""


def _scan(source: Source[AnyItem], item: AnyItem) -> Sample | _Problem:
    try:
        return source.scan(item)
    except DataError as error:
        return _Problem(str(error), isinstance(error, DamagedFile))


def _encode(source: Source[AnyItem], sample: Sample) -> tuple[bytes, bytes | None]:
    """What `source` encodes; raises `DataError` unless it has the sample's size, as the headers of both files say."""
    image, mask = source.encode(sample)
    for data, what, kind in ((image, "image", "JPEG"), (mask, "mask", "PNG")):
        if data is None:
            continue
        with open_image(data, name=f"the {what} written for {sample.key!r}", formats=(kind,)) as written:
            width, height = written.size
        if (width, height) != (sample.width, sample.height):
            raise DataError(
                f"the {what} written for {sample.key!r} has {width} x {height} pixels, the manifest would say "
                f"{sample.width} x {sample.height}; if its file changed meanwhile, run the command again"
            )
    return image, mask


# Command line.


def add_longest_side(parser: argparse.ArgumentParser, *, default: int) -> None:
    """Adds the option of scripts that scale large images down, for `ImageForm.longest_side`."""
    text = "scale larger images down to N pixels; 0 keeps all sizes (default: %(default)s)"
    parser.add_argument("--longest-side", type=int, default=default, metavar="N", help=text)


def add_common_arguments(parser: argparse.ArgumentParser, *, name: str | None = None, dry_run: bool = False) -> None:
    """Adds the options that all converters share.

    Args:
        parser: the parser to extend.
        name: the data set's default name; None for a converter that draws its own images.
        dry_run: whether there is `--dry-run`, which needs no `--out`.
    """
    target = parser.add_mutually_exclusive_group(required=not dry_run)
    target.add_argument("--out", type=Path, metavar="DIR", help="folder to make; must not exist or be empty")
    target.add_argument(
        "--verify", type=Path, metavar="DIR", help="compare the shards of DIR with its manifest instead"
    )
    if dry_run:
        text = "read and check all input, say what was understood, and write nothing"
        parser.add_argument("--dry-run", action="store_true", help=text)
    parser.set_defaults(interrupted="interrupted; nothing was written")
    add, cores = parser.add_argument, os.cpu_count() or 1
    add("--processes", type=int, default=cores, metavar="N", help="worker processes (default: all cores)")
    add(
        "--samples-per-shard", type=int, default=128, metavar="N", help="most samples in a shard (default: %(default)s)"
    )
    add("--shards", type=int, metavar="N", help="number of shards of every split, instead")
    add("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: %(default)s)")
    if name is not None:
        add("--name", default=name, metavar="NAME", help="name of the data set (default: %(default)s)")
        add("--subset", action="append", default=[], metavar="NAME=FILE", help="mark a list file's images; repeatable")
        add("--skip-damaged", action="store_true", help="leave out damaged images and those that do not fit")


def required(options: argparse.Namespace, *names: str) -> None:
    """Raises `DataError` if an option is missing that only `--verify` can do without."""
    for name in names:
        if getattr(options, name) is None:
            raise DataError(f"--{name.replace('_', '-')} is missing; see --help for what it must hold")


def run_conversion(options: argparse.Namespace, make: Callable[[argparse.Namespace], DatasetInfo]) -> int:
    """Verifies a data set or makes it with `make`, as the options say, and prints the result.

    Returns:
        Exit status: 0, 1 when `--verify` found damage, or 3 when damaged images were left out without --skip-damaged.

    Raises:
        DataError: the input is refused.
    """
    if options.verify is not None:
        return print_verification(options.verify, processes=options.processes)
    dry_run = getattr(options, "dry_run", False)
    if options.out is None and not dry_run:
        raise DataError("--out is missing; give the folder to make, or --dry-run to write none")
    status = 0
    try:
        info = make(options)
    except DamagedLeftOut as error:
        info, status = error.info, LEFT_OUT
    if dry_run:
        say("wrote nothing, as --dry-run asks")
        return status
    counts = ", ".join(f"{count} {split}" for split, count in info.counts.items())
    say(f"wrote {options.out}: {counts} samples, {info.num_classes} classes, fingerprint {info.fingerprint[:12]}")
    say(f"look at it: slrnet browse {shlex.quote(str(options.out))}")
    return status


def parse_named_files(option: str, texts: Sequence[str]) -> dict[str, Path]:
    """Files by name, of an option that is given as NAME=FILE, any number of times.

    Raises:
        DataError: a text has another form, or a name occurs twice.
    """
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise DataError(f"{option} {text!r} is not NAME=LISTFILE")
        if name in files:
            raise DataError(f"{option} {name} is taken; use another name")
        files[name] = Path(path)
    return files


def _words(option: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [word for name, path in value.items() for word in (option, f"{name}={Path(path).absolute()}")]
    if value is None or value is False or value == "" or value == 0:
        return []
    if value is True:
        return [option]
    return [option, str(value.absolute() if isinstance(value, Path) else value)]


def print_verification(folder: Path, *, processes: int) -> int:
    """Verifies a folder and prints what is damaged; returns the exit status, 1 where something is."""
    damages = verify(folder, processes=processes)
    dataset = load_dataset(folder)
    if not damages:
        say(f"{folder}: all {sum(dataset.info.counts.values())} samples are intact")
        return 0
    say(f"{folder}: {len(damages)} shard(s) are damaged:", error=True)
    for damage in damages:
        say(f"  {damage}", error=True)
    say(f"repair with: {dataset.repair_command}", error=True)
    return 1
