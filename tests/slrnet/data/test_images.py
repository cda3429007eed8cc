"""Opening of files that are, or claim to be, images."""

from __future__ import annotations

import os
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from slrnet.data.depth import Depth
from slrnet.data.images import (
    IMAGE_SUFFIXES,
    MOST_SCANS,
    left_out,
    open_image,
    rgb_pixels,
    sample_type,
    upright_rgb,
    upright_size,
)
from slrnet.data.manifest import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
EXACT = {"PNG": {}, "TIFF": {}, "BMP": {}, "PPM": {}, "TGA": {}, "PCX": {}, "QOI": {}} | {
    "WEBP": {"lossless": True},
    "JPEG2000": {"irreversible": False},
}
LOSSY = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def saved(path: Path, image: Image.Image | npt.NDArray[np.generic], kind: str, **options: object) -> Path:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, kind, **options)
    return path


def pixels_of(path: Path, depth: str = "") -> npt.NDArray[np.uint8]:
    with open_image(path) as image:
        return rgb_pixels(upright_rgb(image, Depth.parse(depth)))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(samples: npt.NDArray[np.generic], bits: int, color: int, *, before_end: bytes = b"") -> bytes:
    """A PNG of samples (H, W, C), which Pillow cannot write with 16 bits or with 2 and 4 bits of gray."""
    height, width, depth = samples.shape
    rows = [samples.reshape(height, width * depth).astype(">u2")[row].tobytes() for row in range(height)]
    if bits < 16:
        wide = np.unpackbits(samples.reshape(height, width * depth, 1).astype(np.uint8), axis=2)[..., 8 - bits :]
        rows = [row.tobytes() for row in np.packbits(wide.reshape(height, width * depth * bits), axis=1)]
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + before_end + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", [*EXACT, *LOSSY])
def test_every_format_is_read_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "a.tga", RGB, kind, **(EXACT | LOSSY)[kind])
    difference = np.abs(pixels_of(path).astype(int) - RGB)
    assert difference.max() == 0 if kind in EXACT else difference.mean() < 12


def test_photos_of_phones_are_read_with_the_extra(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = np.add.outer(np.arange(40), np.arange(60))[..., None].repeat(3, axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.jpg", smooth, "HEIF", quality=100, exif=exif.tobytes())
    read = pixels_of(path)
    assert read.shape == (60, 40, 3)
    assert np.abs(read.astype(int) - np.rot90(smooth, -1)).mean() < 3


def test_suffixes_are_those_of_the_formats() -> None:
    Image.init()
    known = {"JPEG", "MPO", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "PCX", "QOI", "TGA", "HEIF"}
    of_pillow = {suffix: kind for suffix, kind in Image.registered_extensions().items() if suffix in IMAGE_SUFFIXES}
    assert set(of_pillow.values()) <= known
    assert {".jpg", ".jfif", ".mpo", ".heic", ".jp2", ".avif", ".tga", ".gif"} <= IMAGE_SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg"} & IMAGE_SUFFIXES


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n",
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a" + b"\0" * 40,  # WMF
        b"\x00\x00\x01\xb3" + b"\0" * 40,  # MPEG
        b"text",
        b"\0" * 50,
    ],
)
def test_other_kinds_start_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho called > {tmp_path}/called\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jpg cannot be read: no image, or of an unknown kind"):
        pixels_of(tmp_path / "a.jpg")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "empty"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "empty": Path.touch, "device": lambda at: at.symlink_to("/dev/zero")}
    make.get(kind, lambda at: None)(path)
    reason = {"missing": "is missing", "empty": "cannot be read: it is empty"}.get(
        kind, "cannot be read: it is no regular"
    )
    with pytest.raises(DataError, match=rf"a\.png {reason}.*; replace it$"), open_image(path, remedy="replace it"):
        pass


@cache
def damaged() -> dict[str, bytes]:
    sound = png(RGB, 8, 2)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (70 << 20)))
    return {
        "header of a PPM": b"P5\n32 ",
        "short IHDR": sound[:8] + chunk(b"IHDR", sound[16:24]) + sound[33:],
        "much text": sound[:33] + text + sound[33:],
        "no pixels": png(np.zeros((0, 5, 3), dtype=np.uint8), 8, 2),
        "bad data": sound[:45] + b"\xff" * 20 + sound[65:],
        "no rows": b"P6 4000000000 4000000000 255\n",
        "TIFF without tags": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
        "QOI header": b"qoif\0\0",
    }


