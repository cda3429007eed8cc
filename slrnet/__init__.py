"""slrnet: weakly supervised semantic segmentation with self-supervised low-rank networks, trained on Ray.

Implements SLRNet (Pan et al., "Learning Self-Supervised Low-Rank Network for Single-Stage Weakly and Semi-Supervised
Semantic Segmentation", IJCV 2022). Importing this package loads neither PyTorch nor Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slrnet.version import __version__

if TYPE_CHECKING:
    import torch

    from slrnet.config import Protocol
    from slrnet.inference.predictor import Predictor

__all__ = ["__version__", "load"]


def load(
    checkpoint: str | Path, *, protocol: Protocol | None = None, device: torch.device | str | None = None
) -> Predictor:
    """A predictor from a checkpoint directory, or from a run's folder: then its best checkpoint.

    Args:
        checkpoint: path, or location in an object store (s3://, gs://).
        protocol: `ss` (one scale), `ms` (several scales and their mirror images) or `ms_crf`; None for what the
            checkpoint's configuration says.
        device: for the network; None: a GPU where there is one.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: an unknown protocol, `ms_crf` without its extra, or a configuration that gates by true image labels.
    """
    from slrnet.tools.predict import load_predictor

    return load_predictor(checkpoint, protocol=protocol, device=device)
