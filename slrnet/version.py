"""The version of the package, for the wheel and for what a run records."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
