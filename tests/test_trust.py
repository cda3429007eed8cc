"""Every place that prints, logs, removes, writes, requests or runs a program is one of the few that may.

The syntax tree of all code is walked. An exception has its reason; one that nothing needs fails too.
"""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.test_repository import ROOT, sources, tree_of

# What each kind of place looks like, by the name of what is called, and where it may stand: file and reason.
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "prints or logs": (
        r"print|logging\.getLogger|sys\.std(out|err)\.write",
        {
            "slrnet/storage/shown.py": "escapes what it prints and logs",
            "slrnet/cpu/compiled.py": "logs a compiler's message; its room is below storage",
            "slrnet/tracking/mlflow.py": "sets the level of MLflow's logger",
            "slrnet/launch/train.py": "sets the level of Ray's logger",
        },
    ),
}


@cache
def calls() -> list[tuple[str, int, str]]:
    """File, line and name of each call: `f`, `module.f`, `.f` for the method of a value."""
    return [
        (file, node.lineno, name_of(node.func))
        for file, path in sources(ROOT, "slrnet", "data_prep", "ray_jobs")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
    ]


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_only_few_places_may(kind: str) -> None:
    pattern, allowed = KINDS[kind]
    found: dict[str, list[str]] = {}
    for file, line, name in calls():
        if re.fullmatch(pattern, name):
            found.setdefault(file, []).append(f"{line}: {name}")
    assert {name: lines for name, lines in found.items() if name not in allowed} == {}
    assert set(allowed) - set(found) == set(), "nothing needs these exceptions any more"
