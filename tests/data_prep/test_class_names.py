"""Names of classes: what options give, and which class a label means."""

from __future__ import annotations

import pytest

from data_prep.class_names import class_by_label, given_classes, label_pieces
from slrnet.data.manifest import DataError


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        (["cat", "traffic  light "], ("cat", "traffic light")),
        (["background", "cat"], ("cat",)),
        (["Background", "cat"], ("cat",)),
        (["e\u0301tang"], ("\u00e9tang",)),
        (["A", "a"], ("A", "a")),
    ],
)
def test_given_classes(given: list[str], classes: tuple[str, ...]) -> None:
    assert given_classes(given, "--classes") == classes


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["cat", "dog", "background"], "'background' as class 3; it is class 0"),
        (["cat", "dog", "cat"], r"\['cat'\] twice"),
        ([], "names 0 classes; 1 to 254"),
        (["background"], "names 0 classes"),
        ([str(i) for i in range(255)], "names 255 classes"),
    ],
)
def test_refused_classes(given: list[str], match: str) -> None:
    with pytest.raises(DataError, match=match):
        given_classes(given, "--classes")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("cat", ["cat"]),
        ("cat;dog", ["cat", "dog"]),
        (" cat ; dog;", ["cat", "dog"]),
        ("cat,dog", ["cat", "dog"]),
        ("cat | dog", ["cat", "dog"]),
        ("cat/dog", ["cat", "dog"]),
        ("cat\ndog", ["cat", "dog"]),
        ("['cat', 'dog']", ["cat", "dog"]),
        ("cat;big, old tree", ["cat", "big, old tree"]),
        ("Big, Old Tree", ["Big, Old Tree"]),
    ],
)
def test_known_classes_tell_where_labels_end(text: str, pieces: list[str]) -> None:
    assert label_pieces(text, ["cat", "dog", "big, old tree"]) == pieces


def test_without_classes_only_semicolons_separate() -> None:
    assert label_pieces("cat; dog", None) == ["cat", "dog"]
    assert label_pieces("cat,dog", None) == ["cat,dog"]


def test_other_spellings_of_classes_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"Cat": "line 2", "cat": "line 3", "TRAFFIC_LIGHT": "line 4", "Background": "line 5"}
    found = class_by_label(labels, ["cat", "traffic light"], "l.csv")
    assert found == {"Cat": "cat", "cat": "cat", "TRAFFIC_LIGHT": "traffic light", "Background": None}
    out = capsys.readouterr().out
    assert "read as classes: 'Cat' as 'cat', 'TRAFFIC_LIGHT' as 'traffic light'" in out
    assert "'background' is read as none of the classes" in out


@pytest.mark.parametrize(
    ("labels", "classes", "match"),
    [
        (["cat", "bird"], ["cat", "dog"], r"no class: 'bird' \(line 2\); the classes are cat, dog"),
        (["a", "A"], ["A ", "a "], "no class"),
        (["cat Traffic_light"], ["cat", "traffic light"], "too; if 'cat Traffic_light' is several classes, .* by `;`$"),
        (["cats dog"], ["cat", "dog"], "too$"),
        (["Cat", "dog", "cat"], None, r"several ways: 'Cat' \(line 1\), 'cat' \(line 3\)"),
        (["traffic light", "traffic_light"], None, "several ways"),
        (["cat|dog", "cat"], None, "line 1: 'cat|dog' may be one label or several.*--classes 'cat,dog'"),
        (["cat, dog", "bird"], None, "--classes 'bird,cat,dog'"),
        (["cat", "dog", "cat dog"], None, "line 3: 'cat dog' may be one"),
        (["cat+dog", "dog", "cat"], None, "line 1: 'cat.dog' may be one"),
        (["cat", "nan"], None, "line 2: the label 'nan' looks like an empty cell"),
        (["0", "1"], None, "the numbers 0, 1 as labels"),
    ],
)
def test_refused_labels(labels: list[str], classes: list[str] | None, match: str) -> None:
    with pytest.raises(DataError, match=match.replace("|", r"\|")):
        class_by_label({label: f"line {i}" for i, label in enumerate(labels, 1)}, classes, "l.csv")
