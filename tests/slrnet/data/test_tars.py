"""Tar headers: what is read is what tarfile reads, and damage is noticed."""

from __future__ import annotations

import tarfile

import pytest

from slrnet.data.manifest import DataError
from slrnet.data.tars import BLOCK, read_header, tar_members


@pytest.mark.parametrize(
    "name", ["a.jpg", "ä ö.png", "x" * 96 + ".jpg", "folder/" * 14 + "long.json", "in\udcffvalid.jpg"]
)
@pytest.mark.parametrize("size", [0, 1, 12345])
def test_what_is_written_is_read(name: str, size: int) -> None:
    block = bytearray(tar_members({name: bytes(size)})[:BLOCK])
    assert read_header(block) == (name, size)
    found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    assert (found.name, found.size) == (name, size)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_are_read(form: int) -> None:
    header = tarfile.TarInfo("image.jpg")
    header.size, header.mtime, header.uname = 777, 1_700_000_000, "somebody"
    assert read_header(bytearray(header.tobuf(form)[:BLOCK])) == ("image.jpg", 777)


def test_every_changed_byte_is_noticed() -> None:
    """Within the sum itself another digit or other filling may mean the same."""
    whole = tar_members({"a.jpg": bytes(9)})[:BLOCK]
    for place in (*range(148), *range(156, BLOCK)):
        block = bytearray(whole)
        block[place] ^= 0x40
        with pytest.raises(DataError, match="no tar header is where the manifest says"):
            read_header(block)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_what_is_no_file_is_refused(kind: bytes) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.type = kind
    with pytest.raises(DataError, match="no tar header is where the manifest says"):
        read_header(bytearray(header.tobuf(tarfile.USTAR_FORMAT)))


@pytest.mark.parametrize("block", [bytes(BLOCK), b"\xff" * BLOCK, b"text" * (BLOCK // 4)])
def test_other_bytes_are_refused(block: bytes) -> None:
    with pytest.raises(DataError, match="no tar header is where the manifest says"):
        read_header(bytearray(block))
