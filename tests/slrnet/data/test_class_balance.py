"""Class balance: targets by hand, draws that meet them, limits, and the table that shows both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slrnet.cli.main import main
from slrnet.data.class_balance import ClassLists, balance, table
from slrnet.data.manifest import ShardSet


def lists(classes: list[tuple[int, ...]], num_classes: int) -> ClassLists:
    pairs = [(image, c) for image, shown in enumerate(classes) for c in shown]
    images, ids = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    return ClassLists(images, ids, len(classes), num_classes)


ALONE = lists([(1,)] * 90 + [(2,)] * 9 + [(3,)], 4)


def test_single_labels_by_hand() -> None:
    """90, 9 and 1 images: equal shares are 100 / 3 draws of each class."""
    found = balance(ALONE, strength=1.0, limit=100.0)
    assert found.natural.tolist() == pytest.approx([0.9, 0.09, 0.01])
    assert found.target.tolist() == pytest.approx([1 / 3] * 3)
    assert found.expected.tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)
    assert found.draws[[0, 90, 99]].tolist() == pytest.approx([100 / 270, 100 / 27, 100 / 3], rel=0.01)
    assert found.draws.sum() == pytest.approx(100)


def test_strength_lies_between_natural_and_equal_shares() -> None:
    roots = np.sqrt([0.9, 0.09, 0.01])
    found = balance(ALONE, strength=0.5, limit=100.0)
    assert found.target.tolist() == pytest.approx((roots / roots.sum()).tolist())
    assert found.expected.tolist() == pytest.approx(found.target.tolist(), abs=1e-3)
    unchanged = balance(ALONE, strength=0.0, limit=100.0)
    assert unchanged.draws.tolist() == [1.0] * 100
    assert unchanged.expected.tolist() == unchanged.target.tolist() == pytest.approx(unchanged.natural.tolist())


def test_a_limit_binds_and_the_epoch_keeps_its_length() -> None:
    found = balance(ALONE, strength=1.0, limit=3.0)
    assert found.draws.max() == pytest.approx(3.0)
    assert found.draws[99] == pytest.approx(3.0)
    assert found.draws.sum() == pytest.approx(100)
    assert found.expected.tolist() == pytest.approx([0.70, 0.27, 0.03], abs=1e-3)
    assert found.target[1] > 0.27, "nine images drawn three times are too few as well"
    assert "off the target" in table(found, ("background", "a", "b", "c"))


def test_images_of_several_classes() -> None:
    """A long tail with company: the common class appears in most images of the rare ones too."""
    rng = np.random.default_rng(0)
    classes = []
    for _ in range(3000):
        own = int(min(rng.zipf(1.5), 20))
        classes.append(tuple(sorted({own, *([1] if rng.random() < 0.3 else [])})))
    found = balance(lists(classes, 21), strength=0.5, limit=10.0)
    before = np.abs(found.natural - found.target).sum() / 2
    after = np.abs(found.expected - found.target).sum() / 2
    assert before > 0.15
    assert after < 0.01
    assert found.draws.sum() == pytest.approx(3000)


def test_images_without_classes_are_drawn_once_and_missing_classes_have_no_target() -> None:
    found = balance(lists([(1,), (1,), (1,), (2,), (), ()], 4), strength=1.0, limit=10.0)
    assert found.draws[4:].tolist() == [1.0, 1.0]
    assert found.target.tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert found.draws[:4].tolist() == pytest.approx([2 / 3] * 3 + [2.0], rel=0.01)


def test_nothing_to_balance() -> None:
    assert balance(lists([(), ()], 3), strength=1.0, limit=2.0).draws.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("strength", "limit"), [(-0.1, 2.0), (1.1, 2.0), (0.5, 0.5)])
def test_values_out_of_range(strength: float, limit: float) -> None:
    with pytest.raises(ValueError, match="allowed are 0 to 1, and 1 or more"):
        balance(ALONE, strength=strength, limit=limit)


def test_the_table_shows_the_rarest_first_and_cuts_the_middle() -> None:
    found = balance(ALONE, strength=1.0, limit=100.0)
    lines = table(found, ("background", "ant", "bee", "cat")).splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["cat", "1", "1.000"],
        ["bee", "9", "9.000"],
        ["ant", "90", "90.000"],
    ]
    assert lines[1].split()[3] == "33.333"
    cut = table(found, ("background", "ant", "bee", "cat"), most=2).splitlines()
    assert [line.split()[0] for line in cut[1:4]] == ["cat", "...", "ant"]


def test_the_command_prints_the_table_of_a_data_set(
    tiny_data: ShardSet, capsys: pytest.CaptureFixture[str], write_tiny: Callable[..., Any]
) -> None:
    assert main(["class-balance", str(tiny_data.folder), "--strength", "1"]) == 0
    printed = capsys.readouterr().out
    images = [line.split()[:2] for line in printed.splitlines()[1:4]]
    assert images == [["cat", "4"], ["ant", "5"], ["bee", "5"]]
    assert main(["class-balance", str(tiny_data.folder), "--strength", "2"]) == 2
    assert "allowed are 0 to 1" in capsys.readouterr().err
    assert main(["class-balance", str(tiny_data.folder), "--split", "test"]) == 2
