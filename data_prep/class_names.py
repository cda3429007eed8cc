"""Names of the classes: as the user gives them, and as labels in tables and folders spell them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_prep.shard_writer import listed
from data_prep.text_files import read_lines
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["class_by_label", "folded", "given_classes", "label_pieces", "normalized", "read_classes", "separator_hint"]

_SEPARATORS = re.compile(r"[,|/\t]")
_NOTHING = {"", "none", "nan", "null", "na", "n/a", "nothing", "?"}
"""What programs write into an empty cell."""


def normalized(name: str) -> str:
    """A name as it goes into the data set: NFC, without spaces around and with single ones within."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def folded(name: str) -> str:
    """What spellings of one name have in common: case, `_`, `-` and spaces make no difference."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def read_classes(path: str | Path) -> list[str]:
    """Names of the classes in a file, one a line; raises `DataError` if it cannot be read."""
    return [line.strip() for line in read_lines(path, "list of classes") if line.strip()]


def given_classes(names: Sequence[str], option: str) -> tuple[str, ...]:
    """Names of the foreground classes 1, 2, ... that an option gives; `background` may stand before them.

    Raises:
        DataError: a name occurs twice, the background is not the first, or there are none or more than 254.
    """
    wanted = tuple(normalized(name) for name in names)
    places = [place for place, name in enumerate(wanted) if folded(name) == BACKGROUND]
    if places == [0]:
        say(f"{option}: {wanted[0]!r} is class 0 of every data set; the classes 1, 2, ... are the others")
        wanted = wanted[1:]
    elif places:
        raise DataError(
            f"{option} names {wanted[places[-1]]!r} as class {places[-1] + 1}; it is class 0 of every data set: leave "
            "it out, or put it first if 0 is its id in your masks"
        )
    if twice := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise DataError(f"{option} names {twice} twice; each class needs its own name")
    if not 1 <= len(wanted) < IGNORE_INDEX:
        raise DataError(
            f"{option} names {len(wanted)} classes; 1 to {IGNORE_INDEX - 1} are allowed beside the background"
        )
    return wanted


def label_pieces(text: str, classes: Sequence[str] | None) -> list[str]:
    """The labels in a cell: separated by `;` or new lines, and where the classes are known by `,`, `|` or `/` too.

    A piece that is a class is left as it is. Brackets and quotes around are taken off, as Python's lists have them.
    """
    known = {folded(name) for name in classes or ()}
    pieces = []
    text = text.strip()
    if folded(text) in known:
        return [normalized(text)]
    for part in re.split(r"[;\n]", text.removeprefix("[").removesuffix("]")):
        parts = [part] if classes is None or folded(part) in known else _SEPARATORS.split(part)
        pieces += [name for name in (normalized(piece.strip().strip("'\"")) for piece in parts) if name]
    return pieces


def class_by_label(labels: Mapping[str, str], classes: Sequence[str] | None, what: str) -> dict[str, str | None]:
    """The class that each label means; None for the background. Says which spellings are read as another one.

    Args:
        labels: Where each label stands first, such as `line 3`, by label.
        classes: Names of the foreground classes; None if the labels themselves are the names.
        what: What has the labels, for messages.

    Raises:
        DataError: a label is no class. Where the labels are the names: two differ in their spelling only, one may be
            several, or they are numbers.
    """
    background = {label for label in labels if folded(label) == BACKGROUND}
    if background:
        say(f"{what}: the label {BACKGROUND!r} is read as none of the classes")
    others = {label: where for label, where in labels.items() if label not in background}
    named = _by_spelling(others, classes, what) if classes is not None else _as_names(others, what)
    return {**dict.fromkeys(background), **named}


def _by_spelling(labels: Mapping[str, str], classes: Sequence[str], what: str) -> dict[str, str]:
    spelled: dict[str, list[str]] = {}
    for name in classes:
        spelled.setdefault(folded(name), []).append(name)
    found = {label: [label] if label in classes else spelled.get(folded(label), []) for label in labels}
    if unknown := {label: labels[label] for label, names in found.items() if len(names) != 1}:
        shown = listed([f"{label!r} ({where})" for label, where in unknown.items()])
        raise DataError(
            f"{what} has {len(unknown)} label(s) that are no class: {shown}; the classes are "
            f"{', '.join(classes)}: correct the labels, or name these classes too{separator_hint(unknown, classes)}"
        )
    if respelled := [f"{label!r} as {names[0]!r}" for label, names in found.items() if names[0] != label]:
        say(f"{what}: labels in another spelling are read as classes: {listed(respelled)}")
    return {label: names[0] for label, names in found.items()}


def separator_hint(labels: Iterable[str], classes: Sequence[str]) -> str:
    """What to add to a message about labels that are no class, where one of them is several classes in a row."""
    known = "|".join(map(re.escape, sorted({folded(name) for name in classes}, key=len, reverse=True)))
    several = re.compile(f"({known})([ .:+&]+(and )?({known}))+")
    composed = next((label for label in labels if known and several.fullmatch(folded(label))), None)
    return "" if composed is None else f"; if {composed!r} is several classes, separate them by `;`"


def _as_names(labels: Mapping[str, str], what: str) -> dict[str, str]:
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(folded(label), []).append(label)
    for same in spellings.values():
        if len(same) > 1:
            one = ", ".join(f"{label!r} ({labels[label]})" for label in same)
            raise DataError(f"{what} spells a label in several ways: {one}; write it in one, or give --classes")
    whole = set(spellings)
    for label, where in labels.items():
        words = re.split(r"[ +&:]+", folded(label))
        if _SEPARATORS.search(label) or (len(words) > 1 and whole.issuperset(words)):
            suggestion = ",".join(_single(labels))
            raise DataError(
                f"{what}, {where}: {label!r} may be one label or several; separate labels by `;`, or name the classes: "
                f"--classes {suggestion!r}"
            )
        if folded(label) in _NOTHING:
            raise DataError(
                f"{what}, {where}: the label {label!r} looks like an empty cell; leave it empty, or give --classes"
            )
    if labels and all(re.fullmatch(r"[-+]?\d+(\.0*)?", label) for label in labels):
        raise DataError(
            f"{what} has the numbers {listed(sorted(labels))} as labels; write names, or give --classes with these "
            "numbers if they are the names"
        )
    return {label: label for label in labels}


def _single(labels: Iterable[str]) -> list[str]:
    """Names that labels of several separated names hold, sorted."""
    names = {normalized(piece) for label in labels for piece in _SEPARATORS.split(label)}
    composed = {name for name in names if " " in name and all(word in names for word in name.split(" "))}
    return sorted(names - composed - {""})
