"""What is printed, logged and put into Markdown comes with escapes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from slrnet.storage.shown import fenced, in_markdown, logger_of, say, without_secrets


def test_lines_are_printed_with_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2J\nb\r\u202e")
    say(ValueError("\x9b31m"), error=True)
    assert capsys.readouterr() == ("a\\x1b[2J\nb\\r\\u202e\n", "\\x9b31m\n")


def test_a_full_disk_ends_nothing() -> None:
    with open("/dev/full", "w") as stream:
        say("lost", stream=stream)
        assert stream.writable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is left in its buffer


def test_a_logger_escapes_what_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    logger_of("slrnet.a")
    logger_of("slrnet.a").warning("100 %% of %s", "\x1b]0;t\x07")
    assert caplog.messages == ["100 % of \\x1b]0;t\\x07"]
    assert len(logging.getLogger("slrnet.a").filters) == 1


def test_a_reader_that_has_gone_ends_nothing() -> None:
    script = "from slrnet.storage.shown import say\nfor i in range(9000): say(i)\nsay('end', error=True)"
    command = f'{sys.executable} -c "$0" | head -1'
    done = subprocess.run(["bash", "-c", command, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "end\n")


@pytest.mark.parametrize(
    "text", ["x** ![p](http://a.example/b.png)", "<img src=x onerror=alert(1)>", "`c`", "# a\n- b", "[r]: javascript:a"]
)
def test_nothing_in_markdown_is_markup(text: str) -> None:
    shown = in_markdown(text)
    assert not set("*!<>[]()`#&\n") & set(shown.replace("&#", "").replace(";", ""))
    assert "http:" not in shown


def test_names_read_as_they_are_in_markdown() -> None:
    assert in_markdown("voc_2012, café 猫") == "voc_2012, café 猫"


def test_no_line_ends_a_block_of_code() -> None:
    block = fenced("text", "a\n```\n![p](http://a.example)\n````").splitlines()
    assert (block[0], block[-1]) == ("`````text", "`````")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("http://me:p@secret@host", "http://host"),
        ("http://me:se/cret@host", "http://host"),
        ("https://[me:secret@host", "https://host"),
        ("postgresql+psycopg2://me:secret@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("https://host/x?token=secret", "https://host/x"),
        ("s3://key:secret@bucket/runs", "s3://bucket/runs"),
        ("s3://key:se/cret@bucket/runs", "s3://bucket/runs"),
        ("s3://bucket/me@home/a?b", "s3://bucket/me@home/a?b"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////home/me@home/a?b.db", "sqlite:////home/me@home/a?b.db"),
        ("/home/me@home", "/home/me@home"),
    ],
)
def test_uris_are_shown_without_what_they_hide(uri: str, shown: str) -> None:
    assert without_secrets(uri) == shown
