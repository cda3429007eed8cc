"""Prints a benchmark's figure next to its claim."""

from __future__ import annotations


def at_most(text: str, value: float, limit: float) -> bool:
    """Prints a figure next to the claimed maximum; returns True if the claim holds."""
    held = value <= limit
    print(f"{text}: {value:.3g} (claimed: at most {limit:g}){'' if held else '  NOT HELD'}", flush=True)
    return held
