from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from slrnet.cli.arguments import positive, run_argument, sole
from slrnet.storage.lease import HeldError


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_positive_numbers(text: str) -> None:
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1"):
        positive(text)


def test_a_run_in_the_home_folder() -> None:
    assert run_argument("~/runs/x") == Path.home() / "runs" / "x"


def test_one_process_at_a_time_fills_an_output(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "out")
    run = sole(lambda options: sole(lambda options: None)(options))
    with pytest.raises(HeldError, match=rf"output {options.out} is in use: process \d+ of .* works there since"):
        run(options)
    assert sole(lambda options: 3)(options) == 3
    assert list(tmp_path.iterdir()) == []


def test_every_command_that_fills_an_output_is_alone() -> None:
    """Those that are not marked hold the lease themselves, or write one file, whole."""
    from slrnet.cli import looking, sharing, training

    with_out = {
        name: adder
        for module in (looking, sharing, training)
        for name in module.__all__
        if "--out" in _options(adder := getattr(module, name))
    }
    alone = {name for name, adder in with_out.items() if hasattr(adder.keywords["run"], "__wrapped__")}
    assert set(with_out) - alone == {"evaluate", "pseudo_label", "watch"}


def _options(add: object) -> list[str]:
    parser = argparse.ArgumentParser()
    add(parser)  # type: ignore[operator]
    return [name for action in parser._actions for name in action.option_strings]
