"""Names and texts from files that others wrote: which may become a path, and how they are shown."""

from __future__ import annotations

import hashlib
import re
import unicodedata

__all__ = ["CONTROL", "check_name", "check_run_name", "check_text", "printable", "short_name"]

LONGEST = 100
"""Bytes that a name of a file may have in UTF-8, so that there is room for a suffix."""
CONTROL = r"\p{Cc}\x{61c}\x{200e}\x{200f}\x{2028}-\x{202e}\x{2066}-\x{2069}"
"""Within [] of Arrow's regular expressions: control characters, line breaks and changes of direction."""
_MOST_BYTES = 200
_RUN_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9_.-]{1,200}")
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of a text, so that it reads as another one."""


def printable(text: str) -> str:
    """The text with escapes for control characters, line breaks and changes of direction."""
    return "".join(ascii(c)[1:-1] if _is_control(c) else c for c in text)


def check_text(what: str, text: str) -> None:
    """Raises ValueError if a text is empty or has control characters, line breaks or changes of direction."""
    if not text.strip() or any(map(_is_control, text)):
        raise ValueError(f"the {what} is {text!a}; a text without control characters and line breaks is needed")


def check_name(what: str, name: str) -> None:
    """Raises ValueError if a name cannot become that of a file: it has `/`, a dot at its start, or too many bytes."""
    check_text(what, name)
    if name.startswith(".") or "/" in name or "\\" in name or len(name.encode()) > LONGEST:
        raise ValueError(
            f"the {what} is {name[:LONGEST]!r}; a name without / and \\ that starts with no dot, of up to {LONGEST} "
            "bytes, is needed"
        )


def check_run_name(name: str) -> str:
    """Returns the name of a run or sweep, which becomes a folder; raises ValueError if it is none."""
    if not _RUN_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a run; allowed are up to 200 letters, digits and _ - .")
    return name


def short_name(name: str) -> str:
    """The name of a file, or if it is too long for a suffix and a file system, its beginning and a hash of it."""
    data = name.encode(errors="surrogateescape")
    if len(data) <= _MOST_BYTES:
        return name
    return f"{data[: _MOST_BYTES - 17].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS
