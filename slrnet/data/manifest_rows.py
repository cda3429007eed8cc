"""The rows of a manifest file, read a part at a time, and the writer of such files.

`manifest.parquet` is cut into groups of some ten thousand rows; groups end where shards end. The footer holds a table
of the shards with a sha256 over the rows of each. Opening a manifest reads that table alone, so it takes time by the
number of shards. Rows are read, and compared with the sha256 of their shard, when something asks for them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from slrnet.data.sample_set import Places
from slrnet.storage.files import open_regular
from slrnet.storage.names import CONTROL

__all__ = [
    "MANIFEST_VERSION",
    "SCHEMA",
    "SHARDS",
    "DataError",
    "ManifestRows",
    "ManifestWriter",
    "cumulative",
    "fingerprint",
]

MANIFEST_VERSION = 3
"""Version of the format of manifest and description; other versions are refused."""

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
"""The table of shards: file name, split, numbers of samples, masks and known image labels, sha256 of the rows."""

_SHARD_NAME = rf"^[^./\\{CONTROL}][^/\\{CONTROL}]*\.tar$"  # a file within the folder
_NAME = rf"^[^./\\{CONTROL}][^/\\{CONTROL}]*$"
_FORMS = {"key": r"^[^./\\\x00-\x1f]+$", "split": _NAME, "shard": _SHARD_NAME, "sha256": "^[0-9a-f]{64}$"}
_RANGES = {"offset": (0, 2**62), "bytes": (1, 2**40), "width": (1, 2**20), "height": (1, 2**20)}
_SHARDS_KEY = "slrnet.shards"
_GROUP_ROWS = 1 << 14
"""Least number of rows in a group. Reading one sample decodes its group; the footer has some hundred bytes a group."""
_GROUPS_KEPT = 4
_REPETITIVE = ["split", "shard", "subsets.list.element"]
"""Columns whose values repeat, for parquet's dictionaries."""


class DataError(ValueError):
    """The data set cannot be used as it is; the message names the file, the value and the remedy."""


