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
            "slrnet/ops/kernels.py": "logs a compiler's message; its room is beside storage",
            "slrnet/tracking/mlflow.py": "sets the level of MLflow's logger",
            "slrnet/launch/train.py": "sets the level of Ray's logger",
        },
    ),
    "removes": (
        r"shutil\.(rmtree|move)|os\.(remove|unlink|rmdir|removedirs)|.*\.(unlink|rmdir)",
        {
            "slrnet/storage/folders.py": "removes what is marked, beneath a folder that it was given",
            "slrnet/storage/files.py": "its own unfinished file",
            "slrnet/storage/lease.py": "its own lease, and the empty folder that it made for it",
            "slrnet/storage/remote.py": "copies in the cache's folders, to make room",
            "slrnet/data/manifest.py": "copies in the cache, of a data set that another one has replaced",
            "slrnet/launch/pseudo_label.py": "unfinished files in its own folder of work",
            "ray_jobs/demo.py": "its own temporary folder",
        },
    ),
    "writes": (
        r".*\.(write_text|write_bytes|touch|rename|symlink_to|hardlink_to|savefig|copytree|copyfile|copy_files)"
        r"|save_file|torch\.save|np\.savez?|os\.(replace|rename|link|symlink|mkfifo)",
        {
            "slrnet/storage/files.py": "a file beside the one that it replaces",
            "slrnet/storage/folders.py": "the mark of a folder of slrnet's own",
            "slrnet/storage/lease.py": "its own claim on a lease",
            "slrnet/storage/remote.py": "copies an object to an unfinished file",
            "slrnet/checkpoints/checkpoint.py": "a folder that appears whole",
            "slrnet/checkpoints/run_store.py": "copies a run's files to the object store that the user names",
            "slrnet/data/annotation_folder.py": "a folder that appears whole",
            "slrnet/data/manifest.py": "a folder that appears whole",
            "slrnet/data/voc_folder.py": "a folder that appears whole",
            "slrnet/launch/pseudo_label.py": "its own folder of work, which takes its name when it is complete",
            "slrnet/sweeps/population.py": "a folder that appears whole",
            "slrnet/sweeps/results.py": "a file that appears whole",
            "slrnet/tools/figures/pictures.py": "a file that appears whole",
            "slrnet/tools/predict.py": "a file that appears whole",
            "slrnet/tools/review/desk.py": "a folder that appears whole, and masks that do",
            "slrnet/tools/review/reviewed_shards.py": "a folder that appears whole",
            "data_prep/demo.py": "pictures that it draws into a temporary folder",
            "ray_jobs/demo.py": "the token of its own cluster, in a temporary folder",
        },
    ),
    "requests": (
        r"urllib\.request\..*|requests\..*|(.*\.)?urlopen|socket\.(create_connection|create_server|socket)|httpx\..*",
        {
            "slrnet/tracking/location.py": "asks the tracking server that the user names whether it is there",
            "slrnet/launch/cluster.py": "asks whether nodes of the user's cluster answer",
            "slrnet/tools/dashboard.py": "looks whether a port of this machine is free",
            "ray_jobs/demo.py": "its own cluster on this machine",
        },
    ),
    "runs programs": (
        r"subprocess\..*|os\.(system|popen|exec\w*|spawn\w*|fork)",
        {
            "slrnet/tracking/provenance.py": "git, for the commit of the code",
            "slrnet/cpu/compiled.py": "the C compiler, on files of the package",
            "slrnet/ops/kernels.py": "the C compiler, on a line that asks for Python.h",
            "slrnet/tools/dashboard.py": "MLflow's server",
            "data_prep/mat_files.py": "the reader of .mat files, with limits",
            "ray_jobs/demo.py": "its own cluster",
        },
    ),
    "opens images": (
        r"(PIL\.)?Image\.open",
        {
            "slrnet/data/images.py": "formats by content, limits before memory",
        },
    ),
    "loads what could hold code": (
        r"torch\.load|pickle\.loads?|np\.load|yaml\..*load.*|eval|exec|marshal\.loads?|joblib\.load|(.*\.)?extractall",
        {
            "slrnet/checkpoints/checkpoint.py": "with weights_only",
            "slrnet/models/encoders.py": "with weights_only",
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


def test_tensors_are_loaded_without_code() -> None:
    loads = [
        ast.unparse(node)
        for _, path in sources(ROOT, "slrnet", "data_prep", "ray_jobs", "benchmarks")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and name_of(node.func) == "torch.load"
    ]
    assert len(loads) >= 2
    assert [load for load in loads if "weights_only=True" not in load] == []
