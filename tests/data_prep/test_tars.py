"""Tars of other programs: keys, splits and labels from every source, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.conversion import Output
from data_prep.tars import convert, read_tar
from slrnet.cli.main import main
from slrnet.data.manifest import DataError
from tests.fixtures.shards import table_of

from .conftest import stripes


def _jpeg(size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (90, 60, 30)).save(file, "JPEG")
    return file.getvalue()


def _mask(*ids: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(stripes(ids)).save(file, "PNG")
    return file.getvalue()


def _labels(classes: Any) -> bytes:
    return json.dumps({"classes": classes}).encode()


def _tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """As other programs write them: with folders, times that need a header of their own, and users."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(content), 1_700_000_000.5, "somebody"
            archive.addfile(member, io.BytesIO(content))
    return path


def _convert(tmp_path: Path, files: dict[str, bytes], name: str = "train-000000.tar", **options: Any) -> dict[str, Any]:
    _tar(tmp_path / "tars" / name, files)
    shared = {name: options.pop(name) for name in ("subsets", "skip_damaged") if name in options}
    convert(tmp_path / "tars", Output(tmp_path / "out", shards=1, **shared), classes=["cat", "dog"], **options)
    return {row["key"]: row for row in table_of(tmp_path / "out").to_pylist()}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_files_belong_together_by_the_name_up_to_the_first_dot(tmp_path: Path, form: int) -> None:
    files = {
        "./a/b.jpg": b"1",
        "./a/b.seg.png": b"2",
        "./a/b.PNG": b"3",
        "readme": b"4",
        "a/c.jpeg": b"5",
        "c.cls": b"6",
    }
    path = _tar(tmp_path / "tars" / "x.tar", files, form)
    left_out: list[str] = []
    read = [(key, {kind: file.read_bytes() for kind, file in files.items()}) for key, files in read_tar(path, left_out)]
    assert read == [("a_b", {"jpg": b"1", "png": b"3"}), ("a_c", {"jpg": b"5"}), ("c", {"cls": b"6"})]
    assert left_out == ["x.tar: ./a/b.seg.png", "x.tar: readme"]


def test_files_of_no_sample_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "old.tar.gz").write_bytes(b"")
    files = {"a b.jpg": _jpeg(), "a b.cls": b"0\r\n", "IMG.v2.jpg": b"", ".jpg": b""}
    files |= {f"notes{number:02}.txt": b"" for number in range(9)}
    assert list(_convert(tmp_path, files)) == ["a_b"]
    printed = capsys.readouterr().out
    assert (
        "left out 12 files that are no KEY.jpg, KEY.jpeg, KEY.png, KEY.json, KEY.cls: old.tar.gz, "
        "train-000000.tar: IMG.v2.jpg, train-000000.tar: .jpg, train-000000.tar: notes00.txt"
    ) in printed
    assert "train-000000.tar: notes06.txt, ... and 2 more\n" in printed


def test_links_and_sparse_files_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _tar(tmp_path / "tars" / "train.tar", {"a.jpg": _jpeg(), "a.cls": b"0"})
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("c", tarfile.DIRTYPE), ("d.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    convert(tmp_path / "tars", Output(tmp_path / "out"), classes=["cat"])
    assert "left out 2 files that are no" in (printed := capsys.readouterr().out)
    assert "train.tar: b.jpg, train.tar: d.jpg\n" in printed


def test_keys_in_several_places_are_refused(tmp_path: Path) -> None:
    sample = {"a.jpg": _jpeg(), "a.cls": b"0"}
    _tar(tmp_path / "tars" / "val-0.tar", sample)
    rows = _convert(tmp_path, sample | {"b.jpg": _jpeg(), "b.cls": b"0"})
    assert len(rows) == 2  # a key of train may be one of val
    _tar(tmp_path / "tars" / "train-1.tar", sample)
    with pytest.raises(DataError, match=r"have 1 keys in several places: .*train-0.*.tar: a.jpg, .*train-1.tar: a.jpg"):
        convert(tmp_path / "tars", Output(tmp_path / "again"), classes=["cat"])


def test_labels_of_any_encoding(tmp_path: Path) -> None:
    label = json.dumps({"classes": ["dog"]}).encode("utf-16")
    files = {"a.jpg": _jpeg(), "a.json": label, "b.jpg": _jpeg(), "b.cls": b"\xef\xbb\xbf1"}
    assert [row["classes"] for row in _convert(tmp_path, files).values()] == [[2], [2]]


def test_labels_come_from_json_or_cls_else_from_the_mask(tmp_path: Path) -> None:
    rows = _convert(
        tmp_path,
        {
            "names.jpg": _jpeg(), "names.png": _mask(0, 1), "names.json": _labels(["dog", "cat"]),
            "ids.jpg": _jpeg(), "ids.json": _labels([2]),
            "none.jpg": _jpeg(), "none.json": _labels([]),
            "cls.jpg": _jpeg(), "cls.cls": b"1\n",
            "mask.jpg": _jpeg(), "mask.png": _mask(0, 2, 255), "mask.json": b'{"caption": "a dog"}',
            "unknown.jpg": _jpeg(), "unknown.json": _labels(None),
        },
        unlabeled=True,
    )  # fmt: skip
    found = {key: (row["classes"], row["has_image_labels"], row["has_mask"]) for key, row in rows.items()}
    assert found == {
        "names": ([1, 2], True, True),
        "ids": ([2], True, False),
        "none": ([], True, False),
        "cls": ([2], True, False),
        "mask": ([2], True, True),
        "unknown": ([], False, False),
    }


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000.tar", "train"),
        ("val-000000.tar", "val"),
        ("photos_val_07.tar", "val"),
        ("test.tar", "test"),
        ("shard-000003.tar", "train"),
        ("interval-000.tar", "train"),
    ],
)
def test_the_split_is_the_one_that_the_tars_name_states(tmp_path: Path, name: str, split: str) -> None:
    rows = _convert(tmp_path, {"a.jpg": _jpeg(), "a.cls": b"0"}, name=name)
    assert rows["a"]["split"] == split


