"""Pixels of shapes against worked-out masks, against a loop over pixel centers, and what is refused."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.annotations.shapes import Bitmap, Polygons, RunLengths, Shape, box, draw, ellipse, points_of, turned

Array = npt.NDArray[Any]
TRIANGLE = [(0.0, 0.0), (8.0, 0.0), (0.0, 8.0)]


def polygon(points: Any, label: str = "cat", number: int = 1, holes: Any = ()) -> Polygons:
    return Polygons(
        label=label, number=number, outlines=(points_of(points),), holes=tuple(points_of(hole) for hole in holes)
    )


def png(pixels: Array, mode: str | None = None, *, packed: bool = False) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    data = buffer.getvalue()
    return base64.b64encode(zlib.compress(data) if packed else data).decode()


def holds(points: Array, x: float, y: float) -> bool:
    """Whether a polygon holds a point, by the even-odd rule."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (y1 <= y) != (y2 <= y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            crossings += 1
    return crossings % 2 == 1


def by_centers(points: Array, size: tuple[int, int]) -> Array:
    return np.array([[holds(points, x + 0.5, y + 0.5) for x in range(size[0])] for y in range(size[1])])


def mask_of(shape: Shape, size: tuple[int, int] = (10, 8)) -> Array:
    return draw([shape], {"cat": 1}, size)


def test_a_box_covers_the_pixels_between_its_edges() -> None:
    expected = np.zeros((8, 10), dtype=np.uint8)
    expected[1:4, 2:7] = 1
    assert np.array_equal(mask_of(polygon(box(2, 1, 7, 4))), expected)
    assert np.array_equal(mask_of(polygon(box(7, 4, 2, 1))), expected)  # corners in the other order


def test_holes_are_left_open() -> None:
    ring = mask_of(polygon(box(1, 1, 9, 7), holes=[box(3, 3, 6, 5)]))
    expected = np.zeros((8, 10), dtype=np.uint8)
    expected[1:7, 1:9] = 1
    expected[3:5, 3:6] = 0
    assert np.array_equal(ring, expected)


@pytest.mark.parametrize("seed", range(4))
def test_polygons_agree_with_the_centers_of_pixels(seed: int) -> None:
    """Those that cross themselves, too; pycocotools rounds to a fifth of a pixel, so single pixels may differ."""
    generator = np.random.default_rng(seed)
    points = generator.uniform((-5, -5), (45, 35), (3 + 2 * seed, 2))
    size = (40, 30)
    ours, expected = mask_of(polygon(points), size) > 0, by_centers(points, size)
    assert expected.sum() > 100
    assert (ours & expected).sum() / (ours | expected).sum() > 0.95


def test_shapes_beyond_the_image_are_cut_off() -> None:
    expected = np.zeros((8, 10), dtype=np.uint8)
    expected[:3, 7:] = 1
    assert np.array_equal(mask_of(polygon(box(7, -4, 14, 3))), expected)
    assert not mask_of(polygon(box(-6, 1, -2, 5))).any()
    bitmap = Bitmap(label="cat", number=1, column=7, row=-2, png=png(np.full((5, 6), 255, dtype=np.uint8)))
    assert np.array_equal(mask_of(bitmap), expected)
    runs = RunLengths(label="cat", number=1, column=7, row=-2, width=6, height=5, runs=np.array([0, 30]))
    assert np.array_equal(mask_of(runs), expected)


def test_later_shapes_lie_over_earlier_ones_and_other_labels_are_not_drawn() -> None:
    shapes = [polygon(box(0, 0, 6, 8)), polygon(box(4, 0, 10, 8), "dog", 2), polygon(box(0, 0, 10, 8), "tree", 3)]
    row = draw(shapes, {"cat": 1, "dog": 2}, (10, 8))[3]
    assert row.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("degrees", [0, 30, 90])
def test_ellipses(degrees: float) -> None:
    mask = mask_of(polygon(ellipse(50, 40, 30, 15, degrees=degrees)), (100, 80))
    rows, columns = np.mgrid[:80, :100] + 0.5
    angle = np.deg2rad(degrees)
    along = (columns - 50) * np.cos(angle) + (rows - 40) * np.sin(angle)
    across = (rows - 40) * np.cos(angle) - (columns - 50) * np.sin(angle)
    expected = (along / 30) ** 2 + (across / 15) ** 2 < 1
    assert (mask.astype(bool) & expected).sum() / (mask.astype(bool) | expected).sum() > 0.97


def test_turning_is_clockwise_on_the_screen() -> None:
    assert np.allclose(turned(points_of([(3, 1)]), (1, 1), 90), [(1, 3)])


