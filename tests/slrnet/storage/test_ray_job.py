from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrnet.storage.ray_job import in_copy, lasting, unset_variables, uploaded

REMEDY = r"give an absolute path that all nodes see, such as \$PWD/a/b in the terminal that submits"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder like the one that Ray gives to a submitted job."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0a1b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("a/b", True),
        (".", True),
        ("{copy}/a/b", True),
        ("{link}/a/b", True),
        ("../../../runs", False),
        ("/runs", False),
        ("/working_dir_files/_ray_pkg_1/runs", False),
        ("/runtime_resources/runs", False),
    ],
)
def test_what_lies_in_rays_copy(path: str, inside: bool, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "session_1")
    link = tmp_path / "latest" / copy.relative_to(tmp_path / "session_1")
    assert in_copy(Path(path.format(copy=copy, link=link))) == inside


@pytest.mark.parametrize("path", ["a/b", "{copy}/a/b", "x/../a/b"])
@pytest.mark.parametrize(("check", "problem"), [(lasting, "would be in Ray's copy"), (uploaded, "is not in Ray's")])
def test_a_path_that_is_lost_is_refused_with_the_remedy(
    path: str, check: Callable[[Path], Path], problem: str, copy: Path
) -> None:
    with pytest.raises(ValueError, match=f"^a/b {problem}.*{REMEDY}$"):
        check(Path(path.format(copy=copy)))


def test_a_setting_is_named(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.path own would be"):
        lasting(copy / "own", setting="data.path")


def test_what_works_goes_on_working(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "own.json").touch()
    assert uploaded(Path("own.json")) == Path("own.json"), "an uploaded file is the submitter's"
    monkeypatch.chdir(tmp_path)
    for check in (lasting, uploaded):
        assert check(Path("runs")) == Path("runs")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLRNET_STORAGE": "/runs"}, ""),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "SLRNET_STORAGE, MLFLOW_TRACKING_URI, SLRNET_WEIGHTS, SLRNET_CACHE;"),
        (
            {
                "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}",
                "SLRNET_STORAGE": "/runs",
                "SLRNET_WEIGHTS": "/w",
                "SLRNET_CACHE": "",
            },
            "the variables MLFLOW_TRACKING_URI, SLRNET_CACHE;",
        ),
    ],
)
def test_a_job_says_which_variables_it_lacks(
    environment: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        "SLRNET_STORAGE",
        "MLFLOW_TRACKING_URI",
        "SLRNET_WEIGHTS",
        "SLRNET_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    note = unset_variables()
    assert expected in note
    assert bool(note) == bool(expected)
    assert not note or """--runtime-env-json '{"env_vars": {"NAME": "VALUE"}}'""" in note
