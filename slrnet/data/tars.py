"""Tar shards as bytes: nothing in them depends on the machine, the user or the time, so equal samples give equal files.

A sample is KEY.jpg, KEY.png (indexed mask, where there is one) and KEY.json, in this order.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from slrnet.data.manifest import SCHEMA, DataError

__all__ = ["BLOCK", "ShardWriter", "read_header", "tar_end", "tar_members"]

BLOCK = tarfile.BLOCKSIZE
"""Bytes of a header; files are padded to a multiple of it."""
_FILL = b" \0"
_REGULAR = tarfile.REGTYPE + tarfile.AREGTYPE


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes samples into an empty tar file, ended on exit; gathers their rows of the manifest, where it has `name`."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.columns: dict[str, list[Any]] = {column: [] for column in SCHEMA.names}
        """The values of all rows so far, by the names of `SCHEMA`."""

    def __exit__(self, _: object, error: object, __: object) -> None:
        if error is None:
            self._file.write(tar_end(self._file.tell()))

    def add(
        self,
        *,
        key: str,
        split: str,
        subsets: Sequence[str],
        size: tuple[int, int],
        classes: Sequence[int] | None,
        image: bytes,
        mask: bytes | None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds a sample.

        Args:
            key: the sample's name.
            split: the split that it belongs to.
            subsets: the named subsets that it belongs to.
            size: (width, height) of the image, pixels.
            classes: foreground ids that are present, the image labels; None if they are not known.
            image: bytes of a JPEG file.
            mask: bytes of an indexed PNG file; None if there is no mask.
            notes: further entries of its JSON file.
        """
        names = None if classes is None else list(classes)
        record: dict[str, Any] = {"key": key, "classes": names, "subsets": sorted(subsets)}
        record |= {"width": size[0], "height": size[1], **(notes or {})}
        files = {f"{key}.jpg": image, **({} if mask is None else {f"{key}.png": mask})}
        files[f"{key}.json"] = json.dumps(record).encode()
        data = tar_members(files)
        row = record | {
            "classes": list(classes or ()),
            "has_image_labels": classes is not None,
            "split": split,
            "shard": self._name,
            "offset": self._file.tell(),
            "has_mask": mask is not None,
            "bytes": len(data),
            "sha256": hashlib.sha256(b"".join(files.values())).hexdigest(),
        }
        self._file.write(data)
        for name, values in self.columns.items():
            values.append(row[name])


def tar_members(files: Mapping[str, bytes]) -> bytes:
    """Headers and padded contents of files by name, in ustar format."""
    parts = []
    for name, data in files.items():
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = len(data), 0o644, 0
        parts += [header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]
    return b"".join(parts)


def read_header(block: bytearray) -> tuple[str, int]:
    """Name and length of the file whose header a block of 512 bytes is; a sixth of the time of tarfile's own parsing.

    Raises:
        DataError: it is no header, one that is damaged, or one of something else than a file of less than 8 GiB.
    """
    try:
        size, checksum = int(block[124:136].strip(_FILL), 8), int(block[148:156].strip(_FILL), 8)
    except ValueError:
        raise DataError("no tar header is where the manifest says") from None
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum or block[156] not in _REGULAR:
        raise DataError("no tar header is where the manifest says")
    name = block[:100].partition(b"\0")[0]
    if block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size


def tar_end(size: int) -> bytes:
    """What follows the last member of a tar of `size` bytes: two empty blocks, padded to a whole record."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)
