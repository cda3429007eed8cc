from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from slrnet.cli.arguments import data_location
from slrnet.cli.main import build_parser, main
from slrnet.cli.training import _fields_of, add_storage, workers
from slrnet.launch.cluster import WorkerRequest


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    workers()(parser)
    add_storage(parser)
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
    assert parser.parse_args([]).storage == str(Path.home() / "slrnet_runs")


def test_a_data_set_keeps_its_place_on_other_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_location("shards") == str(tmp_path / "shards")
    assert data_location("s3://bucket/shards") == "s3://bucket/shards"


@pytest.mark.parametrize(
    "words",
    [
        *["export /run", "convert-weights x.pth", "voc-archive /run /images", "predict /run x", "report /run"],
        *["figures tables /run", "codes /run x", "browse /data", "evaluate --checkpoint /run", "pseudo-label"],
        *["profile --recipe demo --data /data", "prepare demo", "prepare voc --root /data"],
    ],
)
def test_a_place_that_takes_no_files_is_refused_before_work_starts(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = main([*words.split(), "--out", "/proc/own"])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert "takes no files" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a b", "a/b", "a" * 201])
@pytest.mark.parametrize("command", ["train", "distill", "tune"])
def test_a_name_that_is_no_folder_is_refused_before_a_folder_is_made(
    name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser([command]).parse_args([command, "--name", name])
    assert f"argument --name: {name!r} is no name of a run; allowed are" in capsys.readouterr().err
    assert build_parser([command]).parse_args([command, "--name", "v1.2-a_b"]).name == "v1.2-a_b"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("predict /run x --out m --device gpu", "there is no device 'gpu' here; there are cpu"),
        ("predict /run x --out m --device cuda:99", "there is no device 'cuda:99' here; there are cpu"),
        ("predict /run x --out m --device meta", "there is no device 'meta' here"),
        ("tune --num-samples 0", "'0' is not a whole number from 1"),
        ("tune --max-concurrent -1", "'-1' is not a whole number from 1"),
        ("tune --num-workers 0", "'0' is not a number of workers from 1"),
        ("evaluate --checkpoint x --max-failures -1", "'-1' is not a whole number from 0"),
        ("pseudo-label --wait-for-nodes nan", "'nan' is not a time"),
        ("train --cpus-per-worker 0", "'0' is not a whole number from 1"),
        ("profile --recipe demo --data x --out p --steps 0", "'0' is not a whole number from 1"),
    ],
)
def test_devices_and_counts_that_do_no_work_are_refused(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser(words.split()).parse_args(words.split())
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "train --storage",
        "train --data",
        "train --config",
        "distill --storage",
        "distill --data",
        "tune --storage",
        "tune --data",
        "tune --config",
        "evaluate --checkpoint",
        "evaluate --checkpoint /run --data",
        "evaluate --checkpoint /run --out",
        "pseudo-label --checkpoint",
        "pseudo-label --checkpoint /run --out",
        "pseudo-label --checkpoint /run --out /out --voc-folder",
        "pseudo-label --verify",
        "profile --recipe demo --data /data --out",
        "export /run --out",
        "predict /run /images --out",
        "browse /data --out",
    ],
)
def test_a_relative_path_in_rays_copy_of_the_project_is_refused(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(SystemExit) as ended:
        build_parser(words.split()).parse_args([*words.split(), "own"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {words.split()[-1]}: own " in error
    assert "such as $PWD/own in the terminal that submits" in error
    build_parser(words.split()).parse_args([*words.split(), str(tmp_path / "own")])


@pytest.mark.parametrize("command", ["train", "distill", "tune", "evaluate --checkpoint x", "pseudo-label"])
def test_all_commands_that_start_workers_take_the_same_options(command: str) -> None:
    words = f"{command} --num-workers 2:4 --cpus-per-worker 3 --cpu-only --wait-for-nodes 30 --hang-limit 0".split()
    options = build_parser(words).parse_args([*words, "--max-failures", "3"])
    request = WorkerRequest(**_fields_of(WorkerRequest, options))
    expected = WorkerRequest(
        num_workers=(2, 4), cpus_per_worker=3, cpu_only=True, wait_minutes=30, max_failures=3, hang_limit=0
    )
    assert request == expected
