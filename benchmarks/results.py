"""Runs the benchmarks and writes what they print to benchmarks/RESULTS.md: `make bench PEER=FOLDER`.

    python benchmarks/results.py [--peer-dir FOLDER] [--only NAME ...]

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet), for the benchmarks that compare with it. With --only
the other sections of the file stay as they are, each with the machine and commit that it was measured on. Exit status
1 where a claim did not hold or a benchmark failed; the file says which.
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
    "train_step", "evaluate", "refine", "cvlr", "kernels", "cross_entropy", "cpu_tricks",
    "loader", "workers", "startup", "scale", "conversion_speed", "conversion_memory", "checkpoint_cost", "ray_overhead",
)  # fmt: skip
LONGER = ("chaos", "nodes", "sweep_faults", "fuzz", "cost_model", "gpu")
"""Not of speed, and minutes each; predictions; in need of a GPU: they run when they are named."""
WITH_PEER = ("train_step", "evaluate", "refine", "cvlr", "loader")
FILE, TRIED = ROOT / "benchmarks" / "RESULTS.md", ROOT / "benchmarks" / "TRIED.md"
OUTCOMES = {0: "ended well", 1: "**a claim did not hold**"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument("--only", nargs="+", choices=[*NAMES, *LONGER], metavar="NAME", help="some of the benchmarks")
    options = parser.parse_args()
    peer = [] if options.peer_dir is None else ["--peer-dir", str(options.peer_dir.resolve())]
    sections = read_sections(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    codes = []
    for name in options.only or NAMES:
        print(f"== {name}", flush=True)
        code, section = run(name, peer if name in WITH_PEER else [])
        codes.append(code)
        sections[name] = section
        with written_whole(FILE) as incoming:  # after each, so that nothing is lost when the next one is stopped
            incoming.write_text(document(sections), encoding="utf-8")
    return 1 if any(codes) else 0


def run(name: str, arguments: list[str]) -> tuple[int, str]:
    """Runs a benchmark, its output passed on; its exit status, and its section of the file."""
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
    changed = ", with changes that are not committed" if tags["git_state"] == "dirty" else ""
    versions = ", ".join(f"{name} {tags[f'version.{name}']}" for name in ("python", "torch", "ray"))
    memory = psutil.virtual_memory().total / 2**30
    machine = f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    return f"commit {tags['git_commit'][:12]}{changed}; {machine}; {versions}"


def processor() -> str:
    """The processor's name, and the widest vectors that it has."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    width = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if f" {flag} " in text), "")
    return " ".join(filter(None, [name[1].strip() if name else platform.machine(), width]))


def read_sections(text: str) -> dict[str, str]:
    """The sections of an earlier file, by the benchmarks' names."""
    heads = "|".join([*NAMES, *LONGER, "Tried"])  # and no other line that a benchmark may print
    parts = re.split(rf"^## (?=(?:{heads})\b)", text, flags=re.MULTILINE)[1:]
    found = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}
    return {name: section for name, section in found.items() if name in (*NAMES, *LONGER)}


def document(sections: dict[str, str]) -> str:
    """The file: sections in the order of the benchmarks, and what was tried and did not pay."""
    head = "# Measured\n\nWritten by `benchmarks/results.py`; do not edit. Each section says where and when it was run."
    ranked = [f"## {name}\n\n{sections[name]}" for name in (*NAMES, *LONGER) if name in sections]
    return "\n\n".join([head, *ranked, TRIED.read_text(encoding="utf-8").strip()]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
