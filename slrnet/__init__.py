"""slrnet: weakly supervised semantic segmentation with self-supervised low-rank networks, trained on Ray.

Implements SLRNet (Pan et al., "Learning Self-Supervised Low-Rank Network for Single-Stage Weakly and Semi-Supervised
Semantic Segmentation", IJCV 2022). Importing this package loads neither PyTorch nor Ray.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
