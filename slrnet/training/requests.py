"""What others may ask of a training while it runs."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["Requests", "Wish"]

Wish: TypeAlias = Literal["", "save", "stop"]
"""A checkpoint after this step, one and the end, or neither."""


class Requests:
    """What others ask of a training while it runs; these never ask. Each rank has its own, and one that is asked does.

    `asked` is read before every step, and while images are measured.
    """

    def asked(self) -> Wish:
        """Returns "save" for a checkpoint after this step, "stop" to end with one, "" for neither."""
        return ""

    def saved(self, step: int) -> None:
        """The checkpoint asked for, after `step` steps, is written; "save" is not asked again. Called on every rank."""
