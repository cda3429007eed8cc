"""Single samples of a split, read from their tars at the manifest's byte offsets, checked and decoded.

WebDataset's own tar reader starts at the first sample of a shard, reads masks that nobody asked for, and drops the rest
of a shard after an error. Reading by offset costs a damaged sample alone, and touches no file but those asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slrnet.data.manifest import DataError, SampleRow, ShardSet, SplitView
from slrnet.data.tars import BLOCK, read_header
from slrnet.data.transforms import decode_image, decode_mask
from slrnet.storage.remote import RemoteError, is_remote, open_cached

__all__ = ["FoundSample", "OnError", "SampleIndex", "ShardFiles", "SkippedSample", "index_split"]

_OPEN_SHARDS = 128
"""Shards that a reader keeps open: more than the shuffling reaches at a time with shards of common size."""

OnError = Literal["stop", "skip"]
"""What a damaged or missing sample does: stop the run, or be skipped, counted and reported."""


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """A sample that could not be read.

    Attributes:
        shard: file name of its tar.
        key: its name.
        reason: what was wrong.
    """

    shard: str
    key: str
    reason: str


class FoundSample(NamedTuple):
    """Where a sample's files lie.

    Attributes:
        sample: its place in the split.
        row: what the manifest says of it.
        shard: place of its shard among those of the split.
        files: the bytes of the shard that are each file that is wanted, by suffix, in the order of the tar.
        begin: first byte of these files.
        size: bytes from there to the end of the last one.
    """

    sample: int
    row: SampleRow
    shard: int
    files: dict[str, slice]
    begin: int
    size: int


@dataclass(frozen=True, kw_only=True)
class SampleIndex:
    """What readers know of a split; samples 0 to n - 1 are counted in the manifest's order.

    Attributes:
        folder: that holds the shards, or the copies of those in an object store.
        location: of the data set; another than the folder where that holds copies.
        split: what the manifest says.
        compare: samples that are read whole are compared with their sha256.
        on_error: what damage does.
        advice: the commands that find and repair damage.
    """

    folder: Path
    location: str
    split: SplitView
    compare: bool
    on_error: OnError
    advice: str

    @property
    def firsts(self) -> npt.NDArray[np.int64]:
        """(S + 1,) first sample of each shard; the last entry is n."""
        return self.split.firsts

    def key(self, sample: int) -> str:
        """Name of a sample."""
        return self.split.key(sample)

    def shard_name(self, sample: int) -> str:
        """File name of the shard that holds a sample."""
        return self.split.shard_names[self.split.shard_of(sample)]

    def image_labels(self, rows: Sequence[SampleRow | None]) -> Tensor:
        """Image labels of n samples: (n, K-1) float32 of 0 and 1; 0 alone where None stands for ungranted ones."""
        labels = np.zeros((len(rows), self.split.num_classes - 1), dtype=np.float32)
        for place, row in enumerate(rows):
            for label in row.classes if row else ():
                labels[place, label - 1] = 1.0
        return torch.from_numpy(labels)

    def damage(self, sample: int, error: DataError) -> SkippedSample:
        """Describes a damaged sample where those are skipped.

        Raises:
            DataError: they are not: what is wrong where, and what to do.
        """
        if self.on_error == "skip":
            return SkippedSample(self.shard_name(sample), self.key(sample), str(error))
        raise self._described(sample, error) from None

    @contextmanager
    def naming(self, sample: int) -> Iterator[None]:
        """Errors within name sample, shard and remedy, also where damaged samples are skipped elsewhere.

        Raises:
            DataError: one was raised within.
        """
        try:
            yield
        except DataError as error:
            raise self._described(sample, error) from None

    def decode(self, row: SampleRow, files: Mapping[str, bytes | memoryview], reduction: int = 1) -> Tensor:
        """Decodes a sample's image to (3, H, W) uint8, or to smaller sides (see `transforms.decode_image`).

        Raises:
            DataError: it cannot be decoded, or has another size than in the manifest.
        """
        image = decode_image(files["jpg"], reduction)
        height, width = -(-row.height // reduction), -(-row.width // reduction)
        if image.shape != (3, height, width):
            found = f"{'about ' * (reduction > 1)}{image.shape[2] * reduction} x {image.shape[1] * reduction}"
            raise DataError(f"the image has {found} pixels, the manifest says {row.width} x {row.height}")
        return image

    def decode_mask(self, row: SampleRow, files: Mapping[str, bytes | memoryview]) -> Tensor | None:
        """Decodes the mask among a sample's files, if there is one, to (H, W) uint8.

        Raises:
            DataError: it cannot be decoded, or has another size than the image.
        """
        if "png" not in files:
            return None
        mask = decode_mask(files["png"])
        if mask.shape != (row.height, row.width):
            raise DataError(f"the mask has shape {tuple(mask.shape)}, the image {(row.height, row.width)}")
        return mask

    def _described(self, sample: int, error: DataError) -> DataError:
        path = self.folder / self.shard_name(sample)
        return DataError(f"shard {path}: sample {self.key(sample)!r}: {error}; {self.advice}")


class ShardFiles:
    """Reads samples from their tars at the manifest's byte offsets; keeps the shards last used open."""

    def __init__(self, index: SampleIndex) -> None:
        self.index = index
        self._files: OrderedDict[int, tuple[BinaryIO, int]] = OrderedDict()
        self._memory = memoryview(b"")

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file, _length in self._files.values():
            file.close()

    def find(self, sample: int, *, masks: bool) -> FoundSample:
        """Looks up the sample's image, or with `masks` all of its files; no other one is touched.

        Raises:
            DataError: what is missing or damaged; neither the sample nor its shard is named.
        """
        view = self.index.split
        row, shard = view.row(sample), view.shard_of(sample)
        file, length = self._open(shard)
        end = row.offset + row.bytes
        if end > length:
            raise DataError(f"the shard is cut off: it has {length} bytes, the sample ends at byte {end}")
        files = _members(file, row, only=None if masks else "jpg")
        if "jpg" not in files:
            raise DataError("its image is missing from the tar")
        parts = list(files.values())
        return FoundSample(sample, row, shard, files, parts[0].start, parts[-1].stop - parts[0].start)

    def views(self, found: FoundSample) -> dict[str, memoryview]:
        """What is in a sample's files, by suffix; good until the next call, which writes to the same memory.

        Raises:
            DataError: the shard cannot be read; neither the sample nor its shard is named.
        """
        file, _ = self._open(found.shard)
        if len(self._memory) < found.size:
            self._memory = memoryview(bytearray(found.size))
        _read(file, found.begin, self._memory[: found.size])
        begin = found.begin
        return {suffix: self._memory[part.start - begin : part.stop - begin] for suffix, part in found.files.items()}

    def read(self, sample: int, *, masks: bool) -> dict[str, bytes]:
        """The sample's files by suffix: `jpg` alone, or with `masks` all of them, compared with the sha256.

        Raises:
            DataError: what is missing or damaged; neither the sample nor its shard is named.
        """
        found = self.find(sample, masks=masks)
        files = {suffix: bytes(view) for suffix, view in self.views(found).items()}
        if masks and self.index.compare:
            digest = hashlib.sha256(b"".join(files.values())).hexdigest()
            if digest != found.row.sha256:
                raise DataError(f"its files have the sha256 {digest[:12]}..., not that of the manifest")
        return files

    def load(self, sample: int) -> tuple[dict[str, bytes], Tensor, Tensor | None]:
        """The sample's files, compared with the sha256, its image (3, H, W) and its mask (H, W), where it has one.

        Raises:
            DataError: what is missing or damaged in which sample of which shard, and what to do.
        """
        with self.index.naming(sample):
            files, row = self.read(sample, masks=True), self.index.split.row(sample)
            return files, self.index.decode(row, files), self.index.decode_mask(row, files)

    def _open(self, shard: int) -> tuple[BinaryIO, int]:
        """The shard's file, without a buffer of its own, and its length."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            file = self._path(shard).open("rb", buffering=0)
        except FileNotFoundError:
            raise DataError("the shard is missing") from None
        except OSError as error:
            raise DataError(f"the shard cannot be opened: {error.strerror}") from None
        self._files[shard] = file, os.fstat(file.fileno()).st_size
        if len(self._files) > _OPEN_SHARDS:
            self._files.popitem(last=False)[1][0].close()
        return self._files[shard]

    def _path(self, shard: int) -> Path:
        """The shard on this machine; a copy of an object store's is made if need be, and compared with the manifest."""
        index, name = self.index, self.index.split.shard_names[shard]
        if not is_remote(index.location):
            return index.folder / name
        try:
            return open_cached(index.location, name, check=lambda copy: self._compare(shard, copy))
        except RemoteError as error:
            raise DataError(str(error)) from None

    def _compare(self, shard: int, path: Path) -> None:
        """Raises DataError where a sample is not the manifest's."""
        view = self.index.split
        length = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for sample in range(int(view.firsts[shard]), int(view.firsts[shard + 1])):
                row = view.row(sample)
                end = row.offset + row.bytes
                if end > length:
                    raise DataError(f"the shard is cut off: it has {length} bytes, the sample ends at byte {end}")
                digest = hashlib.sha256()
                for part in _members(file, row, only=None).values():
                    data = bytearray(part.stop - part.start)
                    _read(file, part.start, memoryview(data))
                    digest.update(data)
                if digest.hexdigest() != row.sha256:
                    raise DataError(f"sample {row.key!r} has another sha256 than in the manifest")


