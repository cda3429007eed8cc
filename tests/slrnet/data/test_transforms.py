"""Decoding of all kinds of JPEG, the distribution of crops, and images against their masks."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from slrnet.data import transforms
from slrnet.data.counter_random import key_of, random_bits
from slrnet.data.manifest import DataError
from slrnet.data.transforms import ASPECT_RATIOS, Crop, crop_mask, decode_image, decode_mask, draw_crops
from tests.fixtures.crops import crop_image


def _picture(width: int = 40, height: int = 24) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x + 60], axis=-1).astype(np.uint8))


def _bytes(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def _pil(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_jpeg_becomes_rgb(mode: str) -> None:
    data = _bytes(_picture().convert(mode), "JPEG")
    image = decode_image(data)
    assert image.shape == (3, 24, 40)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(image.int(), _pil(data).int(), atol=2, rtol=0.0)


@pytest.mark.parametrize("data", [b"", b"no picture", _bytes(_picture(), "JPEG")[:-100], _bytes(_picture(), "PNG")])
def test_what_is_no_complete_jpeg_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="the image (is empty|cannot be decoded as JPEG: [A-Z])") as caught:
        decode_image(data)
    assert "/" not in str(caught.value), "no source files of libraries in messages"


def test_masks_give_ids_not_colours() -> None:
    ids = np.array([[0, 1, 255], [7, 1, 0]], dtype=np.uint8)
    indexed = Image.fromarray(ids, "P")
    indexed.putpalette([200, 100, 50] * 256)
    for image in (indexed, Image.fromarray(ids, "L")):
        assert torch.equal(decode_mask(_bytes(image, "PNG")), torch.from_numpy(ids))


def test_masks_of_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match=r"mode RGB; allowed are indexed \(P\)"):
        decode_mask(_bytes(_picture(), "PNG"))
    with pytest.raises(DataError, match="the mask cannot be read"):
        decode_mask(b"garbage")
    with pytest.raises(DataError, match="the mask cannot be read"):
        decode_mask(_bytes(Image.fromarray(np.zeros((90, 90), dtype=np.uint8)), "PNG")[:60])


def _crops(sizes: list[tuple[int, int]], key: np.uint64, *, size: int = 9, **options: Any) -> list[Crop]:
    return draw_crops(sizes, size=size, keys=random_bits(key, np.arange(len(sizes))), **options)


def test_crops_cover_the_wanted_share_of_the_image() -> None:
    crops = _crops([(300, 400)] * 2000, key_of(0), scale=(0.3, 0.6), flip=0.25)
    shares = [crop.height * crop.width / (300 * 400) for crop in crops]
    assert 0.295 < min(shares) < 0.31
    assert 0.59 < max(shares) < 0.605
    assert abs(np.mean(shares) - 0.45) < 0.01, "the area is uniform"
    ratios = [math.log(crop.width / crop.height) for crop in crops]
    assert math.log(ASPECT_RATIOS[0]) - 0.02 < min(ratios) < -0.25
    assert 0.25 < max(ratios) < math.log(ASPECT_RATIOS[1]) + 0.02
    assert abs(np.mean(ratios)) < 0.02, "the ratio is log-uniform around 1"
    assert all(0 <= crop.top <= 300 - crop.height and 0 <= crop.left <= 400 - crop.width for crop in crops)
    assert min(crop.top for crop in crops) == 0
    assert abs(np.mean([crop.mirrored for crop in crops]) - 0.25) < 0.04


def test_a_crop_follows_from_its_key_and_size_alone() -> None:
    keys = random_bits(key_of(1), np.array([1, 1, 2, 1]))
    sizes = [(30, 40), (30, 40), (30, 40), (300, 400)]
    crops = draw_crops(sizes, size=9, scale=(0.2, 1.0), flip=0.5, keys=keys)
    assert crops[0] == crops[1] != crops[2]
    assert crops[0].mirrored == crops[3].mirrored
    alone = [
        draw_crops([size], size=9, scale=(0.2, 1.0), flip=0.5, keys=key)
        for size, key in zip(sizes, keys[:, None], strict=True)
    ]
    assert [crop for (crop,) in alone] == crops


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_box_fits_the_central_one_is_taken(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    """The whole area of images that are longer than any box."""
    for crop in _crops([(height, width)] * 9, key_of(2), scale=(1.0, 1.0), flip=0.0):
        assert crop == (*box, False, 1)


def test_boxes_lie_within_their_images() -> None:
    """Also in images of a few pixels, where rounding decides what fits."""
    sizes = [(height, width) for height in range(1, 20) for width in range(1, 20)]
    for seed in range(5):
        crops = _crops(sizes, key_of(seed), scale=(0.05, 1.0), flip=1.0)
        for (height, width), crop in zip(sizes, crops, strict=True):
            assert 0 <= crop.top <= height - crop.height < height
            assert 0 <= crop.left <= width - crop.width < width
            assert crop.mirrored


def test_cropping_without_resizing_copies_the_box() -> None:
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
    crop = Crop(top=1, left=2, height=4, width=4, mirrored=False)
    assert torch.equal(crop_image(image, crop, size=4), image[:, 1:5, 2:6])
    assert torch.equal(crop_mask(image[0], crop, size=4), image[0, 1:5, 2:6])
    mirrored = Crop(1, 2, 4, 4, mirrored=True)
    assert torch.equal(crop_image(image, mirrored, size=4), image[:, 1:5, 2:6].flip(-1))
    assert torch.equal(crop_mask(image[0], mirrored, size=4), image[0, 1:5, 2:6].flip(-1))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [20, 90])
def test_crops_are_those_of_pillow(mode: Any, size: int) -> None:
    """Smaller and larger than their box of 35 x 50 pixels; the two filters differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    found = crop_image(image, Crop(3, 4, 35, 50, mirrored=False), size=size, mode=mode)
    box = Image.fromarray(pixels).crop((4, 3, 54, 38)).resize((size, size), Image.Resampling[mode.upper()])
    expected = torch.from_numpy(np.array(box)).permute(2, 0, 1)
    torch.testing.assert_close(found.int(), expected.int(), atol=1, rtol=0.0)
    other = crop_image(image, Crop(3, 4, 35, 50, mirrored=False), size=size)
    assert torch.equal(found, other) == (mode == "bilinear")


