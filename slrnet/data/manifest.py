"""What a prepared data set consists of: `dataset.json` (what it is) and `manifest.parquet` (one row a sample).

A prepared folder holds tar shards named SPLIT-000000.tar, each sample as KEY.jpg, KEY.png (indexed mask, where there is
one) and KEY.json, and beside them these two files. Columns of the manifest, rows ordered by shard and offset:

| column | type | meaning |
| --- | --- | --- |
| key | string | name of the sample, unique within its split, without dots |
| split | string | `train`, `val`, ... |
| subsets | list of string | named subsets that the sample belongs to |
| shard | string | file name of its tar |
| offset | int64 | where its first tar header starts in the shard, bytes |
| width, height | int32 | of the image, pixels |
| classes | list of int16 | foreground ids 1..K-1 that are present: the image labels |
| has_mask | bool | whether KEY.png exists |
| has_image_labels | bool | whether `classes` is known; where not, it is empty and says nothing |
| bytes | int64 | what it takes in the tar from `offset` on, headers and padding included |
| sha256 | string | hex digest of its files' bytes, concatenated in the order of the tar |

A sample with neither a mask nor image labels is an unlabelled image; one with image labels and no classes shows the
background alone. Version 1 of the files has no column `has_image_labels`: every sample has image labels there.

All columns stay in arrow or numpy arrays, so that a manifest of millions of rows costs tens of bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from slrnet.data.catalog import voc_palette
from slrnet.data.remote import cached, is_remote, open_cached
from slrnet.data.sample_set import SampleSet

__all__ = [
    "DATASET_FILE",
    "MANIFEST_FILE",
    "MANIFEST_VERSION",
    "SCHEMA",
    "DataError",
    "DatasetInfo",
    "ShardEntry",
    "ShardSet",
    "SplitView",
    "fingerprint",
    "load_dataset",
    "save_dataset",
]

MANIFEST_VERSION = 2
"""Version of the two files' format that is written; version 1 is read as well, others are refused."""

DATASET_FILE = "dataset.json"
"""File that says what a data set is."""
MANIFEST_FILE = "manifest.parquet"
"""File with a row per sample."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("subsets", pa.list_(pa.string())),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("classes", pa.list_(pa.int16())),
        ("has_mask", pa.bool_()),
        ("has_image_labels", pa.bool_()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)
"""Names and types of the manifest's columns."""

_SINCE_VERSION_2 = "has_image_labels"
_KEY = r"^[^./\\\x00-\x1f]+$"
_SHARD = r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.tar$"
"""Keys and shards name files within the folder."""


class DataError(ValueError):
    """The data is not as it must be; the message names the file, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a prepared data set is: the content of `dataset.json`."""

    name: str
    """Short name for people, such as `voc2012`."""
    classes: tuple[str, ...]
    """Names of all K classes, `background` first; the place is the id."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB colour of each of the K classes, 0 to 255."""
    counts: Mapping[str, int]
    """Samples per split."""
    fingerprint: str
    """sha256 over the classes and the content of the manifest: equal for equal data in equal shards."""
    made_by: str
    """The command that makes the data set, without its `--out`."""
    version: int = MANIFEST_VERSION
    """Format version of the files."""

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return len(self.classes)

    def palette_array(self) -> npt.NDArray[np.uint8]:
        """Colours for a mask image: (256, 3) uint8 RGB by id; ids beyond the classes have VOC's colours."""
        colours = voc_palette()
        colours[: len(self.palette)] = self.palette
        return colours


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar file of a split."""

    name: str
    """File name."""
    path: Path
    """Absolute path."""
    num_samples: int
    """Samples that the manifest lists for it."""
    first: int
    """Index within the split of its first sample; the others follow in the order of the tar."""
    offsets: npt.NDArray[np.int64]
    """(num_samples,) byte offsets of the samples' first tar headers, ascending."""
    sizes: npt.NDArray[np.int64]
    """(num_samples,) bytes that each sample takes in the tar from its offset on."""


