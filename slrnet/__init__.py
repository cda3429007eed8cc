"""slrnet: weakly supervised semantic segmentation with self-supervised low-rank networks, trained on Ray.

Implements SLRNet (Pan et al., "Learning Self-Supervised Low-Rank Network for Single-Stage Weakly and Semi-Supervised
Semantic Segmentation", IJCV 2022). Importing this package loads neither PyTorch nor Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slrnet.version import __version__

if TYPE_CHECKING:
    import torch

    from slrnet.config import Config, Protocol
    from slrnet.inference.predictor import Predictor
    from slrnet.launch.train import OnEpoch, RunResult

__all__ = ["__version__", "load", "predict", "train"]


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


def train(
    config: Config | str | None = None,
    data: str | Path = "",
    *,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    storage: str | Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    num_workers: int | tuple[int, int] | None = 0,
    **workers: Any,
) -> RunResult:
    """Trains a run, as `slrnet train` does.

    Args:
        config: name of a recipe, or settings; None: those of the run that is resumed or of `init`, else recipe demo.
        data: folder of shards or its s3:// or gs:// location, or a folder of images that says what they show, as for
            `slrnet train --data`; empty: that of the settings, else the embedded demo data.
        settings: settings to change, such as {"train.epochs": 3}.
        name: unique name of the run; None: recipe and time.
        storage: folder for runs, or its s3:// or gs:// location; None: $SLRNET_STORAGE, else ~/slrnet_runs.
        init: run or checkpoint whose weights the training starts from.
        resume: continue the run of that name.
        on_epoch: called after each epoch with its figures by name, shares in [0, 1], and its number from 1 as `epoch`.
            When it returns True, the training ends after the step under way, with a checkpoint.
        num_workers: 0 trains in this process; N or (fewest, most) worker processes on Ray; None: one per GPU.
        workers: other fields of `slrnet.launch.cluster.WorkerRequest`.

    Returns:
        The run: `best` and `last`, the folders of checkpoints; `state.metrics`, the best one's figures.

    Raises:
        ValueError: a setting, the data, the storage or the cluster does not allow the run; nothing has been started.
        slrnet.launch.train.TrainingError: the training failed.
    """
    from slrnet.cli.starting import train as start

    chosen: dict[str, Any] = {"name": name, "storage": storage, "init": init, "resume": resume, "on_epoch": on_epoch}
    return start(config, data=data, settings=settings or {}, workers={"num_workers": num_workers} | workers, **chosen)


def predict(
    checkpoint: str | Path,
    images: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    protocol: Protocol | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Writes the masks of image files, as `slrnet predict` does; `load` predicts images in memory.

    Args:
        checkpoint: a checkpoint or a run, see `load`.
        images: a file, a folder, a pattern, or several of them.
        out: folder for NAME.png, a palette PNG of class ids, NAME.overlay.jpg to look at, and predictions.json.
        protocol: see `load`.
        device: see `load`.
        batch_size: images of one size to predict at a time, >= 1.
        overwrite: whether masks that exist are replaced.

    Returns:
        The masks' paths by the images' names. An image that cannot be read has none; a line on stderr says why.

    Raises:
        ValueError: there is no such image, its mask exists, or `out` is a location in an object store.
        CheckpointError: the checkpoint is missing or damaged.
    """
    from slrnet.storage.remote import require_path
    from slrnet.tools.predict import predict_files

    places = [str(place) for place in ([images] if isinstance(images, (str, Path)) else images)]
    choice: dict[str, Any] = {"protocol": protocol, "device": device, "batch_size": batch_size, "overwrite": overwrite}
    return predict_files(checkpoint, places, require_path(Path(out).expanduser(), "out"), **choice).masks