def _members(file: BinaryIO, row: SampleRow, *, only: str | None) -> dict[str, slice]:
    """The bytes of a shard that are a sample's files, by suffix; with `only` that one, and none after it is touched."""
    position, end = row.offset, row.offset + row.bytes
    block, found = bytearray(BLOCK), {}
    while position < end and only not in found:
        _read(file, position, memoryview(block))
        name, size = read_header(block)
        position += BLOCK
        key, _, suffix = name.partition(".")
        if key != row.key:
            raise DataError(f"its place in the tar holds {name!r}")
        if position + size > end:
            raise DataError(f"{name!r} is longer in the tar than in the manifest")
        if only in (None, suffix):
            found[suffix] = slice(position, position + size)
        position += -(-size // BLOCK) * BLOCK
    return found


def _read(file: BinaryIO, position: int, out: memoryview) -> None:
    """Fills some memory with the bytes of a file from a position on."""
    try:
        while out:
            done = os.preadv(file.fileno(), [out], position)
            if not done:
                raise DataError(f"the shard is cut off: it ends at byte {position}")
            position, out = position + done, out[done:]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from None


def index_split(shard_set: ShardSet, view: SplitView, *, on_error: OnError, checksums: bool = False) -> SampleIndex:
    """Gathers what readers need of a split; no shard is touched.

    Args:
        shard_set: the data set.
        view: one of its splits.
        on_error: what damage does.
        checksums: compare samples that are read whole with the manifest's sha256.
    """
    return SampleIndex(
        folder=shard_set.folder,
        location=shard_set.location,
        split=view,
        compare=checksums,
        on_error=on_error,
        advice=(
            f"find all damage with `{shard_set.verify_command}`, "
            f"make the data set anew with `{shard_set.repair_command}`"
        ),
    )
