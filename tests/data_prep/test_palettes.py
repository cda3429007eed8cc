"""Palette files: their forms, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.palettes import read_palette
from slrnet.data.manifest import DataError


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("background #000000\ncat red\n", "line 2: 'cat red' is not"),
        ("background 0 0 0\ncat 0 0 256\n", "line 2"),
        ("background #000000\ncat #000000\n", "a name or a color twice"),
        ("background #000000\ncat #ff0000\nvoid #ff0000\n", "a name or a color twice"),
        ("cat #ff0000\ndog #00ff00\n", "needs 'background' first"),
    ],
)
def test_palettes(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "palette.txt").write_text(text)
    with pytest.raises(DataError, match=match):
        read_palette(tmp_path / "palette.txt")
