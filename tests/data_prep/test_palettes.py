"""Palette files: their forms, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.palettes import read_palette
from slrnet.data.manifest import DataError


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("background #000000\ncat red\n", "line 2: 'cat red' is not"),
        ("background 0 0 0\ncat 0 0 256\n", "line 2"),
        ("background #000000\ncat #000000\n", "a color twice, line 1 and line 2"),
        ("background #000000\ncat #ff0000\nvoid #ff0000\n", "a color twice, line 2 and line 3"),
        ("background #000000\ncat #ff0000\nCat #00ff00\n", "a name twice, line 2 and line 3"),
        (
            "background #000000\ncat 255 0 0 255\n",
            "more than a name and three numbers; .*'cat 255', put it into quotes",
        ),
        ("background #000000\n0,cat,255,0,0\n", "more than a name and three numbers"),
        ("cat #ff0000\ndog #00ff00\n", "classes cat, dog, but no 'background'; add a line"),
    ],
)
def test_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "palette.txt").write_text(text)
    with pytest.raises(DataError, match=match):
        read_palette(tmp_path / "palette.txt")


FORMS = {
    "hex": "background #000000\nTraffic light #FAAA1E\ncar #0000ff\nvoid #ffffff\n",
    "numbers": "background 0 0 0\nTraffic light 250 170 30\ncar 0 0 255\nvoid 255 255 255\n",
    "quotes": "background 0 0 0\n\"Traffic light\" 250 170 30\n'car' 0 0 255\nvoid 255 255 255\n",
    "tabs and commas": "background\t0,0,0\nTraffic light\t250,170,30\n\ncar\t0, 0, 255\nvoid\t255,255,255\n",
    "color first": "0 0 0 background\n250 170 30\tTraffic light\n#0000ff car\n255 255 255 void\n",
    "background later": "Traffic light 250 170 30\nBackground 0 0 0\nvoid #ffffff\ncar 0 0 255\n",
    "CVAT": "# label:color_rgb:parts:actions\nbackground:0,0,0::\nTraffic light:250,170,30::\ncar:0,0,255:wheel,door:\n"
    "void:255,255,255::\n",
    "CSV": "name,r,g,b\nbackground,0,0,0\nTraffic light,250,170,30\ncar,0,0,255\nvoid,255,255,255\n",
    "object": '{"background": "#000000", "Traffic light": [250, 170, 30], "car": "#0000ff", "void": "#ffffff"}',
    "list": '[{"name": "background", "color": "#000000", "id": 1}, {"name": "Traffic light", "color": "#faaa1e"}, '
    '{"name": "car", "color": [0, 0, 255]}, {"name": "void", "color": "#ffffff"}]',
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("palette.json" if form in ("object", "list") else "palette.txt")
    path.write_text(FORMS[form], encoding="utf-8-sig", newline="\r\n")
    palette = read_palette(path)
    assert palette.names == ("background", "Traffic light", "car")
    assert palette.colors.tolist() == [[0, 0, 0], [250, 170, 30], [0, 0, 255]]
    assert palette.void is not None
    assert palette.void.tolist() == [255, 255, 255]


def test_a_mask_with_smooth_edges_says_how_many_pixels_and_where(tmp_path: Path) -> None:
    (tmp_path / "palette.txt").write_text("background #000000\ncat #ff0000\nvoid #ffffff\n")
    palette = read_palette(tmp_path / "palette.txt")
    pixels = np.zeros((4, 5, 3), dtype=np.uint8)
    pixels[1:, 2:] = (255, 0, 0)
    pixels[3] = 255
    assert palette.ids(pixels).tolist() == [[0] * 5, [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [255] * 5]
    pixels[2, 1], pixels[1, 1:3] = (64, 0, 0), (127, 0, 0)
    with pytest.raises(
        DataError, match=r"3 pixel\(s\) in 2 color\(s\) .* first #7f0000 at row 1, column 1; .*smoothing"
    ):
        palette.ids(pixels)
