"""Facts about MLflow's page: its addresses, its own tags, and how it names and orders pictures."""

from __future__ import annotations

import re
import shlex
import urllib.parse
from pathlib import Path
from typing import Any

from slrnet.tracking.location import SQLITE, public

__all__ = [
    "KIND",
    "KIND_TAG",
    "NOTE_TAG",
    "PARENT_TAG",
    "PORT",
    "latest_pictures",
    "picture_files",
    "picture_step",
    "quality_series",
    "run_address",
    "runs_address",
    "sample_files",
    "sample_series",
]

PORT = 5000
"""Default port of the page."""
PARENT_TAG = "mlflow.parentRunId"
"""Tag that names the run that another one belongs to."""
NOTE_TAG = "mlflow.note.content"
"""Tag that holds a run's description, in Markdown."""
KIND_TAG = "mlflow.experimentKind"
"""Tag that says what an experiment is for."""
KIND = "custom_model_development"
"""Its value with which the page shows runs and charts instead of its views for language models."""
DESCRIBED = 2
"""Pictures in a run's description."""

_WORKFLOW = "workflowType=machine_learning"  # the same in an address
_SAMPLES = "samples"
# The names of the files of `log_image`. Beside each lies a smaller copy, whose name ends differently.
_PICTURE = re.compile(r"(?P<key>[^+%]+)[+%]step[+%](?P<step>\d+)[+%]timestamp[+%](?P<time>\d+)[+%][^+%]+\.png")


def run_address(uri: str, experiment_id: str, run_id: str) -> str:
    """Where to look at a run: an address, or for a local store an address and the command that serves it."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    if uri.startswith("http"):
        return f"{public(uri)}/{page}"
    database = Path(uri.removeprefix(SQLITE))
    command = ["slrnet", "dashboard", "--storage", str(database.parent)]
    if database.name != "mlflow.db":
        command = ["mlflow", "server", "--host", "127.0.0.1", "--backend-store-uri", uri]
    return f"http://127.0.0.1:{PORT}/{page}?{_WORKFLOW} after `{shlex.join(command)}`"


def runs_address(port: int) -> str:
    """Address of the page's list of experiments, served on this machine at `port`."""
    return f"http://127.0.0.1:{port}/#/experiments?{_WORKFLOW}"


def sample_series(key: str) -> str:
    """Name of the pictures that show how one image gets its pseudo labels.

    The page sorts folders by name: this one comes after the curves of the pseudo masks. Its cards have room for 20
    letters, folder included.
    """
    return f"{_SAMPLES}/{key}"


def quality_series(group: str) -> str:
    """Name of the pictures that show the scores of all classes; `group` is `pseudo_mask` or `val`."""
    return f"quality/{group}"


def picture_step(epoch: int, *, every: int) -> int:
    """Position of a picture that is drawn after epoch `epoch` (from 0), with one measurement in `every` epochs.

    It counts measurements from 0, because the page's sliders start at 0.
    """
    return epoch // every


def picture_files(client: Any, run_id: str) -> dict[tuple[str, int], str]:
    """Artifact paths of a run's pictures by (series, step); of two pictures of one step, the later one."""
    latest = dict[tuple[str, int], tuple[int, str]]()
    for file in client.list_artifacts(run_id, "images"):
        name = _PICTURE.fullmatch(Path(file.path).name)
        if name:
            picture = (name["key"].replace("~", "/"), int(name["step"]))
            latest[picture] = max(latest.get(picture, (0, "")), (int(name["time"]), file.path))
    return {picture: path for picture, (_, path) in latest.items()}


def sample_files(client: Any, run_id: str) -> dict[tuple[str, int], str]:
    """The same of the samples' pictures, by (sample's key, step)."""
    files = picture_files(client, run_id)
    return {
        (series.removeprefix(f"{_SAMPLES}/"), step): path
        for (series, step), path in files.items()
        if series.startswith(f"{_SAMPLES}/")
    }


def latest_pictures(client: Any, run_id: str) -> str:
    """Markdown that shows the first samples' pictures, each at its last step; the page serves the files."""
    paths = sample_files(client, run_id)
    last = {name: paths[name, step] for name, step in sorted(paths)}
    queries = {name: urllib.parse.urlencode({"path": path, "run_uuid": run_id}) for name, path in last.items()}
    return "".join(f"\n\n![{name}](get-artifact?{queries[name]})" for name in sorted(queries)[:DESCRIBED])
