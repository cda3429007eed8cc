"""How a benchmark says whether what it claims holds."""

from __future__ import annotations


def at_most(text: str, value: float, limit: float) -> bool:
    """Prints a figure beside the largest one that is claimed; whether it holds."""
    held = value <= limit
    print(f"{text}: {value:.3g} (claimed: at most {limit:g}){'' if held else '  NOT HELD'}", flush=True)
    return held
