"""Images by the names that tables and lists give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.found_files import key_of
from data_prep.image_names import ImageNames
from slrnet.data.manifest import DataError

PATHS = ["a.jpg", "cats/b.v2.png", "cats/1.jpg", "dogs/1.jpg", "Dogs/Big.JPG", "caf\u00e9.jpg", "x y.jpg"]


@pytest.fixture
def names() -> ImageNames:
    return ImageNames({key_of(path): path for path in PATHS})


@pytest.mark.parametrize(
    ("name", "path", "way"),
    [
        ("a.jpg", "a.jpg", ""),
        ("a", "a.jpg", ""),
        ("./a.jpg", "a.jpg", ""),
        ('"a.jpg"', "a.jpg", ""),
        ("cats/b.v2.png", "cats/b.v2.png", ""),
        ("cats_b_v2", "cats/b.v2.png", ""),
        ("cats\\b.v2.png", "cats/b.v2.png", ""),
        ("cafe\u0301.jpg", "caf\u00e9.jpg", ""),
        ("x y.jpg", "x y.jpg", ""),
        ("img/a.jpg", "a.jpg", "without the folders before it"),
        ("/data/img/cats/1.jpg", "cats/1.jpg", "without the folders before it"),
        ("C:\\img\\dogs\\1.jpg", "dogs/1.jpg", "without the folders before it"),
        ("A.JPG", "a.jpg", "in another case"),
        ("dogs/big.jpg", "Dogs/Big.JPG", "in another case"),
        ("b.v2.png", "cats/b.v2.png", "in another folder"),
    ],
)
def test_found(names: ImageNames, name: str, path: str, way: str) -> None:
    assert names.find(name) == (key_of(path), way)


@pytest.mark.parametrize("name", ["nine.jpg", "1.jpg", "birds/1.jpg", "", "/", "a.jpg.bak"])
def test_not_found(names: ImageNames, name: str) -> None:
    assert names.find(name) is None


def test_lists(names: ImageNames, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val.txt").write_text("img\\a.jpg\r\n\r\n cats/1.jpg \r\ncats/1\r\n", encoding="utf-16")
    assert names.read_keys(tmp_path / "val.txt") == ["a", "cats_1"]
    out = capsys.readouterr().out
    assert r"val.txt: 1 name(s) are those of images without the folders before it: img\a.jpg as a.jpg" in out


def test_lists_of_what_is_not_there(names: ImageNames, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val.txt").write_text("a.jpg\n\nnine\nten\n")
    with pytest.raises(DataError, match=r"lists 2 image\(s\) that are not there: 'nine' \(line 3\), 'ten' \(line 4\)"):
        names.read_keys(tmp_path / "val.txt")
    lenient = ImageNames(names.paths, skip_unmatched=True)
    assert lenient.read_keys(tmp_path / "val.txt") == ["a"]
    assert "left out 2 name(s) of no image: 'nine' (line 3), 'ten' (line 4)" in capsys.readouterr().out
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="val.txt is empty"):
        names.read_keys(tmp_path / "val.txt")


def test_two_files_are_not_taken_for_one(names: ImageNames) -> None:
    assert names.find_all({"a": 2, "a.jpg": 3}, "l.csv") == {"a": "a", "a.jpg": "a"}
    with pytest.raises(DataError, match="could mean one image: x/a.jpg and y/a.jpg; write each as its path"):
        names.find_all({"x/a.jpg": 2, "y/a.jpg": 3}, "l.csv")
    with pytest.raises(DataError, match="could mean one image: a.jpg and A.jpg"):
        names.find_all({"a.jpg": 2, "A.jpg": 3}, "l.csv")


def test_splits(names: ImageNames, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt").write_text("cats/1\na.jpg\n")
    assert names.read_splits({"val": tmp_path / "a.txt"}) == {"a": "val"}
    with pytest.raises(DataError, match="image 'a' is in the splits 'val' and 'test'; keep one"):
        names.read_splits({"val": tmp_path / "a.txt", "test": tmp_path / "b.txt"})
