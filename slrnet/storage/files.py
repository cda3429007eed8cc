"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["sha256_of", "write_json", "write_text", "written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside `path`, of the same suffix, to write to; it takes the place of `path` when all went well.

    An error removes it, and the next write replaces what a killed process left there. Creates the folder if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_name(f".incoming.{path.name}")
    try:
        yield incoming
        incoming.replace(path)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as indented JSON; see `write_text`."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `written_whole` does."""
    with written_whole(path) as incoming:
        incoming.write_text(text, encoding="utf-8")
