"""Writes the paper's tables with our rows below as Markdown; our figures are from the records of evaluations."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from slrnet.checkpoints.run_store import CONFIG, STATE
from slrnet.config import Config, load_config
from slrnet.data.catalog import VOC_CLASSES
from slrnet.launch.pseudo_label import RECORD
from slrnet.storage.files import read_json
from slrnet.storage.shown import in_markdown
from slrnet.tools.report.runs import find_records, metrics_by_protocol

__all__ = ["PAPER_TABLES", "PaperTable", "Result", "read_results", "write_tables"]

_NUM_CLASSES = {"COCO": 81, "L2ID": 201}
_SUPERVISION = {"wsss": "I", "sss_image_labels": "I, P", "sss": "P"}


class PaperTable(NamedTuple):
    """A table of the paper."""

    number: int
    about: str
    head: tuple[str, ...]
    """Names of the columns; figures are mIoU in percent."""
    rows: tuple[tuple[str, ...], ...]
    """The paper's cells, empty where it has none."""


def _paper_tables() -> Iterator[PaperTable]:
    """The tables of paper.md, beside this module."""
    text = files("slrnet.tools.figures").joinpath("paper.md").read_text(encoding="utf-8")
    for number, about, table in re.findall(r"## Table (\d)\. (.+)\n\n((?:\|.+\n)+)", text):
        head, _, *rows = (tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in table.splitlines())
        yield PaperTable(int(number), about, head, tuple(rows))


PAPER_TABLES = tuple(_paper_tables())
"""Tables 1 to 6."""


@dataclass(frozen=True)
class Result:
    """One of our scores."""

    run: str
    """Name of the run's folder."""
    epoch: int
    config: Config
    """Settings of the training."""
    classes: tuple[str, ...]
    protocol: str
    split: str
    images: int
    """Number of images that it was measured on; 0 if the record does not say."""
    miou: float
    """In [0, 1]."""

    @property
    def data(self) -> str:
        """Name of the benchmark whose classes these are, or are among; empty for none."""
        if set(self.classes) <= set(VOC_CLASSES):
            return "VOC"
        return next((name for name, number in _NUM_CLASSES.items() if len(self.classes) == number), "")

    @property
    def table(self) -> int:
        """Number of the paper's table that it belongs to; 0 for none."""
        if self.data == "VOC" and "gated_by_image_labels" in self.protocol:
            return 1
        if self.data == "VOC" and self.split == "val":
            distilled = self.config.model.architecture == "deeplabv3plus"
            return 2 if distilled else {"wsss": 2, "sss_image_labels": 5, "sss": 6}[self.config.setting]
        weak = self.config.setting == "wsss" and self.split == "val"
        return {"COCO": 3, "L2ID": 4}.get(self.data, 0) if weak else 0

    def row(self, head: Sequence[str]) -> list[str]:
        """The cells under the names of columns, of which the first is that of the method or run."""
        note = f", {self.images} images" if self.images else ""
        if self.data == "VOC" and set(self.classes) != set(VOC_CLASSES):
            note += f"; **{len(self.classes) - 1} of VOC's 20 classes, not comparable**"
        cells = {
            head[0]: f"slrnet, {in_markdown(self.run)}, epoch {self.epoch}",
            "CRF": "yes" if "crf" in self.protocol else "",
            "Backbone": in_markdown(self.config.model.encoder),
            "Labels": _SUPERVISION[self.config.setting],
            self.split: f"{100 * self.miou:.1f}",
            "split": in_markdown(self.split),
            "mIoU": f"{100 * self.miou:.1f}",
            "source": f"ours: {in_markdown(self.protocol)}{note}",
        }
        return [cells.get(column, "") for column in head]


def read_results(folders: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """Reads our scores from all `evaluation.json` and `pseudo_labels.json` below some folders.

    Returns:
        The scores, and a line about each record that cannot be used because its checkpoint is gone.

    Raises:
        ValueError: a folder does not exist, or a record is damaged.
    """
    results: list[Result] = []
    unused: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give a run's folder, or one that holds runs")
        for name, read in (("evaluation.json", _of_evaluation), (RECORD, _of_pseudo_labels)):
            for path, record in find_records(folder, name).items():
                try:
                    results += read(path, record)
                except FileNotFoundError as error:
                    unused.append(f"{path}: its checkpoint {error} is gone")
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    unused.append(f"{path}: it is no record of a measurement: {error}")
    return list(dict.fromkeys(results)), unused


def write_tables(results: Sequence[Result]) -> str:
    """Writes the paper's tables 1 to 6 as Markdown, each with our scores that belong to it."""
    lines = [
        "# Tables 1 to 6",
        "",
        "mIoU in percent. Rows whose source is `paper` are printed there and were not measured here; empty cells were "
        "not measured. I, P, S: image labels, pixel labels, saliency maps.",
    ]
    for table in PAPER_TABLES:
        head = [*table.head, "source"]
        ours = [result.row(head) for result in results if result.table == table.number]
        rows = [*([*row, "paper"] for row in table.rows), *(ours or [["slrnet", *[""] * (len(head) - 2), "not run"]])]
        lines += ["", f"## Table {table.number}. {table.about}", "", _markdown(head, rows)]
    if rest := [result for result in results if not result.table]:
        head = ["Run", "split", "mIoU", "source"]
        rows = [result.row(head) for result in rest]
        lines += ["", "## Figures that belong to none of these tables", "", _markdown(head, rows)]
    return "\n".join(lines) + "\n"


def _of_evaluation(path: Path, record: Mapping[str, Any]) -> Iterator[Result]:
    config, classes, run = _origin(path.parent, record["checkpoint"])
    for protocol, metrics in metrics_by_protocol(record).items():
        if "val/miou" in metrics:
            split, images = record["split"], record["images"]
            yield Result(run, record["epoch"], config, classes, protocol, split, images, metrics["val/miou"])


def _of_pseudo_labels(path: Path, record: Mapping[str, Any]) -> Iterator[Result]:
    job = record["job"]
    config, classes, run = _origin(path.parent, job["checkpoint"])
    for split, protocols in record["quality"].items():
        for protocol, quality in protocols.items():
            if "miou" in quality["metrics"]:
                images, miou = quality.get("images", 0), quality["metrics"]["miou"]
                yield Result(run, job["epoch"], config, classes, protocol, split, images, miou)


def _origin(place: Path, checkpoint: str) -> tuple[Config, tuple[str, ...], str]:
    """Returns settings, classes, and run of a record's checkpoint, even if the run was moved with its records."""
    written = Path(checkpoint)
    for folder in (written, *(parent / "checkpoints" / written.name for parent in place.parents)):
        # False also for a name that no file can have.
        if all(os.path.isfile(folder / name) for name in (CONFIG, STATE)):
            state = read_json(folder / STATE)
            return load_config(folder / CONFIG), tuple(state["classes"]), folder.parents[1].name
    raise FileNotFoundError(checkpoint)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(escaped, head, tablefmt="github", disable_numparse=True)