class SplitView:
    """One split of a data set: its samples in the order of shards and offsets, its shards and its image labels.

    Args:
        name: The split.
        table: Rows of the manifest that belong to it.
        folder: Folder that holds the shards.
        num_classes: K, background included.
    """

    def __init__(self, name: str, *, table: pa.Table, folder: Path, num_classes: int) -> None:
        self.name = name
        self.table = table.sort_by([("shard", "ascending"), ("offset", "ascending")]).combine_chunks()
        self.folder = folder
        self.num_classes = num_classes

    @property
    def num_samples(self) -> int:
        """Number of samples in the split."""
        return int(self.table.num_rows)

    @cached_property
    def shards(self) -> tuple[ShardEntry, ...]:
        """The tar files in order of their names."""
        names = _array(self.table, "shard").dictionary_encode()
        codes = names.indices.to_numpy()
        firsts = np.flatnonzero(np.diff(codes, prepend=-1))
        lasts = np.append(firsts[1:], len(codes))
        offsets, sizes = _numpy(self.table, "offset"), _numpy(self.table, "bytes")
        texts = names.dictionary.to_pylist()
        return tuple(
            self._shard(texts[codes[first]], first=int(first), offsets=offsets[first:last], sizes=sizes[first:last])
            for first, last in zip(firsts, lasts, strict=True)
        )

    @cached_property
    def keys(self) -> pa.StringArray:
        """Keys of all samples as an arrow array; `key(i)` gives one as text."""
        return _array(self.table, "key")

    def key(self, index: int) -> str:
        """Key of the sample at `index`, 0 <= index < num_samples."""
        return str(self.keys[index].as_py())

    @cached_property
    def has_masks(self) -> npt.NDArray[np.bool_]:
        """(num_samples,) whether each sample comes with a mask."""
        return _numpy(self.table, "has_mask").astype(np.bool_)

    @cached_property
    def has_image_labels(self) -> npt.NDArray[np.bool_]:
        """(num_samples,) whether each sample's image labels are known; where not, `image_labels` gives zeros."""
        return _numpy(self.table, "has_image_labels").astype(np.bool_)

    @cached_property
    def with_masks(self) -> SampleSet:
        """The samples that come with a mask."""
        return SampleSet.of(self.has_masks)

    @cached_property
    def with_image_labels(self) -> SampleSet:
        """The samples whose image labels are known."""
        return SampleSet.of(self.has_image_labels)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        """(num_samples, 2) width and height of each image, pixels."""
        return np.stack([_numpy(self.table, "width"), _numpy(self.table, "height")], axis=1)

    def image_labels(self, indices: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Which foreground classes each image shows.

        Args:
            indices: (n,) integer indices of samples within the split; None for all of them.

        Returns:
            (n, K-1) float32 of 0 and 1; column c is class c + 1, the background is left out. A row of zeros is an image
            without objects, or one whose labels are not known; `has_image_labels` tells which.
        """
        starts, classes = self.class_lists
        rows = np.arange(self.num_samples) if indices is None else np.asarray(indices, dtype=np.int64)
        lengths = starts[rows + 1] - starts[rows]
        labels = np.zeros((len(rows), self.num_classes - 1), dtype=np.float32)
        # Places of all wanted list items: each row's start, repeated, plus 0, 1, 2, ... within the row.
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        items = classes[np.repeat(starts[rows], lengths) + within]
        labels[np.repeat(np.arange(len(rows)), lengths), items - 1] = 1.0
        return labels

    @cached_property
    def subset_names(self) -> tuple[str, ...]:
        """Names of the subsets that occur in the split, sorted."""
        return tuple(sorted(pc.list_flatten(_array(self.table, "subsets")).unique().to_pylist()))

    def in_subset(self, name: str) -> npt.NDArray[np.bool_]:
        """Which samples belong to the named subset.

        Returns:
            (num_samples,) bool.

        Raises:
            DataError: no sample of the split is in a subset of that name.
        """
        if name not in self.subset_names:
            known = ", ".join(self.subset_names) or "none"
            raise DataError(
                f"split {self.name!r} of {self.folder} has no subset {name!r}; it has: {known}; "
                f"data_prep makes one with --subset {name}=LISTFILE"
            )
        subsets = _array(self.table, "subsets")
        hits = pc.equal(pc.list_flatten(subsets), name).to_numpy(zero_copy_only=False)
        member = np.zeros(self.num_samples, dtype=np.bool_)
        member[pc.list_parent_indices(subsets).to_numpy()[hits]] = True
        return member

    @cached_property
    def class_lists(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(num_samples + 1,) starts and (E,) foreground ids: sample i shows the ids from starts[i] to starts[i + 1]."""
        column = _array(self.table, "classes")
        lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return starts, pc.list_flatten(column).to_numpy().astype(np.int64)

    def _shard(
        self, name: str, *, first: int, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
    ) -> ShardEntry:
        return ShardEntry(
            name=name,
            path=self.folder / name,
            num_samples=len(offsets),
            first=first,
            offsets=offsets,
            sizes=sizes,
        )


class ShardSet:
    """A prepared data set: what it is, where it lies, and its manifest. `load_dataset` makes one.

    Args:
        folder: Absolute path of the folder; of a data set in an object store, of its copies on this machine.
        info: Content of `dataset.json`.
        table: The manifest, with the columns of `SCHEMA`.
        location: Where the data set is, as `load_dataset` takes it; empty: `folder`.
    """

    def __init__(self, folder: Path, *, info: DatasetInfo, table: pa.Table, location: str = "") -> None:
        self.folder = folder
        self.location = location or str(folder)
        self.info = info
        self.table = table

    def path_of(self, entry: ShardEntry) -> Path:
        """A shard's file on this machine; of a data set in an object store a copy, made if need be.

        Raises:
            RemoteError: the object store does not have it, or refuses it.
        """
        return open_cached(self.location, entry.name) if is_remote(self.location) else entry.path

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.info.counts)

    @property
    def repair_command(self) -> str:
        """The command line that makes the folder anew."""
        folder = shlex.quote(str(self.folder))
        return f"rm -r {folder} && {self.info.made_by} --out {folder}"

    @property
    def verify_command(self) -> str:
        """The command line that compares all shards with the manifest."""
        program = self.info.made_by.split(" --", 1)[0]
        return f"{program} --verify {shlex.quote(str(self.folder))}"

    def split(self, name: str) -> SplitView:
        """The samples of one split.

        Raises:
            DataError: there is no such split; the message names those that exist.
        """
        if name not in self.splits:
            raise DataError(f"{self.folder} has no split {name!r}; it has: {', '.join(self.splits)}")
        rows = self.table.filter(pc.equal(self.table["split"], name))
        return SplitView(name, table=rows, folder=self.folder, num_classes=self.info.num_classes)


