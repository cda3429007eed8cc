"""Writing and checking of shards: what all scripts of this folder share.

Tar headers carry no time, user or permission of the machine, and a sample's place follows from its key and the seed
alone, so the same input gives the same bytes whatever the number of processes. A folder appears as a whole, under its
final name, or not at all.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.workers import ConversionPool
from slrnet.data.manifest import SCHEMA, DataError, DatasetInfo, SampleRow, load_dataset, save_dataset
from slrnet.data.tars import ShardWriter, tar_end, tar_members
from slrnet.storage.files import check_writable
from slrnet.storage.folders import whole_folder
from slrnet.storage.lease import beside, owned, require_free
from slrnet.storage.names import check_name
from slrnet.storage.ray_job import lasting

__all__ = [
    "Damage",
    "Item",
    "Sample",
    "check_output",
    "deal",
    "listed",
    "report_problems",
    "verify",
    "write_dataset",
]

MAX_LISTED = 10
"""Problems spelled out in one message; the rest is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An image of a converter's source."""

    key: str
    """Name, unique within the split; letters, digits, `_`, `-` and the like, without dots and slashes."""
    split: str
    """Split it belongs to."""
    subsets: tuple[str, ...] = ()
    """Named subsets it belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(Item):
    """One image to write: what the manifest says about it, and where its bytes come from."""

    width: int
    """Width of the image, pixels."""
    height: int
    """Height of the image, pixels."""
    classes: tuple[int, ...] | None
    """Foreground ids 1..K-1 that are present, ascending: the image labels; None where they are not known."""
    source: Any = None
    """Whatever `encode` needs to find its files; picklable."""
    image_as_is: bool = False
    """Whether the image's file goes into the shard as it is."""
    mask_as_is: bool = False
    """Whether the mask's does."""

    @classmethod
    def of(cls, item: Item, size: tuple[int, int], classes: tuple[int, ...] | None, **others: Any) -> Self:
        """The sample of a source's image of `size` = (width, height), pixels; `others` are further fields."""
        others |= {"key": item.key, "split": item.split, "subsets": item.subsets}
        return cls(width=size[0], height=size[1], classes=classes, **others)


@dataclass(frozen=True)
class Damage:
    """What is wrong with one shard."""

    shard: str
    """File name."""
    reason: str
    """What was found."""
    keys: tuple[str, ...] = ()
    """Samples that are damaged; empty when the whole file is meant."""

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.shard}: {self.reason}" + (f": {listed(self.keys, ', ')}" if self.keys else "")


Encode = Callable[[Sample], tuple[bytes, bytes | None]]
"""From a sample to the bytes of its JPEG and of its indexed PNG mask (None where there is none); picklable."""


def write_dataset(
    out: str | os.PathLike[str],
    samples: Sequence[Sample],
    encode: Encode,
    *,
    name: str,
    classes: Sequence[str],
    palette: npt.NDArray[np.uint8],
    made_by: str,
    depth: str = "",
    samples_per_shard: int = 128,
    shards: int | None = None,
    seed: int = 0,
    workers: ConversionPool | None = None,
) -> DatasetInfo:
    """Writes samples as tar shards with manifest and description; the folder appears when all is written.

    Args:
        out: Folder to make; it must not exist or be empty.
        samples: What to write, in any order.
        encode: Gives the bytes of one sample; runs in worker processes where there are any.
        name: Short name of the data set.
        classes: Names of all K classes, background first.
        palette: (256, 3) uint8 RGB by id.
        made_by: The command that makes the data set, without `--out`; errors name it as the way to repair.
        depth: How images of more than 8 bits became 8-bit ones, see `DatasetInfo.depth`.
        samples_per_shard: Samples that a shard holds at most, when `shards` is not given.
        shards: Number of shards of every split.
        seed: Seed of the order in which samples are dealt to shards.
        workers: Processes that write; None: this one. The output is the same for any number.

    Raises:
        DataError: the output folder is not empty, a key is unfit or occurs twice, a class id is outside the classes,
            or a split has fewer samples than shards. No failure leaves anything behind.
    """
    target = check_output(out)
    plan = deal(samples, len(classes), samples_per_shard=samples_per_shard, shards=shards, seed=seed)
    with owned(beside(target), f"output folder {target}"), whole_folder(_unused(target)) as folder:
        write, weights = partial(_write_shard, folder, encode), [len(members) for _, members in plan]
        parts = (workers or ConversionPool(1)).map(write, plan, weights=weights, label="writing")
        return save_dataset(folder, parts, name=name, classes=classes, palette=palette, made_by=made_by, depth=depth)


