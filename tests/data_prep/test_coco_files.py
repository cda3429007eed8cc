"""Annotation files: read piece by piece, in the encodings that there are, and what is no such file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.coco_files import _elements, _JsonReader, identity, read_annotations, read_spans
from slrnet.data.manifest import DataError

CONTENT: dict[str, Any] = {
    "info": {"year": 2017, "note": "größe"},
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 5, "note": "Bär"},
        {"id": 2, "image_id": 7, "category_id": 5},
        {"id": 3, "image_id": 7, "category_id": 0},
    ],
    "images": [
        {"id": 9, "file_name": "größe 9.jpg", "width": 20, "height": 12},
        {"id": 7, "file_name": "a.jpg", "width": 30.0, "height": 10},
    ],
    "categories": [{"id": 5, "name": "Bär"}, {"id": 0, "name": "cat", "supercategory": "animal"}],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
LISTS: dict[str, list[Any]] = {"images": [], "categories": [], "annotations": []}


def write(folder: Path, content: Any, encoding: str = "utf-8", **options: Any) -> Path:
    path = folder / "instances.json"
    path.write_bytes(json.dumps(content, **options).encode(encoding))
    return path


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(), JSON, min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([None, 2]),
    st.sampled_from(["utf-8", "utf-16-le", "utf-16-be"]),
    st.booleans(),
)
@pytest.mark.slow
def test_piecewise_reading_equals_reading_the_whole(
    content: dict[str, Any], chunk: int, indent: int | None, encoding: str, escaped: bool
) -> None:
    content = content | LISTS
    data = json.dumps(content, ensure_ascii=escaped, indent=indent).encode(encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_JsonReader, "CHUNK", chunk)
        found = list(_elements(io.BytesIO(b"123" + data), encoding, 3))
    expected = [(name, value) for name, values in content.items() if isinstance(values, list) for value in values]
    assert [(name, value) for name, _, _, value in found] == expected
    for _, start, length, value in found:
        assert json.loads((b"123" + data)[start : start + length].decode(encoding)) == value


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(tmp_path: Path, encoding: str, escaped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, CONTENT, encoding, ensure_ascii=escaped)
    content = read_annotations(path)
    assert [tuple(image) for image in content.images] == [(7, "a.jpg", 30, 10), (9, "größe 9.jpg", 20, 12)]
    assert [tuple(category) for category in content.categories] == [(0, "cat", "animal"), (5, "Bär", "")]
    assert content.image_places.tolist() == [0, 0, 1]
    assert content.category_places.tolist() == [1, 0, 1]
    ids = [
        [annotation["id"] for annotation in read_spans(path, content.encoding, content.spans[content.of_image(place)])]
        for place in (0, 1)
    ]
    assert ids == [[2, 3], [1]]
    assert capsys.readouterr().err == ""


def test_a_guessed_encoding_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, CONTENT, "cp1252", ensure_ascii=False)
    content = read_annotations(path)
    assert content.images[1].file_name == "größe 9.jpg"
    assert read_spans(path, content.encoding, content.spans[2:])[0]["note"] == "Bär"
    assert f"{path} is not UTF-8: read as Windows-1252 (Latin-1), such as 'größe 9.jpg'" in capsys.readouterr().err


def test_ids_are_numbers_or_texts(tmp_path: Path) -> None:
    content = {
        "images": [{"id": name, "file_name": f"{name}.jpg", "width": 1, "height": 1} for name in ("b", "12", "007", 3)],
        "categories": [{"id": "1", "name": "cat"}, {"id": "x", "name": "dog"}],
        "annotations": [
            {"image_id": 12, "category_id": 1.0},
            {"image_id": "b", "category_id": "x"},
            {"image_id": "3", "category_id": "1"},
        ],
    }
    path = write(tmp_path, content)
    read = read_annotations(path)
    assert [image.id for image in read.images] == [3, 12, "007", "b"]
    assert read.image_places.tolist() == [0, 1, 3]
    categories = [annotation["category_id"] for annotation in read_spans(path, read.encoding, read.spans)]
    assert categories == [1, 1, "x"]


@pytest.mark.parametrize("value", [None, True, 1.5, "", [1], {"a": 1}, float("nan"), float("inf")])
def test_what_is_no_id(value: Any) -> None:
    with pytest.raises(ValueError, match="has the image_id .*; a whole number or a text is allowed"):
        identity({"image_id": value}, "image_id")


def test_large_ids() -> None:
    assert identity({"id": 2**70}, "id") == 2**70
    assert identity({"id": "9" * 30}, "id") == "9" * 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "byte 0 is the end of the file, not '{'"),
        ("[]", r"byte 0 is '\[', not '{'"),
        ("{", "byte 1: Expecting value"),
        ('{"a": 1 2}', "byte 8 is '2', not ','"),
        ('{"images": [{}', "byte 14 is the end of the file, not a comma or bracket"),
        ('{"images": [{"id": 1}]}', r"images\[0\] has the file_name None"),
        ('{"annotations": [1]}', r"annotations\[0\] is 1; an object is allowed"),
        ('{"a": [1x]}', "byte 8 is 'x', not a comma or bracket"),
        ('{"images": []}', "it has no list 'categories'"),
        ('{"images": {}}', "its 'images' is no list"),
        ('{"images": null}', "its 'images' is no list"),
        (json.dumps(LISTS) + "{}", "something follows the end of the object"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"images": [{"id": ' + "1" * 5000 + "}]}", "Exceeds the limit"),
    ],
)
def test_files_that_are_no_annotations_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"instances.json is no file of COCO's instance annotations: .*{message}"):
        read_annotations(path)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (("images", 0), {"file_name": None}, r"images\[0\] has the file_name None"),
        (("images", 0), {"file_name": "a\nb.jpg"}, r"images\[0\] has the file_name 'a\\nb.jpg'"),
        (("images", 0), {"file_name": "a.jpg"}, r"images\[1\] has the file_name 'a.jpg' of image 9"),
        (("images", 1), {"id": "9"}, r"images\[1\] has the id 9 of another image, 'größe 9.jpg'"),
        (("images", 1), {"id": float("inf")}, r"images\[1\] has the id inf"),
        (("images", 1), {"width": -1}, r"images\[1\] has the width -1; whole pixels from 1 to 1000000"),
        (("images", 1), {"height": 1.5}, r"images\[1\] has the height 1.5"),
        (("images", 1), {"height": float("nan")}, r"images\[1\] has the height nan"),
        (("images", 1), {"height": 10**12}, r"images\[1\] has the height 1000000000000"),
        (("categories", 1), {"id": 5}, r"categories\[1\] has the id 5 of another category"),
        (("categories", 1), {"name": 5}, r"categories\[1\] has the name 5"),
        (("categories", 1), {"name": "\x1b[2Jcat"}, r"categories\[1\] has the name '\\x1b\[2Jcat'"),
        (("categories", 1), {"name": "\ud800"}, r"categories\[1\] has the name '\\ud800'"),
        (("categories", 1), {"name": "x" * 10**6}, r"categories\[1\] has the name 'xxx"),
        (
            ("annotations", 0),
            {"image_id": 2**70},
            r"annotations of the images \[1180591620717411303424\], which it does",
        ),
        (
            ("annotations", 0),
            {"category_id": "cat"},
            r"annotations of the categories \['cat'\], which it does not list",
        ),
        (("annotations", 2), {"category_id": None}, r"annotations\[2\] has the category_id None"),
    ],
)
def test_entries_that_cannot_be_used_are_named(
    tmp_path: Path, place: tuple[str, int], change: dict[str, Any], message: str
) -> None:
    content = json.loads(json.dumps(CONTENT))
    content[place[0]][place[1]] |= change
    with pytest.raises(DataError, match=message):
        read_annotations(write(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*none.json: No such file"):
        read_annotations(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder, pipe or device"):
        read_annotations(tmp_path)
    data = write(tmp_path, CONTENT, "utf-16-le", ensure_ascii=False).read_bytes()
    (tmp_path / "cut.json").write_bytes(data[:-3])
    with pytest.raises(DataError, match="ends within a character"):
        read_annotations(tmp_path / "cut.json")
    write(tmp_path, CONTENT, "utf-32")
    with pytest.raises(DataError, match="UTF-32 text; save it as UTF-8"):
        read_annotations(tmp_path / "instances.json")


def test_values_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_JsonReader, "CHUNK", 1 << 10)
    monkeypatch.setattr(_JsonReader, "LONGEST", 1 << 12)
    with pytest.raises(DataError, match="byte 6: a value is longer than 0 MB"):
        read_annotations(write(tmp_path, {"x": "a" * 10_000} | LISTS))


def test_a_truncated_file_ends_in_a_message_wherever_it_ends(tmp_path: Path) -> None:
    data = write(tmp_path, CONTENT).read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut.json").write_bytes(data[:length])
        with pytest.raises(DataError, match="cut.json is no file of COCO's instance annotations: "):
            read_annotations(tmp_path / "cut.json")
    assert np.all(read_annotations(tmp_path / "instances.json").spans > 0)
