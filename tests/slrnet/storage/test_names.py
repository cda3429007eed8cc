"""Names and texts of others: which are taken, and how they are shown."""

from __future__ import annotations

import pytest

from slrnet.storage.names import check_name, check_text, printable, short_name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat", "cat"),
        ("été 猫 ش\u200cه", "été 猫 ش\u200cه"),  # letters of any script, joiners too
        ("\x1b]0;t\x07", "\\x1b]0;t\\x07"),
        ("k\x9b31m", "k\\x9b31m"),
        ("a\nerror: b\r\t", "a\\nerror: b\\r\\t"),
        ("cat\u202egpj", "cat\\u202egpj"),
        ("\u2028\ud800\x00", "\\u2028\\ud800\\x00"),
    ],
)
def test_control_characters_are_shown_as_escapes_and_refused(text: str, shown: str) -> None:
    assert printable(text) == shown
    if shown == text:
        check_text("class", text)
    else:
        with pytest.raises(ValueError, match=r"the class is .* without control characters") as caught:
            check_text("class", text)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["val", "été 2", "猫", "a.b-c_d", "x" * 100])
def test_names_of_files_are_taken(name: str) -> None:
    check_name("split", name)
    assert printable(name) == name


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "/x/y", "a/b", "a\\b", ".hidden", "a\x00", "猫" * 34])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the split is "):
        check_name("split", name)


def test_long_names_are_shortened_and_stay_different() -> None:
    long = "猫" * 80
    assert short_name("x" * 200) == "x" * 200
    assert len({short_name(long), short_name(long + "a"), short_name(long + "b")}) == 3
    assert short_name(long).startswith("猫" * 60)
    assert len(short_name(long).encode()) <= 200
