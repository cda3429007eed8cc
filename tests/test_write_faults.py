"""Faults at writes, a few; `make chaos` injects them at every one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.write_faults import KINDS, Output, inject
from slrnet.storage.folders import whole_folder


def _replace_folder(text: str, folder: Path) -> None:
    with whole_folder(folder / "checkpoint", own={"a"}) as new:
        (new / "a").write_text(text * 9000)


def _tear_file(text: str, folder: Path) -> None:
    with (folder / "a").open("w") as file:
        file.write(text * 9000)


def _read(folder: Path) -> None:
    (folder / "checkpoint" / "a").read_text()


def test_an_output_is_the_earlier_or_the_new_one_after_each_fault() -> None:
    output = Output(partial(_replace_folder, "1"), partial(_replace_folder, "22"), _read)
    counts, problems = inject(output, slow=0.01, step=5)
    assert problems == []
    assert {*KINDS, "full within a file", "killed within a file"} == set(counts)


def test_a_torn_file_is_found() -> None:
    output = Output(partial(_tear_file, "1"), partial(_tear_file, "22"), lambda folder: None)
    _, problems = inject(output, slow=0.01, step=3)
    assert any("killed within a file" in problem and "neither the earlier nor" in problem for problem in problems)
