from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from slrnet.cli.arguments import positive, run_argument


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_positive_numbers(text: str) -> None:
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1"):
        positive(text)


def test_a_run_in_the_home_folder() -> None:
    assert run_argument("~/runs/x") == Path.home() / "runs" / "x"
