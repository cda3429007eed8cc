"""What the documentation says is so: places in the code exist, commands are accepted, examples run, links lead on."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import slrnet
from slrnet.cli.data import KINDS
from slrnet.cli.main import COMMANDS, build_parser, main
from slrnet.config import apply_overrides
from slrnet.data.manifest import SCHEMA, DatasetInfo
from slrnet.recipes import get_recipe
from tests.fixtures.stores import Stock

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "deploy" / "kubernetes" / "README.md",
    *PAGES,
]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# The files of which a shell asks for completions.
SCRIPTS = [
    *(f"data_prep/{kind}.py" for kind in KINDS),
    *(f"ray_jobs/{name}.py" for name in ("distill", "evaluate", "pseudo_label", "train", "tune")),
    "slrnet/cli/main.py",
]
# Programs that are not ours, and why their lines are not tried here.
FOREIGN = {
    "aws": "needs an account",
    "hf": "needs a network; tests/slrnet/models/test_hub.py has a hub",
    "docker": "needs Docker; tests/deploy checks the Dockerfile",
    "helm": "needs a cluster",
    "kubectl": "needs a cluster; tests/deploy checks what it applies",
    "sbatch": "needs Slurm; what it runs is checked, and tests/deploy/test_slurm.py runs the script",
    "mlflow": "a server that does not end; tests/slrnet/training/test_tracking.py starts one",
    "make": "its targets are checked; tests/test_repository.py has the Makefile's own tests",
    "eval": "changes the shell",
    "export": "sets a variable",
    "pre-commit": "changes the checkout's hooks",
}


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block."""
    for _, language, content in FENCE.findall(path.read_text(encoding="utf-8")):
        yield language, content


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of the documentation, as (file, words) without variables set in front of it."""
    found = []
    for path in TEXTS:
        for language, content in blocks(path):
            for line in content.replace("\\\n", " ").splitlines() if language == "sh" else ():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                if words:
                    found.append((path.relative_to(ROOT).as_posix(), words))
    return found


def subcommand(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a subcommand, as `slrnet` builds it."""
    parser = build_parser(words)
    for word in words:
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = commands.choices[word]
    return parser


def test_every_block_says_what_it_is() -> None:
    unnamed = [path.name for path in TEXTS for language, _ in blocks(path) if language not in ("sh", "text", "python")]
    assert unnamed == []


def test_commands_are_accepted() -> None:
    refused = []
    for file, words in commands():
        try:
            accept(words)
        except (Exception, SystemExit) as error:
            refused.append(f"{file}: {shlex.join(words)}: {error!r}")
    assert not refused, "\n".join(refused)


def accept(words: list[str]) -> None:
    """Raises if a command line of the documentation would be refused; runs nothing."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "ray":
        accepted_by_ray(words[1:])
        if "--" not in words:
            return
        words = words[words.index("--") + 1 :]
        program = words[0]
    if program == "sbatch":
        words = words[words.index("deploy/slurm.sh") + 1 :]
        program = words[0]
    if program == "slrnet":
        arguments = words[1:]
    elif program == "python" and words[1] == "docs/generate.py":
        return
    elif program == "python" and words[1].startswith("benchmarks/"):
        parser_of(words[1]).parse_args(words[2:])
        return
    elif program == "python":
        assert (ROOT / words[1]).is_file(), words
        arguments = [*command_of(words[1]), *words[2:]]
    else:
        assert program in FOREIGN, words
        if program == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return
    options = parse(arguments[: arguments.index(">")] if ">" in arguments else arguments)
    if getattr(options, "recipe", None):
        apply_overrides(get_recipe(options.recipe), options.set)


def accepted_by_ray(words: list[str]) -> None:
    """Ray's own parser takes these words of a `ray` command; nothing is run."""
    from ray.scripts.scripts import cli

    command: Any = cli
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, [word for word in words if word not in (">", "/dev/null")])


