"""The matrix of processors: each combination runs, one that this processor lacks is skipped, all failures are named."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import processors
from tests.processors import COMPILER, Combination, combinations


class Recorder:
    """Stands for pytest: keeps what it is asked to run and fails where the variables contain `failing`."""

    def __init__(self, failing: tuple[str, str] = ("", "")) -> None:
        self.failing = failing
        self.calls: list[tuple[list[str], dict[str, str]]] = []

    def __call__(self, arguments: Sequence[str], sets: dict[str, str]) -> list[str]:
        self.calls.append((list(arguments), sets))
        return ["FAILED tests/test_a.py::test_b"] if self.failing in sets.items() else []


def test_every_combination_runs_after_a_failure_and_each_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(failing=("ATEN_CPU_CAPABILITY", "default"))
    assert processors.main([], level="AVX512", run_tests=recorder) == 1
    assert len(recorder.calls) == len(combinations())
    summary = capsys.readouterr().out.partition("=== summary\n")[2].splitlines()
    failed = [line for line in summary if "FAILED" in line and not line.startswith("    ")]
    assert all("ATEN_CPU_CAPABILITY=default" in line for line in failed)
    assert len(failed) == summary.count("    FAILED tests/test_a.py::test_b") == 4
    for combination in combinations():
        assert sum(str(combination) in line for line in summary) == 1


def test_without_a_failure_the_status_is_0() -> None:
    recorder = Recorder()
    assert processors.main(["--only", "native-1", "native-2"], level="AVX2", run_tests=recorder) == 0
    assert [sets["OMP_NUM_THREADS"] for _, sets in recorder.calls] == ["1", "2"]
    for arguments, _ in recorder.calls:
        assert arguments[:2] == ["-m", "not slow"]
        assert set(processors.FOLDERS) <= set(arguments)


@pytest.mark.parametrize(
    ("level", "lacking"), [("DEFAULT", {"avx2", "avx512"}), ("AVX2", {"avx512"}), ("AVX512", set())]
)
def test_what_the_processor_lacks_is_skipped_and_said(
    level: str, lacking: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    assert processors.main([], level=level, run_tests=recorder) == 0
    run = {sets.get("ATEN_CPU_CAPABILITY", "default") for _, sets in recorder.calls}
    assert run == {"default", "avx2", "avx512"} - lacking
    assert (f"skipped: this processor has {level} at most" in capsys.readouterr().out) == bool(lacking)


def test_the_numeric_folders_exist() -> None:
    assert [folder for folder in processors.FOLDERS if not (processors.ROOT / folder).is_dir()] == []


@pytest.mark.slow
def test_a_variable_of_the_callers_does_not_hide_what_the_processor_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = processors._level()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert processors._level() == real


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_kernels_are_compiled_for_the_older_processor(tmp_path: Path) -> None:
    (tmp_path / "empty.c").touch()
    compiler = processors._compiler_for("x86-64-v2", tmp_path / "cc")
    command = [compiler, "-march=native", "-dM", "-E", str(tmp_path / "empty.c")]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "__SSE4_2__" in macros
    assert "__AVX__" not in macros


def test_a_restricted_compiler_lives_as_long_as_its_tests() -> None:
    seen = []

    def run_tests(arguments: Sequence[str], sets: dict[str, str]) -> list[str]:
        seen.append((sets[COMPILER], os.path.exists(sets[COMPILER])))
        return []

    processors.main(["--only", "sse41-1"], level="DEFAULT", run_tests=run_tests)
    ((path, existed),) = seen
    assert not os.path.exists(path)
    assert existed == (shutil.which("cc") is not None)


@pytest.mark.slow
def test_pytest_gets_the_variables_and_its_failures_come_back(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import os\n\ndef test_it():\n    assert os.environ['ATEN_CPU_CAPABILITY'] == 'avx2'\n")
    arguments = ["-p", "no:cacheprovider", "--confcutdir", str(tmp_path), str(test)]
    assert processors._pytest(arguments, {"ATEN_CPU_CAPABILITY": "avx2"}) == []
    (failure,) = processors._pytest(arguments, {"ATEN_CPU_CAPABILITY": "default"})
    assert failure.startswith("FAILED ")
    assert failure.endswith("test_it.py::test_it")
    assert processors._pytest([str(tmp_path / "none.py")], {}) == ["pytest exited with 4"]


def test_each_combination_says_what_it_sets() -> None:
    text = str(Combination("old-2", {"A": "b"}, threads=2, machine="x86-64-v2"))
    assert text == "old-2: A=b OMP_NUM_THREADS=2 kernels for -march=x86-64-v2"
