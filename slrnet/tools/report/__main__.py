# PYTHON_ARGCOMPLETE_OK
"""One HTML file about one run or several: `python -m slrnet.tools.report RUN_OR_CHECKPOINT... [--out FILE.html]`.

Settings, curves, scores per class, confusions, best and worst images, the way from mask to pseudo label over the
epochs, code maps, calibration. The file needs no network and nothing beside it. What a run does not have is named with
the reason.

Exit status: 0, or 2 for wrong arguments and damaged files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slrnet.checkpoints.run_store import run_argument
from slrnet.completion import parse
from slrnet.data.manifest import load_dataset
from slrnet.evaluation.examine import Subject
from slrnet.storage.files import written_whole
from slrnet.storage.remote import is_remote
from slrnet.tools.predict import positive
from slrnet.tools.report.page import Findings, look, render
from slrnet.tools.report.runs import Run, read_run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 2 for wrong arguments and damaged files."""
    options = parse(_parser(), arguments)
    try:
        runs = [read_run(path) for path in options.runs]
        findings = [_findings(run, options) for run in runs]
        page = render(runs, findings)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(options.out) as incoming:
            incoming.write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _findings(run: Run, options: argparse.Namespace) -> Findings:
    """Measures a run on the data that were named, else on those that it was trained on, where they are still there."""
    location = str(options.data or run.checkpoint.config.data.path)
    if options.data is None and not is_remote(location) and not (Path(location) / "dataset.json").is_file():
        reason = "the training's data are not at hand; give their folder with --data"
        return Findings(absent={"masks": reason, "codes": reason, "sweep": reason})
    subject = Subject.of(run.checkpoint, load_dataset(location), options.device)
    return look(subject, images=options.images, at_most=options.measured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slrnet.tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        type=run_argument,
        nargs="+",
        metavar="RUN_OR_CHECKPOINT",
        help="a run's folder (its best one), or a checkpoint",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with shards (default: that of each training)")
    parser.add_argument(
        "--images", type=positive, default=4, metavar="N", help="best, worst and code maps, each (default: %(default)s)"
    )
    parser.add_argument("--measured", type=positive, metavar="N", help="images to measure at most (default: all)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