def load_dataset(folder: str | os.PathLike[str]) -> ShardSet:
    """Reads the description and the manifest of a prepared data set; shards are not touched.

    Args:
        folder: Path of a folder, or its location in an object store (see `slrnet.data.remote`).

    Raises:
        RemoteError: the object store does not have it, or refuses it.
        DataError: the folder holds no prepared data set, one of another format version, files that do not belong
            together, or a manifest that no script of data_prep/ writes, such as one that points out of the folder.
    """
    location = str(folder)
    if is_remote(location):
        return _load_remote(location)
    return _load(Path(folder).absolute())


def _load_remote(location: str) -> ShardSet:
    """The description is copied each time; the manifest where it is not the one that belongs to the description."""
    info = _read_info(open_cached(location, DATASET_FILE, again=True).parent)
    mark = cached(location) / f".{MANIFEST_FILE}.of"
    same = mark.exists() and mark.read_text(encoding="utf-8") == info.fingerprint
    path = open_cached(location, MANIFEST_FILE, again=not same).parent
    shards = _load(path)
    mark.write_text(info.fingerprint, encoding="utf-8")
    if not same:  # shards of another version may lie there
        for copy in path.glob("*.tar"):
            copy.unlink()
    return ShardSet(path, info=shards.info, table=shards.table, location=location)


