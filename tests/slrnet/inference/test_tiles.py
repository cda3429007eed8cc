"""Tiles: what they cover, weights that sum to 1, and masks without seams."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrnet.inference.tiles import fading_weights, predict_tiles, tile_starts

Image = np.ndarray[Any, np.dtype[np.uint8]]
Maps = np.ndarray[Any, np.dtype[np.float32]]


def test_tiles_along_a_side() -> None:
    assert tile_starts(90, tile=100, overlap=20) == (0,)
    assert tile_starts(100, tile=100, overlap=20) == (0,)
    assert tile_starts(101, tile=100, overlap=20) == (0, 1)
    assert tile_starts(260, tile=100, overlap=20) == (0, 80, 160)
    assert tile_starts(8000, tile=768, overlap=192)[-1] == 8000 - 768


@given(st.integers(1, 400), st.integers(2, 90), st.data())
def test_tiles_cover_a_side_and_overlap_enough(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile // 2))
    starts = tile_starts(length, tile=tile, overlap=overlap)
    assert starts[0] == 0
    assert starts[-1] + min(tile, length) == length
    assert all(0 < after - before <= tile - overlap for before, after in pairwise(starts))
    weights = fading_weights(length, starts, tile=tile)
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        assert (weight > 0).all()
        total[start : start + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_fade_linearly() -> None:
    first, second = fading_weights(14, (0, 6), tile=8)
    np.testing.assert_allclose(first, [1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(second, first[::-1], atol=1e-6)


def shades(tile: Image) -> Maps:
    """A network that looks at each pixel alone: three classes by brightness."""
    grey = tile.mean(axis=2) / 255
    return np.stack([1 - grey, np.full_like(grey, 0.5), grey]).astype(np.float32) / 1.5


@pytest.mark.parametrize("size", [(40, 37), (64, 64), (150, 97), (33, 200)])
def test_a_network_of_single_pixels_gives_the_mask_of_the_whole_image(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = predict_tiles(image, shades, num_classes=3, tile=40, overlap=12)
    assert (mask.shape, mask.dtype) == (size, np.uint8)
    np.testing.assert_array_equal(mask, shades(image).argmax(axis=0))


def test_no_seam_where_tiles_disagree() -> None:
    """Each tile has a level of its own; added up, levels change by less than a step of the ramp from pixel to pixel."""
    levels = iter(np.random.default_rng(1).permutation(30) / 30)
    image = np.zeros((70, 300, 3), dtype=np.uint8)
    added: list[Maps] = []

    def predict(tile: Image) -> Maps:
        level = np.full(tile.shape[:2], next(levels), dtype=np.float32)
        added.append(level)
        return np.stack([level, 1 - level])

    predict_tiles(image, predict, num_classes=2, tile=70, overlap=20)
    starts = tile_starts(300, tile=70, overlap=20)
    assert len(added) == len(starts) == 6
    line = np.zeros(300)
    for start, weight, level in zip(starts, fading_weights(300, starts, tile=70), added, strict=True):
        line[start : start + 70] += weight * level[0]
    assert np.abs(np.diff(line)).max() < 1.2 / 20  # hard borders jump by up to 1
    assert np.abs(np.diff(line)).max() > 0


def test_rows_are_handed_over_between_bands() -> None:
    """Classes that tell pixels apart in both directions: a row or column that slips shows."""
    image = np.zeros((90, 80, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = np.arange(90)[:, None], np.arange(80)

    def predict(tile: Image) -> Maps:
        wanted = (tile[..., 0].astype(int) + tile[..., 1]) % 5
        return (np.arange(5)[:, None, None] == wanted).astype(np.float32)

    mask = predict_tiles(image, predict, num_classes=5, tile=32, overlap=15)
    np.testing.assert_array_equal(mask, (np.arange(90)[:, None] + np.arange(80)) % 5)


@pytest.mark.slow
def test_the_band_lies_along_the_shorter_side() -> None:
    """A strip as long as an image may be takes no more memory than other images of its pixels."""

    def predict(tile: Image) -> Maps:
        return np.stack([tile[..., 0] == number for number in range(20)]).astype(np.float32)

    image = np.zeros((2, 200_000, 3), dtype=np.uint8)
    image[0, 80_000:], image[1, 140_000:] = 7, 19
    tracemalloc.start()
    mask = predict_tiles(image, predict, num_classes=20, tile=10_000, overlap=100)
    assert tracemalloc.get_traced_memory()[1] < 12e6, "along the strip, a row of the band has 16 MB"
    tracemalloc.stop()
    np.testing.assert_array_equal(mask, image[..., 0])
