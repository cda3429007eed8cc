"""The rules that hold the project together, checked on its own files, each rule also on a planted violation."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import processors

ROOT = Path(__file__).resolve().parents[1]
CODE = ("slrnet", "ray_jobs", "data_prep", "benchmarks")
# The rooms of slrnet/, floor by floor: a room imports from the floors below it alone.
FLOORS = (
    ("version", "config"),
    ("cpu",),
    ("ops", "storage", "distributed"),
    ("views", "models", "data", "recipes"),
    ("losses", "calibration", "viz"),
    ("tracking", "inference", "checkpoints"),
    ("evaluation",),
    ("training",),
    ("launch",),
    ("tools", "sweeps"),
    ("cli",),
    ("__main__",),
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
DATA_PREP = HEIGHT["data"] + 1
"""The converters use what is below the losses."""
# What scripts and commands may import although it is not below them: each converter is also a script of the command.
ALLOWED_ABOVE = {
    **{
        f"data_prep/{name}.py": {"slrnet.cli.main", "slrnet.cli.main.main"}
        for name in ("voc", "coco", "l2id", "folder", "tars", "demo")
    },
    "slrnet/cli/training.py": {"ray_jobs.demo", "ray_jobs.demo.run_demo"},
}
# Which files may import a module (and everything below it); all other code may not.
SEAMS = {
    "mlflow": {"slrnet/tracking/mlflow.py", "slrnet/tracking/served_model.py"},
    "ray.train": {"slrnet/launch/train.py"},
    "ray.tune": {"slrnet/sweeps/run.py"},
    "pynvml": {"slrnet/tracking/gpu_monitor.py"},
}
WITHOUT_RAY = tuple(room for room, height in HEIGHT.items() if height < HEIGHT["launch"])
PUBLIC = ("load", "predict", "train")
"""Names of `slrnet` itself, which belong to the top."""
# Modules whose package has another name.
PACKAGES = {
    "PIL": "pillow",
    "pynvml": "nvidia-ml-py",
    "pydensecrf": "pydensecrf2",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
TEXTS = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", ".json"}
FILES = {"Makefile", "Dockerfile", "run", ".gitignore", ".rayignore", ".dockerignore"}
Rule = Callable[[Path], list[str]]


def sources(root: Path, *folders: str) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path


def texts(root: Path) -> Iterator[tuple[str, str]]:
    """Every text of the project by its path: what lies in the root, and the project's folders."""
    folders = [root / name for name in (*CODE, "tests", "deploy", "docs", ".ci")]
    paths = [*root.iterdir(), *(path for folder in folders if folder.is_dir() for path in folder.rglob("*"))]
    for path in sorted(paths):
        if path.is_file() and (
            path.suffix in TEXTS
            or path.name in {"Makefile", "Dockerfile", "run", ".gitignore", ".rayignore", ".dockerignore"}
        ):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of the modules that a file imports, also inside functions and by `import_module("...")`."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays within its package, which is named by its dots.
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return frozenset(names)


