"""Names and texts from files that others wrote: which may become a path, and how they are shown."""

from __future__ import annotations

import unicodedata

__all__ = ["check_name", "check_text", "printable"]

LONGEST = 100
"""Bytes that a name of a file may have in UTF-8, so that there is room for a suffix."""
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


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS
