from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import slrnet
from slrnet.cli.main import exit_code, main
from slrnet.launch.train import TrainingError

ROOT = Path(__file__).resolve().parents[3]


def test_an_unknown_command_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert "'trian'" in text
    assert "pseudo-label" in text


@pytest.mark.parametrize("words", [[], ["prepare"]])
def test_a_command_must_be_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "required: " in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == slrnet.__version__


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path), str(tmp_path / "none.jpg"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        ("prepare", "demo", "--out", "s3://bucket/shards"),
        ("prepare", "voc", "--root", "s3://bucket/VOC2012", "--out", "here"),
        ("predict", "run", "photo.jpg", "--out", "gs://bucket/masks"),
        ("browse", "s3://bucket/shards"),
        ("pseudo-label", "--checkpoint", "run", "--out", "here", "--also", "coco=s3://bucket/annotations"),
        ("voc-archive", "run", "s3://bucket/JPEGImages", "--out", "here.tgz"),
    ],
)
def test_a_location_where_a_path_belongs_is_refused(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: [a-z-]+: (s3|gs)://bucket/\w+ is a location, and only the path .* is taken there; .*", line
    )
    with pytest.raises(ValueError, match=r"^out: s3://bucket/masks is a location"):
        slrnet.predict("run", "photo.jpg", "s3://bucket/masks")
    assert not list(tmp_path.iterdir())


def test_the_package_runs_as_a_module_and_loads_the_named_group_alone() -> None:
    script = "import runpy, sys\ntry: runpy.run_module('slrnet', run_name='__main__')\nexcept SystemExit: pass\n"
    script += "print(sorted(name for name in sys.modules if name.startswith('slrnet.cli.')), 'torch' in sys.modules)"
    command = [sys.executable, "-c", script, "predict", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: slrnet predict [-h] ")
    loaded = ["slrnet.cli.arguments", "slrnet.cli.looking", "slrnet.cli.main"]
    assert done.stdout.splitlines()[-1] == f"{loaded} False"


def fail(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_that_ends_gives_its_status(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: status) == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no such recipe"), 2),
        (FileNotFoundError("no such file"), 2),
        (TrainingError("rank 1 failed"), 1),
    ],
)
def test_a_mistake_or_a_failed_training_gets_one_line(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(fail(error)) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        exit_code(fail(RuntimeError("a defect")))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_line(
    sent: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        os.kill(os.getpid(), sent)
        signal.pause()
        return 0

    # A shell that starts tests in the background has them ignore the interrupt key.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert exit_code(run, interrupted="interrupted; rerun to continue") == status
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().err == "interrupted; rerun to continue\n"


def test_the_handler_of_sigterm_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    during = []
    exit_code(lambda: during.append(signal.getsignal(signal.SIGTERM)) or 0)
    assert during != [before]
    assert signal.getsignal(signal.SIGTERM) == before
