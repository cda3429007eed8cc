"""Every place that prints, logs, removes, writes, requests or runs a program is one of the few that may.

The syntax tree of all code is walked: each name that is called, or handed on as a value, by its full name whatever it
was imported as. Opening a file counts as writing unless its mode is known to read. An exception has its reason; one
that nothing needs fails too.
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
        r"(builtins\.)?print|p?pprint(\..*)?|os\.write|warnings\.warn|traceback\.print_.*|(.*\.)?tqdm\.write|rich\..*"
        r"|sys\.(__)?std(out|err)(__)?\.(write|writelines|buffer.*)"
        r"|logging\.(getLogger|debug|info|warning|error|exception|critical|log|basicConfig)",
        {
            "slrnet/storage/shown.py": "escapes what it prints and logs",
            "slrnet/cpu/compiled.py": "logs a compiler's message; its room is below storage",
            "slrnet/ops/kernels.py": "logs a compiler's message; its room is beside storage",
            "slrnet/tracking/mlflow.py": "sets the level of MLflow's logger",
            "slrnet/launch/train.py": "sets the level of Ray's logger",
            "slrnet/launch/stopping.py": "one fixed line, from within a signal's handler",
            "data_prep/mat_reader.py": "its result, for the process that started it",
        },
    ),
    "removes": (
        r"shutil\.(rmtree|move)|os\.(remove|removedirs)|.*\.(unlink|rmdir|rmtree|truncate|delete_dir\w*|delete_file)"
        r"|send2trash\..*",
        {
            "slrnet/storage/folders.py": "removes what is marked, beneath a folder that it was given",
            "slrnet/storage/files.py": "its own unfinished file",
            "slrnet/storage/lease.py": "its own lease, and the empty folder that it made for it",
            "slrnet/storage/remote.py": "copies in the cache's folders, to make room",
            "slrnet/data/manifest.py": "copies in the cache, of a data set that another one has replaced",
            "slrnet/launch/pseudo_label.py": "unfinished files in its own folder of work",
            "ray_jobs/demo.py": "its own temporary folder",
            "slrnet/checkpoints/run_store.py": "checkpoints of a run in the object store that the user names",
        },
    ),
    "writes": (
        r"open\(.*|(?!slrnet\.).*\.(write_text|write_bytes|touch|rename|symlink_to|hardlink_to|savefig|tofile|to_csv|to_parquet)"
        r"|.*\.(copy_files|open_output_stream|open_append_stream|write_table|ParquetWriter|save_file|memmap)"
        r"|shutil\.(copy\w*|make_archive|unpack_archive)|torch\.save|(np|numpy)\.save\w*|(json|pickle|yaml)\.dump"
        r"|os\.(replace|rename|renames|link|symlink|mkfifo|mknod|truncate)|tempfile\.(mkstemp|NamedTemporaryFile)",
        {
            "slrnet/storage/files.py": "a file beside the one that it replaces",
            "slrnet/storage/folders.py": "the mark of a folder of slrnet's own",
            "slrnet/storage/lease.py": "its own claim on a lease",
            "slrnet/storage/remote.py": "unfinished copies here, and copies in the store that the user names",
            "slrnet/checkpoints/checkpoint.py": "a folder that appears whole",
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
            "slrnet/data/manifest_rows.py": "a file of a folder that appears whole",
            "slrnet/launch/ray_log.py": "lines at the end of a log in the run's folder",
            "slrnet/storage/shown.py": "the null device, in place of a pipe that nobody reads",
            "slrnet/tools/voc_archive.py": "a file that appears whole",
            "slrnet/tracking/run_log.py": "lines at the end of a log in the run's folder",
            "data_prep/shard_writer.py": "a file of a folder that appears whole",
        },
    ),
    "requests": (
        r"urllib\.request\..*|(requests|httpx|aiohttp|urllib3|http\.client|ftplib|smtplib|boto3|huggingface_hub)\..*"
        r"|(.*\.)?urlopen|socket\.(create_connection|create_server|socket)|asyncio\.(open_connection|start_server)"
        r"|torch\.hub\..*|webbrowser\..*",
        {
            "slrnet/tracking/location.py": "asks the tracking server that the user names whether it is there",
            "slrnet/launch/cluster.py": "asks whether nodes of the user's cluster answer",
            "slrnet/tools/dashboard.py": "looks whether a port of this machine is free",
            "ray_jobs/demo.py": "its own cluster on this machine",
            "slrnet/models/encoders.py": "weights that a recipe names, with their checksum",
            "slrnet/models/hub.py": "weights that the user names on Hugging Face's hub",
        },
    ),
    "runs programs": (
        r"subprocess\.(run|Popen|call|check_\w+|getoutput|getstatusoutput)|os\.(system|popen|exec\w*|(posix_)?spawn\w*|fork\w*)"
        r"|pty\..*|asyncio\.create_subprocess_\w+",
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
        r"(PIL\.)?(Image\.open|ImageFile\.Parser)|cv2\.imread|(.*\.)?(read_image|imread|decode_image_file)",
        {
            "slrnet/data/images.py": "formats by content, limits before memory",
        },
    ),
    "loads what could hold code": (
        r"torch\.(jit\.)?load|(pickle|marshal|dill|cloudpickle|joblib|shelve)\.(loads?|open|Unpickler)|(np|numpy)\.load"
        r"|yaml\..*load.*|(builtins\.)?(eval|exec|compile)|(.*\.)?(extractall|unpack_archive)|runpy\..*",
        {
            "slrnet/checkpoints/checkpoint.py": "with weights_only",
            "slrnet/models/encoders.py": "with weights_only",
            "slrnet/data/readers.py": "what this process's own readers send through a pipe",
        },
    ),
}


READING = re.compile(r"r[bt]?(:.*|\|.*)?|rb?U?|os\.O_RDONLY( \| os\.O_(NONBLOCK|CLOEXEC|DIRECTORY|NOFOLLOW))*")
"""Modes of files that are not written."""
MODES = {"open": 1, "io.open": 1, "os.open": 1, "os.fdopen": 1, "gzip.open": 1, "bz2.open": 1, "lzma.open": 1,
         "tarfile.open": 1, "tarfile.TarFile": 1, "zipfile.ZipFile": 1, "io.FileIO": 1, ".open": 0}  # fmt: skip
"""Where the mode stands among the arguments of what opens files."""


@cache
def uses() -> list[tuple[str, int, str]]:
    """File, line and full name of each name that is used; `.f` for `f` of a value, `open(MODE)` for an opened file."""
    return [
        (file, line, name)
        for file, path in sources(ROOT, "slrnet", "data_prep", "ray_jobs")
        for line, name in uses_in(tree_of(path))
    ]


def uses_in(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and name, as `uses` gives them, of all names in a module."""
    imported: dict[str, str] = {}
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in nodes:
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            found.append((node.lineno, full_name(node, imported)))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, name) for name in names_of_call(node, imported)]
    return found


