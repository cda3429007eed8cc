"""Tables of image labels: CSV files in any dialect, and .xlsx workbooks.

The first line names the columns: one of the image; one or more of its labels, or one of 0 and 1 for each class; if
wanted, one of the split. Cells are separated by `,`, `;`, `|` or tabs. An image may have several lines, whose labels
are joined. What is in no such column is said, and what could be lost is an error with the line as editors count it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from data_prep.class_names import class_by_label, folded, label_pieces, normalized
from data_prep.image_names import ImageNames
from data_prep.shard_writer import listed
from data_prep.splits import checked_splits, meant_split
from data_prep.text_files import read_lines
from slrnet.data.catalog import BACKGROUND
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["ImageLabels", "LabelTable", "read_label_table"]

# fmt: off
IMAGE_COLUMNS = (
    "image", "filename", "file", "path", "filepath", "imagepath", "imagename", "imagefile", "img", "images", "files",
    "photo", "picture", "imageid", "name", "key", "id",
)
# fmt: on
"""Names of the image's column without case, spaces and `_`; the first counts where a table has several."""
LABEL_COLUMN = re.compile(r"(labels?|class(es)?|(class|label)names?|categor(y|ies)|tags?|annotations?)\d*")
SPLIT_COLUMNS = {"split", "splits", "set", "datasplit", "partition"}
YES, NO = {"1", "1.0", "true", "yes", "x"}, {"0", "0.0", "false", "no"}
DELIMITERS = (",", ";", "\t", "|")

Row = tuple[int, list[str]]
"""Line, and its cells without spaces around."""


@dataclass(frozen=True)
class ImageLabels:
    """What one source says about the images, by their keys."""

    what: str
    """What messages call the source."""
    labels: Mapping[str, tuple[str, ...]]
    """Names of the foreground classes of each image that it knows."""
    splits: Mapping[str, str] | None = None
    """Splits of images; None if it states none."""
    class_names: tuple[str, ...] = ()
    """Names of the foreground classes that it mentions, in its order."""


@dataclass(frozen=True)
class LabelTable:
    """The lines of a table: image as written, names of its foreground classes, split (empty if none is stated)."""

    path: Path
    rows: Sequence[tuple[int, str, tuple[str, ...], str]]
    """Line, image, classes, split."""
    class_names: tuple[str, ...]
    """Names of the foreground classes: in the order of the columns, or sorted."""
    has_splits: bool

    def of_images(self, names: ImageNames) -> ImageLabels:
        """What the table says about images; joins the lines of each.

        Raises:
            DataError: it lists images that are not there, or contradicts itself.
        """
        lines: dict[str, int] = {}
        for line, image, _, _ in self.rows:
            lines.setdefault(image, line)
        keys = names.find_all(lines, str(self.path))
        labels: dict[str, tuple[str, ...]] = {}
        splits: dict[str, str] = {}
        repeated = []
        for line, image, classes, split in self.rows:
            if (key := keys.get(image)) is None:
                continue
            if key in labels:
                repeated.append(f"{names.paths[key]} (line {line})")
                if bool(classes) != bool(labels[key]):
                    raise DataError(
                        f"{self.path}, line {line}: image {image!r} occurs twice, with labels and "
                        "without; keep one line"
                    )
                if split != splits.get(key, ""):
                    raise DataError(f"{self.path}, line {line}: image {image!r} occurs twice, in two splits; keep one")
            labels[key] = tuple(dict.fromkeys([*labels.get(key, ()), *classes]))
            if split:
                splits[key] = split
        if repeated:
            say(f"{self.path}: joined the labels of {len(repeated)} further line(s): {listed(repeated)}")
        return ImageLabels(str(self.path), labels, splits if self.has_splits else None, self.class_names)


def read_label_table(path: str | Path, classes: Sequence[str] | None = None) -> LabelTable:
    """Reads a table of labels; the module's docstring has its forms.

    Args:
        path: A CSV file, or a workbook .xlsx with one sheet that has cells.
        classes: Names of the foreground classes; None to take them from the table.

    Raises:
        DataError: the file cannot be read, lacks a column, or a line could be read in several ways.
    """
    path = Path(path)
    lines = _sheet_rows(path) if path.suffix.lower() in (".xlsx", ".xlsm") else _text_rows(path)
    rows = _without_blank(path, lines)
    if not rows:
        raise DataError(f"the table of labels {path} is empty; its first line names the columns, as `image,labels`")
    (_, header), *body = rows
    columns = _Columns.of(path, header, body, classes)
    cells = [columns.read(row) for row in body]
    split_lines: dict[str, str] = {}
    label_lines: dict[str, str] = {}
    for line, _, labels, split in cells:
        if split:
            split_lines.setdefault(split, f"line {line}")
        for label in labels:
            label_lines.setdefault(label, f"line {line}")
    checked_splits(split_lines, str(path))
    if columns.flags:
        return LabelTable(path, cells, columns.class_names, columns.split is not None)
    class_of = class_by_label(label_lines, classes, str(path))
    named = [
        (line, image, tuple(dict.fromkeys(name for label in labels if (name := class_of[label]))), split)
        for line, image, labels, split in cells
    ]
    mentioned = sorted({name for name in class_of.values() if name})
    return LabelTable(path, named, tuple(mentioned), columns.split is not None)