def verify(folder: str | os.PathLike[str], *, processes: int = 1) -> list[Damage]:
    """Re-reads all shards and compares them with the manifest, byte for byte.

    Args:
        folder: A folder that `write_dataset` made.
        processes: Worker processes.

    Returns:
        What is damaged, missing or does not belong there; empty when all is well.

    Raises:
        DataError: the manifest or the description itself cannot be used.
    """
    dataset = load_dataset(folder, check=True)
    views = [dataset.split(split) for split in dataset.splits]
    tasks = [
        (dataset.folder / name, [view.row(sample) for sample in view.samples_of(place)])
        for view in views
        for place, name in enumerate(view.shard_names)
    ]
    weights = [len(rows) for _, rows in tasks]
    with ConversionPool(processes) as workers:
        damages_by_shard = workers.map(_verify_shard, tasks, weights=weights, label="verifying")
    unlisted = sorted({path.name for path in dataset.folder.glob("*.tar")} - {path.name for path, _ in tasks})
    damages = [damage for part in damages_by_shard for damage in part]
    return damages + [Damage(name, "is not in the manifest") for name in unlisted]


def check_output(out: str | os.PathLike[str]) -> Path:
    """Absolute path of an output folder that may be written.

    Raises:
        DataError: it is a file, or a folder with something in it.
        ValueError: nothing can be written there, it is in Ray's copy of the project, or another process fills it.
    """
    lasting(Path(out))
    path = _unused(Path(out).resolve())
    require_free(beside(path), f"output folder {path}")
    return check_writable(path, folder=True)


def _unused(path: Path) -> Path:
    """The path of an output folder, after checking that it holds nothing."""
    if path.is_dir() and any(path.iterdir()):
        raise DataError(f"the output folder {path} is not empty; give another --out")
    if path.exists() and not path.is_dir():
        raise DataError(f"the output folder {path} is a file; give another --out")
    return path


def report_problems(problems: Sequence[str], what: str, *, advice: str | None = None) -> None:
    """Raises one error for all problems found in the input; does nothing when there are none.

    Raises:
        DataError: there are problems; the first ten are spelled out, the rest is counted.
    """
    if problems:
        end = "" if advice is None else f"\n{advice}"
        raise DataError(f"{len(problems)} problem(s) in {what}:\n  " + listed(problems, "\n  ") + end)


# Writing.


def _check_samples(samples: Sequence[Sample], num_classes: int) -> None:
    if not samples:
        raise DataError("there is no sample to write; check the list files and --classes")
    problems = []
    seen: set[tuple[str, str]] = set()
    for sample in samples:
        reason = _unfit_key(sample.key)
        if reason:
            problems.append(reason)
        if (sample.split, sample.key) in seen:
            problems.append(f"key {sample.key!r} occurs twice in split {sample.split!r}; rename one of the two")
        seen.add((sample.split, sample.key))
        if any(not 1 <= label < num_classes for label in sample.classes or ()):
            problems.append(f"key {sample.key!r} has classes {sample.classes}; allowed are 1 to {num_classes - 1}")
    names = {("split", sample.split) for sample in samples}
    for what, name in sorted(names | {("subset", name) for sample in samples for name in sample.subsets}):
        try:
            check_name(what, name)
        except ValueError as error:
            problems.append(str(error))
    report_problems(problems, "the samples")