@pytest.mark.parametrize("mirrored", [False, True])
def test_mask_and_image_stay_aligned(mirrored: bool) -> None:
    """A picture of two flat halves and its mask: away from the edge, each pixel keeps the id of its colour."""
    image = torch.zeros(3, 50, 61, dtype=torch.uint8)
    image[:, :, 20:] = 200
    mask = torch.zeros(50, 61, dtype=torch.uint8)
    mask[:, 20:] = 5
    crop = Crop(3, 4, 40, 50, mirrored)
    pixels, ids = crop_image(image, crop, size=33)[0], crop_mask(mask, crop, size=33)
    assert sorted(ids.unique().tolist()) == [0, 5], "ids are never mixed"
    sure = (pixels == 0) | (pixels == 200)
    assert sure.float().mean() > 0.9
    assert torch.equal(ids[sure] == 5, pixels[sure] == 200)
    assert bool(ids[0, 0] == 5) is mirrored


@pytest.mark.parametrize(
    ("size", "sides", "reduction"),
    [
        (321, (3000, 4000), 8),
        (321, (1500, 2000), 4),
        (321, (960, 1280), 2),
        (321, (960, 1000), 1),
        (64, (960, 1280), 8),
    ],
)
def test_a_large_photograph_is_decoded_as_small_as_its_crop_allows(
    size: int, sides: tuple[int, int], reduction: int
) -> None:
    """By the whole range of boxes; 960 x 1000 pixels are too few for it to pay."""
    crops = _crops([sides] * 300, key_of(3), size=size, scale=(0.3, 1.0), flip=0.5)
    assert max(crop.reduction for crop in crops) == reduction
    for crop in crops:
        assert all(side % crop.reduction == 0 for side in crop[:4])
        assert 0 <= crop.top <= sides[0] - crop.height
        assert 0 <= crop.left <= sides[1] - crop.width
        shorter = min(crop.height, crop.width)
        assert shorter >= crop.reduction * size or crop.reduction == 1
        assert shorter < 2 * crop.reduction * size or crop.reduction in (reduction, 8)


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (61, 43)])
def test_a_reduced_image_has_the_means_of_its_pixels(mode: str, width: int, height: int, reduction: int) -> None:
    data = _bytes(_picture(width, height).convert(mode), "JPEG")
    small, whole = decode_image(data, reduction), decode_image(data)
    assert small.dtype == torch.uint8
    means = avg_pool2d(whole.float(), reduction, ceil_mode=True)
    assert small.shape == means.shape
    inside = (slice(None), slice(height // reduction), slice(width // reduction))  # beyond, blocks are cut off
    torch.testing.assert_close(small[inside].float(), means[inside], atol=4, rtol=0.0)


@pytest.mark.parametrize("reduction", [2, 4])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_crop_of_a_reduced_image_is_that_of_the_whole_one(mirrored: bool, reduction: int) -> None:
    """A pixel's shift of either would change a value by 4 times as much, and its mask is cut from the whole one."""
    data = _bytes(_picture(160, 120), "JPEG")
    crop = Crop(16, 24, 96, 80, mirrored, reduction)
    small = crop_image(decode_image(data, reduction), crop, size=20)
    whole = crop_image(decode_image(data), crop._replace(reduction=1), size=20)
    shifted = crop_image(decode_image(data), crop._replace(reduction=1, left=24 + 4), size=20)
    assert (small.float() - whole.float()).abs().mean() < 1
    assert (small[0].float() - shifted[0].float()).abs().mean() > 4
    mask = torch.arange(120, dtype=torch.uint8)[:, None].expand(120, 160)
    assert torch.equal(crop_mask(mask, crop, size=20), crop_mask(mask, crop._replace(reduction=1), size=20))


@pytest.mark.parametrize("data", [b"no picture", _bytes(_picture(), "JPEG")[:-100], _bytes(_picture(), "PNG")])
def test_what_is_no_complete_jpeg_is_not_reduced_either(data: bytes) -> None:
    with pytest.raises(DataError, match="the image cannot be read"):
        decode_image(data, 2)


def _png_that_claims(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header promises a large image of zeros."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    header = struct.pack(">II", width, height) + bytes(data[24:29])
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(2**16, 2**16), (2**31 - 1, 2**31 - 1), (14_000, 14_000)])
def test_a_small_file_that_claims_a_huge_mask_is_refused_undecoded(width: int, height: int) -> None:
    with pytest.raises(DataError, match=r"pixels|sequence"):
        decode_mask(_png_that_claims(width, height))


@pytest.mark.parametrize("fill", [b"", b"\xff\xff\xff", b"\x00\x01"])
def test_a_small_progressive_image_of_many_pixels_is_refused_undecoded(
    monkeypatch: pytest.MonkeyPatch, fill: bytes
) -> None:
    """A scan may say in a few bytes that all blocks are empty; fill and stray bytes before a marker are legal."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xc0" * 30)
    data = file.getvalue()
    place = data.index(b"\xff\xc2", 80)
    claim = data[: place + 5] + struct.pack(">HH", 30_000, 30_000) + data[place + 9 :]
    monkeypatch.setattr(transforms, "_decode_jpeg", lambda *arguments, **named: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="30000 x 30000 pixels; at most 178,000,000 are read"):
        decode_image(claim[:place] + fill + claim[place:])


def test_a_file_that_claims_a_huge_image_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    data = file.getvalue()
    place = data.index(b"\xff\xc0") + 5  # height and width in the frame's header
    monkeypatch.setattr(transforms, "_decode_jpeg", lambda *arguments, **named: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="pixels"):
        decode_image(data[:place] + struct.pack(">HH", 65500, 65500) + data[place + 4 :] + b"\0" * 200_000)