def _load(path: Path) -> ShardSet:
    info = _read_info(path)
    try:
        table = pq.read_table(path / MANIFEST_FILE)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path / MANIFEST_FILE}: {error}; {_remedy(path, info)}") from None
    if not table.schema.equals(_schema(info.version)):
        raise DataError(
            f"{path / MANIFEST_FILE} has the columns {table.schema.names} of types "
            f"{[str(kind) for kind in table.schema.types]}, not those of a manifest; {_remedy(path, info)}"
        )
    problem = _problem(table, info)
    if problem:
        raise DataError(f"{path / MANIFEST_FILE} is no manifest of {path / DATASET_FILE}: {problem}; get it anew")
    found = fingerprint(info.classes, table, version=info.version)
    if found != info.fingerprint:
        raise DataError(
            f"{path / MANIFEST_FILE} does not belong to {path / DATASET_FILE}: its fingerprint is {found[:12]}, "
            f"expected {info.fingerprint[:12]}; {_remedy(path, info)}"
        )
    if info.version == 1:
        known = pa.array(np.ones(table.num_rows, dtype=np.bool_))
        table = table.append_column(_SINCE_VERSION_2, known).select(SCHEMA.names)
    return ShardSet(path, info=info, table=table)


def save_dataset(
    folder: str | os.PathLike[str],
    columns: Mapping[str, Sequence[Any]] | pa.Table,
    *,
    name: str,
    classes: Sequence[str],
    palette: npt.NDArray[np.uint8],
    made_by: str,
) -> DatasetInfo:
    """Writes `manifest.parquet` and `dataset.json` into an existing folder. Shards are the caller's.

    Args:
        folder: Where to write.
        columns: The manifest: a table with the columns of `SCHEMA`, or those by name, all of one length.
        name: Short name of the data set.
        classes: Names of all K classes, background first.
        palette: (K or more, 3) uint8 RGB by id.
        made_by: The command that makes the data set, without `--out`.

    Returns:
        What was written to `dataset.json`.
    """
    rows = columns if isinstance(columns, pa.Table) else pa.table(dict(columns), schema=SCHEMA)
    table = rows.sort_by([("shard", "ascending"), ("offset", "ascending")])
    counts = {item["values"]: item["counts"] for item in pc.value_counts(table["split"]).to_pylist()}
    info = DatasetInfo(
        name=name,
        classes=tuple(classes),
        palette=tuple((int(r), int(g), int(b)) for r, g, b in palette[: len(classes)]),
        counts=dict(sorted(counts.items())),
        fingerprint=fingerprint(classes, table),
        made_by=made_by,
    )
    pq.write_table(table, Path(folder) / MANIFEST_FILE)
    (Path(folder) / DATASET_FILE).write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
    return info


