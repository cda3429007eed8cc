"""Rows of a manifest where they lie: in the file, read a part at a time, or in memory.

`manifest.parquet` is cut into groups of some ten thousand rows that end where shards end. Its footer holds a table of
the shards, with a sha256 over each one's rows. Opening a manifest reads that table; rows are read when they are asked
for and compared with it then. So opening costs what the shards' number asks for, whatever the number of rows.
"""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = [
    "SCHEMA",
    "SHARDS",
    "SHARD_NAME",
    "DataError",
    "FileRows",
    "ManifestWriter",
    "Rows",
    "TableRows",
    "array_of",
    "foreign_columns",
    "hash_columns",
    "in_order",
    "numpy_of",
    "problem_of",
    "shards_of",
]

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

SHARDS = pa.schema(
    [
        ("shard", pa.string()),
        ("split", pa.string()),
        ("samples", pa.int64()),
        ("masks", pa.int64()),
        ("image_labels", pa.int64()),
        ("digest", pa.binary(32)),
    ]
)
"""The table of shards: file name, split, numbers of samples, of those with masks and with known image labels, sha256 of
the rows."""

SHARD_NAME = r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.tar$"
"""What shards are named: files within the folder."""
_KEY = r"^[^./\\\x00-\x1f]+$"
_SHARDS_KEY = "slrnet.shards"
_GROUP_ROWS = 1 << 14
"""Rows of a group at least. A reader decodes a group for a sample of it; the footer has some hundred bytes for each."""
_GROUPS_KEPT = 4
_TABLES_APART = 1000
"""Small tables that a writer keeps before it makes them one: each takes kilobytes, whatever it holds."""
_ALIKE = ["split", "shard", "subsets.list.element"]
"""Columns whose values repeat."""

Places = npt.NDArray[np.int64]


class DataError(ValueError):
    """The data is not as it must be; the message names the file, the value and the remedy."""


class Rows(Protocol):
    """All rows of a manifest, ordered by shard and offset."""

    @property
    def shards(self) -> pa.Table:
        """The table of shards, with the columns of `SHARDS`."""

    def of_shard(self, place: int) -> pa.Table:
        """The rows of the shard at a place of that table.

        Raises:
            DataError: they cannot be read, or are not those that the table of shards was made for.
        """

    def columns(self, names: Sequence[str], first: int, stop: int) -> pa.Table:
        """Some columns of the rows from `first` to `stop` - 1.

        Raises:
            DataError: they cannot be read.
        """


