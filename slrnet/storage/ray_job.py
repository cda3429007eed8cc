"""What a submitted job sees: a copy of the project, and no variables of the terminal.

`ray job submit --working-dir .` uploads the folder without what `.gitignore` and `.rayignore` name, and runs the job in
a copy on the cluster. Ray removes the copy, and the next submission gets another one: what a job writes there is lost,
and a data set or a run that it reads there has no place that a later job, or another node, finds.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

__all__ = ["in_copy", "lasting", "unset_variables", "uploaded"]

VARIABLES = ("SLRNET_STORAGE", "MLFLOW_TRACKING_URI", "SLRNET_WEIGHTS", "SLRNET_CACHE")
"""Variables that decide where a job reads and writes."""
_COPIES = ("runtime_resources", "working_dir_files")
"""The folders of a Ray session above all copies."""


def in_copy(path: Path) -> bool:
    """Whether a path, relative to the working folder, is in a copy that Ray made for a job."""
    return _COPIES in pairwise(path.resolve().parts)


def lasting(path: Path, *, setting: str = "") -> Path:
    """Returns a path of data or results, which a `setting` may have named.

    Raises:
        ValueError: it is in Ray's copy of the project; the message has the remedy.
    """
    if in_copy(path):
        raise ValueError(
            f"{setting} {_within_copy(path)} would be in Ray's copy of the project, which no other job sees and Ray "
            f"removes; {_absolute(path)}".strip()
        )
    return path


def uploaded(path: Path) -> Path:
    """Returns the path of an input file; raises a ValueError with the remedy if Ray's copy of the project lacks it."""
    if not path.exists() and in_copy(path):
        raise ValueError(
            f"{_within_copy(path)} is not in Ray's copy of the project, which lacks what .gitignore and .rayignore "
            f"name; {_absolute(path)}"
        )
    return path


def unset_variables() -> str:
    """For a submitted job, says which of `VARIABLES` it does not have and how to pass them; else ""."""
    unset = [name for name in VARIABLES if not os.environ.get(name)]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or not unset:
        return ""
    return (
        f"this job does not have the variables {', '.join(unset)}; those of your terminal do not reach a job: pass "
        """them with `ray job submit --runtime-env-json '{"env_vars": {"NAME": "VALUE"}}'`"""
    )


def _within_copy(path: Path) -> Path:
    parts = path.resolve().parts
    return Path(*parts[parts.index(_COPIES[1]) + 2 :])


def _absolute(path: Path) -> str:
    return f"give an absolute path that all nodes see, such as $PWD/{_within_copy(path)} in the terminal that submits"
