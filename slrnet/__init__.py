"""slrnet: weakly supervised semantic segmentation with self-supervised low-rank networks, trained on Ray.

Implements SLRNet (Pan et al., "Learning Self-Supervised Low-Rank Network for Single-Stage Weakly and Semi-Supervised
Semantic Segmentation", IJCV 2022). Importing this package loads neither PyTorch nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slrnet.inference.predictor import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from slrnet.inference.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
