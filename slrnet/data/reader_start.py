"""Imported once by the server that reader processes are forked from, so that they start with compiled kernels."""

from __future__ import annotations

from slrnet.kernels import crop_cpu, wanted

__all__ = ["prepare"]


def prepare() -> None:
    """Compiles what readers use, where it may be chosen; otherwise each of them would, at its first image."""
    if wanted():
        crop_cpu.available()


prepare()
