"""Single samples of a split, read from their tars at the manifest's byte offsets, checked and decoded.

WebDataset's own tar reader starts at the first sample of a shard, reads masks that nobody asked for, and drops the rest
of a shard after an error. Reading by offset costs a damaged sample alone, and touches no file but those asked for.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from slrnet.data.manifest import DataError, ShardSet, SplitView
from slrnet.data.remote import RemoteError, is_remote, open_cached
from slrnet.data.transforms import decode_image, decode_mask

__all__ = ["OnError", "SampleIndex", "ShardFiles", "SkippedSample", "index_split"]

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


@dataclass(frozen=True, kw_only=True)
class SampleIndex:
    """What readers need of a split's manifest, in arrays; samples 0 to n - 1 are counted in the manifest's order.

    Attributes:
        folder: that holds the shards, or the copies of those in an object store.
        location: of the data set; another than the folder where that holds copies.
        shards: (S) file names in the order of the manifest.
        firsts: (S + 1,) first sample of each shard; the last entry is n.
        offsets: (n,) byte in its shard at which a sample starts.
        sizes: (n,) bytes that it takes there.
        image_sizes: (n, 2) width and height, pixels.
        has_masks: (n,) whether it comes with a mask.
        has_image_labels: (n,) whether its image labels are known.
        keys: (n) names.
        checksums: (n) hex sha256 over a sample's files; None where nothing is to be compared with them.
        compare: samples that are read whole are compared with them.
        labels: the split, for its image labels.
        on_error: what damage does.
        advice: the commands that find and repair damage.
    """

    folder: Path
    location: str
    shards: tuple[str, ...]
    firsts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    image_sizes: npt.NDArray[np.int32]
    has_masks: npt.NDArray[np.bool_]
    has_image_labels: npt.NDArray[np.bool_]
    keys: pa.StringArray
    checksums: pa.StringArray | None
    compare: bool
    labels: SplitView
    on_error: OnError
    advice: str

    def key(self, sample: int) -> str:
        """Name of a sample."""
        return str(self.keys[sample].as_py())

    def shard_of(self, sample: int) -> int:
        """Place in `shards` of the shard that holds a sample."""
        return int(np.searchsorted(self.firsts, sample, side="right")) - 1

    def image_labels(self, sample: int) -> Tensor:
        """Image labels of a sample: (K-1,) float32 of 0 and 1, from the manifest."""
        return torch.from_numpy(self.labels.image_labels(np.array([sample])))[0]

    def no_image_labels(self) -> Tensor:
        """(K-1,) float32 of 0, for a sample whose image labels are not known or not granted."""
        return torch.zeros(self.labels.num_classes - 1)

    def damage(self, sample: int, error: DataError) -> SkippedSample:
        """Describes a damaged sample where those are skipped.

        Raises:
            DataError: they are not: what is wrong where, and what to do.
        """
        if self.on_error == "skip":
            return SkippedSample(self.shards[self.shard_of(sample)], self.key(sample), str(error))
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

    def decode(self, sample: int, files: dict[str, bytes]) -> Tensor:
        """Decodes a sample's image to (3, H, W) uint8.

        Raises:
            DataError: it cannot be decoded, or has another size than in the manifest.
        """
        image = decode_image(files["jpg"])
        width, height = self.image_sizes[sample].tolist()
        if image.shape != (3, height, width):
            found = f"{image.shape[2]} x {image.shape[1]}"
            raise DataError(f"the image has {found} pixels, the manifest says {width} x {height}")
        return image

    def decode_mask(self, files: dict[str, bytes], image: Tensor) -> Tensor | None:
        """Decodes the mask among a sample's files, if there is one, to (H, W) uint8.

        Raises:
            DataError: it cannot be decoded, or has another size than the image.
        """
        if "png" not in files:
            return None
        mask = decode_mask(files["png"])
        if mask.shape != image.shape[-2:]:
            raise DataError(f"the mask has shape {tuple(mask.shape)}, the image {tuple(image.shape[-2:])}")
        return mask

    def _described(self, sample: int, error: DataError) -> DataError:
        path = self.folder / self.shards[self.shard_of(sample)]
        return DataError(f"shard {path}: sample {self.key(sample)!r}: {error}; {self.advice}")


class ShardFiles:
    """Reads samples from their tars at the manifest's byte offsets; keeps the shards last used open."""

    def __init__(self, index: SampleIndex) -> None:
        self.index = index
        self._files: OrderedDict[int, tuple[BinaryIO, int]] = OrderedDict()

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file, _length in self._files.values():
            file.close()

    def read(self, sample: int, *, masks: bool) -> dict[str, bytes]:
        """The sample's files by suffix: `jpg` alone, or with `masks` all of them, compared with the sha256.

        Raises:
            DataError: what is missing or damaged; neither the sample nor its shard is named.
        """
        index = self.index
        file, length = self._open(index.shard_of(sample))
        start = int(index.offsets[sample])
        end = start + int(index.sizes[sample])
        if end > length:
            raise DataError(f"the shard is cut off: it has {length} bytes, the sample ends at byte {end}")
        try:
            found = dict(_members(file, start, end, key=index.key(sample), only=None if masks else "jpg"))
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from None
        if "jpg" not in found:
            raise DataError("its image is missing from the tar")
        if masks and index.compare and index.checksums is not None:
            digest = hashlib.sha256(b"".join(found.values())).hexdigest()
            if digest != index.checksums[sample].as_py():
                raise DataError(f"its files have the sha256 {digest[:12]}..., not that of the manifest")
        return found

    def load(self, sample: int) -> tuple[dict[str, bytes], Tensor, Tensor | None]:
        """The sample's files, compared with the sha256, its image (3, H, W) and its mask (H, W), where it has one.

        Raises:
            DataError: what is missing or damaged in which sample of which shard, and what to do.
        """
        with self.index.naming(sample):
            files = self.read(sample, masks=True)
            image = self.index.decode(sample, files)
            return files, image, self.index.decode_mask(files, image)

    def _open(self, shard: int) -> tuple[BinaryIO, int]:
        """The shard's file and its length."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            file = self._path(shard).open("rb")
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
        index, name = self.index, self.index.shards[shard]
        if not is_remote(index.location):
            return index.folder / name
        try:
            return open_cached(index.location, name, check=lambda copy: self._compare(shard, copy))
        except RemoteError as error:
            raise DataError(str(error)) from None

    def _compare(self, shard: int, path: Path) -> None:
        """Raises DataError where a sample is not the manifest's."""
        index = self.index
        length = path.stat().st_size
        with path.open("rb") as file:
            for sample in range(int(index.firsts[shard]), int(index.firsts[shard + 1])):
                start = int(index.offsets[sample])
                end = start + int(index.sizes[sample])
                if end > length:
                    raise DataError(f"the shard is cut off: it has {length} bytes, the sample ends at byte {end}")
                digest = hashlib.sha256()
                for _, data in _members(file, start, end, key=index.key(sample), only=None):
                    digest.update(data)
                if index.checksums is not None and digest.hexdigest() != index.checksums[sample].as_py():
                    raise DataError(f"sample {index.key(sample)!r} has another sha256 than in the manifest")


