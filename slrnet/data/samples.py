"""Single samples of a split, read from their tars at the manifest's byte offsets, checked and decoded.

WebDataset's own tar reader starts at the first sample of a shard, reads masks that nobody asked for, and drops the rest
of a shard after an error. Reading by offset costs a damaged sample alone, and touches no file but those asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slrnet.data.manifest import DataError, SampleRow, ShardSet, SplitView
from slrnet.data.tars import BLOCK, read_header
from slrnet.data.transforms import decode_image, decode_mask
from slrnet.storage.files import open_regular
from slrnet.storage.remote import RemoteError

__all__ = ["LocatedSample", "OnError", "SampleIndex", "ShardFiles", "SkippedSample"]

_OPEN_SHARDS = 128
"""Shards that a reader keeps open: more than the shuffling reaches at a time with shards of common size."""

OnError = Literal["stop", "skip"]
"""What a damaged or missing sample does: stop the run, or be skipped, counted and reported."""


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """A sample that could not be read: the file name of its tar, its key, and what is wrong."""

    shard: str
    key: str
    reason: str


class LocatedSample(NamedTuple):
    """Where a sample's files lie in its shard."""

    sample: int
    """Index within the split."""
    row: SampleRow
    """What the manifest says about it."""
    shard: int
    """Place of its shard among those of the split."""
    files: dict[str, slice]
    """Bytes of each wanted file in the shard, by suffix and in the order of the tar."""


@dataclass(frozen=True, kw_only=True)
class SampleIndex:
    """What readers know about a split. Making one touches no shard."""

    shard_set: ShardSet
    split: SplitView
    on_error: OnError = "stop"

    @property
    def advice(self) -> str:
        """The commands that find and repair damage."""
        verify, repair = self.shard_set.verify_command, self.shard_set.repair_command
        return f"find all damage with `{verify}`, rebuild the data set with `{repair}`"

    def image_labels(self, rows: Sequence[SampleRow | None]) -> Tensor:
        """Image labels of n samples, (n, K-1) float32 of 0 and 1; a None, whose labels stay unread, gives 0."""
        labels = np.zeros((len(rows), self.split.num_classes - 1), dtype=np.float32)
        for place, row in enumerate(rows):
            for label in row.classes if row else ():
                labels[place, label - 1] = 1.0
        return torch.from_numpy(labels)

    def damage(self, sample: int, error: DataError) -> SkippedSample:
        """Describes a damaged sample; raises a `DataError` with place and remedy unless damaged samples are skipped."""
        if self.on_error == "skip":
            return SkippedSample(self._shard_name(sample), self.split.key(sample), str(error))
        raise self._described(sample, error) from None

    @contextmanager
    def naming(self, sample: int) -> Iterator[None]:
        """Adds sample, shard and remedy to the message of a `DataError` that is raised within."""
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
            size = f"{'about ' * (reduction > 1)}{image.shape[2] * reduction} x {image.shape[1] * reduction}"
            raise DataError(f"the image has {size} pixels, the manifest says {row.width} x {row.height}")
        return image

    def decode_mask(self, row: SampleRow, files: Mapping[str, bytes | memoryview]) -> Tensor | None:
        """Decodes the mask among a sample's files, if there is one, to (H, W) uint8; raises like `decode`."""
        if "png" not in files:
            return None
        mask = decode_mask(files["png"])
        if mask.shape != (row.height, row.width):
            raise DataError(f"the mask has shape {tuple(mask.shape)}, the image {(row.height, row.width)}")
        # Void, 255, becomes 0.
        if (highest := int((mask + 1).amax())) > (count := self.split.num_classes):
            raise DataError(f"the mask has the id {highest - 1}; allowed are 0 to {count - 1}, and 255 for void")
        return mask

    def _described(self, sample: int, error: DataError) -> DataError:
        path = self.shard_set.folder / self._shard_name(sample)
        return DataError(f"shard {path}: sample {self.split.key(sample)!r}: {error}; {self.advice}")

    def _shard_name(self, sample: int) -> str:
        return self.split.shard_names[self.split.shard_of(sample)]