class TestBitmaps:
    PIXELS = np.array([[0, 1, 0], [1, 1, 1]], dtype=np.uint8)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "tRNS"])
    def test_kinds_of_images(self, mode: str, packed: bool) -> None:
        """Of images with transparency, what is not transparent; of others, what is not 0."""
        if mode == "RGBA":  # black pixels, that are there or not
            data = png(np.stack([self.PIXELS * 0] * 3 + [self.PIXELS * 255], axis=2), packed=packed)
        elif mode == "tRNS":
            buffer = io.BytesIO()
            image = Image.fromarray(self.PIXELS)
            image.putpalette([0, 0, 0, 255, 255, 255])
            image.save(buffer, "PNG", transparency=0)
            data = base64.b64encode(zlib.compress(buffer.getvalue()) if packed else buffer.getvalue()).decode()
        elif mode == "P":
            data = png(self.PIXELS, packed=packed)
        else:
            data = png(self.PIXELS * 255, mode, packed=packed)
        mask = mask_of(Bitmap(label="cat", number=1, column=4, row=2, png=data))
        expected = np.zeros((8, 10), dtype=np.uint8)
        expected[2:4, 4:7] = self.PIXELS
        assert np.array_equal(mask, expected)

    @pytest.mark.parametrize(
        "data",
        ["%%%", "", base64.b64encode(b"no image").decode(), base64.b64encode(zlib.compress(b"no image")).decode()],
    )
    def test_what_is_no_image_is_refused(self, data: str) -> None:
        with pytest.raises(ValueError, match=r"shape 4 \('cat'\) has a bitmap that cannot be read"):
            mask_of(Bitmap(label="cat", number=4, column=0, row=0, png=data))

    def test_a_truncated_image_is_refused(self) -> None:
        noise = np.random.default_rng(0).integers(0, 2, (8, 10), dtype=np.uint8) * 255
        data = base64.b64encode(base64.b64decode(png(noise))[:60]).decode()
        with pytest.raises(ValueError, match="has a bitmap that cannot be read"):
            mask_of(Bitmap(label="cat", number=1, column=0, row=0, png=data))


def runs(*counts: int, width: int = 3, height: int = 2, column: int = 0) -> RunLengths:
    return RunLengths(
        label="cat", number=7, column=column, row=0, width=width, height=height, runs=np.array(counts, dtype=np.int64)
    )


def test_run_lengths_go_row_by_row() -> None:
    assert mask_of(runs(2, 3, 1), (3, 2)).tolist() == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (polygon([(0, 0), (5, 5)]), "2 point.* on one line, which enclose no area"),
        (polygon([(1, 1), (3, 3), (6, 6)]), "3 point.* on one line"),
        (polygon([(1, 1), (1, 1), (1, 1)]), "on one line"),
        (polygon([(1, 1), (float("nan"), 3), (6, 2)]), "no finite number"),
        (polygon([(1, 1), (float("inf"), 3), (6, 2)]), "no finite number"),
        (polygon([(1, 1), (1e9, 3), (6, 2)]), r"reaches from \(1, 1\) to \(1e\+09, 3\), far beyond the image of 10x8"),
        (polygon([(1, -9), (3, 3), (6, 2)]), "far beyond the image"),
        (polygon(box(1, 1, 9, 7), holes=[[(2, 2), (3, 3)]]), "enclose no area"),
        (runs(2, 2), "run lengths that do not add up to its 3x2 pixels"),
        (runs(), "do not add up"),
        (runs(-3, 9), "do not add up"),
        (runs(2**62, 2**62, 2**62, 2**62, 6), "do not add up"),
        (runs(0, 6, width=10**9, height=10**9), "far beyond the image"),
        (runs(0, 6, column=-40), "far beyond the image"),
        (runs(0, width=0), "0x2 pixels"),
    ],
)
def test_what_is_no_shape_of_the_image_is_refused(shape: Shape, words: str) -> None:
    with pytest.raises(ValueError, match=rf"shape {shape.number} \('cat'\) .*{words}"):
        mask_of(shape)


@pytest.mark.parametrize("values", [[1, 2, 3], [(1, 2), (3,)], [("a", "b")], None, [[1, 2, 3]], [[10**400, 1]]])
def test_points_are_pairs_of_numbers(values: Any) -> None:
    with pytest.raises(ValueError, match="points that are not pairs of numbers"):
        points_of(values)


@pytest.mark.parametrize("radii", [(0, 3), (3, -1), (float("nan"), 1)])
def test_radii_are_above_0(radii: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        ellipse(5, 5, *radii)
