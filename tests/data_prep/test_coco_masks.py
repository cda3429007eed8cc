"""What may be drawn of COCO's annotations, and the masks that are drawn; pycocotools sees no number unchecked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.coco_masks import class_mask, drawable, is_box_alone

pytest.importorskip("pycocotools", reason="needs the extra `coco`")

WIDTH, HEIGHT = 20, 12
Array = npt.NDArray[Any]


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    """A polygon around whole pixels."""
    return [left, top, right, top, right, bottom, left, bottom]


def runs(inside: Array) -> dict[str, Any]:
    """Run lengths as numbers, down the columns, as COCO's crowds have them."""
    flat = inside.astype(int).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(inside.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def packed(inside: Array) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    encoded: dict[str, Any] = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return encoded | {"counts": encoded["counts"].decode()}


def drawn(segmentation: Any, **more: Any) -> Array:
    return class_mask([{"id": 1, "category_id": 4, "segmentation": segmentation, **more}], HEIGHT, WIDTH, {4: 9})


def test_all_forms_of_segmentations_cover_the_same_pixels() -> None:
    inside = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    inside[3:8, 5:11] = 1
    two = [box(5, 3, 8, 8), box(8, 3, 11, 8)]
    for form in ([box(5, 3, 11, 8)], box(5, 3, 11, 8), two, runs(inside), packed(inside)):
        np.testing.assert_array_equal(drawn(form), 9 * inside)


@given(st.integers(1, 6), st.integers(1, 40), st.randoms(use_true_random=False))
def test_packed_run_lengths_are_those_that_pycocotools_packs(height: int, width: int, random: Any) -> None:
    inside = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    assert drawable({"segmentation": packed(inside)}, height, width) == runs(inside)


def test_long_packed_run_lengths() -> None:
    """Numbers of several characters, negative differences, and zero at the start."""
    inside = np.ones((500, 900), dtype=np.uint8)
    inside[:, 300] = 0
    inside[3:5, 7] = 0
    assert drawable({"segmentation": packed(inside)}, 500, 900) == runs(inside)
    assert drawable({"segmentation": packed(inside)}, 500, 900)["counts"][0] == 0  # type: ignore[call-overload]


PARTLY = box(-8, -5, 8, 5)


def test_polygons_that_reach_beyond_the_image_are_cut() -> None:
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[:5, :8] = 9
    np.testing.assert_array_equal(drawn([PARTLY]), expected)
    assert (drawn([box(-WIDTH, -HEIGHT, 2 * WIDTH, 2 * HEIGHT)]) == 9).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 1e9, 1e9, 5, 5]], r"has a polygon with the point \(1e\+09, 1e\+09\), far outside the image"),
        ([[0, 0, float("nan"), 0, 5, 5]], r"the point \(nan, 0\), far outside"),
        ([[0, 0, float("inf"), 0, 5, 5]], r"the point \(inf, 0\), far outside"),
        ([[0, 0, 5, -12.5, 5, 5]], r"the point \(5, -12.5\), far outside"),
        ([[0, 0, 10**400, 0, 5, 5]], "a number of more than 300 digits"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers; pairs x, y are allowed"),
        ([["a"] * 6], r"has the polygon \['a', .*; a list of numbers"),
        ([[True] * 6], r"has the polygon \[True, "),
        ([[0, 0, 5, 5, 0, 5], 3], "has the polygon 3"),
        ([{"x": 1}], r"has the polygon \[\{'x': 1\}\]"),
        ([[-20, -12, 40, 24] * 40_000], r"has an outline of [0-9]+ pixels; allowed are 4194304"),
        ("polygon", "has the segmentation 'polygon'; polygons or run lengths are allowed"),
        (None, "has the segmentation None"),
        ({"size": [12, 20], "counts": [239]}, "has run lengths for 239 pixels; the image has 240 pixels"),
        ({"size": [12, 20], "counts": [200, 41]}, "has run lengths for 241 pixels"),
        ({"size": [12, 20], "counts": []}, "has run lengths for 0 pixels"),
        ({"size": [12, 20], "counts": [-5, 245]}, "has negative run lengths"),
        ({"size": [12, 20], "counts": [0.5] * 480}, r"has the run lengths \[0.5, "),
        ({"size": [12, 20], "counts": ["240"]}, r"has the run lengths \['240'\]"),
        ({"size": [12, 20], "counts": [True] * 240}, r"has the run lengths \[True, "),
        ({"size": [12, 20], "counts": None}, "has the run lengths None"),
        ({"size": [20, 12], "counts": [240]}, r"for the size \[20, 12\], not \[12, 20\]"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, r"for the size \[1000000000, 1000000000\]"),
        ({"counts": [240]}, "for the size None"),
        ({"size": [12, 20], "counts": "ooooo5oooo5"}, "has run lengths for 207618046 pixels"),
        ({"size": [12, 20], "counts": "o" * 20}, "has damaged packed run lengths"),
        ({"size": [12, 20], "counts": "ooo"}, "has packed run lengths that are cut off"),
        ({"size": [12, 20], "counts": "\0\0"}, "has damaged packed run lengths"),
        ({"size": [12, 20], "counts": "ÿĀ"}, "has damaged packed run lengths"),
        ({"size": [12, 20], "counts": ""}, "has run lengths for 0 pixels"),
        ({"size": [12, 20], "counts": "1" * 10_000}, "has (negative run lengths|run lengths for [0-9]+ pixels)"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_is_drawn(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawable({"segmentation": segmentation}, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=message):
        drawn(segmentation)


@pytest.mark.parametrize(("crowd", "label"), [(0, 9), (False, 9), (None, 9), (1, 255), (True, 255)])
def test_crowds_are_void(crowd: Any, label: int) -> None:
    assert (drawn([box(0, 0, WIDTH, HEIGHT)], iscrowd=crowd) == label).all()


def test_other_values_of_iscrowd_are_refused() -> None:
    for crowd in ([1], 2, "1"):
        with pytest.raises(ValueError, match="has the iscrowd .*; allowed are 0 and 1"):
            drawn([box(0, 0, 5, 5)], iscrowd=crowd)


def test_boxes_alone() -> None:
    bbox = [1, 1, 5, 5]
    empty: list[dict[str, Any]] = [{}, {"segmentation": []}, {"segmentation": None}]
    for segmentation in empty:
        assert is_box_alone(segmentation | {"bbox": bbox})
        assert not is_box_alone(segmentation)
        for other in ([1, 1, 0, 5], [1, 1, 5, 0], [], "box", [1, 1, None, 5], [float("nan")] * 4):
            assert not is_box_alone(segmentation | {"bbox": other})
    assert not is_box_alone({"segmentation": [box(1, 1, 5, 5)], "bbox": bbox})


def test_crowds_follow_the_rule_of_areas_and_ties_the_rule_of_ids() -> None:
    def annotation(number: int, category: int, polygon: list[float], crowd: int = 0) -> dict[str, Any]:
        return {"id": number, "category_id": category, "segmentation": [polygon], "iscrowd": crowd}

    whole, half = box(0, 0, 20, 12), box(0, 0, 10, 12)
    small_crowd = class_mask([annotation(1, 4, whole), annotation(2, 4, half, crowd=1)], HEIGHT, WIDTH, {4: 1})
    assert (small_crowd[:, :10] == 255).all()
    assert (small_crowd[:, 10:] == 1).all()
    large_crowd = class_mask([annotation(1, 4, whole, crowd=1), annotation(2, 4, half)], HEIGHT, WIDTH, {4: 1})
    assert (large_crowd[:, :10] == 1).all()
    tie = [annotation(5, 4, half), annotation(2, 6, half)]
    assert (class_mask(tie, HEIGHT, WIDTH, {4: 1, 6: 2})[:, :10] == 1).all()
