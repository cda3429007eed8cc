"""Ranges of values that become black and white."""

from __future__ import annotations

import numpy as np
import pytest

from slrnet.data.depth import Depth, ImageError, Range
from slrnet.data.manifest import DataError


@pytest.mark.parametrize(
    ("text", "kind", "values", "scaled"),
    [
        ("12", "uint16", [0, 2056, 4095], [0, 128, 255]),
        ("16", "uint16", [0, 257, 65535], [0, 1, 255]),
        ("8", "int32", [0, 7, 255], [0, 7, 255]),
        ("-160..240", "int16", [-1024, -160, 39, 240, 3071], [0, 0, 127, 255, 255]),
        ("0..1", "float32", [-0.5, 0, 0.5, 1, 9], [0, 0, 128, 255, 255]),
        ("uint16=10,float32=0..2", "float32", [0, 1, 2], [0, 128, 255]),
        ("uint16=10,float32=0..2", "uint16", [0, 1023], [0, 255]),
    ],
)
def test_values_are_scaled_to_the_nearest(text: str, kind: str, values: list[float], scaled: list[int]) -> None:
    depth = Depth.parse(text)
    assert depth.to_8_bit(np.array([values], dtype=kind), kind).tolist() == [scaled]
    assert Depth.parse(str(depth)) == depth


def test_large_images_are_scaled_part_by_part() -> None:
    rows = np.arange(3000, dtype=np.uint16)[:, None].repeat(2000, axis=1)
    assert np.array_equal(Depth.parse("12").to_8_bit(rows, "uint16"), np.rint(rows * (255 / 4095)).astype(np.uint8))


@pytest.mark.parametrize("text", ["7", "33", "twelve", "4..1", "0..inf", "nan..1", "uint8=8", "8,9", "0.."])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="the depth"):
        Depth.parse(text)


@pytest.mark.parametrize(
    ("text", "values", "reason"),
    [
        ("", np.uint16([[3, 9]]), r"uint16 samples, here from 3 to 9: say which values become black and white"),
        ("float32=0..1", np.uint16([[3, 9]]), r"known is the depth float32=0\.\.1: say"),
        ("12", np.uint16([[3, 4096]]), r"go from 3 to 4096, beyond the depth 12 \(0 to 4095\)"),
        ("12", np.int16([[-1, 9]]), r"go from -1 to 9, beyond"),
        ("", np.float32([[0, np.inf]]), "1 of its 2 values are NaN or infinite"),
        ("0..1", np.float32([[0, np.nan, np.inf, 1]]), "2 of its 4 values are NaN or infinite"),
    ],
)
def test_what_a_depth_does_not_hold_is_refused(text: str, values: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        Depth.parse(text).to_8_bit(values, values.dtype.name)


def test_no_text_is_no_range() -> None:
    assert Depth.parse("") == Depth()
    assert str(Depth()) == ""
    assert str(Depth({"": Range.of_bits(12)})) == "12"
