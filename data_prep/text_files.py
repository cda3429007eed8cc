"""Text files as people have them: lists, tables, JSON and XML in any of the encodings that editors write.

UTF-8 and UTF-16 are recognized, with a byte order mark or without. What is neither is read as Windows-1252, which holds
Latin-1, and a line on standard error says so, as that is a guess. Lines end as in Windows, Unix or old Mac files.
Binary files, devices and pipes are refused.
"""

from __future__ import annotations

import json
import re
import stat
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Protocol

from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = [
    "GUESS",
    "Readable",
    "check_regular",
    "parse_json",
    "read_json",
    "read_lines",
    "read_text",
    "read_xml",
    "say_guess",
    "text_encoding",
]

MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",  # before UTF-16, whose mark it begins with
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
"""Encodings by the byte order mark that a file begins with."""
GUESS = "cp1252"
LONGEST = 1 << 28
"""Bytes that a text file may have."""
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
"""Characters that no text file has."""
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Readable(Protocol):
    """A `Path`, or something else that opens and reads like one, such as a file within a tar."""

    @property
    def name(self) -> str: ...

    def open(self, mode: Any = ...) -> Any: ...

    def read_bytes(self) -> bytes: ...


def read_text(path: str | Readable, what: str) -> str:
    """Text of a file, with `\\n` at the ends of its lines and without a byte order mark.

    Args:
        path: The file.
        what: What it should be, for messages: `list of images`, `table of labels`.

    Raises:
        DataError: the file cannot be read, is longer than 256 MB, or is no text.
    """
    text = _decoded(_read_bytes(path, what), f"the {what} {path}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Readable, what: str) -> list[str]:
    """Lines of a text file, without their ends; see `read_text`.

    Raises:
        DataError: the file cannot be read as text.
    """
    lines = read_text(path, what).split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json(path: str | Readable, what: str) -> Any:
    """The value in a JSON file; see `read_text`.

    Raises:
        DataError: the file cannot be read as text, or is no JSON.
    """
    try:
        return parse_json(read_text(path, what))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the {what} {path} is not JSON: {error}; write it again") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text: all of its numbers are finite and all of its texts are Unicode, as the standard has it.

    Raises:
        ValueError: the text is no JSON, or is nested too deeply.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # half a character is a UnicodeEncodeError, a ValueError
    return value


def read_xml(path: Path, what: str, *, remedy: str) -> ElementTree.Element:
    """The root of an XML file, in the encoding that it declares, else as `read_text` reads it.

    Raises:
        DataError: the file cannot be read as XML, or declares entities, which may stand for other files or grow without
            end; the message ends in `remedy`.
    """
    data = _read_bytes(path, what)
    if b"<!ENTITY" in data.replace(b"\0", b""):  # in UTF-16, too
        raise DataError(f"{path} declares entities, which are not read; {remedy}")
    try:
        try:
            return ElementTree.fromstring(data)
        except ElementTree.ParseError:  # perhaps an encoding that the file does not declare
            return ElementTree.fromstring(_decoded(data, f"the {what} {path}"))
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not readable XML: {error}; {remedy}") from None


def text_encoding(data: bytes) -> str | None:
    """The encoding of a text by its first bytes: by a byte order mark, or UTF-16 by its NUL bytes; None otherwise."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    even, odd = data[::2].count(0), data[1::2].count(0)
    # Of UTF-16, the upper half of Latin letters, digits and line ends is NUL, and no lower half is.
    if min(even, odd) == 0 and max(even, odd) > len(data) / 8:
        return "utf-16-le" if odd else "utf-16-be"
    return None


def check_regular(path: Path, what: str) -> None:
    """Raises `DataError` for a folder, a pipe or a device; `OSError` if there is nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"cannot read the {what} {path}: it is a folder, pipe or device; give a file")


def say_guess(name: str, example: str) -> None:
    """Prints that a file is read as Windows-1252, with an example of what that gives."""
    say(
        f"{name} is not UTF-8: read as Windows-1252 (Latin-1), such as {example}; if that is wrong, save it as UTF-8",
        error=True,
    )


def _read_bytes(path: str | Readable, what: str) -> bytes:
    path = Path(path) if isinstance(path, str) else path
    try:
        if isinstance(path, Path):
            check_regular(path, what)
        with path.open("rb") as file:
            data: bytes = file.read(LONGEST + 1)
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from None
    if len(data) > LONGEST:
        raise DataError(f"cannot read the {what} {path}: it has more than {LONGEST >> 20} MB, the most that is allowed")
    return data


def _decoded(data: bytes, name: str) -> str:
    """Text of a file that messages call `name`; says so where the encoding is a guess."""
    known = text_encoding(data)
    for encoding in (known,) if known else ("utf-8", GUESS):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if control := CONTROL.search(text):
            number = text.count("\n", 0, control.start()) + 1
            raise DataError(
                f"{name} is no text file: line {number} holds the byte {control.group()!r}; save it as UTF-8"
            )
        if encoding == GUESS:
            lines = enumerate(text.splitlines(), start=1)
            number, line = next((number, line) for number, line in lines if not line.isascii())
            say_guess(name, f"{line.strip()[:60]!r} in line {number}")
        return text
    raise DataError(f"{name} is neither UTF-8, UTF-16 nor Windows-1252 text; save it as UTF-8")


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:20]} is no finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) != float("inf") else _no_number(text)


_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)
