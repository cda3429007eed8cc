"""Tables of image labels: CSV files with the columns `image`, `labels` and, if wanted, `split`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.found_files import key_of
from data_prep.source_files import read_lines
from slrnet.data.manifest import DataError

__all__ = ["LabelTable", "read_label_table"]


@dataclass(frozen=True)
class LabelTable:
    """What a CSV file says: `labels` by image name, and `splits` by image name where it has that column."""

    path: Path
    labels: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, str] | None


def read_label_table(path: str | Path) -> LabelTable:
    """Reads a CSV file of labels; the module's docstring has its form.

    Raises:
        DataError: the file cannot be read, lacks a column, or has an image twice.
    """
    reader = csv.DictReader(read_lines(path, "table of labels"))
    columns = reader.fieldnames or []
    if missing := [column for column in ("image", "labels") if column not in columns]:
        raise DataError(f"{path} has the columns {list(columns)}; {missing} must be among them")
    labels: dict[str, tuple[str, ...]] = {}
    splits: dict[str, str] = {}
    for number, row in enumerate(reader, start=2):
        key = key_of(Path((row["image"] or "").strip()))
        if not key or key in labels:
            raise DataError(f"{path}, line {number}: image {row['image']!r} is empty or occurs twice")
        labels[key] = tuple(dict.fromkeys(name.strip() for name in (row["labels"] or "").split(";") if name.strip()))
        splits[key] = (row.get("split") or "").strip() or "train"
    return LabelTable(Path(path), labels, splits if "split" in columns else None)