def name_of(node: ast.AST) -> str:
    """The last part of a name with dots; "" for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def imports(names: Iterable[str], module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in names)


@cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def one_seam_for_each_framework(root: Path) -> list[str]:
    violations = []
    for name, path in sources(root, *CODE):
        names = imported(path)
        violations += [
            f"{name} imports {seam}" for seam, allowed in SEAMS.items() if imports(names, seam) - (name in allowed) > 0
        ]
        inner = name.removeprefix("slrnet/").split("/")[0].removesuffix(".py")
        if name.startswith("slrnet/") and inner in WITHOUT_RAY and imports(names, "ray"):
            violations.append(f"{name} imports ray")
    return violations


def dependencies_point_down(root: Path) -> list[str]:
    violations = []
    for name, path in sources(root, "slrnet", "data_prep"):
        names = imported(path)
        parts = name.removesuffix(".py").split("/")
        own = parts[1] if parts[0] == "slrnet" else ""
        names -= ALLOWED_ABOVE.get(name, set())
        forbidden = ["ray_jobs", "tests", "benchmarks", *(["data_prep"] if own and own != "cli" else [])]
        violations += [f"{name} imports {above}" for above in forbidden if imports(names, above)]
        violations += [
            f"{name} imports relatively: {relative}" for relative in sorted(names) if relative.startswith(".")
        ]
        if name == "slrnet/__init__.py":
            continue  # it offers names of all rooms, on demand
        if own and own not in HEIGHT:
            violations.append(f"{name} is in no room; FLOORS in this test lists them, with the floor that each is on")
            continue
        height = HEIGHT[own] if own else DATA_PREP
        for room in sorted({module.split(".")[1] for module in names if module.startswith("slrnet.")} - {own}):
            if room not in HEIGHT and room not in PUBLIC:
                violations.append(f"{name} imports slrnet.{room}, which is no room")
            elif HEIGHT.get(room, len(FLOORS)) >= height:
                violations.append(f"{name} imports slrnet.{room}, which is not below it")
    return violations


def the_picture_shows_the_floors(root: Path) -> list[str]:
    picture = root / "docs" / "architecture.svg"
    if not picture.is_file():
        return []  # the page that shows it fails without it
    shown: dict[int, set[str]] = {}
    boxes = r'<text x="\d+" y="(\d+)" text-anchor="middle" font-weight="bold">([a-z.]+)</text>'
    for y, room in re.findall(boxes, picture.read_text(encoding="utf-8")):
        shown.setdefault(int(y), set()).add(room.removesuffix(".py"))
    drawn = [shown[y] for y in sorted(shown, reverse=True)]
    floors = [{"config", "cpu"}, *(set(rooms) for rooms in FLOORS[2:-1])]
    pairs = enumerate(zip_longest(drawn, floors))
    return [f"the picture has {a} on floor {floor}, FLOORS has {b}" for floor, (a, b) in pairs if a != b]


def functions_are_short(root: Path) -> list[str]:
    sizes = [
        (lines_of(node), f"{name}:{node.name}") for name, path in sources(root, "slrnet") for node in functions(path)
    ]
    violations = [f"{where} has {size} lines, over 80" for size, where in sizes if size > 80]
    violations += [
        f"{where} has {size} lines, over 40" for size, where in sizes if size > 40 and where.endswith(":forward")
    ]
    lengths = sorted(size for size, _ in sizes)
    if lengths and statistics.median(lengths) > 15:
        violations.append(f"the median function has {statistics.median(lengths)} lines, over 15")
    if lengths and lengths[int(0.9 * (len(lengths) - 1))] > 40:
        violations.append(
            f"the 90th percentile of functions has {lengths[int(0.9 * (len(lengths) - 1))]} lines, over 40"
        )
    return violations


def job_scripts_are_thin(root: Path) -> list[str]:
    counts = {name: len(path.read_text().splitlines()) for name, path in sources(root, "ray_jobs")}
    # The demo's driver tells a story on the terminal; the others hand their arguments to the `slrnet` command.
    return [f"{name} has {n} lines, over 25" for name, n in counts.items() if n > 25 and name != "ray_jobs/demo.py"]


def public_names_are_documented(root: Path) -> list[str]:
    violations = []
    for name, path in sources(root, "slrnet"):
        tree = tree_of(path)
        if not ast.get_docstring(tree):
            violations.append(f"{name} has no docstring")
        public = _all_of(tree)
        if public is None:
            if path.name != "__init__.py":
                violations.append(f"{name} has no __all__")
            continue
        documented, defined = _documented(tree)
        violations += [f"{name}: __all__ names {item}, which it lacks" for item in public if item not in defined]
        violations += [f"{name}: {item} has no docstring" for item in public if item in defined - documented]
    return violations


def _all_of(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def _documented(tree: ast.Module) -> tuple[set[str], set[str]]:
    documented, defined = set[str](), set[str]()
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
            documented |= {node.name} if ast.get_docstring(node) else set()
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            defined.add(target)
            text = following.value if isinstance(following, ast.Expr) else None
            documented |= {target} if isinstance(text, ast.Constant) and isinstance(text.value, str) else set()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            # Documented where it is defined.
            names = {alias.asname or alias.name for alias in node.names}
            defined, documented = defined | names, documented | names
    documented.add("__version__")
    return documented, defined


def no_machine_paths(root: Path) -> list[str]:
    places = "|".join(["work", "root", "tmp", "Users", "home/(?!ray/)[a-z]"])
    here = "|".join(re.escape(f"{place}/") for place in {str(root.parent), str(Path.home())} - {"/"})
    # Not after a letter, a dot or a bracket: those are parts of relative paths, addresses and patterns.
    pattern = re.compile(rf"(?<![\w.~/*{{}}<>-])(?:/(?:{places})/|{here})")
    return [
        f"{name}:{number} holds a path of one machine: {line.strip()[:80]}"
        for name, text in texts(root)
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def nothing_is_left_for_later(root: Path) -> list[str]:
    pattern = re.compile(
        r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "not implemented " + "yet"]) + r")\b"
    )
    return [
        f"{name}:{number} is unfinished: {line.strip()[:80]}"
        for name, text in texts(root)
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def each_test_file_mirrors_a_module(root: Path) -> list[str]:
    """ROOM/test_NAME.py tests a module, folder, page or name of slrnet/ROOM; ROOM/test_NAME_PART.py a part of it."""
    misplaced = []
    for name, path in sources(root, "tests/slrnet"):
        room = root / "slrnet" / path.parent.relative_to(root / "tests" / "slrnet")
        if not room.is_dir():
            misplaced.append(f"{name} is in a folder that slrnet does not have")
        elif path.name != "conftest.py":
            tested = path.stem.removeprefix("test_") + "_"
            known = {entry.stem.lower() for entry in room.iterdir()} - {"__init__", "__pycache__"}
            init = room / "__init__.py"
            known |= set(_all_of(tree_of(init)) or []) if init.is_file() else set()
            if path.stem == tested[:-1] or not any(tested.startswith(f"{entry}_") for entry in known):
                misplaced.append(f"{name} is not named for anything in {room.relative_to(root).as_posix()}/")
    return misplaced


def every_test_can_fail(root: Path) -> list[str]:
    violations = []
    for name, path in sources(root, "tests"):
        bodies = [(node, words_of(node)) for node in functions(path)]
        expects = {"assert", "raises", "warns", "fail", "gradcheck"}
        # A test may leave the expectation to a helper of its file, and that one to another.
        for _ in range(2):
            expects |= {node.name for node, words in bodies if words & expects and not node.name.startswith("test")}
        violations += [
            f"{name}:{node.lineno} {node.name} expects nothing"
            for node, words in bodies
            if node.name.startswith("test") and not words & expects
        ]
    return violations


def words_of(function: ast.AST) -> set[str]:
    """The names that a function's body uses; "assert" for a statement, or for names such as `assert_close`."""
    nodes = [node for child in ast.iter_child_nodes(function) for node in ast.walk(child)]
    words = {"assert" if isinstance(node, ast.Assert) else name_of(node) for node in nodes}
    return {"assert" if word.startswith("assert") else word for word in words}


