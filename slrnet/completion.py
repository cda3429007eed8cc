"""Completion of arguments in the shell, by argcomplete (the extra `completion`).

`eval "$(register-python-argcomplete ...)"` or `activate-global-python-argcomplete` teach the shell to ask scripts that
say PYTHON_ARGCOMPLETE_OK at their top; `parse` answers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

__all__ = ["parse"]


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses arguments; a shell that asks for completions gets them, and the process ends.

    Args:
        parser: of the command.
        arguments: None for those of the process.
    """
    if "_ARGCOMPLETE" in os.environ:  # set by the shell, which has asked argcomplete whether it is there
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser.parse_args(arguments)