class ShardFiles(AbstractContextManager["ShardFiles"]):
    """Reads samples from their tars at the manifest's byte offsets; keeps the shards last used open.

    A method raises `DataError` where something is missing or damaged. The message names neither the sample nor its
    shard: `SampleIndex.naming` adds them.
    """

    def __init__(self, index: SampleIndex) -> None:
        self.index = index
        self._files: OrderedDict[int, tuple[BinaryIO, int]] = OrderedDict()
        self._memory = memoryview(b"")

    def __exit__(self, *_: object) -> None:
        for file, _length in self._files.values():
            file.close()

    def locate(self, sample: int, *, masks: bool) -> LocatedSample:
        """Looks up where the sample's image lies, or with `masks` all of its files; no other file is touched."""
        row, shard = self.index.split.row(sample), self.index.split.shard_of(sample)
        files = _locate_files(*self._open(shard), row, only=None if masks else "jpg")
        if "jpg" not in files:
            raise DataError("its image is missing from the tar")
        return LocatedSample(sample, row, shard, files)

    def contents(self, located: LocatedSample) -> dict[str, memoryview]:
        """The bytes of a sample's files by suffix; valid until the next call, which writes to the same memory."""
        file, _ = self._open(located.shard)
        parts = list(located.files.values())
        begin, size = parts[0].start, parts[-1].stop - parts[0].start
        if len(self._memory) < size:
            self._memory = memoryview(bytearray(size))
        _read(file, begin, self._memory[:size])
        return {suffix: self._memory[part.start - begin : part.stop - begin] for suffix, part in located.files.items()}

    def read(self, sample: int) -> dict[str, bytes]:
        """All of the sample's files by suffix, compared with the manifest's sha256."""
        located = self.locate(sample, masks=True)
        files = {suffix: bytes(content) for suffix, content in self.contents(located).items()}
        digest = hashlib.sha256(b"".join(files.values())).hexdigest()
        if digest != located.row.sha256:
            raise DataError(f"its files have the sha256 {digest[:12]}..., not that of the manifest")
        return files

    def _open(self, shard: int) -> tuple[BinaryIO, int]:
        """The shard's file, unbuffered, and its length in bytes."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        name = self.index.split.shard_names[shard]
        try:
            path = self.index.shard_set.path_of(name, check=lambda copy: self._compare(shard, copy))
            file = open_regular(path)
        except RemoteError as error:
            raise DataError(str(error)) from None
        except FileNotFoundError:
            raise DataError("the shard is missing") from None
        except OSError as error:
            raise DataError(f"the shard cannot be opened: {error.strerror}") from None
        self._files[shard] = file, os.fstat(file.fileno()).st_size
        if len(self._files) > _OPEN_SHARDS:
            self._files.popitem(last=False)[1][0].close()
        return self._files[shard]

    def _compare(self, shard: int, path: Path) -> None:
        """Raises DataError if a sample differs from the manifest's."""
        split = self.index.split
        length = path.stat().st_size
        with open_regular(path) as file:
            for row in map(split.row, split.samples_of(shard)):
                digest = hashlib.sha256()
                for part in _locate_files(file, length, row, only=None).values():
                    data = bytearray(part.stop - part.start)
                    _read(file, part.start, memoryview(data))
                    digest.update(data)
                if digest.hexdigest() != row.sha256:
                    raise DataError(f"sample {row.key!r} has another sha256 than in the manifest")


def _locate_files(file: BinaryIO, length: int, row: SampleRow, *, only: str | None) -> dict[str, slice]:
    """The bytes of a sample's files in its shard, by suffix; with `only` that file alone.

    All headers are read: of two files of a name, the checksum is that of one, and the training could take the other.
    """
    position, end = row.offset, row.offset + row.bytes
    if end > length:
        raise DataError(f"the shard is cut off: it has {length} bytes, the sample ends at byte {end}")
    block, files = bytearray(BLOCK), {}
    while position < end:
        _read(file, position, memoryview(block))
        name, size = read_header(block)
        position += BLOCK
        key, _, suffix = name.partition(".")
        if key != row.key:
            raise DataError(f"its place in the tar holds {name!r}")
        if position + size > end:
            raise DataError(f"{name!r} is longer in the tar than in the manifest")
        if suffix in files:
            raise DataError(f"{name!r} is twice in its place in the tar")
        files[suffix] = slice(position, position + size)
        position += -(-size // BLOCK) * BLOCK
    return files if only is None else {suffix: part for suffix, part in files.items() if suffix == only}


def _read(file: BinaryIO, position: int, out: memoryview) -> None:
    """Fills `out` with the bytes of a file from a position on."""
    try:
        while out:
            done = os.preadv(file.fileno(), [out], position)
            if not done:
                raise DataError(f"the shard is cut off: it ends at byte {position}")
            position, out = position + done, out[done:]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from None