def _members(file: BinaryIO, start: int, end: int, *, key: str, only: str | None) -> Iterator[tuple[str, bytes]]:
    """Suffix and bytes of a sample's files; with `only` the one of that suffix, and none after it is touched."""
    position = start
    while position < end:
        file.seek(position)
        header = _header(file.read(tarfile.BLOCKSIZE))
        name, _, suffix = header.name.partition(".")
        if not header.isreg() or name != key:
            raise DataError(f"its place in the tar holds {header.name!r}")
        if position + tarfile.BLOCKSIZE + header.size > end:
            raise DataError(f"{header.name!r} is longer in the tar than in the manifest")
        if only is None or suffix == only:
            yield suffix, file.read(header.size)
            if only is not None:
                return
        position += tarfile.BLOCKSIZE + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise DataError(f"no tar header is where the manifest says ({error})") from None


def index_split(shard_set: ShardSet, view: SplitView, *, on_error: OnError, checksums: bool = False) -> SampleIndex:
    """Gathers what readers need of a split; no shard is touched.

    Args:
        shard_set: the data set.
        view: one of its splits.
        on_error: what damage does.
        checksums: compare samples that are read whole with the manifest's sha256.
    """
    entries = view.shards
    labels = view.table.select(["shard", "offset", "classes"])
    return SampleIndex(
        folder=shard_set.folder,
        location=shard_set.location,
        shards=tuple(entry.name for entry in entries),
        firsts=np.array([*(entry.first for entry in entries), view.num_samples], dtype=np.int64),
        offsets=np.concatenate([entry.offsets for entry in entries]),
        sizes=np.concatenate([entry.sizes for entry in entries]),
        image_sizes=view.sizes,
        has_masks=view.has_masks,
        has_image_labels=view.has_image_labels,
        keys=view.keys,
        checksums=view.table["sha256"].combine_chunks() if checksums or is_remote(shard_set.location) else None,
        compare=checksums,
        labels=SplitView(view.name, table=labels, folder=view.folder, num_classes=view.num_classes),
        on_error=on_error,
        advice=(
            f"find all damage with `{shard_set.verify_command}`, "
            f"make the data set anew with `{shard_set.repair_command}`"
        ),
    )
