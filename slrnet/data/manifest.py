"""What a prepared data set consists of: `dataset.json` (what it is) and `manifest.parquet` (one row a sample).

These two files lie beside the tar shards, most often named SPLIT-000000.tar. Each sample is KEY.jpg, KEY.png (indexed
mask, where there is one) and KEY.json. Columns of the manifest, rows ordered by shard and offset:

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
| has_image_labels | bool | whether `classes` is known; where it is not, `classes` is empty and says nothing |
| bytes | int64 | size of the sample in the tar from `offset` on, headers and padding included |
| sha256 | string | hex digest of its files' bytes, concatenated in the order of the tar |

A sample with neither a mask nor image labels is an unlabeled image. One with image labels and no classes shows the
background alone.

The manifest's footer has a table of the shards with a sha256 over each shard's rows, which are compared when they are
read (see `slrnet.data.manifest_rows`); the fingerprint is a sha256 over that table.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from slrnet.config import nearest
from slrnet.data.catalog import mask_palette
from slrnet.data.foreign_folder import how_to_make_shards
from slrnet.data.manifest_rows import (
    MANIFEST_VERSION,
    SCHEMA,
    DataError,
    ManifestRows,
    ManifestWriter,
    cumulative,
    fingerprint,
)
from slrnet.data.sample_set import SampleSet
from slrnet.storage.files import read_json
from slrnet.storage.names import check_name, check_text, printable
from slrnet.storage.remote import is_remote, open_cached

__all__ = [
    "CHECKED_ROWS",
    "DATASET_FILE",
    "MANIFEST_FILE",
    "SCHEMA",
    "DataError",
    "DatasetInfo",
    "SampleRow",
    "ShardSet",
    "SplitView",
    "load_dataset",
    "save_dataset",
]

CHECKED_ROWS = 200_000
"""`load_dataset` compares all rows of a manifest of up to this many rows with the fingerprint, which takes a second."""

DATASET_FILE = "dataset.json"
"""File that says what a data set is."""
MANIFEST_FILE = "manifest.parquet"
"""File with a row per sample."""

_SHARDS_KEPT = 128
"""Shards whose rows a view keeps: more than the shuffling reaches at a time with shards of common size."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a prepared data set is: the content of `dataset.json`."""

    name: str
    """Short name for people, such as `voc2012`."""
    classes: tuple[str, ...]
    """Names of all K classes, `background` first; the place is the id."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB color of each of the K classes, 0 to 255."""
    counts: Mapping[str, int]
    """Samples per split."""
    fingerprint: str
    """sha256 over the classes and the content of the manifest: equal for equal data in equal shards."""
    made_by: str
    """The command that makes the data set, without its `--out`."""
    depth: str = ""
    """How images of more than 8 bits became 8-bit ones, a text of `slrnet.data.depth`; empty if there are none."""
    version: int = MANIFEST_VERSION
    """Format version of the files."""

    def __post_init__(self) -> None:
        names = self.classes
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"classes are {list(names)[:5]}...; two names or more are needed, each once")
        colors = [value for color in self.palette for value in color]
        if len(self.palette) != len(names) or not all(0 <= value <= 255 for value in colors):
            raise ValueError(f"the palette has {len(self.palette)} colors; {len(names)} of 0 to 255 are needed")

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return len(self.classes)

    def palette_array(self) -> npt.NDArray[np.uint8]:
        """Colors for a mask image: (256, 3) uint8 RGB by id; ids beyond the classes have VOC's colors."""
        return mask_palette(self.palette)

    def repair_command(self, folder: Path) -> str:
        """The command line that makes the data set of a folder again, beside it."""
        command = self.command()
        if command is None:
            return f"the converter that made it: {DATASET_FILE} names a command that is none of slrnet's"
        return f"{command} --out {shlex.quote(f'{folder}-new')}"

    def command(self) -> str | None:
        """The command that makes the data set, if it is one of slrnet's scripts; quoted, so that it runs no other."""
        try:
            words = shlex.split(self.made_by)
        except ValueError:
            return None
        if words[:1] != ["python"] or not re.fullmatch(r"(data_prep|ray_jobs)/\w+\.py", "".join(words[1:2])):
            return None
        return printable(shlex.join(words))


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the manifest says about one sample; the module's docstring describes the columns."""

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

    What concerns one sample or shard reads that part of the manifest; arrays over all samples read a whole column.
    Either raises `DataError` if the manifest is damaged there.

    Args:
        name: name of the split.
        rows: the manifest's rows, those of other splits included; the shards lie beside the manifest.
    """

    def __init__(self, name: str, rows: ManifestRows) -> None:
        self.name = name
        self.folder = rows.path.parent
        self.num_classes = rows.num_classes
        self._rows = rows
        self._in_split = pc.equal(rows.shards["split"], name).to_numpy()
        self._places = np.flatnonzero(self._in_split)
        self._shards = rows.shards.take(self._places)
        self.firsts = cumulative(self._shards["samples"].to_numpy())
        """(S + 1,) int64, the first sample of each shard; the last entry is the number of samples."""
        self.shard_names: list[str] = self._shards["shard"].to_pylist()
        """File names of the S shards, in order."""
        self._sample_rows = lru_cache(_SHARDS_KEPT)(self._read_sample_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what the view is made of, not what it has read."""
        return SplitView, (self.name, self._rows)

    @property
    def num_samples(self) -> int:
        """Number of samples in the split."""
        return int(self.firsts[-1])

    def shard_of(self, sample: int) -> int:
        """Place among the shards of the one that holds a sample."""
        return int(self.firsts.searchsorted(sample, side="right")) - 1

    def samples_of(self, shard: int) -> range:
        """The samples of the shard at a place, in the order of the tar."""
        return range(int(self.firsts[shard]), int(self.firsts[shard + 1]))

    def shard_rows(self, shard: int) -> pa.Table:
        """All columns of the manifest for the samples of the shard at a place."""
        return self._rows.of_shard(int(self._places[shard]))

    def row(self, sample: int) -> SampleRow:
        """What the manifest says about a sample, 0 <= sample < num_samples."""
        shard = self.shard_of(sample)
        return self._sample_rows(shard)[sample - int(self.firsts[shard])]

    def key(self, index: int) -> str:
        """Key of the sample at `index`, 0 <= index < num_samples."""
        return self.row(index).key

    def column(self, name: str) -> pa.Array:
        """A column of the manifest for all samples of the split."""
        in_split = np.repeat(self._in_split, self._rows.shards["samples"].to_numpy())
        return self._rows.column(name).filter(in_split).combine_chunks()

    @cached_property
    def keys(self) -> pa.StringArray:
        """Keys of all samples as an arrow array; `key(i)` gives one as text."""
        return self.column("key")

    @cached_property
    def with_masks(self) -> SampleSet:
        """The samples that come with a mask."""
        return self._having("masks", "has_mask")

    @cached_property
    def with_image_labels(self) -> SampleSet:
        """The samples whose image labels are known."""
        return self._having("image_labels", "has_image_labels")

    @cached_property
    def subset_names(self) -> tuple[str, ...]:
        """Names of the subsets that occur in the split, sorted."""
        return tuple(sorted(pc.list_flatten(self.column("subsets")).unique().to_pylist()))

    def in_subset(self, name: str) -> npt.NDArray[np.bool_]:
        """(num_samples,) bool: which samples belong to the named subset.

        Raises:
            DataError: no sample of the split is in a subset of that name.
        """
        if name not in self.subset_names:
            known = ", ".join(self.subset_names) or "none"
            raise DataError(
                f"split {self.name!r} of {self.folder} has no subset {name!r}; it has: {known}"
                f"{nearest(name, self.subset_names)}; `slrnet prepare` makes one with --subset {name}=LISTFILE"
            )
        subsets, member = self.column("subsets"), np.zeros(self.num_samples, dtype=np.bool_)
        member[pc.list_parent_indices(subsets).filter(pc.equal(pc.list_flatten(subsets), name))] = True
        return member

    def _read_sample_rows(self, shard: int) -> list[SampleRow]:
        rows = self.shard_rows(shard).select(_ROW_COLUMNS).to_pylist()
        return [SampleRow(**values | {"classes": tuple(values["classes"])}) for values in rows]

    def _having(self, counted: str, flag: str) -> SampleSet:
        """Samples whose flag is set. Reads that column only if some shard has samples with and without it."""
        having, samples = self._shards[counted].to_numpy(), self._shards["samples"].to_numpy()
        if ((having > 0) & (having < samples)).any():
            return SampleSet.of(self.column(flag).to_numpy(zero_copy_only=False))
        shards = SampleSet.of(having == samples)
        return SampleSet(self.firsts[shards.starts], self.firsts[shards.stops])


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A prepared data set: what it is, where it lies, and its manifest. `load_dataset` makes one."""

    folder: Path
    """Absolute path of the folder; for a data set in an object store, the folder of its copies on this machine."""
    location: str
    """Where the data set is, as `load_dataset` takes it."""
    info: DatasetInfo
    rows: ManifestRows

    def path_of(self, shard: str, check: Callable[[Path], None] = lambda path: None) -> Path:
        """A shard's file on this machine; for a data set in an object store, a copy (see `open_cached`)."""
        return open_cached(self.location, shard, check=check) if is_remote(self.location) else self.folder / shard

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.info.counts)

    @property
    def table(self) -> pa.Table:
        """The whole manifest, a row for each sample with the columns of `SCHEMA`; read anew at each call."""
        return pa.concat_tables([self.rows.of_shard(place) for place in range(self.rows.shards.num_rows)])

    @property
    def repair_command(self) -> str:
        """The command line that makes the data set again, beside the folder."""
        return self.info.repair_command(self.folder)

    @property
    def verify_command(self) -> str:
        """The command line that compares all shards with the manifest."""
        script = " ".join((self.info.command() or "python data_prep/folder.py").split()[:2])
        return f"{script} --verify {shlex.quote(str(self.folder))}"

    def split(self, name: str) -> SplitView:
        """The samples of one split; raises a `DataError` that names all splits if there is no such one."""
        if name not in self.splits:
            have = f"it has: {', '.join(self.splits)}{nearest(name, self.splits)}"
            raise DataError(f"{self.location} has no split {name!r}; {have}")
        return SplitView(name, self.rows)