@dataclass(frozen=True)
class _Columns:
    """Places of the columns that are read."""

    path: Path
    header: Sequence[str]
    image: int
    labels: tuple[int, ...]
    """Those whose cells hold labels."""
    flags: Mapping[int, str]
    """Classes of the columns of 0 and 1."""
    split: int | None
    classes: Sequence[str] | None

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in self.flags.values() if name))

    @classmethod
    def of(cls, path: Path, header: Sequence[str], body: Sequence[Row], classes: Sequence[str] | None) -> _Columns:
        names = [_plain(name) for name in header]
        if twice := sorted(
            {
                header[i]
                for i, name in enumerate(names)
                if name and names.count(name) > 1 and not LABEL_COLUMN.fullmatch(name)
            }
        ):
            raise DataError(f"{path} has the columns {twice} twice; keep one of each")
        image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
        labels = tuple(place for place, name in enumerate(names) if LABEL_COLUMN.fullmatch(name) and place != image)
        split = next((place for place, name in enumerate(names) if name in SPLIT_COLUMNS), None)
        flags: dict[int, str] = {}
        others = [place for place, name in enumerate(names) if name and place not in (image, split, *labels)]
        if image is not None and not labels:
            flags, others = _flag_columns(path, header, others, body, classes)
        missing = [name for name, place in (("image", image), ("labels", labels or flags)) if place in (None, (), {})]
        if image is None or missing:
            raise DataError(
                f"{path} has the columns {list(header)}; {missing} must be among them: the first line names the "
                "columns, as `image,labels`"
            )
        columns = cls(path, header, image, labels, flags, split, classes)
        columns._check_others(others, body)
        return columns

    def read(self, row: Row) -> tuple[int, str, tuple[str, ...], str]:
        """Line, image, labels (classes if there are columns of 0 and 1) and split of a line."""
        line, cells = row
        needed = max(self.image, *self.labels, *self.flags, -1 if self.split is None else self.split)
        if len(cells) <= needed:
            raise DataError(
                f"{self.path}, line {line} has {len(cells)} of {needed + 1} cells; an image with none of the classes "
                "needs an empty cell, as in `a.jpg,`"
            )
        if not cells[self.image]:
            raise DataError(f"{self.path}, line {line}: the image is empty, but other cells are not: {cells}")
        split = "" if self.split is None else cells[self.split]
        if self.flags:
            self._refuse_extra(line, cells)
            labels = [name for place, name in self.flags.items() if name and cells[place].lower() in YES]
        else:
            pieces = [label_pieces(cells[place], self.classes) for place in self.labels]
            labels = [label for piece in pieces for label in piece] + self._extra_labels(line, cells)
        return line, cells[self.image], tuple(dict.fromkeys(labels)), split

    def _extra(self, cells: Sequence[str]) -> list[str]:
        """What stands right of the columns that have names."""
        end = max(place for place, name in enumerate(self.header) if name) + 1
        return [cell for cell in cells[end:] if cell]

    def _refuse_extra(self, line: int, cells: Sequence[str], remedy: str = "take them away") -> None:
        if extra := self._extra(cells):
            raise DataError(
                f"{self.path}, line {line} has {len(cells)} cells, more than the {len(self.header)} columns: {extra} "
                f"are in none; {remedy}"
            )

    def _extra_labels(self, line: int, cells: Sequence[str]) -> list[str]:
        """Labels that were not quoted: cells right of the labels, where that is the last column."""
        extra = self._extra(cells)
        last = all(place in self.labels for place, name in enumerate(self.header) if name and place >= self.labels[-1])
        known = {folded(name) for name in self.classes or ()}
        if extra and (not last or not all(folded(cell) in known for cell in extra)):
            remedy = "separate labels by `;`, or put them into quotes"
            if last and self.classes is None:
                remedy += ", or name the classes with --classes if each cell is a label"
            self._refuse_extra(line, cells, remedy)
        return [normalized(cell) for cell in extra]

    def _check_others(self, others: Sequence[int], body: Sequence[Row]) -> None:
        """Says which columns are not read; none of them may state splits."""
        for place in others:
            values = {cells[place] for _, cells in body if place < len(cells)} - {""}
            if self.split is None and values and all(meant_split(value) for value in values):
                raise DataError(
                    f"{self.path}: the column {self.header[place]!r} seems to hold splits; name it `split`, or "
                    "remove it"
                )
        if others:
            names = [repr(self.header[place]) for place in others]
            say(f"{self.path}: the columns {listed(names)} are not used")


