"""Damaged inputs of every reader, a few; `make fuzz` has a budget for many."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz

INPUTS = {"images": 10, "samples": 10, "weights": 10, "matrices": 10}
"""By reader; others take a tenth of a second for one."""


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_damaged_input_ends_in_a_value_or_an_error_of_ours(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")
    original = fuzz.example(name)
    for number in range(INPUTS.get(name, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert fuzz.examine(name, number, folder, original)[1] == ""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("weights", 34),
        ("weights", 192),
        ("weights", 40),
        ("shards", 337),
        ("runs", 50094),
        ("runs", 5000705),
        ("coco", 5001196),
    ],
)
def test_finds_stay_mended(name: str, number: int, tmp_path: Path) -> None:
    assert fuzz.examine(name, number, tmp_path, fuzz.example(name))[1] == ""


def test_another_error_is_a_find() -> None:
    def raised(make: object) -> BaseException:
        try:
            make()  # type: ignore[operator]
        except Exception as error:
            return error
        raise AssertionError

    from slrnet.config import load_config
    from slrnet.storage.names import check_name

    assert fuzz.is_own(raised(lambda: check_name("split", "../x")))
    assert fuzz.is_own(raised(lambda: load_config("no such file")))
    assert not fuzz.is_own(raised(lambda: int("x")))  # none of our code explains it
    assert not fuzz.is_own(raised(lambda: {}["a"]))
