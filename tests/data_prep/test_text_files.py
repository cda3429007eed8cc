"""Texts in the encodings that people's editors write."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.text_files import parse_json, read_json, read_lines, read_text, read_xml
from slrnet.data.manifest import DataError

WORDS = ["background", "Bär groß", "snake"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8"),
        lambda text: text.encode("utf-8-sig"),
        lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_texts_of_any_encoding_and_line_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encode: Callable[[str], bytes], end: str, last: bool
) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(encode(end.join(WORDS) + end * last))
    assert read_lines(path, "list of classes") == WORDS
    assert read_lines(str(path), "list of classes") == WORDS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["北京\n上海", "ψ\nω", "кот\r\nпёс", "a b"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_other_scripts(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_lines(tmp_path / "a.txt", "list") == text.split("\r\n" if "\r" in text else "\n")


def test_a_guessed_encoding_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("background\r\nBär\r\nprice €\r\n".encode("cp1252"))
    assert read_lines(path, "list of classes") == ["background", "Bär", "price €"]
    assert capsys.readouterr().err == (
        f"the list of classes {path} is not UTF-8: read as Windows-1252 (Latin-1), such as 'Bär' in line 2; "
        "if that is wrong, save it as UTF-8\n"
    )


def test_empty_and_blank_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for data, lines in ((b"", []), (b"\n", [""]), (b"a\n\n b \n", ["a", "", " b "]), (codecs.BOM_UTF8, [])):
        path.write_bytes(data)
        assert read_lines(path, "list") == lines


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cat\ndo\0g\n", r"the table a\.txt is no text file: line 2 holds the byte '\\x00'"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"the table a\.txt is no text file: line 2 holds the byte '\\x1a'"),
        (b"\x1b[2Jcat", r"line 1 holds the byte '\\x1b'"),
        (codecs.BOM_UTF16_LE + b"a\0b", r"a\.txt is neither UTF-8, UTF-16 nor Windows-1252 text; save it as UTF-8"),
        ("カメラ".encode("shift_jis"), r"a\.txt is neither"),
    ],
)
def test_binary_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_text("a.txt", "table")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = ((tmp_path, "it is a folder"), (tmp_path / "pipe", "pipe or device"), (tmp_path / "x", "No such file"))
    for path, reason in places:
        with pytest.raises(DataError, match=rf"cannot read the list of images {path}: .*{reason}"):
            read_lines(path, "list of images")
    with (tmp_path / "long").open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(DataError, match=r"long: it has more than 256 MB"):
        read_text(tmp_path / "long", "list of images")


class TestJson:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
    def test_encodings(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "a.json").write_bytes('{"names": ["Bär", "\\ud83d\\ude00"], "size": 1.5e3}'.encode(encoding))
        assert read_json(tmp_path / "a.json", "annotations") == {"names": ["Bär", "\U0001f600"], "size": 1500.0}

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[1, NaN]", "NaN is no finite number"),
            ("[-Infinity]", "-Infinity is no finite number"),
            ("[1e999]", "1e999 is no finite number"),
            ('{"a": ', "Expecting value"),
            ("[" * 100_000, "nested too deeply|Expecting value"),
            ("1" * 5000, "Exceeds the limit"),
            ('["\\ud800"]', "surrogates not allowed"),
            ("", "Expecting value"),
        ],
    )
    def test_what_is_no_json(self, tmp_path: Path, text: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            parse_json(text)
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=rf"the annotations .*a\.json is not JSON: .*({reason}).*; write it again"):
            read_json(tmp_path / "a.json", "annotations")


class TestXml:
    def read(self, folder: Path, data: bytes) -> Any:
        (folder / "a.xml").write_bytes(data)
        return read_xml(folder / "a.xml", "annotation", remedy="fetch it again")

    @pytest.mark.parametrize(
        ("head", "encoding"),
        [
            ("", "utf-8"),
            ("", "utf-8-sig"),
            ("", "cp1252"),
            ('<?xml version="1.0" encoding="iso-8859-1"?>', "iso-8859-1"),
            ('<?xml version="1.0" encoding="UTF-16"?>', "utf-16"),
            ('<?xml version="1.0" encoding="UTF-8"?>\r\n', "utf-8"),
        ],
    )
    def test_encodings(self, tmp_path: Path, head: str, encoding: str) -> None:
        root = self.read(tmp_path, f"{head}<annotation><name>Bär</name></annotation>".encode(encoding))
        assert root.findtext("name") == "Bär"

    def test_what_is_no_xml(self, tmp_path: Path) -> None:
        bomb = "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))
        (tmp_path / "secret").write_text("secret")
        for data in (
            b"",
            b"<annotation><object></annotation>",
            b'<?xml version="1.0" encoding="klingon"?><a/>',
            b"<a>\0</a>",
            f"<!DOCTYPE a [<!ENTITY a0 'lol'>{bomb}]><a>&a11;</a>".encode(),
            f"<!DOCTYPE a [<!ENTITY x SYSTEM 'file://{tmp_path}/secret'>]><a>&x;</a>".encode(),
        ):
            with pytest.raises(
                DataError, match=r"a\.xml (is not readable XML|declares entities).*; fetch it again|no text file"
            ):
                self.read(tmp_path, data)

    def test_deep_files(self, tmp_path: Path) -> None:
        depth = 10 * sys.getrecursionlimit()
        assert self.read(tmp_path, b"<a>" * depth + b"</a>" * depth).findall("object") == []
