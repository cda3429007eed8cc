"""Runs the benchmarks and writes their output to benchmarks/RESULTS.md: `make bench PEER=FOLDER`.

    python benchmarks/results.py [--peer-dir FOLDER] [--only NAME ...]

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet), for the benchmarks that compare with it. With
--only, the other sections of the file do not change; each section names the machine and commit of its measurement. The
exit status is 1 if a claim does not hold or a benchmark fails; the file says which one.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from slrnet.storage.files import written_whole  # noqa: E402
from slrnet.tracking.provenance import environment_tags  # noqa: E402

NAMES = (
    "train_step", "released_training", "evaluate", "refine", "cvlr", "kernels", "cross_entropy", "cpu_tricks",
    "loader", "workers", "startup", "scale", "conversion_speed", "conversion_memory", "checkpoint_cost", "ray_overhead",
)  # fmt: skip
LONGER = (
    "chaos",
    "write_faults",
    "nodes",
    "sweep_faults",
    "same_training",
    "fuzz",
    "cost_model",
    "gpu",
    "demo_compare",
    "review_loop",
    "mask_sizes",
)
"""Run only when named: they take minutes and measure no speed, only make predictions, or need a GPU."""
WITH_PEER = ("train_step", "released_training", "evaluate", "refine", "cvlr", "loader")
FILE, TRIED = ROOT / "benchmarks" / "RESULTS.md", ROOT / "benchmarks" / "TRIED.md"
OUTCOMES = {0: "succeeded", 1: "**a claim did not hold**"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument(
        "--only", nargs="+", choices=[*NAMES, *LONGER], metavar="NAME", help="run only these benchmarks"
    )
    options = parser.parse_args()
    peer = [] if options.peer_dir is None else ["--peer-dir", str(options.peer_dir.resolve())]
    sections = read_sections(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    codes = []
    for name in options.only or NAMES:
        print(f"== {name}", flush=True)
        code, section = run(name, peer if name in WITH_PEER else [])
        codes.append(code)
        sections[name] = section
        with written_whole(FILE) as incoming:  # after each one, so an interrupt loses no results
            incoming.write_text(document(sections), encoding="utf-8")
    return 1 if any(codes) else 0


def run(name: str, arguments: list[str]) -> tuple[int, str]:
    """Runs a benchmark and echoes its output; returns its exit status and its section of the file."""
    script = Path("benchmarks") / f"{name}.py"
    begun, seen = time.perf_counter(), []
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        seen.append(line)
    code = process.wait()
    about = (ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    command = " ".join(["python", str(script), *(["--peer-dir", "FOLDER"] if arguments else [])])
    lines = [
        f"{re.sub(r'[:.]? ?`[^`]*`[.]?$', '.', ' '.join(about.split()))}",
        "",
        f"`{command}` {OUTCOMES.get(code, f'**failed** with exit status {code}')} after "
        f"{time.perf_counter() - begun:.0f} s on {time.strftime('%Y-%m-%d')}; {provenance()}.",
        "",
        "```",
        "".join(seen).strip(),
        "```",
    ]
    return code, "\n".join(lines)


def provenance() -> str:
    tags = environment_tags()
    changed = ", with uncommitted changes" if tags["git_state"] == "dirty" else ""
    versions = ", ".join(f"{name} {tags[f'version.{name}']}" for name in ("python", "torch", "ray"))
    memory = psutil.virtual_memory().total / 2**30
    machine = f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    return f"commit {tags['git_commit'][:12]}{changed}; {machine}; {versions}"


def processor() -> str:
    """Returns the processor's name and its widest vector extension."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    width = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if f" {flag} " in text), "")
    return " ".join(filter(None, [name[1].strip() if name else platform.machine(), width]))


def read_sections(text: str) -> dict[str, str]:
    """Returns the sections of an existing file by benchmark name."""
    heads = "|".join([*NAMES, *LONGER, "Tried"])  # other lines in a benchmark's output may start with ## too
    parts = re.split(rf"^## (?=(?:{heads})\b)", text, flags=re.MULTILINE)[1:]
    found = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}
    return {name: section for name, section in found.items() if name in (*NAMES, *LONGER)}


def document(sections: dict[str, str]) -> str:
    """Returns the file's text: the sections in the order of the benchmarks, then the rejected ideas of TRIED.md."""
    head = "# Measured\n\nWritten by `benchmarks/results.py`; do not edit. Each section names its machine and date."
    ranked = [f"## {name}\n\n{sections[name]}" for name in (*NAMES, *LONGER) if name in sections]
    return "\n\n".join([head, *ranked, TRIED.read_text(encoding="utf-8").strip()]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
