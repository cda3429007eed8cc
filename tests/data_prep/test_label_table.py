"""Tables of labels: the dialects and layouts that are read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.image_names import ImageNames
from data_prep.label_table import LabelTable, read_label_table
from slrnet.data.manifest import DataError

NAMES = ImageNames({key: f"{key}.jpg" for key in "abcd"})
CLASSES = ["cat", "dog", "traffic light"]
EXPECTED = {"a": ("cat", "dog"), "b": ("cat",), "c": ()}
SAME = {
    "semicolons": "image,labels\na.jpg,cat;dog\nb.jpg,cat\nc.jpg,\n",
    "spaces": " image , labels \na.jpg , cat ; dog\nb.jpg,  cat\nc.jpg, \n",
    "quotes": 'image,labels\n"a.jpg","cat;dog"\n"b.jpg","cat"\n"c.jpg",""\n',
    "European spreadsheet": 'image;labels\na.jpg;"cat;dog"\nb.jpg;cat\nc.jpg;\n',
    "tabs": "image\tlabels\na.jpg\tcat;dog\nb.jpg\tcat\nc.jpg\t\n",
    "bars": "image|labels\na.jpg|cat;dog\nb.jpg|cat\nc.jpg|\n",
    "Excel": 'sep=;\nImage;Labels\na.jpg;"cat;dog"\nb.jpg;cat\nc.jpg;\n',
    "header": "\ufeffFile Name,CLASS\na.jpg,cat;dog\nb.jpg,cat\nc.jpg,\n",
    "lines in cells": 'image,labels\na.jpg,"cat\ndog"\nb.jpg,cat\nc.jpg,\n',
    "blank lines": "\n\nimage,labels\n\na.jpg,cat;dog\n\nb.jpg,cat\n,,\nc.jpg,\n\n",
    "several columns": "image,label_1,label_2\na.jpg,cat,dog\nb.jpg,cat,\nc.jpg,,\n",
    "several lines": "image,label\na.jpg,cat\nb.jpg,cat\na.jpg,dog\nb,cat\nc.jpg,\n",
    "0 and 1": "filename,cat,dog\na.jpg,1,1\nb.jpg, 1, 0\nc.jpg,0,0\n",
    "true and false": "file,cat,dog,background\na.jpg,True,True,False\nb.jpg,True,FALSE,false\nc.jpg,false,0,true\n",
    "crosses": "image;cat;dog\na.jpg;x;x\nb.jpg;x;\nc.jpg;;\n",
    "background": "image,labels\na.jpg,cat;dog\nb.jpg,background;cat\nc.jpg,Background\n",
    "other columns": ",image,width,labels\n0,a.jpg,640,cat;dog\n1,b.jpg,640,cat\n2,c.jpg,480,\n",
    "paths": "image,labels\nimg\\a.jpg,cat;dog\n/data/img/b.jpg,cat\nC.JPG,\n",
}
KNOWN = {
    "extra cells": "image,labels\na.jpg,cat,dog\nb.jpg,cat\nc.jpg,\n",
    "extra columns": "image,labels,,\na.jpg,cat,dog,\nb.jpg,cat,,\nc.jpg,,,\n",
    "commas": 'image,labels\na.jpg,"cat, dog"\nb.jpg,cat\nc.jpg,\n',
    "bars in cells": "image,labels\na.jpg,cat | dog\nb.jpg,cat\nc.jpg,\n",
    "lists": "image,labels\na.jpg,\"['cat', 'dog']\"\nb.jpg,['cat']\nc.jpg,[]\n",
    "cases": "image,labels\na.jpg,Cat;DOG\nb.jpg,cat\nc.jpg,\n",
    "ids beside flags": "id,filename,CAT,dog,traffic_light\n17,a.jpg,1,1,0\n18,b.jpg,1,0,0\n19,c.jpg,0,0,0\n",
}


def read(tmp_path: Path, text: str, classes: list[str] | None = None) -> LabelTable:
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    return read_label_table(tmp_path / "l.csv", classes)


@pytest.mark.parametrize("form", SAME)
def test_forms(form: str, tmp_path: Path) -> None:
    table = read(tmp_path, SAME[form])
    assert table.class_names == ("cat", "dog")
    assert table.of_images(NAMES).labels == EXPECTED
    assert table.of_images(NAMES).splits is None


@pytest.mark.parametrize("form", [*SAME, *KNOWN])
def test_forms_with_known_classes(form: str, tmp_path: Path) -> None:
    text = {**SAME, **KNOWN}[form]
    classes = CLASSES[:2] if "flags" not in form else CLASSES
    assert read(tmp_path, text, classes).of_images(NAMES).labels == EXPECTED


@pytest.mark.parametrize("form", [form for form in KNOWN if form not in ("cases", "ids beside flags")])
def test_what_needs_classes_says_so(form: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2.*--classes"):
        read(tmp_path, KNOWN[form])


def test_splits(tmp_path: Path) -> None:
    table = read(tmp_path, "Split,image,labels\nval,a.jpg,cat\ntrain,b.jpg,cat\n,c.jpg,\n")
    assert table.of_images(NAMES).splits == {"a": "val", "b": "train"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("image,labels\r\na.jpg,\u00e9tang\r\n".encode(encoding))
    assert read_label_table(tmp_path / "l.csv").class_names == ("\u00e9tang",)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image,labels,split\na.jpg,cat,dog,train\nb.jpg,cat,val\n", r"line 2 has 4 cells, .* \['train'\] are in none"),
        ("image,labels\na.jpg,cat\n\n\nb.jpg\n", "line 5 has 1 of 2 cells"),
        ("image,labels\na.jpg,cat\n,dog\n", "line 3: the image is empty"),
        ('image,labels\na.jpg,"cat\n', "line 2: unexpected end of data; check its quotes"),
        ("a.jpg,cat\nb.jpg,dog\n", r"columns \['a.jpg', 'cat'\]; \['image', 'labels'\] must be among them"),
        ("image\na.jpg\n", r"\['labels'\] must be among them"),
        ("image,labels,image\na.jpg,cat,b.jpg\n", r"columns \['image'\] twice"),
        ("", "is empty; its first line names the columns"),
        ("image,labels,subset\na.jpg,cat,train\nb.jpg,cat,val\n", "column 'subset' seems to hold splits"),
        (
            "image,labels,split\na.jpg,cat,Train\nb.jpg,cat,validation\n",
            r"'Train' \(line 2: write 'train'\), 'validation'",
        ),
        ("image,cat,dog\na.jpg,1,0\nb.jpg,640,0\n", "line 3: the column 'cat' holds '640'"),
        ("image,cat,dog\na.jpg,1,0\nb.jpg,,0\n", "line 3: the column 'cat' holds ''"),
        ("image,species\na.jpg,cat\n", "line 2: the column 'species' holds 'cat'.*name the column of the labels"),
        ("image,labels\na.jpg,cat\na,\n", "line 3: image 'a' occurs twice, with labels and without"),
        ("image,labels,split\na.jpg,cat,val\na.jpg,dog,train\n", "line 3: image 'a.jpg' occurs twice, in two splits"),
        ("image,labels\na.jpg,cat\n\nnine.jpg,cat\n", r"lists 1 image\(s\) that are not there: 'nine.jpg' \(line 4\)"),
        ("image,label\na.jpg,0\nb.jpg,1\n", "the numbers 0, 1 as labels"),
        ('image,labels\na.jpg,"cat;\ndog"\nb.jpg,Dog\n', r"'dog' \(line 2\), 'Dog' \(line 4\)"),
    ],
)
def test_refused(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        read(tmp_path, text).of_images(NAMES)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image,labels\na.jpg,bird\n", r"no class: 'bird' \(line 2\); the classes are cat, dog, traffic light"),
        ("image,labels\na.jpg,cat,bird\n", r"\['bird'\] are in none"),
        ("image,cat,dog\na.jpg,1,0\n", "no column of the classes traffic light"),
    ],
)
def test_refused_with_classes(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        read(tmp_path, text, CLASSES)


def test_what_is_not_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, "image,width,labels,note\na.jpg,640,cat,\n,,,\nb.jpg,640,cat,\n").of_images(NAMES)
    out = capsys.readouterr().out
    assert "l.csv: the columns 'width', 'note' are not used" in out
    assert "l.csv: left out 1 line(s) whose cells are all empty: 3" in out


class TestWorkbooks:
    def save(self, path: Path, *rows: list[object]) -> LabelTable:
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
        return read_label_table(path)

    def test_cells(self, tmp_path: Path) -> None:
        table = self.save(
            tmp_path / "l.xlsx", ["Image", "Labels"], [], ["a.jpg", "cat;dog"], ["b", "cat"], ["c.jpg", None]
        )
        assert table.of_images(NAMES).labels == EXPECTED
        flags = self.save(tmp_path / "f.xlsx", ["image", "cat", "dog"], ["a", 1, True], ["b", 1.0, 0], ["c", 0, False])
        assert flags.of_images(NAMES).labels == EXPECTED

    def test_formulas_without_values(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="the formula in B2 has no value"):
            self.save(tmp_path / "l.xlsx", ["image", "labels"], ["a.jpg", "=A2"])

    def test_merged_cells_and_several_sheets(self, tmp_path: Path) -> None:
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in (["image", "labels"], ["a.jpg", "cat"], ["b.jpg", None]):
            book.active.append(row)
        book.active.merge_cells("B2:B3")
        book.save(tmp_path / "l.xlsx")
        with pytest.raises(DataError, match="merged cells, B2:B3; split them"):
            read_label_table(tmp_path / "l.xlsx")
        book.create_sheet("more").append(["image", "labels"])
        book.save(tmp_path / "l.xlsx")
        with pytest.raises(DataError, match=r"2 sheets with cells \['Sheet', 'more'\]"):
            read_label_table(tmp_path / "l.xlsx")

    @pytest.mark.parametrize(
        ("name", "match"), [("l.xlsx", "cannot be read as a workbook"), ("l.xls", "save it as .xlsx")]
    )
    def test_other_files(self, name: str, match: str, tmp_path: Path) -> None:
        pytest.importorskip("openpyxl")
        (tmp_path / name).write_text("image,labels\n")
        with pytest.raises(DataError, match=match):
            read_label_table(tmp_path / name)
