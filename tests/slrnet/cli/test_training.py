from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from slrnet.cli.training import add_storage, add_workers, data_location


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_workers(parser)
    add_storage(parser, remote=True)
    return parser


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("4", 4), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_numbers_of_workers(text: str, expected: object, parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args(["--num-workers", text]).num_workers == expected


@pytest.mark.parametrize("text", ["-1", "two", "4:2", "0:2", "1:2:3", ""])
def test_what_is_no_number_of_workers(
    text: str, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args([f"--num-workers={text}"])
    assert "give one, as 4, or fewest:most, as 2:8" in capsys.readouterr().err


def test_places_for_runs(
    parser: argparse.ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parser.parse_args(["--storage", "runs"]).storage == str(tmp_path / "runs")
    assert parser.parse_args(["--storage", "s3://bucket/runs/"]).storage == "s3://bucket/runs"
    with pytest.raises(SystemExit):
        parser.parse_args(["--storage", "ftp://host/runs"])
    assert "allowed are folders, s3:// and gs://" in capsys.readouterr().err


@pytest.mark.parametrize("value", [None, ""])
def test_the_usual_place_for_runs(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set but empty counts as unset."""
    monkeypatch.delenv("SLRNET_STORAGE", raising=False)
    if value is not None:
        monkeypatch.setenv("SLRNET_STORAGE", value)
    parser = argparse.ArgumentParser()
    add_storage(parser)
    assert parser.parse_args([]).storage == Path.home() / "slrnet_runs"


def test_a_data_set_keeps_its_place_on_other_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_location("shards") == str(tmp_path / "shards")
    assert data_location("s3://bucket/shards") == "s3://bucket/shards"
