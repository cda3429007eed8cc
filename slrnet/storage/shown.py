"""What people read: the only place that prints, loggers, and texts within Markdown.

Texts come from files of others too: they reach a terminal, a log or a page with escapes, so that they can move no
cursor, hide no line and load nothing.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import TextIO

from slrnet.storage.names import printable

__all__ = ["LEFT_OUT", "fenced", "in_markdown", "logger_of", "say", "without_secrets"]

LEFT_OUT = 3
"""Exit status when damaged images were left out and the others are done; 0 with --skip-damaged."""
_MARKUP = re.compile(r"[^\w\s.:,;+%/'-]|:(?=//)|(?<=www)\.", re.ASCII)
"""Characters that may begin something in Markdown or HTML, and those that make a word an address."""


def say(text: object, *, error: bool = False, stream: TextIO | None = None) -> None:
    """Prints a line, or several, on stdout, with `error` on stderr, or on another stream.

    A reader that has gone (`| head`) or a full disk ends nothing: what cannot be printed is left out.
    """
    stream = stream or (sys.stderr if error else sys.stdout)
    try:
        print(_escaped(str(text)), file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        return


def logger_of(module: str) -> logging.Logger:
    """The logger of a module, whose messages have escapes."""
    logger = logging.getLogger(module)
    logger.addFilter(_escape_record)
    return logger


def in_markdown(text: str) -> str:
    """The text as it reads, for a line of Markdown: nothing in it is markup, a link or a picture."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};" if match[0].isascii() else match[0], printable(text))


def fenced(kind: str, text: str) -> str:
    """A block of code in Markdown, such as `sh`, which no line of the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{kind}\n{_escaped(text)}\n{fence}"


def without_secrets(uri: str) -> str:
    """A URI without the user, the password and the query that it may hold; a path stays as it is."""
    scheme, mark, rest = uri.partition("://")
    bucket = rest.partition("/")[0] if scheme in ("s3", "gs") else ":"
    if not mark or scheme.startswith("sqlite") or not {":", "@"} & set(bucket):
        return uri
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _escaped(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = _escaped(record.getMessage()), ()
    return True