def _unfit_key(key: str) -> str | None:
    """Why a key cannot name the members of a tar, or None."""
    if "." in key:
        return (
            f"key {key!r} has a dot; readers of WebDataset shards cut keys at the first dot: "
            "rename the image and its partner files without dots"
        )
    if not re.fullmatch(r"[^\s/\\\x00-\x1f]+", key):
        return f"key {key!r} is empty or has a space, slash or control character; rename the files"
    if len(key.encode()) > 90:
        return f"key {key!r} is longer than 90 bytes, more than a tar header holds; rename the files"
    return None


def deal(
    samples: Sequence[Sample], num_classes: int, *, samples_per_shard: int, shards: int | None, seed: int
) -> list[tuple[str, list[Sample]]]:
    """Shard names and their samples: sorted by key, shuffled by the seed, cut into nearly equal runs.

    Raises:
        DataError: a key is unfit or occurs twice, a class id is outside the classes, or a split has fewer samples than
            shards.
    """
    _check_samples(samples, num_classes)
    if samples_per_shard < 1 or (shards is not None and shards < 1):
        raise DataError(f"--samples-per-shard {samples_per_shard} and --shards {shards} must be at least 1")
    plan = []
    for split in sorted({sample.split for sample in samples}):
        members = sorted((sample for sample in samples if sample.split == split), key=lambda sample: sample.key)
        random.Random(f"{seed} {split}").shuffle(members)
        count = shards if shards is not None else -(-len(members) // samples_per_shard)
        if count > len(members):
            raise DataError(
                f"split {split!r} has {len(members)} samples, fewer than the {count} shards asked for; "
                f"use --shards {len(members)} or fewer, or --samples-per-shard"
            )
        ends = [len(members) * (index + 1) // count for index in range(count)]
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            plan.append((f"{split}-{index:06d}.tar", members[start:end]))
    return plan


def _write_shard(folder: Path, encode: Encode, task: tuple[str, list[Sample]]) -> pa.Table:
    """Writes the tar of a name with some samples; returns its rows of the manifest."""
    name, samples = task
    with (folder / name).open("wb") as file, ShardWriter(file, name) as shard:
        for sample in samples:
            image, mask = encode(sample)
            shard.add(
                key=sample.key,
                split=sample.split,
                subsets=sample.subsets,
                size=(sample.width, sample.height),
                classes=sample.classes,
                image=image,
                mask=mask,
            )
    return pa.table(shard.columns, schema=SCHEMA)


# Verifying.


def _verify_shard(task: tuple[Path, list[SampleRow]]) -> list[Damage]:
    """What is wrong with a tar that should hold the samples of some rows."""
    path, rows = task
    name, keys = path.name, tuple(row.key for row in rows)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [Damage(name, f"is missing, with {len(keys)} sample(s)", keys)]
    except OSError as error:
        return [Damage(name, f"cannot be read ({error.strerror}), with {len(keys)} sample(s)", keys)]
    bad = tuple(
        row.key for row in rows if not _is_intact(data[row.offset : row.offset + row.bytes], row.key, row.sha256)
    )
    damages = [Damage(name, f"{len(bad)} damaged sample(s)", bad)] if bad else []
    end = rows[-1].offset + rows[-1].bytes
    if not bad and data[end:] != tar_end(end):
        damages.append(Damage(name, f"has {len(data) - end} bytes after its last sample that are not the end of a tar"))
    return damages


def _is_intact(data: bytes, key: str, digest: str) -> bool:
    """Whether the bytes of one sample are what was written: contents by digest, the rest by writing it again."""
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member)
                files[member.name] = content.read() if content else b""
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return False
    if any(name.partition(".")[0] != key for name in files):
        return False
    return hashlib.sha256(b"".join(files.values())).hexdigest() == digest and tar_members(files) == data


# Messages.


def listed(texts: Sequence[str], separator: str = ", ") -> str:
    """The first ten texts, and how many more there are."""
    more = len(texts) - MAX_LISTED
    return separator.join([*texts[:MAX_LISTED], *([f"... and {more} more"] if more > 0 else [])])