def names_of_call(call: ast.Call, imported: dict[str, str]) -> list[str]:
    """What a call uses besides the name of its function: a mode other than for reading, `getattr` of a fixed name."""
    name = full_name(call.func, imported)
    if name in ("getattr", "operator.attrgetter", "operator.methodcaller"):
        fixed = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        return [f"{full_name(call.args[0], imported)}.{text}" for text in fixed if isinstance(text, str)]
    place = MODES.get(name, MODES[".open"] if name.endswith(".open") and not name.endswith("Image.open") else None)
    if place is None or any(keyword.arg == "fileobj" for keyword in call.keywords):
        return []
    named = [keyword.value for keyword in call.keywords if keyword.arg in ("mode", "flags")]
    mode = (named or [*call.args[place : place + 1]] or [ast.Constant("r")])[0]
    text = mode.value if isinstance(mode, ast.Constant) else ast.unparse(mode)
    return [] if READING.fullmatch(str(text)) else [f"open({text})"]


def full_name(node: ast.expr, imported: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, imported)}.{node.attr}"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_only_few_places_may(kind: str) -> None:
    pattern, allowed = KINDS[kind]
    found: dict[str, list[str]] = {}
    for file, line, name in uses():
        if re.fullmatch(pattern, name):
            found.setdefault(file, []).append(f"{line}: {name}")
    assert {name: lines for name, lines in found.items() if name not in allowed} == {}
    assert set(allowed) - set(found) == set(), "nothing needs these exceptions any more"


def test_tensors_are_loaded_without_code() -> None:
    loads = [
        ast.unparse(node)
        for _, path in sources(ROOT, "slrnet", "data_prep", "ray_jobs", "benchmarks")
        if "torch.load" in path.read_text(encoding="utf-8")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and full_name(node.func, {}) == "torch.load"
    ]
    assert len(loads) >= 2
    assert [load for load in loads if "weights_only=True" not in load] == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("prints or logs", "print('x')"),
        ("prints or logs", "f(callback=print)"),
        ("prints or logs", "import sys as s\ns.stderr.write('x')"),
        ("prints or logs", "from warnings import warn\nwarn('x')"),
        ("removes", "from shutil import rmtree as away\naway(x)"),
        ("removes", "map(os.remove, paths)"),
        ("removes", "path.parent.unlink()"),
        ("removes", "getattr(path, 'rmdir')()"),
        ("writes", "open(path, 'w')"),
        ("writes", "path.open(mode='ab')"),
        ("writes", "open(path, mode)"),
        ("writes", "import io\nio.open(path, 'r+')"),
        ("writes", "os.open(path, os.O_RDWR)"),
        ("writes", "import tarfile as t\nt.open(path, 'w:gz')"),
        ("writes", "Path(path).write_bytes(b'')"),
        ("writes", "from pathlib import Path\nPath.write_text(path, '')"),
        ("requests", "import requests as r\nr.Session().get(x)"),
        ("requests", "from urllib.request import urlopen as u\nu(x)"),
        ("runs programs", "from subprocess import check_output as c\nc(x)"),
        ("loads what could hold code", "from pickle import loads\nloads(x)"),
    ],
)
def test_a_planted_place_is_seen(kind: str, code: str) -> None:
    assert [name for _, name in uses_in(ast.parse(code)) if re.fullmatch(KINDS[kind][0], name)]


def test_reading_is_no_writing() -> None:
    code = "open(p); open(p, 'rb'); p.open('r'); os.open(p, os.O_RDONLY | os.O_CLOEXEC); tarfile.open(p, 'r:*')"
    assert [name for _, name in uses_in(ast.parse(code)) if re.fullmatch(KINDS["writes"][0], name)] == []