@pytest.mark.parametrize("name", damaged())
def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(damaged()[name])
    with pytest.raises(DataError, match=r"a\.png cannot be read: \w"):
        pixels_of(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "TGA", "AVIF", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_files_that_end_early_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    path = saved(tmp_path / "a.tga", RGB, kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"a\.tga cannot be read"):
        pixels_of(path)


def test_too_many_pixels_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", np.zeros((20, 30), dtype=np.uint8), "PNG")
    with pytest.raises(DataError, match="30 x 20 pixels; at most 599 are read"), open_image(path, max_pixels=599):
        pass
    with open_image(path, max_pixels=600) as image:
        assert image.size == (30, 20)


def test_images_beyond_the_limit_of_pillow_are_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    path = saved(tmp_path / "a.png", RGB, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert np.array_equal(pixels_of(path), RGB)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert not recwarn.list


def test_a_jpeg_of_many_scans_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", RGB, "JPEG", progressive=True)
    data = path.read_bytes()
    scan = data[data.rindex(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + scan * MOST_SCANS + b"\xff\xd9")
    with pytest.raises(DataError, match=rf"it has 1\d\d scans; at most {MOST_SCANS} are read"):
        pixels_of(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_images_are_turned_upright_in_every_format(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:8, :16], stored[8:, 16:] = (255, 0, 0), (0, 0, 255)
    turns = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.transpose(1, 0, 2)]
    turns += [lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).transpose(1, 0, 2), np.rot90]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a", stored, kind, exif=exif, **(EXACT | LOSSY)[kind])
    read, upright = pixels_of(path), turns[orientation - 1](stored)
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < 3
    with open_image(path) as image:
        assert upright_size(image) == (read.shape[1], read.shape[0])


def test_an_orientation_may_stand_in_xmp_or_after_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(png(RGB, 8, 2, before_end=late))
    assert np.array_equal(pixels_of(tmp_path / "a.png"), np.rot90(RGB, -1))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    path = saved(tmp_path / "b.webp", RGB, "WEBP", lossless=True, xmp=xmp)
    assert np.array_equal(pixels_of(path), np.rot90(RGB))


DEEP = RNG.integers(0, 4096, (6, 5, 3)).astype(np.uint16)
GRAY = DEEP[..., 0]
EIGHT = np.rint(DEEP * (255 / 4095)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_gray_is_scaled_by_the_depth(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "a", GRAY, kind)
    assert np.array_equal(pixels_of(path, "12"), EIGHT[..., :1].repeat(3, axis=2))
    with pytest.raises(DataError, match=r"a cannot be read: it has uint16 samples, here from \d+ to \d+: say which"):
        pixels_of(path)


@pytest.mark.parametrize(("color", "bands"), [(2, [0, 1, 2]), (6, [0, 1, 2]), (4, [0, 0, 0])])
def test_deep_png_colors_keep_their_bits(tmp_path: Path, color: int, bands: list[int]) -> None:
    samples = DEEP if color != 4 else DEEP[..., :1]
    if color != 2:
        samples = np.dstack([samples, np.full(GRAY.shape, 65535)])
    (tmp_path / "a.png").write_bytes(png(samples, 16, color))
    assert np.array_equal(pixels_of(tmp_path / "a.png", "12"), EIGHT[..., bands])


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_deep_tiff_colors_keep_their_bits(tmp_path: Path, compression: str | None, planes: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    samples = DEEP if planes == "contig" else np.moveaxis(DEEP, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", compression=compression, planarconfig=planes)
    assert np.array_equal(pixels_of(tmp_path / "a.tif", "12"), EIGHT)


@pytest.mark.parametrize("kind", ["int8", "int16", "uint32", "int32", "float32"])
def test_types_of_samples_are_told_apart(tmp_path: Path, kind: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.array([[0, 1, 100]], dtype=kind)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    with open_image(tmp_path / "a.tif") as image:
        assert sample_type(image) == kind
    assert pixels_of(tmp_path / "a.tif", f"{kind}=0..100")[0, :, 0].tolist() == [0, 3, 255]


def test_a_fourth_band_of_a_tiff_is_no_transparency(tmp_path: Path) -> None:
    bands = np.dstack([RGB, np.full((24, 32), 40, dtype=np.uint8)])
    path = saved(tmp_path / "a.tif", bands, "TIFF")
    assert np.array_equal(pixels_of(path), RGB)
    with open_image(path) as image:
        assert left_out(image) == "has 4 bands; the first three are taken"
    path = saved(tmp_path / "a.png", bands, "PNG")
    assert pixels_of(path).min() >= 255 - 40


def test_modes_of_print_become_rgb(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")
    assert pixels_of(path)[0, 0].tolist() == [255, 0, 0]
    path = saved(tmp_path / "b.tif", Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF")
    assert pixels_of(path).min() > 240


def test_a_tiff_of_several_pages_is_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(RGB), Image.fromarray(RGB[::-1])]
    path = saved(tmp_path / "a.tif", pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"a\.tif cannot be read: it has several pages, 2 at least; save each"):
        pixels_of(path)


def test_a_tiff_with_smaller_versions_is_read(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(RGB, photometric="rgb")
        file.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(pixels_of(tmp_path / "a.tif"), RGB)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_taken_and_said(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = saved(tmp_path / "a", first, kind, save_all=True, append_images=[second], **EXACT.get(kind, {}))
    with open_image(path) as image:
        assert left_out(image) == "is an animation; its first picture is taken"
    assert pixels_of(path)[0, 0].tolist() == [255, 0, 0]


def test_pixels_are_copied_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrnet.data.images._STRIP", 100)
    assert np.array_equal(rgb_pixels(Image.fromarray(RGB)), RGB)