def ray_commands_of_deploy() -> list[str]:
    """What the cluster's files run of Ray's, and what cluster.yaml's comments advise; a 1 for each variable."""
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    cluster = yaml.safe_load(text)
    runs = [line for name in ("head_start", "worker_start") for line in cluster[f"{name}_ray_commands"]]
    job = yaml.safe_load((ROOT / "deploy/kubernetes/base/rayjob.yaml").read_text(encoding="utf-8"))["spec"]
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    runs += [f"ray start {' '.join(f'--{k}={v}' for k, v in group['rayStartParams'].items())}" for group in groups]
    comments = re.sub(r" \\\n#\s+", " ", "\n".join(line for line in text.splitlines() if line.startswith("#")))
    script = (ROOT / "deploy/slurm.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"\bray (?:up|down|dashboard|job|start|stop|get-auth-token|health-check) ?[^\n>&;']*", script)
    found += re.findall(r"^# +\d\. (ray [a-z].*?)(?:  .*)?$", comments, re.MULTILINE)
    found += [match.group() for line in runs for match in [re.search(r"\bray (?:start|stop)[^>]*", line)] if match]
    return [re.sub(r'"?\$\w+"?', "1", line) for line in found]


def test_commands_of_the_clusters_files_are_accepted() -> None:
    refused = []
    for line in ray_commands_of_deploy():
        try:
            accepted_by_ray(shlex.split(line)[1:])
        except Exception as error:
            refused.append(f"{line}: {error!r}")
    assert not refused, "\n".join(refused)


def test_a_ray_command_that_does_not_exist_is_found() -> None:
    import click

    with pytest.raises(click.UsageError, match="use-internal-ip"):
        accepted_by_ray(["get-head-ip", "--use-internal-ip", "cluster.yaml"])


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a benchmark builds, taken at the moment when it would parse."""
    parsers: list[argparse.ArgumentParser] = []

    def take(parser: argparse.ArgumentParser, *_: Any) -> argparse.Namespace:
        parsers.append(parser)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", take)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return parsers[0]


def command_of(script: str) -> list[str]:
    """The subcommand that a script runs."""
    (called,) = re.findall(r"main\(\[(.*), \*sys.argv\[1:\]\]\)", (ROOT / script).read_text(encoding="utf-8"))
    return [ast.literal_eval(word) for word in called.split(", ")]


def parse(arguments: list[str]) -> argparse.Namespace:
    return build_parser(arguments).parse_args(arguments)


def test_a_wrong_option_is_found() -> None:
    with pytest.raises(SystemExit):
        parse(["prepare", "folder", "--out", "x", "--images", "photos", "--labels-file", "x"])


SUBCOMMANDS = [
    *([name] for group in COMMANDS.values() for name in group if name != "prepare"),
    *(["prepare", kind] for kind in KINDS),
]


@pytest.mark.parametrize("words", SUBCOMMANDS, ids=" ".join)
def test_help_explains_every_option(words: list[str]) -> None:
    parser = subcommand(words)
    assert parser.description is not None
    assert "Exit status" in parser.format_help()
    for action in parser._actions:
        assert action.help, action.dest
        stated = "default" in action.help or action.default in (None, [], False, argparse.SUPPRESS, "")
        assert stated or "%(default)" in action.help, f"{action.dest} does not say its default"
        if action.nargs != 0 and action.choices is None:
            assert action.metavar or not action.option_strings, f"{action.dest} has no metavar"


def test_the_first_page_lists_every_subcommand() -> None:
    page = build_parser([]).format_help()
    for group, names in COMMANDS.items():
        assert f"\n{group}:\n" in page
        for name, line in names.items():
            assert re.search(rf"^  {name} +{re.escape(line)}$", page, re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 100


def test_shells_know_that_they_may_ask() -> None:
    starts = {script: (ROOT / script).read_text(encoding="utf-8")[:1024] for script in SCRIPTS}
    assert [script for script, start in starts.items() if "PYTHON_ARGCOMPLETE_OK" not in start] == []


def completions(words: str, answers: Path) -> list[str]:
    """What a command offers to a shell for the last of these words, as argcomplete's shell function asks."""
    program = "slrnet/__main__.py" if words.startswith("slrnet ") else words.split()[0]
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": words, "COMP_POINT": str(len(words))}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_ARGCOMPLETE_STDOUT_FILENAME": str(answers), **asked}
    done = subprocess.run(
        [sys.executable, program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return sorted(word.strip() for word in re.split(r"[\v\n]", answers.read_text()) if word.strip())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("slrnet p", ["predict", "prepare", "profile", "pseudo-label"]),
        ("slrnet prepare voc --sb", ["--sbd"]),
        ("ray_jobs/evaluate.py --protocol m", ["ms", "ms_crf"]),
        ("data_prep/voc.py --sb", ["--sbd"]),
    ],
)
def test_arguments_are_completed(words: str, expected: list[str], tmp_path: Path) -> None:
    assert completions(words, tmp_path / "answers") == expected


ANCHOR = re.compile(r"`((?:slrnet|data_prep|ray_jobs|docs)/[\w/]+\.py):([\w.]+)`")


def anchors() -> list[tuple[str, str]]:
    return sorted({match for path in TEXTS for match in ANCHOR.findall(path.read_text(encoding="utf-8"))})


def test_places_in_the_code_exist() -> None:
    assert [f"{file} does not define {name}" for file, name in anchors() if not defines(file, name)] == []


def defines(file: str, name: str) -> bool:
    body: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next((node for node in body if part in names_of(node)), None)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {ast.unparse(target) for target in targets}


def test_paths_that_are_named_exist() -> None:
    pattern = re.compile(r"`((?:slrnet|data_prep|ray_jobs|benchmarks|tests|docs)/[\w/]+\.(?:py|md))`")
    named = {match for path in TEXTS for match in pattern.findall(path.read_text(encoding="utf-8"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_links_lead_somewhere() -> None:
    found = []
    for path in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
            file, _, anchor = target.partition("#")
            place = path.parent / file if file else path
            if "://" in target or (place.exists() and (not anchor or anchor in headings(place))):
                continue
            found.append(f"{path.name}: {target}")
    assert found == []


def headings(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_error_messages_that_are_explained_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    messages = list(raised())
    assert len(quoted) > 25
    patterns = {text: re.compile(".*".join(map(re.escape, text.split("...")))) for text in quoted}
    assert [text for text, pattern in patterns.items() if not any(map(pattern.search, messages))] == []


def raised() -> Iterator[str]:
    """Texts in the code with `{}` for what varies."""
    for folder in ("slrnet", "data_prep", "ray_jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_pages_from_the_code_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name in ("settings", "recipes"):
        written = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert written == getattr(generate, f"{name}_page")(), f"run `python docs/generate.py`: docs/{name}.md is stale"


def table_after(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading of formats.md."""
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rest = page[page.index(f"\n{heading}\n") :].splitlines()
    start = next(place for place, line in enumerate(rest) if line.startswith("| ---"))
    rows = []
    for line in rest[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def names_in(rows: list[list[str]]) -> list[str]:
    return [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]


class TestFormats:
    def test_columns_of_the_manifest(self) -> None:
        rows = table_after("### manifest.parquet")
        assert names_in(rows) == SCHEMA.names
        kinds = [re.sub(r"list<\w+: (\w+)>", r"list of \1", str(kind)) for kind in SCHEMA.types]
        assert [row[1] for row in rows] == kinds

    def test_entries_of_dataset_json(self) -> None:
        assert names_in(table_after("### dataset.json")) == list(DatasetInfo.__dataclass_fields__)

    def test_entries_of_state_json(self) -> None:
        from slrnet.checkpoints.checkpoint import TrainState  # takes seconds, and the other tests need no network

        page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
        rows = [
            line.strip("|").split(" | ") for line in page.partition("| entry of `state.json`")[2].splitlines()[2:13]
        ]
        expected = {"schema_version", "sha256", *(field.name for field in fields(TrainState))}
        assert expected == set(names_in([row for row in rows if row[0].strip().startswith("`")]))

    def test_entries_of_evaluation_json(self) -> None:
        described = (ROOT / "slrnet/launch/prediction.py").read_text(encoding="utf-8").replace("return {", "record = {")
        measured = (ROOT / "slrnet/launch/evaluation.py").read_text(encoding="utf-8")
        keys = [*keys_of_record(described), *keys_of_record(measured)]
        assert sorted(names_in(table_after("## evaluation.json"))) == sorted(keys)

    def test_entries_of_pseudo_labels_json(self) -> None:
        source = (ROOT / "slrnet/launch/pseudo_label.py").read_text(encoding="utf-8")
        assert names_in(table_after("## pseudo_labels.json")) == keys_of_record(source)


def keys_of_record(source: str) -> list[str]:
    """Keys of the dictionary that a module assigns to `record`."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "record"
            and isinstance(node.value, ast.Dict)
        ):
            return [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
    return []


def test_examples_of_extending_run() -> None:
    names: dict[str, Any] = {"__name__": "example"}
    examples = [content for language, content in blocks(ROOT / "docs" / "extending.md") if language == "python"]
    assert len(examples) == 3
    for example in examples:
        exec(example, names)
    assert names["low_rank"].auxiliary_head is None


@pytest.mark.slow
def test_the_notebook_goes_from_images_to_masks(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "first_masks.ipynb").read_text(encoding="utf-8"))
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [code["metadata"].get("tags") for code in codes][:2] == [["parameters"], None]
    assert not any(code["outputs"] for code in codes)
    small = [
        "train.epochs=2",
        "train.pretrain_epochs=1",
        "train.batch_size=4",
        "data.crop_size=64",
        "model.encoder=timm:test_efficientnet",
    ]
    small += ["model.encoder_weights=none", "model.decoder_dim=8", "model.frozen_stages=0", "data.workers=0"]
    settings = {key: json.loads(value) if value[0].isdigit() else value for key, value in (s.split("=") for s in small)}
    names: dict[str, Any] = {"__name__": "notebook"}
    for code in codes:
        exec("".join(code["source"]), names)
        if "parameters" in code["metadata"].get("tags", ()):
            names |= {"folder": tmp_path, "settings": settings, "pictures": 12}
    assert len(names["losses"]) == 2
    assert names["prediction"].mask.shape == (128, 128)
    assert all(path.is_file() for path in names["masks"].values())


def test_citation_and_changelog_have_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == slrnet.__version__
    assert citation["license"] == "Apache-2.0"
    assert f"## [{slrnet.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra `docs` is not installed")
@pytest.mark.slow
def test_the_pages_build_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "method" / "index.html").is_file()


@pytest.mark.slow
def test_own_data_runs_as_it_stands(stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stock(tmp_path / "runs")
    page = [content for language, content in blocks(ROOT / "docs" / "own-data.md") if language == "sh"]
    for content in page:
        for line in content.splitlines():
            program, *words = shlex.split(line)
            assert (program, main(words)) == ("slrnet", 0), line
    assert len(list((tmp_path / "masks").glob("*.png"))) == 32
    assert set(json.loads((tmp_path / "masks" / "predictions.json").read_text())) == {
        "checkpoint",
        "protocol",
        "images",
    }


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(stock: Stock, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    wheel = next(tmp_path.glob("slrnet-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
        packed = set(archive.namelist())
    files = [
        path for name in ("slrnet", "data_prep", "ray_jobs") for path in (ROOT / name).rglob("*") if path.is_file()
    ]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.name != "README.md"}
    assert {name for name in names - packed if "__pycache__" not in name} == set()
    # Dependencies are those of this environment; its own slrnet comes after the wheel's.
    (packages / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    elsewhere = tmp_path / "elsewhere"
    stock(elsewhere / "runs")
    settings = [
        *("train.epochs=1", "train.pretrain_epochs=0", "train.batch_size=4", "evaluation.pseudo_mask_images=0"),
        *("data.crop_size=64", "model.encoder=timm:test_efficientnet", "model.encoder_weights=none"),
        *("model.decoder_dim=8", "model.frozen_stages=0"),
    ]
    changes = [word for setting in settings for word in ("--set", setting)]
    train = "train --recipe demo --data shards --num-workers 0 --name w --storage runs"
    (script,) = packages.glob("slrnet-*.dist-info/entry_points.txt")
    assert "slrnet = slrnet.cli.main:main" in script.read_text()
    for words in (
        ["-c", f"import slrnet; assert slrnet.__file__.startswith({str(packages)!r}), slrnet.__file__"],
        shlex.split("-m slrnet demo --help"),
        shlex.split("-m slrnet prepare demo --train 8 --val 4 --image-size 64 --out shards"),
        ["-m", "slrnet", *shlex.split(train), *changes],
    ):
        command = [str(tmp_path / "venv" / "bin" / "python"), *words]
        done = subprocess.run(command, cwd=elsewhere, env=alone(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "runs/w/checkpoints/checkpoint-0001/model.safetensors").is_file()


def alone() -> dict[str, str]:
    """The environment without what would lead to another checkout or another store."""
    left_out = ("PYTHONPATH", "SLRNET_STORAGE", "MLFLOW_TRACKING_URI")
    return {name: value for name, value in os.environ.items() if name not in left_out}
