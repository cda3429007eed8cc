"""Reads back what MLflow has of a run: curves, tags, pictures, and the runs of a sweep."""

from __future__ import annotations

import json
import os
import tempfile
import urllib.parse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from slrnet.data.images import open_image
from slrnet.tracking.location import WORKFLOW, is_named, resolve_uri
from slrnet.tracking.mlflow import PARENT_TAG, check_artifacts, client_of, picture_files, store_errors
from slrnet.tracking.protocol import SAMPLES, RunHandle, clean_key

__all__ = ["comparison", "find_run", "logged_pictures", "metric_history", "run_tags", "runs_below", "runs_page"]


def find_run(uri: str, storage: str | Path, run_id: str) -> RunHandle | None:
    """The run that a checkpoint names, or None: it names none, its store cannot be reached or no longer has it.

    `uri` is the configuration's `tracking.uri`, which is asked only if it `is_named`; `storage` is the run's storage
    folder, for the default store.
    """
    default = Path(storage).expanduser().absolute() / "mlflow.db"
    nowhere = not uri and not os.environ.get("MLFLOW_TRACKING_URI") and not default.exists()
    if not run_id or nowhere or not is_named(uri, storage):
        return None
    unreachable: tuple[type[Exception], ...] = (ValueError, *store_errors())
    try:
        resolved = resolve_uri(uri, storage)
        run = client_of(resolved).get_run(run_id)
        check_artifacts(resolved, str(run.info.artifact_uri))
    except unreachable:
        return None
    return RunHandle(uri=resolved, run_id=run_id, experiment_id=str(run.info.experiment_id))


def metric_history(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    """The curve `key` of a run as (step, value), by step and then by the time of logging; empty if never logged."""
    points = client_of(handle.uri).get_metric_history(handle.run_id, clean_key(key))
    ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
    return [(int(point.step), float(point.value)) for point in ordered]


def run_tags(handle: RunHandle) -> dict[str, str]:
    """The tags of a run."""
    return dict(client_of(handle.uri).get_run(handle.run_id).data.tags)


def logged_pictures(handle: RunHandle) -> dict[tuple[str, int], Image.Image]:
    """The samples' pictures by (sample's key, step); of pictures logged twice for a step, the later one."""
    client, pictures = client_of(handle.uri), {}
    with tempfile.TemporaryDirectory() as folder:
        for series, path in picture_files(client, handle.run_id, SAMPLES).items():
            with open_image(Path(client.download_artifacts(handle.run_id, path, folder))) as picture:
                pictures[series] = picture.convert("RGB")
    return pictures


def comparison(handles: Sequence[RunHandle]) -> str:
    """Link to MLflow's comparison of runs, with parallel coordinates over the settings that differ."""
    ids = json.dumps([handle.run_id for handle in handles], separators=(",", ":"))
    experiment = json.dumps(sorted({handle.experiment_id for handle in handles}))
    return f"#/compare-runs?{urllib.parse.urlencode({'runs': ids, 'experiments': experiment})}"


def runs_page(uri: str) -> str:
    """The part of an address that leads to the list of runs, of the experiment with the newest one."""
    client = client_of(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    newest = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)
    place = f"/{newest[0].info.experiment_id}/runs" if newest else ""
    return f"#/experiments{place}?{WORKFLOW}"


def runs_below(parent: RunHandle) -> dict[str, tuple[RunHandle, str]]:
    """The runs of a sweep: handle and status (`RUNNING`, `FINISHED`, `FAILED`, `KILLED`) by run name."""
    most = 50_000  # in one answer of MLflow
    below = f"tags.`{PARENT_TAG}` = '{parent.run_id}'"
    runs = client_of(parent.uri).search_runs([parent.experiment_id], filter_string=below, max_results=most)
    return {str(run.info.run_name): (replace(parent, run_id=run.info.run_id), str(run.info.status)) for run in runs}
