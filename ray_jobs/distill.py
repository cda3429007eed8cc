# PYTHON_ARGCOMPLETE_OK
"""Trains DeepLabV3+ on pseudo masks: `python ray_jobs/distill.py --recipe voc_distill_lite --data PSEUDO`.

PSEUDO is a folder that ray_jobs/pseudo_label.py made with `--splits train`: training images with predicted masks, and
the validation split with its true ones. Needs the extra `distill`. All else is as for ray_jobs/train.py, but for the
default recipe, voc_distill_lite.
Exit status: 0, 1 where the training failed, 2 where something was refused before it began.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ray_jobs.train import main  # noqa: E402
from slrnet.config import Config  # noqa: E402


def check(config: Config) -> None:
    """Refuses data that are not what a distillation is of, and says how good the teacher is."""
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.launch.pseudo_label import read_record
    from slrnet.models.deeplab import require_deeplab

    require_deeplab()
    record = read_record(Path(config.data.path))
    if record is None:
        raise ValueError(
            f"{config.data.path} holds no pseudo masks; make some with `python ray_jobs/pseudo_label.py --checkpoint "
            f"RUN --data {config.data.path} --out PSEUDO`, or train on true masks with ray_jobs/train.py"
        )
    labelled, train, val = record["job"]["splits"], config.data.train_split, config.data.val_split
    if train not in labelled or val in labelled:
        raise ValueError(
            f"{config.data.path} has pseudo masks in {', '.join(labelled)}; a distillation trains on pseudo masks of "
            f"{train!r} and validates on true ones of {val!r}: make them with --splits {train}"
        )
    teacher = Path(record["job"]["checkpoint"])
    metrics = load_checkpoint(teacher).state.metrics if teacher.is_dir() else {}
    scores = [f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name.startswith("val/miou")]
    print(f"teacher {teacher}, masks by {record['job']['protocol']}: {', '.join(scores) or 'not measured'}", flush=True)


if __name__ == "__main__":
    sys.exit(main(__doc__, "voc_distill_lite", check))
