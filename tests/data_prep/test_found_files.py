"""Finding of images: links, files of tools, names that are no text, and the keys of images."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from data_prep.found_files import find_pictures, key_of, paths_by_key
from slrnet.data.manifest import DataError


def put(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_every_suffix_that_is_read_counts_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["a.jpg", "b.JPEG", "c.jfif", "d.png", "e.webp", "f.avif", "g.gif", "h.jp2", "i.bmp", "j.TIF", "k.ppm"]
    put(tmp_path, *images, "notes.txt", "raw/a.CR2", "clip.mp4")
    assert find_pictures(tmp_path, "--images") == images
    out = capsys.readouterr().out
    assert out.startswith("--images: left out 3 file(s) or folder(s) that are no images by their suffix: ")
    assert out.endswith("clip.mp4, notes.txt, raw/a.CR2\n")


def test_files_of_tools_are_left_out_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools = [".ipynb_checkpoints/a.jpg", "x/@eaDir/a.jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "__MACOSX/a.jpg"]
    put(tmp_path, "x/a.jpg", *tools, "b.jpg.crdownload")
    assert find_pictures(tmp_path, "--masks") == ["x/a.jpg"]
    out = capsys.readouterr().out
    assert out.startswith("--masks: left out 7 file(s) or folder(s) that are hidden or of a tool: ")
    assert {"._a.jpg", ".ipynb_checkpoints/", "x/@eaDir/"} <= set(out.strip().partition("tool: ")[2].split(", "))


def test_more_than_ten_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a.jpg", *(f"{i:02}.doc" for i in range(25)))
    find_pictures(tmp_path, "--images")
    out = capsys.readouterr().out
    assert "left out 25 file(s)" in out
    assert out.endswith("08.doc, 09.doc, ... and 15 more\n")


def test_links_are_followed_once_around(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "img/a.jpg", "store/b.jpg", "store/deep/c.jpg")
    (tmp_path / "img" / "cats").symlink_to(tmp_path / "store")
    (tmp_path / "img" / "d.jpg").symlink_to(tmp_path / "store" / "b.jpg")
    (tmp_path / "store" / "deep" / "back").symlink_to(tmp_path / "store")
    assert find_pictures(tmp_path / "img", "--images") == ["a.jpg", "cats/b.jpg", "cats/deep/c.jpg", "d.jpg"]
    assert "that are links into themselves: cats/deep/back/" in capsys.readouterr().out


def test_broken_links_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "img/a.jpg")
    (tmp_path / "img" / "cats").symlink_to("../gone")
    with pytest.raises(DataError, match=r"1 broken link\(s\): cats -> ../gone; restore"):
        find_pictures(tmp_path / "img", "--images")


def test_pipes_are_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    assert find_pictures(tmp_path, "--images") == ["a.jpg"]
    assert "that are no regular files: b.jpg" in capsys.readouterr().out


def test_a_folder_that_is_apart(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "masks/a.png")
    assert find_pictures(tmp_path, "--images", apart=tmp_path / "masks") == ["a.jpg"]


def test_heic_photos_need_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.jpg", "b.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"has 1 HEIC photo\(s\): b.HEIC; run `pip install 'slrnet\[heic\]'`"):
        find_pictures(tmp_path, "--images")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).touch()
    with pytest.raises(DataError, match=r"not UTF-8: b'caf\\xe9.jpg'; rename it"):
        find_pictures(tmp_path, "--images")


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--images .*none is no folder"):
        find_pictures(tmp_path / "none", "--images")
    with pytest.raises(DataError, match="holds no images; known are .apng, .avif"):
        find_pictures(tmp_path, "--images")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a/b.jpg", "a_b"),
        ("three.v2.webp", "three_v2"),
        ("a b\u00a0c.JPG", "a_b_c"),
        ("no suffix", "no_suffix"),
        ("v1.2", "v1_2"),
        ("cafe\u0301.jpg", "caf\u00e9"),
        ("a\\b.jpg", "a_b"),
    ],
)
def test_keys(path: str, key: str) -> None:
    assert key_of(path) == key_of(Path(path)) == key


def test_long_keys_stay_apart_and_fit_a_header() -> None:
    folder = "\u68ee" * 40
    keys = [key_of(f"{folder}/{i}.jpg") for i in range(3)]
    assert len(set(keys)) == 3
    assert all(len(key.encode()) <= 90 and key.startswith(folder[:26]) for key in keys)


def test_images_of_one_key_are_refused_by_name(tmp_path: Path) -> None:
    assert paths_by_key(tmp_path, ["a b.jpg", "c/d.png"]) == {"a_b": "a b.jpg", "c_d": "c/d.png"}
    with pytest.raises(
        DataError, match=r"2 image\(s\) .*: a b.jpg and a_b.jpg, c/d.png and c_d.png; rename one of each"
    ):
        paths_by_key(tmp_path, ["a b.jpg", "a_b.jpg", "c/d.png", "c_d.png"])
