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

Since version 3 the manifest's footer has a table of the shards, and the fingerprint is one over that table, which holds
a sha256 of each shard's rows. A large manifest is opened without its rows; those of a shard are compared when they are
read (`slrnet.data.manifest_rows`). Older files are read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from slrnet.data.catalog import voc_palette
from slrnet.data.manifest_rows import (
    SCHEMA,
    SHARD_NAME,
    DataError,
    FileRows,
    ManifestWriter,
    Rows,
    TableRows,
    array_of,
    foreign_columns,
    hash_columns,
    in_order,
    numpy_of,
    problem_of,
    shards_of,
)
from slrnet.data.sample_set import SampleSet
from slrnet.storage.remote import cached, is_remote, open_cached

__all__ = [
    "CHECKED_ROWS",
    "DATASET_FILE",
    "MANIFEST_FILE",
    "MANIFEST_VERSION",
    "SCHEMA",
    "DataError",
    "DatasetInfo",
    "ManifestWriter",
    "SampleRow",
    "ShardEntry",
    "ShardSet",
    "SplitView",
    "fingerprint",
    "load_dataset",
    "save_dataset",
    "write_description",
]

MANIFEST_VERSION = 3
"""Version of the two files' format that is written; versions 1 and 2 are read as well, others are refused."""

CHECKED_ROWS = 200_000
"""Manifests of up to so many rows are compared with the fingerprint whole when they are opened: that takes a second."""

DATASET_FILE = "dataset.json"
"""File that says what a data set is."""
MANIFEST_FILE = "manifest.parquet"
"""File with a row per sample."""