@pytest.mark.parametrize(("name", "meant"), [("validation-000000.tar", "val"), ("photos_Test.tar", "test")])
def test_other_words_for_a_split_are_refused(tmp_path: Path, name: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"seems to hold the split '{meant}'; rename it"):
        _convert(tmp_path, {"a.jpg": _jpeg(), "a.cls": b"0"}, name=name)


def test_a_fraction_deals_the_samples_of_all_tars(tmp_path: Path) -> None:
    files = {f"k{i}.{kind}": content for i in range(40) for kind, content in (("jpg", _jpeg()), ("cls", b"0"))}
    rows = _convert(tmp_path, files, val_fraction=0.25)
    assert 4 <= sum(row["split"] == "val" for row in rows.values()) <= 16


def test_large_images_and_their_masks_are_scaled_down_and_subsets_marked(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a\n")
    rows = _convert(
        tmp_path,
        {"a.jpg": _jpeg(), "a.png": _mask(0, 1), "b.jpg": _jpeg((5, 4)), "b.cls": b"0"},
        longest_side=6,
        subsets={"few": tmp_path / "few.txt"},
    )
    assert [(rows[key]["width"], rows[key]["height"], rows[key]["subsets"]) for key in "ab"] == [
        (6, 4, ["few"]),
        (5, 4, []),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": _mask(0)}, r"train-000000.tar: sample 'a' has no image .jpg or .jpeg, only a.png"),
        ({"a.jpg": _jpeg()}, r"a.jpg has no mask, and neither .json nor .cls says what it shows; .*--unlabeled"),
        ({"a.jpg": _jpeg()[:300], "a.cls": b"0"}, r"train-000000.tar: a.jpg cannot be read: .*--skip-damaged"),
        ({"a.jpg": b"text", "a.cls": b"0"}, r"a.jpg cannot be read: no image, or of an unknown kind"),
        ({"a.jpg": _jpeg((9, 9)), "a.png": _mask(0, 1)}, r"a.png is 12x8 pixels, its image a.jpg 9x9"),
        ({"a.jpg": _jpeg(), "a.png": _mask(0, 7)}, r"a.png has ids \[7\]; allowed are 0 to 2 and 255 \(void\)"),
        ({"a.jpg": _jpeg(), "a.json": b"{"}, r"a.json is not JSON"),
        ({"a.jpg": _jpeg(), "a.json": _labels("cat")}, r"a.json has the classes 'cat'; a list of names or ids"),
        ({"a.jpg": _jpeg(), "a.json": _labels(["cow"])}, r"a.json has the class 'cow'; allowed are the names cat, dog"),
        ({"a.jpg": _jpeg(), "a.json": _labels([0])}, r"a.json has the class 0; allowed are .* their ids 1 to 2"),
        ({"a.jpg": _jpeg(), "a.cls": b"2"}, r"a.cls has the class '2'; allowed are 0 to 1"),
        ({"a.jpg": _jpeg(), "a.jpeg": _jpeg()}, r"has the files a.jpg and a.jpeg for one sample"),
        ({"a.jpg": _jpeg(), "a.cls": b"0", "b.jpg": _jpeg(), "b.cls": b"0", "a.png": _mask(0)}, "a.png"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_by_name(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _convert(tmp_path, files)
    assert not (tmp_path / "out").exists()


def test_damaged_samples_are_left_out_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.jpg": b"text", "a.cls": b"0", "b.jpg": _jpeg(), "b.cls": b"0"}
    assert list(_convert(tmp_path, files, skip_damaged=True)) == ["b"]
    assert "left out 1 damaged images, 1 remain" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["header", "cut", "no tar"])
def test_a_damaged_tar_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    """tarfile takes a damaged header for the end of the tar: the samples after it would be lost in silence."""
    files = {"a.jpg": _jpeg(), "a.cls": b"0", "b.jpg": _jpeg(), "b.cls": b"0"}
    path = _tar(tmp_path / "tars" / "train-0.tar", files, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    second = data.index(b"b.jpg")
    if damage == "header":
        data[second] ^= 1
    path.write_bytes(bytes(data[: second + 200]) if damage == "cut" else b"text" if damage == "no tar" else bytes(data))
    with pytest.raises(
        DataError, match=r"train-0.tar (is damaged or cut off at byte|cannot be read as an uncompressed)"
    ):
        convert(tmp_path / "tars", Output(tmp_path / "out"), classes=["cat", "dog"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["cat", "cat"]}, "--classes has the names .*1 to 254 different ones"),
        ({"classes": []}, "--classes has the names"),
        ({"classes": ["cat"], "val_fraction": 1.0}, "--val-fraction is 1.0; allowed are shares"),
        ({"classes": ["cat"]}, r"--tars .* holds no files \*.tar"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert(tmp_path, Output(tmp_path / "out"), **options)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _tar(tmp_path / "tars" / "train-0.tar", {"a.jpg": _jpeg(), "a.cls": b"1"})
    words = ["--tars", str(tmp_path / "tars"), "--classes", "cat,dog", "--out", str(tmp_path / "out")]
    assert main(["prepare", "tars", *words, "--processes", "1"]) == 0
    assert "1 train samples, 3 classes" in capsys.readouterr().out
    assert main(["prepare", "tars", "--out", str(tmp_path / "other")]) == 2
    assert "--tars and --classes are needed" in capsys.readouterr().err
