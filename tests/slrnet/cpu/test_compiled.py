"""Compiling kernels: once, from the compiler that is named, and a reason in the log where there is none."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path

import pytest

from slrnet.cpu import compiled


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test compiles anew with the machine's compiler, unless it names another, and leaves nothing to others."""
    monkeypatch.delenv(compiled.COMPILER_VARIABLE, raising=False)
    monkeypatch.setattr(compiled, "compiled", functools.cache(compiled.compiled.__wrapped__))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_compiled_once_and_without_a_file_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = compiled.compiled("cross_entropy")
    assert library is not None
    assert library is compiled.compiled("cross_entropy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "there is no C compiler (no-such-compiler)"),
        ("false", "non-zero exit status"),
    ],
)
def test_without_a_compiler_the_log_says_so_once(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(compiled.COMPILER_VARIABLE, compiler)
    with caplog.at_level(logging.WARNING):
        assert compiled.compiled("cross_entropy") is None
        assert compiled.compiled("cross_entropy") is None
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "slower" in record.getMessage()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_what_the_compiler_says_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.c").write_text("int broken(void) { return nothing; }\n")
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    assert compiled.compiled("broken") is None
    assert "nothing" in caplog.text