_SINCE_VERSION_2 = "has_image_labels"
_SHARDS_KEPT = 128
"""Shards whose rows a view keeps: more than the shuffling reaches at a time with shards of common size."""
_ROWS_AT_ONCE = 64
"""Neighbours whose rows become objects together, which takes hardly longer than one of them."""


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


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the manifest says about one sample; its columns are described above."""

    key: str
    offset: int
    bytes: int
    width: int
    height: int
    classes: tuple[int, ...]
    has_mask: bool
    has_image_labels: bool
    sha256: str


_ROW_COLUMNS = [field.name for field in fields(SampleRow)]


class SplitView:
    """One split of a data set: its samples in the order of shards and offsets, its shards and its image labels.

    What is asked of one sample or shard reads that part of the manifest alone; arrays over all samples read a column.

    Args:
        name: The split.
        rows: The manifest, with those of other splits.
        folder: Folder that holds the shards.
        num_classes: K, background included.
    """

    def __init__(self, name: str, *, rows: Rows, folder: Path, num_classes: int) -> None:
        self.name = name
        self.folder = folder
        self.num_classes = num_classes
        self._rows = rows
        self._places = np.flatnonzero(pc.equal(rows.shards["split"], name).to_numpy(zero_copy_only=False))
        self._table = rows.shards.take(self._places).combine_chunks()
        self._recent: OrderedDict[int, tuple[pa.Table, dict[int, list[SampleRow]]]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what has been read."""
        made = partial(SplitView, rows=self._rows, folder=self.folder, num_classes=self.num_classes)
        return made, (self.name,)

    @cached_property
    def firsts(self) -> npt.NDArray[np.int64]:
        """(S + 1,) first sample of each shard; the last entry is the number of samples."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(numpy_of(self._table, "samples"))])

    @property
    def num_samples(self) -> int:
        """Number of samples in the split."""
        return int(self.firsts[-1])

    @property
    def shard_names(self) -> pa.StringArray:
        """(S) file names of the shards, in order."""
        return array_of(self._table, "shard")

    def shard_of(self, sample: int) -> int:
        """Place among the shards of the one that holds a sample."""
        return int(self.firsts.searchsorted(sample, side="right")) - 1

    def shard_rows(self, shard: int) -> pa.Table:
        """All columns of the manifest for the samples of the shard at a place.

        Raises:
            DataError: the manifest is damaged there.
        """
        return self._rows.of_shard(int(self._places[shard]))

    def row(self, sample: int) -> SampleRow:
        """What the manifest says about a sample, 0 <= sample < num_samples.

        Raises:
            DataError: the manifest is damaged there.
        """
        shard = self.shard_of(sample)
        if shard not in self._recent:
            self._recent[shard] = self.shard_rows(shard).select(_ROW_COLUMNS), {}
            if len(self._recent) > _SHARDS_KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(shard)
        rows, made = self._recent[shard]
        block, place = divmod(sample - int(self.firsts[shard]), _ROWS_AT_ONCE)
        if block not in made:
            found = rows.slice(block * _ROWS_AT_ONCE, _ROWS_AT_ONCE).to_pylist()
            made[block] = [SampleRow(**values | {"classes": tuple(values["classes"] or ())}) for values in found]
        return made[block][place]

    @cached_property
    def shards(self) -> tuple[ShardEntry, ...]:
        """The tar files in order of their names."""
        offsets, sizes = self._numpy("offset"), self._numpy("bytes")
        firsts = self.firsts.tolist()
        return tuple(
            ShardEntry(
                name=name,
                path=self.folder / name,
                num_samples=stop - first,
                first=first,
                offsets=offsets[first:stop],
                sizes=sizes[first:stop],
            )
            for name, first, stop in zip(self.shard_names.to_pylist(), firsts, firsts[1:], strict=False)
        )

    @cached_property
    def keys(self) -> pa.StringArray:
        """Keys of all samples as an arrow array; `key(i)` gives one as text."""
        return self._column("key")

    def key(self, index: int) -> str:
        """Key of the sample at `index`, 0 <= index < num_samples."""
        return self.row(index).key

    @cached_property
    def has_masks(self) -> npt.NDArray[np.bool_]:
        """(num_samples,) whether each sample comes with a mask."""
        return self._numpy("has_mask").astype(np.bool_)

    @cached_property
    def has_image_labels(self) -> npt.NDArray[np.bool_]:
        """(num_samples,) whether each sample's image labels are known; where not, `image_labels` gives zeros."""
        return self._numpy("has_image_labels").astype(np.bool_)

    @cached_property
    def with_masks(self) -> SampleSet:
        """The samples that come with a mask."""
        return self._having("masks", "has_mask")

    @cached_property
    def with_image_labels(self) -> SampleSet:
        """The samples whose image labels are known."""
        return self._having("image_labels", "has_image_labels")

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        """(num_samples, 2) width and height of each image, pixels."""
        return np.stack([self._numpy("width"), self._numpy("height")], axis=1)

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
        return tuple(sorted(pc.list_flatten(self._column("subsets")).unique().to_pylist()))

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
        subsets = self._column("subsets")
        hits = pc.equal(pc.list_flatten(subsets), name).to_numpy(zero_copy_only=False)
        member = np.zeros(self.num_samples, dtype=np.bool_)
        member[pc.list_parent_indices(subsets).to_numpy()[hits]] = True
        return member

    @cached_property
    def class_lists(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(num_samples + 1,) starts and (E,) foreground ids: sample i shows the ids from starts[i] to starts[i + 1]."""
        column = self._column("classes")
        lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return starts, pc.list_flatten(column).to_numpy().astype(np.int64)

    def _having(self, number: str, column: str) -> SampleSet:
        """Samples for which a column holds; it is read only if it holds for a part of some shard."""
        having, of = numpy_of(self._table, number), numpy_of(self._table, "samples")
        if ((having > 0) & (having < of)).any():
            return SampleSet.of(self._numpy(column).astype(np.bool_))
        whole = SampleSet.of(having == of)
        return SampleSet(self.firsts[whole.starts], self.firsts[whole.stops])

    def _numpy(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._column(name).to_numpy(zero_copy_only=False)
        return values

    def _column(self, name: str) -> pa.Array:
        """A column of all samples."""
        ends = np.cumsum(numpy_of(self._rows.shards, "samples"))
        runs = SampleSet.of(self._places)
        parts = [
            self._rows.columns([name], int(ends[start - 1]) if start else 0, int(ends[stop - 1]))
            for start, stop in zip(runs.starts.tolist(), runs.stops.tolist(), strict=True)
        ]
        return array_of(pa.concat_tables(parts or [SCHEMA.empty_table().select([name])]), name)


class ShardSet:
    """A prepared data set: what it is, where it lies, and its manifest. `load_dataset` makes one.

    Args:
        folder: Absolute path of the folder; of a data set in an object store, of its copies on this machine.
        info: Content of `dataset.json`.
        rows: The manifest.
        location: Where the data set is, as `load_dataset` takes it; empty: `folder`.
    """

    def __init__(self, folder: Path, *, info: DatasetInfo, rows: Rows, location: str = "") -> None:
        self.folder = folder
        self.location = location or str(folder)
        self.info = info
        self.rows = rows

    def path_of(self, entry: ShardEntry) -> Path:
        """A shard's file on this machine; of a data set in an object store a copy, made if need be.

        Raises:
            RemoteError: the object store does not have it, or refuses it.
        """
        return open_cached(self.location, entry.name) if is_remote(self.location) else entry.path

    @property
    def table(self) -> pa.Table:
        """The whole manifest, with the columns of `SCHEMA`.

        Raises:
            DataError: it is damaged.
        """
        parts = [self.rows.of_shard(place) for place in range(self.rows.shards.num_rows)]
        return pa.concat_tables(parts or [SCHEMA.empty_table()])

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
        return SplitView(name, rows=self.rows, folder=self.folder, num_classes=self.info.num_classes)


def load_dataset(folder: str | os.PathLike[str], *, check: bool | None = None) -> ShardSet:
    """Reads the description and the manifest of a prepared data set; shards are not touched.

    Args:
        folder: Path of a folder, or its location in an object store (see `slrnet.storage.remote`).
        check: Compare all rows of the manifest with its fingerprint now; False leaves it to the reading of each shard's
            rows. None: where there are at most `CHECKED_ROWS` of them. Manifests before version 3 are always compared.

    Raises:
        RemoteError: the object store does not have it, or refuses it.
        DataError: the folder holds no prepared data set, one of another format version, files that do not belong
            together, or a manifest that no script of data_prep/ writes, such as one that points out of the folder.
    """
    location = str(folder)
    if is_remote(location):
        return _load_remote(location, check)
    return _load(Path(folder).absolute(), check)


def _load_remote(location: str, check: bool | None) -> ShardSet:
    """The description is copied each time; the manifest where it is not the one that belongs to the description."""
    info = _read_info(open_cached(location, DATASET_FILE, again=True).parent)
    mark = cached(location) / f".{MANIFEST_FILE}.of"
    same = mark.exists() and mark.read_text(encoding="utf-8") == info.fingerprint
    path = open_cached(location, MANIFEST_FILE, again=not same).parent
    shards = _load(path, check)
    mark.write_text(info.fingerprint, encoding="utf-8")
    if not same:  # shards of another version may lie there
        for copy in path.glob("*.tar"):
            copy.unlink()
    return ShardSet(path, info=shards.info, rows=shards.rows, location=location)


def _load(path: Path, check: bool | None) -> ShardSet:
    info = _read_info(path)
    if info.version < MANIFEST_VERSION:
        return ShardSet(path, info=info, rows=_load_older(path, info))
    rows = FileRows(path / MANIFEST_FILE, num_classes=info.num_classes, advice=_remedy(path, info))
    _refuse(path, _problem(rows.shards, info))
    _compare(path, info, _fingerprint_of(info.classes, rows.shards))
    if check or (check is None and sum(info.counts.values()) <= CHECKED_ROWS):
        for place in range(rows.shards.num_rows):
            rows.of_shard(place)
    return ShardSet(path, info=info, rows=rows)


def _load_older(path: Path, info: DatasetInfo) -> TableRows:
    """The rows of a manifest of version 1 or 2, read and compared as a whole."""
    file, schema = path / MANIFEST_FILE, _schema(info.version)
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {file}: {error}; {_remedy(path, info)}") from None
    if not table.schema.equals(schema):
        raise foreign_columns(file, table.schema, _remedy(path, info))
    _refuse(path, problem_of(table, num_classes=info.num_classes))
    rows = TableRows(_as_now(table))
    _refuse(path, _problem(rows.shards, info))
    _compare(path, info, fingerprint(info.classes, table, version=info.version))
    return rows


def _refuse(path: Path, problem: str) -> None:
    if problem:
        raise DataError(f"{path / MANIFEST_FILE} is no manifest of {path / DATASET_FILE}: {problem}; get it anew")


def _compare(path: Path, info: DatasetInfo, found: str) -> None:
    if found != info.fingerprint:
        raise DataError(
            f"{path / MANIFEST_FILE} does not belong to {path / DATASET_FILE}: its fingerprint is {found[:12]}, "
            f"expected {info.fingerprint[:12]}; {_remedy(path, info)}"
        )


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
    writer = ManifestWriter(Path(folder) / MANIFEST_FILE)
    writer.add(in_order(rows))
    return write_description(folder, writer.close(), name=name, classes=classes, palette=palette, made_by=made_by)


def write_description(
    folder: str | os.PathLike[str],
    shards: pa.Table,
    *,
    name: str,
    classes: Sequence[str],
    palette: npt.NDArray[np.uint8],
    made_by: str,
) -> DatasetInfo:
    """Writes `dataset.json` beside a manifest that a `ManifestWriter` wrote.

    Args:
        folder: Where to write.
        shards: What the writer's `close` returned.
        name: Short name of the data set.
        classes: Names of all K classes, background first.
        palette: (K or more, 3) uint8 RGB by id.
        made_by: The command that makes the data set, without `--out`.
    """
    info = DatasetInfo(
        name=name,
        classes=tuple(classes),
        palette=tuple((int(r), int(g), int(b)) for r, g, b in palette[: len(classes)]),
        counts=_counts(shards),
        fingerprint=_fingerprint_of(classes, shards),
        made_by=made_by,
    )
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
    if version > 2:
        return _fingerprint_of(classes, shards_of(table))
    return _hashed(table.select(_schema(version).names), [version, *classes])


def _fingerprint_of(classes: Sequence[str], shards: pa.Table) -> str:
    """The fingerprint of version 3, from the table of shards."""
    return _hashed(shards, [MANIFEST_VERSION, *classes])


def _hashed(table: pa.Table, values: Sequence[object]) -> str:
    digest = hashlib.sha256(json.dumps(values).encode())
    hash_columns(digest, table)
    return digest.hexdigest()


def _problem(shards: pa.Table, info: DatasetInfo) -> str:
    """What no table of shards of ours has; "" where it has none of that."""
    wrong = shards.filter(pc.invert(pc.match_substring_regex(shards["shard"], SHARD_NAME)))
    if wrong.num_rows:
        return f"shard {wrong['shard'][0].as_py()!r} is not of the form {SHARD_NAME}"
    if _counts(shards) != dict(info.counts):
        return f"it has {_counts(shards)} samples, {DATASET_FILE} says {dict(info.counts)}"
    return ""


def _counts(shards: pa.Table) -> dict[str, int]:
    """Samples by split."""
    sums = shards.group_by("split").aggregate([("samples", "sum")]).to_pylist()
    return dict(sorted((row["split"], row["samples_sum"]) for row in sums))


def _schema(version: int) -> pa.Schema:
    return SCHEMA if version > 1 else SCHEMA.remove(SCHEMA.get_field_index(_SINCE_VERSION_2))


def _as_now(table: pa.Table) -> pa.Table:
    """A table of an older version in order, with the columns of this one."""
    if _SINCE_VERSION_2 not in table.column_names:
        known = pa.array(np.ones(table.num_rows, dtype=np.bool_))
        table = table.append_column(_SINCE_VERSION_2, known).select(SCHEMA.names)
    return in_order(table)


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
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # the last one: Infinity is valid JSON to Python
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
