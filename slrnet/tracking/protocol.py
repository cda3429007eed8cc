"""What a training needs of a tracking backend, a backend that records nothing, and names of metrics and pictures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image

from slrnet.storage.shown import without_secrets
from slrnet.tracking.location import PORT, WORKFLOW, database_of

__all__ = ["SAMPLES", "NullTracker", "Picture", "RunHandle", "Tracker", "clean_key", "clean_metrics", "metric_key"]

Picture: TypeAlias = "Image.Image | np.ndarray[Any, np.dtype[np.uint8]]"
"""A PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8."""

SAMPLES = "samples/"
"""How the series of pictures begin that show how images get their pseudo labels; the image's key follows.

The page sorts folders by name: this one comes after the curves of the pseudo masks. Its cards have room for 20 letters,
folder included.
"""
MAX_KEY_LENGTH = 250
"""Characters that MLflow allows in a metric's name."""


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """What a process needs to attach to a run; small and picklable, because it travels to the workers."""

    uri: str
    """Tracking URI as `resolve_uri` returns it."""
    run_id: str
    experiment_id: str

    def how_to_open(self) -> str:
        """Where to look at the run: an address, or for a local store an address and the command that serves it."""
        page = f"#/experiments/{self.experiment_id}/runs/{self.run_id}"
        database = database_of(self.uri)
        if database is None:
            return f"{without_secrets(self.uri)}/{page}"
        command = ["slrnet", "dashboard", "--storage", str(database.parent)]
        if database.name != "mlflow.db":
            command = ["mlflow", "server", "--host", "127.0.0.1", "--backend-store-uri", self.uri]
        return f"http://127.0.0.1:{PORT}/{page}?{WORKFLOW} after `{shlex.join(command)}`"


class Tracker(Protocol):
    """Records the curves, pictures and tags of one training."""

    run_id: str = ""
    """The run's id, which checkpoints record; "" for none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve, at position `step` >= 0.

        Raises:
            ValueError: two names become the same key, or a name has no usable character.
        """

    def log_image(self, key: str, image: Picture, step: int) -> None:
        """Adds a picture to the series `key`, at position `step` >= 0; raises a `ValueError` as `log_metrics` does."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run; a tag that exists takes the new value."""

    def undelivered_points(self) -> list[tuple[int, dict[str, float]]]:
        """Step and values of the points that would be lost if this process died now."""
        return []

    def drain(self) -> int:
        """Delivers what is pending; returns how many records could not be delivered."""
        return 0


class NullTracker(Tracker):
    """Records nothing; for ranks other than 0. It refuses the same metric names as other trackers do."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Checks the names."""
        clean_metrics(metrics)

    def log_image(self, key: str, image: Picture, step: int) -> None:
        """Checks the name."""
        clean_key(key)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Does nothing."""


def metric_key(*parts: str) -> str:
    """Joins the parts of a metric's name, for instance ("pseudo_mask", "iou", "tv/monitor"), by `/`.

    Within a part, slashes become `-`, so that a class name is always one level; see `clean_key`.
    """
    return "/".join(clean_key(part.replace("/", "-")) for part in parts)


def clean_key(key: str) -> str:
    """Replaces what MLflow refuses in a key: other characters become `_`, and empty, "." and ".." levels are dropped.

    Raises:
        ValueError: nothing is left.
    """
    levels = (re.sub(r"[^A-Za-z0-9_\-. ]", "_", level).strip() for level in key.split("/"))
    clean = "/".join(level for level in levels if level.strip("."))
    if not clean:
        raise ValueError(f"{key!r} is no key; it needs a letter, a digit or one of _ -")
    return clean[:MAX_KEY_LENGTH]


def clean_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same values by clean keys; raises a `ValueError` if two keys become the same one."""
    clean: dict[str, float] = {}
    for key, value in metrics.items():
        safe = clean_key(key)
        if safe in clean:
            raise ValueError(f"metric {key!r} becomes {safe!r}, which another metric of this step already has")
        clean[safe] = float(value)
    return clean
