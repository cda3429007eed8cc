from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slrnet
from slrnet.cli.main import main

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


def test_the_package_runs_as_a_module_and_loads_the_named_group_alone() -> None:
    script = "import runpy, sys\ntry: runpy.run_module('slrnet', run_name='__main__')\nexcept SystemExit: pass\n"
    script += "print(sorted(name for name in sys.modules if name.startswith('slrnet.cli.')), 'torch' in sys.modules)"
    command = [sys.executable, "-c", script, "predict", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: slrnet predict [-h] ")
    loaded = ["slrnet.cli.arguments", "slrnet.cli.looking", "slrnet.cli.main"]
    assert done.stdout.splitlines()[-1] == f"{loaded} False"