def load_dataset(folder: str | os.PathLike[str], *, check: bool | None = None) -> ShardSet:
    """Reads the description and the manifest of a prepared data set; shards are not touched.

    Args:
        folder: path of a folder, or its location in an object store (see `slrnet.storage.remote`).
        check: compare all rows of the manifest with its fingerprint now; False leaves this to the reading of each
            shard's rows. None: compare if there are at most `CHECKED_ROWS` rows.

    Raises:
        RemoteError: the object store does not have it, or refuses it.
        DataError: the folder holds no prepared data set, one of another format version, files that do not belong
            together, or a manifest that no script of data_prep/ writes, such as one that points out of the folder.
    """
    location = str(folder)
    if not is_remote(location):
        path = Path(folder).absolute()
        return _load(path, str(path), check)
    path = open_cached(location, DATASET_FILE, again=True).parent
    open_cached(location, MANIFEST_FILE)
    try:
        return _load(path, location, check)
    except DataError:  # the copies may be those of another data set that was there before
        open_cached(location, MANIFEST_FILE, again=True)
        for shard in path.glob("*.tar"):
            shard.unlink()
        return _load(path, location, check)


def _load(path: Path, location: str, check: bool | None) -> ShardSet:
    info = _read_info(path)
    advice = f"rebuild the data set: {info.repair_command(path)}"
    rows = ManifestRows(path / MANIFEST_FILE, num_classes=info.num_classes, advice=advice)
    if (counts := _counts(rows.shards)) != info.counts:
        raise DataError(
            f"{path / MANIFEST_FILE} is no manifest of {path / DATASET_FILE}: it has {counts} samples, {DATASET_FILE} "
            f"says {info.counts}; copy or rebuild it"
        )
    read = fingerprint(info.classes, rows.shards)
    if read != info.fingerprint:
        raise DataError(
            f"{path / MANIFEST_FILE} does not belong to {path / DATASET_FILE}: its fingerprint is {read[:12]}, "
            f"expected {info.fingerprint[:12]}; {advice}"
        )
    if check or (check is None and sum(info.counts.values()) <= CHECKED_ROWS):
        for place in range(rows.shards.num_rows):
            rows.of_shard(place)
    return ShardSet(folder=path, location=location, info=info, rows=rows)


