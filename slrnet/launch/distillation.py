"""Checks the data of a distillation: DeepLabV3+ trained on the pseudo masks of another network."""

from __future__ import annotations

from pathlib import Path

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.config import Config
from slrnet.launch.pseudo_label import read_record
from slrnet.models.deeplab import require_deeplab

__all__ = ["check_distillation"]


def check_distillation(config: Config) -> str:
    """Checks that the training data of a distillation have pseudo masks, and that the extra `distill` is installed.

    Args:
        config: the run's settings.

    Returns:
        A line about the teacher and how good it is.

    Raises:
        ValueError: the extra is missing, or the data have no pseudo masks where training or validation needs them.
    """
    require_deeplab()
    record = read_record(Path(config.data.path))
    if record is None:
        raise ValueError(
            f"{config.data.path} holds no pseudo masks; make some with `slrnet pseudo-label --checkpoint RUN --data "
            f"{config.data.path} --out PSEUDO`, or train on true masks with `slrnet train`"
        )
    labeled, train_split, val_split = record["job"]["splits"], config.data.train_split, config.data.val_split
    if train_split not in labeled or val_split in labeled:
        raise ValueError(
            f"{config.data.path} has pseudo masks in {', '.join(labeled)}; a distillation trains on pseudo masks of "
            f"{train_split!r} and validates on true ones of {val_split!r}: make them with --splits {train_split}"
        )
    teacher = Path(record["job"]["checkpoint"])
    metrics = load_checkpoint(teacher).state.metrics if teacher.is_dir() else {}
    scores = [f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name.startswith("val/miou")]
    return f"teacher {teacher}, masks by {record['job']['protocol']}: {', '.join(scores) or 'not measured'}"
