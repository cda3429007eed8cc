"""Polygons of masks: they hold exactly the pixels of their ids, without holes, and simplified ones leave no gaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from slrnet.data.outlines import Ring, outlines_of

shapely = pytest.importorskip("shapely")
Mask = npt.NDArray[np.uint8]

SQUARE = np.array([[0, 0, 0, 0], [0, 7, 7, 0], [0, 7, 7, 0]], dtype=np.uint8)
RING = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=np.uint8)
CORNER = np.array([[1, 0], [0, 1]], dtype=np.uint8)
"""Two pixels that touch at a corner alone."""
CHAIN = np.ones((6, 6), dtype=np.uint8)
CHAIN[[0, 1, 2, 3], [1, 2, 3, 2]] = 0
"""A region that touches itself where pixels of another one meet at corners."""


def circles(*, seed: int, side: int = 60) -> Mask:
    rng, (rows, columns) = np.random.default_rng(seed), np.indices((side, side))
    mask = np.zeros((side, side), dtype=np.uint8)
    for _ in range(12):
        row, column, radius = rng.integers(side), rng.integers(side), rng.integers(4, side // 3)
        mask[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = rng.integers(3)
    return mask


def noise(seed: int) -> Mask:
    return (np.random.default_rng(seed).random((11, 14)) < 0.2 + 0.1 * (seed % 6)).astype(np.uint8)


def inside(rings: Sequence[Ring], shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """How many polygons hold the center of each pixel."""
    rows, columns = np.indices(shape) + 0.5
    counts = [shapely.contains_xy(shapely.Polygon(ring), columns, rows).astype(np.int64) for ring in rings]
    return np.asarray(sum(counts, np.zeros(shape, dtype=np.int64)))


@pytest.mark.parametrize(
    "mask",
    [SQUARE, RING, CORNER, CHAIN, CHAIN.T, np.full((1, 3), 255, np.uint8), *map(noise, range(12)), circles(seed=0)],
)
def test_exact_polygons_hold_the_pixels_of_their_id_once_and_have_no_holes(mask: Mask) -> None:
    outlines = outlines_of(mask)
    assert list(outlines) == np.unique(mask).tolist()
    for label, rings in outlines.items():
        np.testing.assert_array_equal(inside(rings, mask.shape), mask == label)
        assert all(shapely.is_valid(shapely.Polygon(ring)) for ring in rings)
        assert sum(shapely.Polygon(ring).area for ring in rings) == (mask == label).sum()


def test_corners_of_simple_shapes_are_those_of_their_pixels() -> None:
    (square,) = outlines_of(SQUARE)[7]
    assert {tuple(corner) for corner in square.tolist()} == {(1, 1), (3, 1), (3, 3), (1, 3)}
    assert len(square) == 4
    assert len(outlines_of(CORNER)[1]) == 2
    assert len(outlines_of(RING)[1]) == 2  # cut above and below its hole


@pytest.mark.parametrize(("tolerance", "overlap"), [(1.0, 0.97), (2.0, 0.95)])
def test_simplified_borders_have_fewer_corners_and_leave_no_gap(tolerance: float, overlap: float) -> None:
    mask = circles(seed=1)
    exact, simple = outlines_of(mask), outlines_of(mask, tolerance=tolerance)
    corners = [sum(len(ring) for rings in found.values() for ring in rings) for found in (exact, simple)]
    assert corners[1] < corners[0] / 2
    assert (sum(inside(rings, mask.shape) for rings in simple.values()) == 1).mean() > 0.98
    areas = sum(shapely.Polygon(ring).area for rings in simple.values() for ring in rings)
    assert areas == mask.size  # the whole image is covered, and nothing twice
    for label, rings in simple.items():
        held = inside(rings, mask.shape) > 0
        assert (held & (mask == label)).sum() / (held | (mask == label)).sum() > overlap