class TableRows:
    """Rows in memory.

    Args:
        table: with the columns of `SCHEMA`, or those of them that are asked for.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    @cached_property
    def shards(self) -> pa.Table:
        """The table of shards."""
        return shards_of(self._table, digests=False)

    def of_shard(self, place: int) -> pa.Table:
        """The rows of the shard at a place of that table."""
        return self._table.slice(int(self._ends[place]), int(self._ends[place + 1] - self._ends[place]))

    def columns(self, names: Sequence[str], first: int, stop: int) -> pa.Table:
        """Some columns of the rows from `first` to `stop` - 1."""
        return self._table.select(list(names)).slice(first, stop - first)

    @cached_property
    def _ends(self) -> Places:
        return _cumulative(numpy_of(self.shards, "samples"))


class FileRows:
    """Rows in a file that `ManifestWriter` wrote. Picklable: other processes open the file themselves.

    Args:
        path: of the file.
        num_classes: K, background included; rows with other classes are refused.
        advice: what to do where it is damaged.

    Raises:
        DataError: it is no manifest, or not whole.
    """

    def __init__(self, path: Path, *, num_classes: int, advice: str) -> None:
        self.path = path
        self.num_classes = num_classes
        self.advice = advice
        self._opened: pq.ParquetFile | None = None
        self._recent: OrderedDict[int, pa.Table] = OrderedDict()
        try:
            metadata = self._file.metadata
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            schema, footer = self._file.schema_arrow, (metadata.metadata or {}).get(_SHARDS_KEY.encode())
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None
        if not schema.equals(SCHEMA):
            raise foreign_columns(path, schema, advice)
        self.shards = _decoded(path, footer, advice)
        self._group_ends = _cumulative(np.array(groups, dtype=np.int64))
        samples, number = numpy_of(self.shards, "samples"), int(self._group_ends[-1])
        self._ends = _cumulative(samples)
        if ((samples < 1) | (samples > number)).any() or self._ends[-1] != number:
            raise DataError(f"{path} has {number} rows, its table of shards says {self._ends[-1]}; {advice}")

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open."""
        return self.__dict__ | {"_opened": None, "_recent": OrderedDict()}

    def of_shard(self, place: int) -> pa.Table:
        """The rows of the shard at a place of the table of shards.

        Raises:
            DataError: they cannot be read, or are not those that the table of shards was made for.
        """
        first, stop = int(self._ends[place]), int(self._ends[place + 1])
        parts = [
            self._group(group).slice(max(0, first - begin), min(end, stop) - max(begin, first))
            for group, begin, end in self._groups(first, stop)
        ]
        # A copy: a slice would keep its whole group in memory.
        rows = pa.concat_tables(parts).take(np.arange(stop - first)).combine_chunks()
        problem = problem_of(rows, num_classes=self.num_classes)
        if not problem and _digest(rows) != self.shards["digest"][place].as_py():
            problem = "they are not those of the data set: their sha256 is another"
        if problem:
            name = self.shards["shard"][place].as_py()
            raise DataError(
                f"{self.path} is damaged or foreign in the rows of shard {name!r}: {problem}; {self.advice}"
            )
        return rows

    def columns(self, names: Sequence[str], first: int, stop: int) -> pa.Table:
        """Some columns of the rows from `first` to `stop` - 1; damage of the file is found, a change of values not.

        Raises:
            DataError: they cannot be read.
        """
        parts = [SCHEMA.empty_table().select(list(names))]
        for group, begin, end in self._groups(first, stop):
            part = self._read(group, names).select(list(names))
            parts.append(part.slice(max(0, first - begin), min(end, stop) - max(begin, first)))
        return pa.concat_tables(parts)

    @property
    def _file(self) -> pq.ParquetFile:
        if self._opened is None:
            self._opened = pq.ParquetFile(self.path, page_checksum_verification=True)
        return self._opened

    def _groups(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The groups that hold some rows: number, first row, row after the last."""
        if first < stop:
            low = int(np.searchsorted(self._group_ends, first, side="right")) - 1
            high = int(np.searchsorted(self._group_ends, stop, side="left"))
            for group in range(low, high):
                yield group, int(self._group_ends[group]), int(self._group_ends[group + 1])

    def _group(self, group: int) -> pa.Table:
        """All columns of a group; those last used are kept."""
        if group not in self._recent:
            self._recent[group] = self._read(group, SCHEMA.names)
            if len(self._recent) > _GROUPS_KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(group)
        return self._recent[group]

    def _read(self, group: int, names: Sequence[str]) -> pa.Table:
        try:
            rows = self._file.read_row_group(group, columns=list(names), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None
        if rows.num_rows != self._group_ends[group + 1] - self._group_ends[group]:
            raise self._unreadable(f"group {group} has {rows.num_rows} rows")
        return rows

    def _unreadable(self, error: object) -> DataError:
        return DataError(f"cannot read {self.path}: {error}; {self.advice}")


class ManifestWriter:
    """Writes a manifest part by part; memory holds a group of rows and the table of shards.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(
            path, SCHEMA, use_dictionary=_ALIKE, write_statistics=False, write_page_checksum=True
        )
        self._waiting: list[pa.Table] = []
        self._shards: list[pa.Table] = [SHARDS.empty_table()]

    def add(self, rows: pa.Table) -> None:
        """Adds the rows of whole shards, ordered by shard and offset, behind those of all shards before."""
        shards = shards_of(rows)
        self._shards.append(shards)
        if len(self._shards) > _TABLES_APART:
            self._shards = [pa.concat_tables(self._shards).combine_chunks()]
        begin = 0
        for end in np.cumsum(numpy_of(shards, "samples")).tolist():
            if sum(part.num_rows for part in self._waiting) + end - begin >= _GROUP_ROWS:
                self._waiting.append(rows.slice(begin, end - begin))
                self._write_group()
                begin = end
        if begin < rows.num_rows:
            self._waiting.append(rows.slice(begin))

    def close(self) -> pa.Table:
        """Ends the file; returns its table of shards."""
        self._write_group()
        shards = pa.concat_tables(self._shards).combine_chunks()
        self._writer.add_key_value_metadata({_SHARDS_KEY: _encoded(shards)})
        self._writer.close()
        return shards

    def _write_group(self) -> None:
        if self._waiting:
            rows = pa.concat_tables(self._waiting)
            self._writer.write_table(rows, row_group_size=rows.num_rows)
            self._waiting = []


def shards_of(rows: pa.Table, *, digests: bool = True) -> pa.Table:
    """The table of shards of some rows: an entry for each run of rows of the same shard and split.

    Args:
        rows: with the columns of `SCHEMA`.
        digests: False leaves their column zero, where nothing is compared with it.
    """
    if not rows.num_rows:
        return SHARDS.empty_table()
    runs = [
        array_of(rows, name).dictionary_encode().indices.to_numpy(zero_copy_only=False) for name in ("shard", "split")
    ]
    changes = np.any([np.diff(run, prepend=-1) != 0 for run in runs], axis=0)
    firsts = np.flatnonzero(changes)
    ends = np.append(firsts[1:], rows.num_rows)
    masks, labels = (_cumulative(_flags(rows, name)) for name in ("has_mask", "has_image_labels"))
    return pa.table(
        {
            "shard": array_of(rows, "shard").take(firsts),
            "split": array_of(rows, "split").take(firsts),
            "samples": ends - firsts,
            "masks": masks[ends] - masks[firsts],
            "image_labels": labels[ends] - labels[firsts],
            "digest": [
                _digest(rows.slice(first, end - first)) if digests else bytes(32)
                for first, end in zip(firsts, ends, strict=True)
            ],
        },
        schema=SHARDS,
    )


def problem_of(rows: pa.Table, *, num_classes: int) -> str:
    """What no rows of ours have; "" where they have none of that. A stranger's may be made to do harm.

    Args:
        rows: with the columns of `SCHEMA`.
        num_classes: K, background included.
    """
    for name in rows.column_names:
        column = array_of(rows, name)
        if column.null_count or (pa.types.is_list(column.type) and pc.list_flatten(column).null_count):
            return f"column {name} has empty values"
    for name, pattern in (("key", _KEY), ("shard", SHARD_NAME), ("sha256", "^[0-9a-f]{64}$")):
        wrong = rows.filter(pc.invert(pc.match_substring_regex(rows[name], pattern)))
        if wrong.num_rows:
            return f"{name} {wrong[name][0].as_py()!r} is not of the form {pattern}"
    ranges = {"offset": (0, 2**62), "bytes": (1, 2**40), "width": (1, 2**20), "height": (1, 2**20)}
    for name, (low, high) in ranges.items():
        values = numpy_of(rows, name)
        if len(values) and not low <= values.min() <= values.max() <= high:
            return f"{name} runs from {values.min()} to {values.max()}; allowed are {low} to {high}"
    classes = pc.list_flatten(array_of(rows, "classes")).to_numpy()
    if len(classes) and not 1 <= classes.min() <= classes.max() < num_classes:
        return f"classes run from {classes.min()} to {classes.max()}; allowed are 1 to {num_classes - 1}"
    return ""


def foreign_columns(path: Path, schema: pa.Schema, advice: str) -> DataError:
    """The error for a file with other columns than a manifest has."""
    return DataError(
        f"{path} has the columns {schema.names} of types {[str(kind) for kind in schema.types]}, "
        f"not those of a manifest; {advice}"
    )


def hash_columns(digest: hashlib._Hash, table: pa.Table) -> None:
    """Adds names, lengths and values of a table's columns to a digest."""
    for name in table.column_names:
        column = array_of(table, name)
        digest.update(f"\n{name} {len(column)}\n".encode())
        hash_values(digest, column)


def in_order(table: pa.Table) -> pa.Table:
    """A manifest's rows in the order of shards, and within them of the tar."""
    return table.sort_by([("shard", "ascending"), ("offset", "ascending")])


def hash_values(digest: hashlib._Hash, column: pa.Array) -> None:
    """Adds the lengths of lists and strings, then the values, as little-endian bytes; empty values count as 0."""
    if pa.types.is_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0)
        digest.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        hash_values(digest, pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        digest.update(pc.fill_null(pc.binary_length(column), 0).to_numpy().astype("<i8").tobytes())
        digest.update(b"".join(pc.fill_null(column.cast(pa.binary()), b"").to_pylist()))
    elif pa.types.is_fixed_size_binary(column.type):
        digest.update(b"".join(column.to_pylist()))
    else:
        whole = pc.fill_null(column.cast(pa.int64()), 0)
        digest.update(whole.to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def array_of(table: pa.Table, name: str) -> pa.Array:
    """A column as one array, whatever chunks it lies in."""
    chunks = table[name].chunks
    # A single chunk is used as it is: no copy, however often a caller asks.
    if len(chunks) < 2:
        return chunks[0] if chunks else pa.array([], table[name].type)
    return pa.concat_arrays(chunks)


def numpy_of(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column as a numpy array."""
    values: npt.NDArray[Any] = array_of(table, name).to_numpy(zero_copy_only=False)
    return values


def _digest(rows: pa.Table) -> bytes:
    digest = hashlib.sha256()
    hash_columns(digest, rows.select(SCHEMA.names))
    return digest.digest()


def _flags(rows: pa.Table, name: str) -> Places:
    return numpy_of(rows, name).astype(np.bool_).astype(np.int64)


def _cumulative(values: npt.NDArray[np.int64]) -> Places:
    """(n + 1,) sums of the values before each."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values, dtype=np.int64)])


def _encoded(shards: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SHARDS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(shards)
    return base64.b64encode(sink.getvalue()).decode()


def _decoded(path: Path, footer: bytes | None, advice: str) -> pa.Table:
    try:
        shards = pa.ipc.open_stream(base64.b64decode(footer or b"", validate=True)).read_all().combine_chunks()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{path} has no table of shards ({error}); {advice}") from None
    if not shards.schema.equals(SHARDS) or any(column.null_count for column in shards.columns):
        raise DataError(f"{path} has a table of shards with other columns, or empty values; {advice}")
    return shards