def imports_are_declared(root: Path) -> list[str]:
    """Third-party modules that the code imports belong to a package of requirements.txt or of an extra but `dev`."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {canonicalize_name(r.name) for r in requirements(root)}
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    declared |= {canonicalize_name(Requirement(text).name) for text in extras}
    violations = []
    for name, path in sources(root, *CODE):
        for module in sorted(
            {dotted.split(".")[0] for dotted in imported(path)} - sys.stdlib_module_names - {*CODE, ""}
        ):
            if canonicalize_name(PACKAGES.get(module, module)) not in declared:
                violations.append(f"{name} imports {module}, which requirements.txt does not name")
    return violations


def requirements(root: Path) -> list[Requirement]:
    lines = (root / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def constraints(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def pinned_versions_fit(root: Path) -> list[str]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
    pinned, violations = constraints(root), []
    for requirement in [*requirements(root), *extras]:
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None:
            violations.append(f"constraints.txt has no version of {requirement.name}")
        elif version not in requirement.specifier:
            violations.append(f"constraints.txt has {requirement.name} {version}, outside {requirement.specifier}")
        if not any(bound.operator in (">=", "==") for bound in requirement.specifier):
            violations.append(f"{requirement.name} has no lower bound")
    return violations


RULES: list[Rule] = [
    one_seam_for_each_framework,
    dependencies_point_down,
    the_picture_shows_the_floors,
    functions_are_short,
    job_scripts_are_thin,
    public_names_are_documented,
    no_machine_paths,
    nothing_is_left_for_later,
    each_test_file_mirrors_a_module,
    every_test_can_fail,
    imports_are_declared,
    pinned_versions_fit,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


DOC = '"""Doc."""\n'
MACHINE_PATH = "/".join(["", "work", "data"])
LONG = "def f():\n" + "    x = 1\n" * 80
PLANTED: list[tuple[Rule, str, str, str]] = [
    (one_seam_for_each_framework, "slrnet/training/trainer.py", "import mlflow", "imports mlflow"),
    (
        one_seam_for_each_framework,
        "slrnet/training/x.py",
        "def f():\n    from mlflow import MlflowClient",
        "imports mlflow",
    ),
    (one_seam_for_each_framework, "slrnet/training/x.py", "import_module('mlflow.entities')", "imports mlflow"),
    (one_seam_for_each_framework, "ray_jobs/train.py", "from ray import train", "imports ray.train"),
    (one_seam_for_each_framework, "ray_jobs/train.py", "import ray.train.torch", "imports ray.train"),
    (one_seam_for_each_framework, "ray_jobs/tune.py", "from ray import tune", "imports ray.tune"),
    (one_seam_for_each_framework, "slrnet/models/x.py", "import ray", "imports ray"),
    (one_seam_for_each_framework, "slrnet/config.py", "from ray.util import state", "imports ray"),
    (one_seam_for_each_framework, "slrnet/training/trainer.py", "import pynvml", "imports pynvml"),
    (dependencies_point_down, "slrnet/config.py", "from slrnet.models import x", "imports slrnet.models"),
    (
        the_picture_shows_the_floors,
        "docs/architecture.svg",
        (ROOT / "docs/architecture.svg").read_text(encoding="utf-8").replace(">views<", ">looks<"),
        "looks",
    ),
    (
        the_picture_shows_the_floors,
        "docs/architecture.svg",
        '<text x="4" y="6" text-anchor="middle" font-weight="bold">cli</text>',
        "the picture has None on floor 9",
    ),
    (dependencies_point_down, "slrnet/losses/a.py", "from slrnet import training", "imports slrnet.training"),
    (dependencies_point_down, "slrnet/inference/a.py", "import slrnet.training.b", "imports slrnet.training"),
    (dependencies_point_down, "slrnet/data/a.py", "from slrnet.models.b import c", "imports slrnet.models"),
    (dependencies_point_down, "slrnet/tools/a.py", "from slrnet import load", "imports slrnet.load"),
    (dependencies_point_down, "slrnet/utils/a.py", "import torch", "is in no room"),
    (dependencies_point_down, "slrnet/utils.py", "import torch", "is in no room"),
    (dependencies_point_down, "slrnet/tools/a.py", "from slrnet.utils import b", "which is no room"),
    (dependencies_point_down, "slrnet/data/a.py", "from data_prep.voc import x", "imports data_prep"),
    (dependencies_point_down, "data_prep/a.py", "from slrnet.training import x", "imports slrnet.training"),
    (dependencies_point_down, "data_prep/conversion.py", "from slrnet.cli.main import main", "imports slrnet.cli"),
    (dependencies_point_down, "slrnet/inference/a.py", "import ray_jobs.train", "imports ray_jobs"),
    (dependencies_point_down, "slrnet/cli/data.py", "import ray_jobs.demo", "imports ray_jobs"),
    (dependencies_point_down, "slrnet/models/a.py", "from . import b", "imports relatively"),
    (functions_are_short, "slrnet/models/a.py", LONG, "has 81 lines, over 80"),
    (functions_are_short, "slrnet/models/a.py", "def forward():\n" + "    x = 1\n" * 40, "has 41 lines, over 40"),
    (functions_are_short, "slrnet/models/a.py", "def f():\n" + "    x = 1\n" * 15, "median function has 16"),
    (
        functions_are_short,
        "slrnet/models/a.py",
        "def f():\n" + "    x = 1\n" * 40,
        "90th percentile of functions has 41",
    ),
    (job_scripts_are_thin, "ray_jobs/train.py", "x = 1\n" * 26, "has 26 lines"),
    (public_names_are_documented, "slrnet/a.py", "__all__ = []", "has no docstring"),
    (public_names_are_documented, "slrnet/a.py", DOC, "has no __all__"),
    (public_names_are_documented, "slrnet/a.py", DOC + "__all__ = ['f']\ndef f(): ...", "f has no docstring"),
    (public_names_are_documented, "slrnet/a.py", DOC + "__all__ = ['A']\nA = 1\nB = 2", "A has no docstring"),
    (public_names_are_documented, "slrnet/a.py", DOC + "__all__ = ['g']", "names g, which it lacks"),
    (no_machine_paths, "slrnet/a.py", f"x = '{MACHINE_PATH}/x'", "slrnet/a.py:1 holds a path"),
    (no_machine_paths, "README.md", f"see {MACHINE_PATH}/x", "README.md:1 holds a path"),
    (nothing_is_left_for_later, "slrnet/a.py", "# TO" + "DO: the rest", "is unfinished"),
    (each_test_file_mirrors_a_module, "tests/slrnet/kernels/test_a.py", "", "is in a folder that slrnet does not have"),
    (each_test_file_mirrors_a_module, "tests/slrnet/test_utils.py", "", "is not named for anything in slrnet/"),
    (
        each_test_file_mirrors_a_module,
        "tests/slrnet/models/test_cvlr.py",
        "",
        "is not named for anything in slrnet/models/",
    ),
    (each_test_file_mirrors_a_module, "tests/slrnet/helpers.py", "", "is not named for anything in slrnet/"),
    (every_test_can_fail, "tests/test_a.py", "def test_f():\n    f(1)", "test_f expects nothing"),
    (imports_are_declared, "slrnet/a.py", "import pandas", "imports pandas"),
    (imports_are_declared, "data_prep/a.py", "import no_such_module", "imports no_such_module"),
    (pinned_versions_fit, "requirements.txt", "torch>=2.9\nrich>=13", "no version of rich"),
    (pinned_versions_fit, "requirements.txt", "torch>=99", "outside >=99"),
    (pinned_versions_fit, "requirements.txt", "torch<99", "torch has no lower bound"),
]


@pytest.mark.parametrize(
    ("rule", "file", "text", "expected"), PLANTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_planted_violation_is_found(rule: Rule, file: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "slrnet" / "models").mkdir(parents=True)
    plant(tmp_path, {file: text})
    violations = rule(tmp_path)
    assert any(expected in violation for violation in violations), violations
    assert all(violation.startswith((file, "the ", "constraints", "torch")) for violation in violations)


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    good = DOC + "import mlflow\n\n__all__ = ['LIMIT', 'f']\nLIMIT = 1\n" + DOC + "def f():\n    " + DOC
    plant(
        tmp_path,
        {
            "slrnet/tracking/mlflow.py": good,
            "slrnet/launch/train.py": DOC + "__all__ = []\nimport ray.train\nfrom slrnet.models import slrnet",
            "slrnet/training/trainer.py": DOC + "__all__ = []\nfrom slrnet.training.step import x\nimport torch",
            "slrnet/__init__.py": DOC + "def load():\n    from slrnet.inference import predictor",
            "slrnet/cli/training.py": DOC + "__all__ = []\nfrom ray_jobs.demo import run_demo",
            "data_prep/voc.py": "from slrnet.cli.main import main",
            "ray_jobs/demo.py": "x = 1\n" * 300,
            "ray_jobs/train.py": "import ray\nimport slrnet.training",
            "tests/slrnet/training/conftest.py": "",
            "tests/slrnet/training/test_trainer.py": "",
            "tests/slrnet/training/test_trainer_resume.py": "",
            "tests/test_a.py": "def test_f():\n    refuses(1)\n\ndef refuses(x):\n    with raises(E):\n        f(x)",
            "README.md": "see docs/work/x, https://example.org/tmp/x and <folder>/root/x",
        },
    )
    assert [violation for rule in RULES for violation in rule(tmp_path)] == []


def plant(root: Path, files: dict[str, str]) -> None:
    for name in ("pyproject.toml", "requirements.txt", "constraints.txt"):
        (root / name).write_text((ROOT / name).read_text())
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    "statement",
    ["import slrnet", "from slrnet.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"],
    ids=["package", "help"],
)
def test_starting_is_light(statement: str) -> None:
    heavy = ("torch", "ray", "mlflow", "torchvision", "timm", "numpy", "pydantic", "argcomplete")
    script = f"{statement}\nimport sys; print([name for name in {heavy!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_what_tests_share_is_light() -> None:
    """A test of one plain file waits for none of what other tests need."""
    heavy = ("torch", "ray", "mlflow", "torchvision", "timm", "moto", "selenium", "boto3")
    script = f"""
import importlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("shared", {str(ROOT / "tests" / "conftest.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name in module.pytest_plugins:
    importlib.import_module(name)
print(len(module.pytest_plugins), [name for name in {heavy!r} if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    count, _, imported_too = done.stdout.strip().partition(" ")
    assert int(count) > 0
    assert imported_too == "[]"


def test_dependencies_have_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert set(project["project"]["dynamic"]) == {"version", "dependencies"}
    assert project["project"]["requires-python"] == ">=3.11"
    names = {canonicalize_name(requirement.name) for requirement in requirements(ROOT)}
    # The shell of that name makes every `import torch` warn.
    assert "nvidia-ml-py" in names
    assert "pynvml" not in names | set(constraints(ROOT))
    assert {"default", "train", "tune"} == next(r.extras for r in requirements(ROOT) if r.name == "ray")


class TestClusterFile:
    @pytest.fixture
    def cluster(self) -> dict[str, object]:
        loaded: dict[str, object] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        return loaded

    @pytest.fixture
    def schema(self) -> dict[str, object]:
        # Found without importing Ray, which takes seconds.
        spec = find_spec("ray")
        assert spec is not None
        assert spec.origin is not None
        loaded: dict[str, object] = json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())
        return loaded

    def test_fits_rays_schema(self, cluster: dict[str, object], schema: dict[str, object]) -> None:
        from jsonschema import Draft7Validator  # importing it takes seconds

        assert not list(Draft7Validator(schema).iter_errors(cluster))
        assert list(Draft7Validator(schema).iter_errors({**cluster, "max_workers": "four"}))

    def test_token_authentication_is_on(self, cluster: dict[str, object]) -> None:
        docker, mounts = cluster["docker"], cluster["file_mounts"]
        assert isinstance(docker, dict)
        assert isinstance(mounts, dict)
        assert "-e RAY_AUTH_MODE=token" in docker["run_options"]
        assert mounts["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"

    def test_the_head_is_bought_and_the_workers_are_spot(self, cluster: dict[str, object]) -> None:
        types = cluster["available_node_types"]
        assert isinstance(types, dict)
        assert "InstanceMarketOptions" not in types["head"]["node_config"]
        assert types["gpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert cluster["head_node_type"] == "head"


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the project's Makefile in a folder that has what the installation reads, and nothing else.

    Not as a part of the `make` that runs the tests, which would add lines about folders.
    """
    for name in ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


class TestMakefile:
    def test_help_lists_every_target(self) -> None:
        done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
        listed = {line.split()[1] for line in done.stdout.splitlines() if line.strip().startswith("make ")}
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert phony is not None
        assert listed == set(phony.group(1).split())
        assert {"demo", "test", "test-fast", "lint", "format", "bench", "clean"} <= listed

    def test_an_old_python_is_refused_by_name(self, tmp_path: Path) -> None:
        old = tmp_path / "python3.9"
        shim = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (old)'; exec(sys.argv[2])"
        old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{shim}" "$@"\n')
        old.chmod(0o755)
        done = make(tmp_path, "test", f"PYTHON={old}")
        assert done.returncode != 0
        assert f"slrnet needs Python 3.11 or newer, and {old} is 3.9.2" in done.stderr
        assert not (tmp_path / ".venv").exists()

    @pytest.mark.parametrize(("failing", "status"), [("", 0), ("not slow", 2), ("slow", 2)])
    def test_all_tests_run_and_both_parts_are_reported(self, failing: str, status: int, tmp_path: Path) -> None:
        (tmp_path / ".venv").mkdir()
        python = tmp_path / "python"
        python.write_text(
            '#!/bin/sh\necho "$@" >> calls\n'
            f'if [ "$4" != "{failing}" ]; then echo "2 passed in 1.00s"; exit; fi\n'
            'echo "FAILED tests/test_a.py::test_b - no"; echo "1 failed in 1.00s"; exit 1\n'
        )
        python.chmod(0o755)
        done = make(tmp_path, "test", f"BIN={tmp_path}", "STAMP=")
        calls = (tmp_path / "calls").read_text().splitlines()
        assert [call.split(" --")[0] for call in calls] == ["-m pytest -m not slow", "-m pytest -m slow"]
        assert done.returncode == status
        *failures, fast, slow = done.stdout.rpartition("\n\n")[2].splitlines()
        assert failures == (["FAILED tests/test_a.py::test_b - no"] if failing else [])
        outcome = {True: "FAILED (1 failed in 1.00s)", False: "passed (2 passed in 1.00s)"}
        assert fast == f"fast tests: {outcome[failing == 'not slow']}"
        assert slow == f"slow tests: {outcome[failing == 'slow']}"

    @pytest.mark.parametrize("failing", ["", "lint", "test", "test-processors"])
    def test_continuous_integration_runs_everything_and_cleans_up(self, failing: str, tmp_path: Path) -> None:
        """With a `make` that writes down what it is asked for; .venv goes also where it fails."""
        for name in (".ci", "bin", ".venv"):
            (tmp_path / name).mkdir()
        script, fake = tmp_path / ".ci" / "run", tmp_path / "bin" / "make"
        script.write_text((ROOT / ".ci" / "run").read_text())
        fake.write_text(f'#!/bin/sh\necho "$@" >> calls\n[ "$1" != "{failing}" ]\n')
        script.chmod(0o755)
        fake.chmod(0o755)
        environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        done = subprocess.run([script], env=environment, check=False)
        targets = [call.split()[0] for call in (tmp_path / "calls").read_text().splitlines()]
        assert (done.returncode == 0) == (failing == "")
        assert targets == ["lint", "test", "test-processors"][: len(targets)]
        assert targets[-1] == (failing or "test-processors")
        assert not (tmp_path / ".venv").exists()
        assert os.access(ROOT / ".ci" / "run", os.X_OK)

    def test_continuous_integration_names_combinations_that_exist(self) -> None:
        (names,) = re.findall(r'^make test-processors ONLY="(.*)"$', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
        assert set(names.split()) <= {combination.name for combination in processors.combinations()}