def save_dataset(
    folder: str | os.PathLike[str],
    parts: Iterable[pa.Table],
    *,
    name: str,
    classes: Sequence[str],
    palette: npt.NDArray[np.uint8],
    made_by: str,
    depth: str = "",
) -> DatasetInfo:
    """Writes `manifest.parquet` and `dataset.json` into an existing folder that holds the shards; returns the latter.

    Args:
        folder: where to write.
        parts: the manifest's rows with the columns of `SCHEMA`. Each part holds whole shards, in any order; the shards
            of a part come after those of earlier parts by name.
        name: short name of the data set.
        classes: names of all K classes, background first.
        palette: (K or more, 3) uint8 RGB by id.
        made_by: the command that makes the data set, without `--out`.
        depth: how images of more than 8 bits became 8-bit ones, see `DatasetInfo.depth`.
    """
    writer = ManifestWriter(Path(folder) / MANIFEST_FILE)
    for part in parts:
        writer.add(part.sort_by([("shard", "ascending"), ("offset", "ascending")]))
    shards = writer.close()
    info = DatasetInfo(
        name=name,
        classes=tuple(classes),
        palette=tuple((r, g, b) for r, g, b in palette[: len(classes)].tolist()),
        counts=_counts(shards),
        fingerprint=fingerprint(classes, shards),
        made_by=made_by,
        depth=depth,
    )
    (Path(folder) / DATASET_FILE).write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
    return info