def _flag_columns(
    path: Path, header: Sequence[str], others: Sequence[int], body: Sequence[Row], classes: Sequence[str] | None
) -> tuple[dict[int, str], list[int]]:
    """Classes by column of 0 and 1, an empty text for the background; and the columns that are none."""
    known = {folded(name): name for name in classes or ()}
    flags: dict[int, str] = {}
    for place in others:
        name = normalized(header[place])
        if _plain(name) in IMAGE_COLUMNS:
            continue
        if folded(name) == BACKGROUND:
            flags[place] = ""
        elif classes is None or folded(name) in known:
            flags[place] = known.get(folded(name), name)
    if not any(flags.values()):
        return {}, list(others)
    zeros = any(cells[place].lower() in NO for _, cells in body for place in flags if place < len(cells))
    allowed = YES | (NO if zeros else {""})
    for line, cells in body:
        for place in flags:
            if place < len(cells) and cells[place].lower() not in allowed:
                raise DataError(
                    f"{path}, line {line}: the column {header[place]!r} holds {cells[place]!r}; without a column "
                    "`labels`, each column is a class and holds 0 or 1: name the column of the labels, or the classes "
                    "with --classes"
                )
    if classes is not None and (missing := [name for name in classes if name not in flags.values()]):
        raise DataError(f"{path} has no column of the classes {listed(missing)}; add them, or correct --classes")
    return flags, [place for place in others if place not in flags]


def _plain(name: str) -> str:
    """`Image_Path` as `imagepath`."""
    return re.sub(r"[\W_]", "", name.casefold())


# Reading of files.


def _without_blank(path: Path, rows: Iterator[Row]) -> list[Row]:
    kept, empty = [], []
    for line, cells in rows:
        stripped = [cell.strip() for cell in cells]
        if any(stripped):
            kept.append((line, stripped))
        elif len(cells) > 1:
            empty.append(str(line))
    if empty:
        say(f"{path}: left out {len(empty)} line(s) whose cells are all empty: {listed(empty)}")
    return kept


def _text_rows(path: Path) -> Iterator[Row]:
    """Lines of a CSV file; their numbers are those of editors, which count blank lines and those within quotes."""
    if path.suffix.lower() in (".xls", ".xlsb", ".ods", ".numbers"):
        raise DataError(f"{path} is a workbook of a kind that is not read; save it as .xlsx or CSV")
    lines = read_lines(path, "table of labels")
    start = next((place for place, line in enumerate(lines) if line.strip()), 0)
    told = re.fullmatch(r"sep=(.)", lines[start].strip()) if lines else None  # Excel's first line
    first = start + bool(told)
    delimiter = told.group(1) if told else _delimiter(lines[start] if lines else "")
    reader = csv.reader(
        (line + "\n" for line in lines[first:]), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    number = first + 1
    try:
        for cells in reader:
            yield number, cells
            number = first + reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: {error}; check its quotes") from None


def _delimiter(header: str) -> str:
    """The separator by which the most columns of a header have known names."""

    def known(delimiter: str) -> int:
        names = [_plain(name) for name in header.split(delimiter)]
        return sum(
            name in IMAGE_COLUMNS or name in SPLIT_COLUMNS or bool(LABEL_COLUMN.fullmatch(name)) for name in names
        )

    return max(DELIMITERS, key=lambda delimiter: (known(delimiter), header.count(delimiter)))


def _sheet_rows(path: Path) -> Iterator[Row]:
    """Rows of a workbook's only sheet that has cells."""
    if find_spec("openpyxl") is None:
        raise DataError(f"to read {path}, run `pip install 'slrnet[xlsx]'`, or save it as CSV")
    import openpyxl

    try:
        formulas, values = (openpyxl.load_workbook(path, data_only=data_only) for data_only in (False, True))
    except Exception as error:  # openpyxl documents none; damaged files raise a dozen kinds
        raise DataError(
            f"{path} cannot be read as a workbook ({type(error).__name__}: {error}); save it again"
        ) from None
    sheets = [sheet for sheet in formulas.worksheets if any(any(row) for row in sheet.values)]
    if len(sheets) != 1:
        names = [sheet.title for sheet in sheets]
        raise DataError(f"{path} has {len(sheets)} sheets with cells {names}; keep the one with the labels")
    if sheets[0].merged_cells.ranges:
        raise DataError(
            f"{path} has merged cells, {listed([str(one) for one in sheets[0].merged_cells.ranges])}; split them"
        )
    rows = zip(sheets[0].iter_rows(), values[sheets[0].title].iter_rows(values_only=True), strict=True)
    for number, (cells, shown) in enumerate(rows, start=1):
        for cell, value in zip(cells, shown, strict=True):
            if cell.data_type == "f" and value is None:
                raise DataError(
                    f"{path}: the formula in {cell.coordinate} has no value; open and save it, or save it as CSV"
                )
        yield number, [_cell_text(value) for value in shown]


def _cell_text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)