def fingerprint(classes: Sequence[str], table: pa.Table, *, version: int = MANIFEST_VERSION) -> str:
    """sha256 over class names and the manifest's values, independent of how arrow lays them out in files.

    Args:
        classes: Names of all K classes.
        table: A manifest with the columns of `SCHEMA`.
        version: Format version that the fingerprint is of; columns that it does not have are left out.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps([version, *classes]).encode())
    for name in _schema(version).names:
        column = _array(table, name)
        digest.update(f"\n{name} {len(column)}\n".encode())
        _hash_values(digest, column)
    return digest.hexdigest()


def _problem(table: pa.Table, info: DatasetInfo) -> str:
    """What no manifest of ours has; "" where it has none of that. A stranger's may be made to do harm."""
    for name in table.column_names:
        column = _array(table, name)
        if column.null_count or (pa.types.is_list(column.type) and pc.list_flatten(column).null_count):
            return f"column {name} has empty values"
    for name, pattern in (("key", _KEY), ("shard", _SHARD), ("sha256", "^[0-9a-f]{64}$")):
        wrong = table.filter(pc.invert(pc.match_substring_regex(table[name], pattern)))
        if wrong.num_rows:
            return f"{name} {wrong[name][0].as_py()!r} is not of the form {pattern}"
    ranges = {"offset": (0, 2**62), "bytes": (1, 2**40), "width": (1, 2**20), "height": (1, 2**20)}
    for name, (low, high) in ranges.items():
        values = _numpy(table, name)
        if len(values) and not low <= values.min() <= values.max() <= high:
            return f"{name} runs from {values.min()} to {values.max()}; allowed are {low} to {high}"
    classes = pc.list_flatten(_array(table, "classes")).to_numpy()
    if len(classes) and not 1 <= classes.min() <= classes.max() < info.num_classes:
        return f"classes run from {classes.min()} to {classes.max()}; allowed are 1 to {info.num_classes - 1}"
    counts = {item["values"]: item["counts"] for item in pc.value_counts(table["split"]).to_pylist()}
    if counts != dict(info.counts):
        return f"it has {counts} samples, {DATASET_FILE} says {dict(info.counts)}"
    return ""


def _schema(version: int) -> pa.Schema:
    return SCHEMA if version > 1 else SCHEMA.remove(SCHEMA.get_field_index(_SINCE_VERSION_2))


def _hash_values(digest: hashlib._Hash, column: pa.Array) -> None:
    """Adds the lengths of lists and strings, then the values, as little-endian bytes."""
    if pa.types.is_list(column.type):
        digest.update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
        _hash_values(digest, pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        digest.update(pc.binary_length(column).to_numpy().astype("<i8").tobytes())
        digest.update("".join(column.to_pylist()).encode())
    else:
        digest.update(column.to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def _read_info(path: Path) -> DatasetInfo:
    file = path / DATASET_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"no shards in {path}; make them with "
            f"`python data_prep/voc.py --root VOCdevkit/VOC2012 --out {path}`, "
            f"or the embedded synthetic data set with `python data_prep/demo.py --out {path}`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {error}; make the data set anew with the scripts of data_prep/") from None
    version = values.get("version") if isinstance(values, dict) else None
    if not isinstance(version, int) or not 1 <= version <= MANIFEST_VERSION:
        raise DataError(
            f"{file} has format version {version}, this program reads versions 1 to {MANIFEST_VERSION}; "
            "make the data set anew with the scripts of data_prep/ of this program"
        )
    try:
        return DatasetInfo(
            name=str(values["name"]),
            classes=_class_names(values["classes"]),
            palette=tuple((int(r), int(g), int(b)) for r, g, b in values["palette"]),
            counts={str(split): int(count) for split, count in dict(values["counts"]).items()},
            fingerprint=str(values["fingerprint"]),
            made_by=str(values["made_by"]),
            version=version,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is incomplete or malformed ({type(error).__name__}: {error}); "
            "make the data set anew with the scripts of data_prep/"
        ) from None


def _class_names(values: Any) -> tuple[str, ...]:
    names = tuple(values)
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes are {list(names)[:5]}...; two names or more are needed, each once")
    return names


def _remedy(path: Path, info: DatasetInfo) -> str:
    return f"make the data set anew: rm -r {shlex.quote(str(path))} && {info.made_by} --out {shlex.quote(str(path))}"


def _array(table: pa.Table, name: str) -> pa.Array:
    """A column as one array, whatever chunks it lies in."""
    column = table[name]
    # A single chunk is used as it is: no copy, however often a caller asks.
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])


def _numpy(table: pa.Table, name: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = _array(table, name).to_numpy(zero_copy_only=False)
    return values