def _counts(shards: pa.Table) -> dict[str, int]:
    sums = shards.group_by("split").aggregate([("samples", "sum")]).to_pylist()
    return dict(sorted((row["split"], row["samples_sum"]) for row in sums))


@cache
def _descriptions() -> TypeAdapter[DatasetInfo]:
    """Takes longer to make than to use."""
    return TypeAdapter(DatasetInfo)


def _read_info(path: Path) -> DatasetInfo:
    file = path / DATASET_FILE
    remake = "rebuild the data set with `slrnet prepare`"
    try:
        values = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no shards in {path}: {how_to_make_shards(path, marker=DATASET_FILE)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}; {remake}") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != MANIFEST_VERSION:
        newer = isinstance(version, int) and version > MANIFEST_VERSION
        advice = f"install the newer slrnet that made it, or {remake}" if newer else remake
        raise DataError(f"{file} has format version {version}, this program reads version {MANIFEST_VERSION}; {advice}")
    try:
        info = _descriptions().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file} is incomplete or malformed ({first['loc']}: {first['msg']}); {remake}") from None
    try:
        for what, text in (("name", info.name), *(("class", text) for text in info.classes)):
            check_text(what, text)
        for split in info.counts:
            check_name("split", split)
    except ValueError as error:
        raise DataError(f"{file} has a name that is not taken: {error}; {remake}") from None
    return info