class ManifestRows:
    """The rows of a manifest file, ordered by shard and offset. Picklable: other processes open the file themselves.

    Args:
        path: the manifest file.
        num_classes: K, background included; rows with other classes are refused.
        advice: what to do about a damaged file, for error messages.

    Raises:
        DataError: the file is not a manifest, or it is damaged.
    """

    def __init__(self, path: Path, *, num_classes: int, advice: str) -> None:
        self.path = path
        self.num_classes = num_classes
        self.advice = advice
        try:
            open_regular(path).close()
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            metadata, schema = self._file.metadata, self._file.schema_arrow
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._unreadable(error) from None
        if not schema.equals(SCHEMA):
            raise DataError(
                f"{path} has the columns {schema.names} of types {[str(kind) for kind in schema.types]}, "
                f"not those of a manifest; {advice}"
            )
        footer = (metadata.metadata or {}).get(_SHARDS_KEY.encode())
        self.shards = _decode_shards(path, footer, advice, most=metadata.num_rows)
        """The table of shards, with the columns of `SHARDS`."""
        self._group_firsts, self._firsts = cumulative(groups), cumulative(self.shards["samples"].to_numpy())
        if self._firsts[-1] != self._group_firsts[-1]:
            raise DataError(
                f"{path} has {self._group_firsts[-1]} rows, its table of shards says {self._firsts[-1]}; {advice}"
            )
        if (np.diff(self._firsts) < 1).any() or not np.isin(self._group_firsts, self._firsts).all():
            raise DataError(f"{path} has groups of rows that do not end where shards end; {advice}")
        self._group = lru_cache(_GROUPS_KEPT)(self._read)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles how to open the file, not what has been read."""
        return partial(ManifestRows, self.path, num_classes=self.num_classes, advice=self.advice), ()

    def of_shard(self, place: int) -> pa.Table:
        """All columns of the rows of one shard, given its place in the table of shards.

        Raises:
            DataError: the rows cannot be read, or differ from those that the table of shards was made for.
        """
        first, count = int(self._firsts[place]), int(self._firsts[place + 1] - self._firsts[place])
        group = int(self._group_firsts.searchsorted(first, side="right")) - 1
        rows = self._group(group).slice(first - int(self._group_firsts[group]), count)
        problem = _problem_of(rows, num_classes=self.num_classes)
        if not problem and _digest_of(rows).digest() != self.shards["digest"][place].as_py():
            problem = "they are not those of the data set: their sha256 is another"
        if problem:
            name = self.shards["shard"][place].as_py()
            raise DataError(
                f"{self.path} is damaged or foreign in the rows of shard {name!r}: {problem}; {self.advice}"
            )
        return rows

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows; raises `DataError` for damaged pages, but not for changed values like `of_shard`."""
        parts = [self._read(group, name)[name] for group in range(len(self._group_firsts) - 1)]
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], SCHEMA.field(name).type)

    def _read(self, group: int, *names: str) -> pa.Table:
        """The named columns of a group of rows; without names all of them."""
        try:
            rows = self._file.read_row_group(group, columns=list(names) or None, use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._unreadable(error) from None
        if rows.num_rows != self._group_firsts[group + 1] - self._group_firsts[group]:
            raise self._unreadable(f"group {group} has {rows.num_rows} rows")
        return rows

    def _unreadable(self, error: object) -> DataError:
        return DataError(f"cannot read {self.path}: {error}; {self.advice}")


class ManifestWriter:
    """Writes a manifest part by part. Memory holds one group of rows and the table of shards."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(
            path, SCHEMA, use_dictionary=_REPETITIVE, write_statistics=False, write_page_checksum=True
        )
        self._shards: list[dict[str, Any]] = []
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def add(self, rows: pa.Table) -> None:
        """Adds the rows of whole shards, ordered by shard and offset, after those of all earlier shards."""
        begin = 0
        for count in rows.group_by(["shard", "split"], use_threads=False).aggregate([([], "count_all")])["count_all"]:
            part = rows.slice(begin, count.as_py())
            begin += part.num_rows
            self._shards.append(_describe_shard(part))
            self._waiting.append(part)
            self._num_waiting += part.num_rows
            if self._num_waiting >= _GROUP_ROWS:
                self._write_group()

    def close(self) -> pa.Table:
        """Completes the file; returns its table of shards."""
        self._write_group()
        shards = pa.Table.from_pylist(self._shards, schema=SHARDS)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SHARDS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_table(shards)
        self._writer.add_key_value_metadata({_SHARDS_KEY: base64.b64encode(sink.getvalue()).decode()})
        self._writer.close()
        return shards

    def _write_group(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=self._num_waiting)
            self._waiting, self._num_waiting = [], 0


def fingerprint(classes: Iterable[str], shards: pa.Table) -> str:
    """sha256, as text, of the K class names and a table of shards, independent of how arrow lays them out."""
    start = json.dumps([MANIFEST_VERSION, *classes]).encode()
    return _digest_of(shards, start).hexdigest()


def cumulative(values: npt.ArrayLike) -> Places:
    """(n + 1,) int64: the sum of all values before each of n values, and of all of them."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values, dtype=np.int64)])


def _describe_shard(rows: pa.Table) -> dict[str, Any]:
    """The row of the table of shards for the rows of one shard."""
    return {
        "shard": rows["shard"][0].as_py(),
        "split": rows["split"][0].as_py(),
        "samples": rows.num_rows,
        "masks": pc.sum(rows["has_mask"]).as_py() or 0,
        "image_labels": pc.sum(rows["has_image_labels"]).as_py() or 0,
        "digest": _digest_of(rows).digest(),
    }


def _problem_of(rows: pa.Table, *, num_classes: int) -> str:
    """What is wrong with some rows, "" where nothing is. A manifest may come from a stranger and be made to do harm."""
    for name in rows.column_names:
        column = rows[name]
        if column.null_count or (pa.types.is_list(column.type) and pc.list_flatten(column).null_count):
            return f"column {name} has empty values"
    for name in _FORMS:
        if problem := _unlike_form(rows, name):
            return problem
    for name, (low, high) in _RANGES.items():
        least, most = pc.min_max(rows[name]).as_py().values()
        if not low <= least <= most <= high:
            return f"{name} runs from {least} to {most}; allowed are {low} to {high}"
    least, most = pc.min_max(pc.list_flatten(rows["classes"])).as_py().values()
    if least is not None and not 1 <= least <= most < num_classes:
        return f"classes run from {least} to {most}; allowed are 1 to {num_classes - 1}"
    return ""


def _digest_of(table: pa.Table, start: bytes = b"") -> hashlib._Hash:
    """sha256 of some bytes and the names, lengths and values of a table's columns."""
    digest = hashlib.sha256(start)
    for name in table.column_names:
        digest.update(f"\n{name} {table.num_rows}\n".encode())
        _hash_values(digest, table[name])
    return digest


def _hash_values(digest: hashlib._Hash, column: pa.ChunkedArray) -> None:
    """Adds the lengths of lists and strings, then the values, as little-endian bytes; empty values count as 0."""
    if pa.types.is_list(column.type):
        _hash_values(digest, pc.list_value_length(column))
        _hash_values(digest, pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        _hash_values(digest, pc.binary_length(column))
        digest.update(b"".join(pc.fill_null(column.cast(pa.binary()), b"").to_pylist()))
    elif pa.types.is_fixed_size_binary(column.type):
        digest.update(b"".join(column.to_pylist()))
    else:
        digest.update(pc.fill_null(column.cast(pa.int64()), 0).to_numpy().astype("<i8", copy=False).tobytes())


def _decode_shards(path: Path, footer: bytes | None, advice: str, *, most: int) -> pa.Table:
    """The table of shards, of which there are at most `most`; more would be unpacked from few bytes to no end."""
    try:
        stream = pa.ipc.open_stream(base64.b64decode(footer or b"", validate=True))
        batches, count = [], 0
        while count <= most and (batch := next(stream, None)) is not None:
            batches.append(batch)
            count += batch.num_rows
        if count > most:
            raise ValueError(f"it has more shards than the manifest has samples, {most}")
        shards = pa.Table.from_batches(batches, stream.schema).combine_chunks()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{path} has no table of shards ({error}); {advice}") from None
    if not shards.schema.equals(SHARDS) or any(column.null_count for column in shards.columns):
        raise DataError(f"{path} has a table of shards with other columns, or empty values; {advice}")
    if problem := _unlike_form(shards, "shard") or _unlike_form(shards, "split"):
        raise DataError(f"{path} is damaged or foreign in the table of shards: {problem}; {advice}")
    return shards


def _unlike_form(table: pa.Table, name: str) -> str:
    """What is wrong with a column of names, "" where nothing is."""
    wrong = table[name].filter(pc.invert(pc.match_substring_regex(table[name], _FORMS[name])))
    return f"{name} {wrong[0].as_py()!r} is not of the form {_FORMS[name]}" if len(wrong) else ""
