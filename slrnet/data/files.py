"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside `path`, of the same suffix, to write to; it takes the place of `path` when all went well."""
    incoming = path.with_name(f".incoming.{path.name}")
    yield incoming
    incoming.replace(path)
