"""Writes a run's curves, pictures and files to MLflow: the one module that imports it.

The driver resolves the store and creates the run; rank 0 attaches to it by its `RunHandle`. One training is one MLflow
run: a resumed training attaches to the same run id. It does not log again what it repeats (the steps between the
checkpoint and the interruption), so that every curve has one value per step.

MLflow takes seconds to import, so it is imported on first use, with telemetry off and notices silenced. Every call goes
through `MlflowClient` with explicit ids: there is no active run and no global tracking URI.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import tempfile
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from slrnet.storage.folders import alone_in
from slrnet.storage.names import check_run_name
from slrnet.storage.shown import in_markdown, logger_of, without_secrets
from slrnet.tracking.location import database_of
from slrnet.tracking.protocol import SAMPLES, Picture, RunHandle, Tracker, clean_key, clean_metrics
from slrnet.tracking.provenance import package_version

__all__ = [
    "PARENT_TAG",
    "MlflowTracker",
    "check_artifacts",
    "client_of",
    "create_run",
    "log_onnx_model",
    "picture_files",
    "store_errors",
    "watch_node",
]

Record: TypeAlias = Callable[[Any, str], None]
"""Something to deliver: is called with a client and a run id."""

PARENT_TAG = "mlflow.parentRunId"
"""Tag that names the run that another one belongs to."""
NOTE_TAG = "mlflow.note.content"
"""Tag that holds a run's description, in Markdown."""
MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 6000, 5000
"""Limits of MLflow's parameter and tag columns."""
DESCRIBED = 2
"""Pictures in a run's description."""
RESULT = "## Result"
"""Heading of what the end of a run writes into its description."""
PATIENCE = 120.0
"""Seconds that the end of a run waits for a store that does not answer."""
PENDING_LIMIT = 10_000
"""Records kept while a store does not answer."""

# With this tag of an experiment the page shows runs and charts instead of its views for language models.
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"
_FINAL_ERRORS = re.compile("BAD_REQUEST|INVALID_(PARAMETER_VALUE|STATE)|PERMISSION_DENIED|RESOURCE_DOES_NOT_EXIST")
# The names of the files of `log_image`. Beside each lies a smaller copy, whose name ends differently.
_PICTURE = re.compile(r"(?P<key>[^+%]+)[+%]step[+%](?P<step>\d+)[+%]timestamp[+%](?P<time>\d+)[+%][^+%]+\.png")
_log = logger_of(__name__)


@cache
def load_mlflow() -> Any:
    """MLflow itself, with settings that it reads when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Few retries: `MlflowTracker` has its own, which do not delay the training.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


@cache
def client_of(uri: str) -> Any:
    """The client of a tracking store.

    It makes or upgrades the tables of a database: one process at a time, or the others fail.
    """
    mlflow, database = load_mlflow(), database_of(uri)
    with nullcontext() if database is None else alone_in(database.parent):
        return mlflow.MlflowClient(tracking_uri=uri)


def store_errors() -> tuple[type[Exception], ...]:
    """What a client raises; refused connections, full disks and all errors of `requests` are OSErrors."""
    return (load_mlflow().exceptions.MlflowException, OSError)


def create_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    resume: bool | None,
    config_json: str = "",
    description: str = "",
    data: tuple[str, str, str] | None = None,
    parent: RunHandle | None = None,
) -> RunHandle:
    """Opens the one run of a training, on the driver, before any worker starts.

    Args:
        uri: tracking URI from `resolve_uri`.
        experiment: name of the experiment; created if missing. With a SQLite store its artifacts go to `mlartifacts`
            beside the database.
        name: name of the run, unique within the experiment: letters, digits and `_ - .`.
        params: settings to list, flat; values over 6,000 characters are cut. MLflow's parameters cannot change: if a
            resumed run's value differs from the first one, the new value becomes the tag `resumed.KEY`.
        tags: the run's tags, such as versions and the data's fingerprint.
        resume: True attaches to the run of that name and sets it running again, False requires a new name, None
            attaches if there is such a run and else opens one.
        config_json: text of the artifact `config.json`; empty for `params` as JSON.
        description: Markdown at the top of the run's page; a run that has a description keeps it.
        data: name, fingerprint and location of the data set, for the page's column of data sets.
        parent: the sweep's run, under which MLflow's page shows this one.

    Raises:
        ValueError: the name has other characters, or is taken or missing against `resume`; the experiment was deleted;
            or the store refuses the request.
    """
    check_run_name(name)
    client = client_of(uri)
    try:
        _await_database(database_of(uri))
        experiment_id = _experiment(client, uri, experiment)
        run_id = _existing_run(client, experiment_id, experiment, name, resume=resume)
        if run_id is None:
            run_id = str(client.create_run(experiment_id, run_name=name).info.run_id)
        else:
            client.update_run(run_id, status="RUNNING")
        check_artifacts(uri, str(client.get_run(run_id).info.artifact_uri))
        page = {NOTE_TAG: description, PARENT_TAG: parent.run_id if parent else ""}
        _log_start(client, run_id, params, {**tags, **{key: value for key, value in page.items() if value}})
        if data is not None:
            _log_data(client, run_id, *data)
        client.log_text(run_id, config_json or json.dumps(dict(params), indent=2, default=str), "config.json")
    except store_errors() as error:
        raise ValueError(f"the tracking store {without_secrets(uri)} refused the run {name!r}: {error}") from error
    return RunHandle(uri=uri, run_id=run_id, experiment_id=experiment_id)


@dataclass(eq=False)
class MlflowTracker(Tracker):
    """Writes to one run; for rank 0 of the workers and for the driver.

    A store that stops answering does not stop a training: records that could not be delivered are kept in order and
    tried again with later calls. What the store refuses for good (the run was deleted, a file is gone) is logged as an
    error, dropped and counted in `lost`. Values that are not finite are counted in `skipped`.
    """

    handle: RunHandle
    _: KW_ONLY
    once: bool = False
    """Leave out points and pictures of steps that the run has from an earlier process."""
    retry_after: float = 30.0
    """Seconds without another attempt after the store failed to answer."""

    def __post_init__(self) -> None:
        self.run_id = self.handle.run_id
        self.skipped = self.lost = 0
        # What the run has from earlier processes: asked for once, when the store answers.
        self._curves = cache(lambda client: frozenset(client.get_run(self.run_id).data.metrics))
        self._steps = cache(lambda client, key: {point.step for point in client.get_metric_history(self.run_id, key)})
        self._pictures = cache(lambda client: picture_files(client, self.run_id))
        self._silent_until = -math.inf
        self._pending: deque[tuple[Record, tuple[int, dict[str, float]] | None]] = deque()
        """Records, and step and values of those that are points."""

    @property
    def undelivered(self) -> int:
        """Records that wait for the store to answer again."""
        return len(self._pending)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve, as `Tracker` says; values that are not finite are left out."""
        clean = clean_metrics(metrics)
        finite = {key: value for key, value in clean.items() if math.isfinite(value)}
        self.skipped += len(clean) - len(finite)
        now = int(time.time() * 1000)

        def send(client: Any, run_id: str) -> None:
            logged = [key for key in finite if self.once and key in self._curves(client)]
            new = finite.keys() - {key for key in logged if step in self._steps(client, key)}
            points = [load_mlflow().entities.Metric(key, finite[key], now, step) for key in sorted(new)]
            client.log_batch(run_id, metrics=points)

        if finite:
            self._send(send, (step, finite))

    def undelivered_points(self) -> list[tuple[int, dict[str, float]]]:
        """Step and values of the points that wait for the store."""
        return [points for _, points in self._pending if points is not None]

    def log_image(self, key: str, image: Picture, step: int) -> None:
        """Adds a picture to the series `key`, which MLflow's page shows as a grid over steps."""
        safe = clean_key(key)
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)

        def send(client: Any, run_id: str) -> None:
            if not self.once or (safe, step) not in self._pictures(client):
                # Written before the call returns: MLflow's own queue is lost with the process.
                client.log_image(run_id, picture, key=safe, step=step, synchronous=True)

        self._send(send)

    def log_artifacts(self, path: str | Path, folder: str = "") -> None:
        """Copies a folder's content, a checkpoint for instance, into the run's artifacts."""
        source = Path(path)
        if not source.is_dir():
            raise ValueError(f"{source} is not a folder")

        def send(client: Any, run_id: str) -> None:
            # MLflow copies a folder that was removed meanwhile as an empty one, without an error.
            if not source.exists():
                raise FileNotFoundError(f"{source} was removed before the tracking store took it")
            client.log_artifacts(run_id, str(source), folder or None)

        self._send(send)

    def log_text(self, text: str, path: str) -> None:
        """Writes a text as the artifact `path`."""
        self._send(lambda client, run_id: client.log_text(run_id, text, path))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; a tag that exists takes the new value."""
        tag = load_mlflow().entities.RunTag
        cut = [tag(key, str(value)[:MAX_TAG_LENGTH]) for key, value in tags.items()]
        if cut:
            self._send(lambda client, run_id: client.log_batch(run_id, tags=cut))

    def describe(self, result: str) -> None:
        """Writes a result (Markdown) at the end of the run's description, in place of an earlier one."""

        def send(client: Any, run_id: str) -> None:
            above = client.get_run(run_id).data.tags.get(NOTE_TAG, "").partition(RESULT)[0].rstrip()
            note = f"{above}\n\n{RESULT}\n\n{result}{_latest_pictures(client, run_id)}".lstrip()
            client.set_tag(run_id, NOTE_TAG, note[:MAX_TAG_LENGTH])

        self._send(send)

    def flush(self) -> int:
        """Tries at once to deliver what is pending; returns how many records the store has still not taken."""
        self._silent_until = -math.inf
        self._deliver()
        return self.undelivered

    def drain(self) -> int:
        """Delivers what is pending, in up to `PATIENCE` seconds; returns how many records the store has not taken."""
        deadline = time.monotonic() + PATIENCE
        while self.flush() and time.monotonic() < deadline:
            time.sleep(2.0)
        return self.undelivered

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", reason: str = "") -> None:
        """Ends the run after `drain`; why it failed or was stopped becomes the tag `reason`."""
        tags = {"reason": reason, "skipped_values": str(self.skipped or "")}
        self.set_tags({key: value for key, value in tags.items() if value})
        self._send(lambda client, run_id: client.set_terminated(run_id, status=status))
        missing = self.drain() + self.lost
        if missing:
            _log.error("%d records never reached the tracking store %s", missing, without_secrets(self.handle.uri))

    def _send(self, record: Record, points: tuple[int, dict[str, float]] | None = None) -> None:
        if len(self._pending) == PENDING_LIMIT:
            self._pending.popleft()
            self.lost += 1
        self._pending.append((record, points))
        if time.monotonic() >= self._silent_until:
            self._deliver()

    def _deliver(self) -> None:
        while self._pending:
            try:
                self._pending[0][0](client_of(self.handle.uri), self.handle.run_id)
            except store_errors() as error:
                # Other errors may pass: servers that restart, gateways, locked SQLite files, full disks.
                final = _FINAL_ERRORS.fullmatch(str(getattr(error, "error_code", "")))
                if not final and not isinstance(error, (FileNotFoundError, PermissionError)):
                    self._silent_until = time.monotonic() + self.retry_after
                    _log.warning("tracking is behind by %d records: %s", self.undelivered, error)
                    return
                self.lost += 1
                _log.error("the tracking store refused a record, which is dropped: %s", error)
            self._pending.popleft()


def check_artifacts(uri: str, artifacts: str) -> None:
    """Raises a ValueError if a database keeps a run's files on another host.

    A database may come from others with a run; MLflow would send the credentials of the environment, and the run's
    files, to the host that it names.
    """
    parts = urllib.parse.urlsplit(artifacts)
    if database_of(uri) is not None and (parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost")):
        raise ValueError(
            f"the tracking store {uri} keeps the run's files at {without_secrets(artifacts)}, which nobody else names; "
            "set MLFLOW_TRACKING_URI to a server, or use another storage folder"
        )


def picture_files(client: Any, run_id: str, below: str = "") -> dict[tuple[str, int], str]:
    """Artifact paths of a run's pictures by (series, step); of two pictures of one step, the later one.

    With `below`, such as `SAMPLES`, only the series that begin so, without that beginning.
    """
    latest = dict[tuple[str, int], tuple[int, str]]()
    for file in client.list_artifacts(run_id, "images"):
        name = _PICTURE.fullmatch(Path(file.path).name)
        if name and (series := name["key"].replace("~", "/")).startswith(below):
            picture = (series.removeprefix(below), int(name["step"]))
            latest[picture] = max(latest.get(picture, (0, "")), (int(name["time"]), file.path))
    return {picture: path for picture, (_, path) in latest.items()}


def watch_node(handle: RunHandle, node: str) -> Callable[[], None]:
    """Adds MLflow's system metrics of this node to a run on a server, as `system/NODE/...`; returns what ends that.

    A SQLite store is for one machine, and gets none: each point would lock it for the training's own.
    """
    if database_of(handle.uri) is not None:
        return lambda: None
    mlflow = load_mlflow()
    mlflow.set_system_metrics_node_id(clean_key(node))
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(handle.run_id, resume_logging=True, tracking_uri=handle.uri)
    monitor.start()
    finish: Callable[[], None] = monitor.finish
    return finish


def log_onnx_model(handle: RunHandle, name: str, file: Path) -> str:
    """Logs an ONNX file as an MLflow model, with its inputs' and outputs' names, types and open sizes as signature.

    MLflow stores a copy in the folder `name` of the run's artifacts: letters, digits and `_ - .`. Returns the model's
    URI for `mlflow models serve -m URI`, with the store as MLFLOW_TRACKING_URI.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(f"model name {name!r} is not usable; allowed are up to 100 letters, digits and _ - .")
    import onnx

    mlflow, model = load_mlflow(), onnx.load(file)
    signature = mlflow.models.ModelSignature(_schema(model.graph.input), _schema(model.graph.output))
    pins = [f"{package}=={package_version(package)}" for package in ("mlflow", "onnxruntime")]
    with tempfile.TemporaryDirectory() as folder:
        code, artifacts = Path(__file__).with_name("served_model.py"), {"network": str(file)}
        options = {"signature": signature, "pip_requirements": pins, "artifacts": artifacts}
        mlflow.pyfunc.save_model(f"{folder}/{name}", python_model=str(code), **options)
        try:
            client_of(handle.uri).log_artifacts(handle.run_id, folder, "models")
        except store_errors() as error:
            raise ValueError(f"the tracking store {without_secrets(handle.uri)} refused the model: {error}") from error
    return f"runs:/{handle.run_id}/models/{name}"


def _schema(values: Any) -> Any:
    types = load_mlflow().types
    shapes = {value.name: [side.dim_value or -1 for side in value.type.tensor_type.shape.dim] for value in values}
    return types.Schema([types.TensorSpec(np.dtype(np.float32), shape, name) for name, shape in shapes.items()])


def _await_database(database: Path | None) -> None:
    """Waits until no other process writes to a database; raises a ValueError if that takes long."""
    if database is None or not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=PATIENCE)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except sqlite3.Error as error:
        raise ValueError(f"the tracking store {database} cannot be written for {PATIENCE:.0f} s: {error}") from None


def _experiment(client: Any, uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = database_of(uri)
        location = database and database.with_name("mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location, tags={_KIND_TAG: _KIND}))
        except load_mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another run has just made it
    if experiment.lifecycle_stage != "active":
        raise ValueError(
            f"the experiment {name!r} was deleted from the tracking store; restore it with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or set another tracking.experiment"
        )
    if _KIND_TAG not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, _KIND_TAG, _KIND)
    return str(experiment.experiment_id)


def _existing_run(client: Any, experiment_id: str, experiment: str, name: str, *, resume: bool | None) -> str | None:
    runs = client.search_runs([experiment_id], filter_string=f"attributes.run_name = '{name}'", max_results=10)
    if runs and resume is False:
        raise ValueError(
            f"the experiment {experiment!r} has a run {name!r} already; continue it with `--resume {name}`, "
            "or give another `--name`"
        )
    if resume and not runs:
        raise ValueError(
            f"the experiment {experiment!r} has no run {name!r} to resume; start it with `--name {name}`, "
            "or check the tracking URI and the experiment"
        )
    if len(runs) > 1:
        ids = ", ".join(run.info.run_id for run in runs)
        raise ValueError(f"the experiment {experiment!r} has {len(runs)} runs {name!r} ({ids}); rename all but one")
    return str(runs[0].info.run_id) if runs else None


def _log_start(client: Any, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    earlier = client.get_run(run_id).data
    if "reason" in earlier.tags:
        client.delete_tag(run_id, "reason")
    values = {}
    for key, value in params.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        values[clean_key(key)] = text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 4] + " ..."
    param = load_mlflow().entities.Param
    new = [param(key, value) for key, value in values.items() if key not in earlier.params]
    client.log_batch(run_id, params=new)
    changed = {f"resumed.{key}": value for key, value in values.items() if earlier.params.get(key, value) != value}
    for key, value in {**tags, **changed}.items():
        if key != NOTE_TAG or NOTE_TAG not in earlier.tags:  # people may have edited the description
            client.set_tag(run_id, key, str(value)[:MAX_TAG_LENGTH])


def _log_data(client: Any, run_id: str, name: str, fingerprint: str, location: str) -> None:
    entities = load_mlflow().entities
    # MLflow allows 36 characters for a digest.
    source = {"source_type": "local", "source": json.dumps({"uri": location})}
    data = entities.Dataset(name=name, digest=fingerprint[:36], **source)
    client.log_inputs(run_id, datasets=[entities.DatasetInput(data, tags=[])])


def _latest_pictures(client: Any, run_id: str) -> str:
    """Markdown that shows the first samples' pictures, each at its last step; the page serves the files."""
    paths = picture_files(client, run_id, SAMPLES)
    last = {name: paths[name, step] for name, step in sorted(paths)}
    queries = {name: urllib.parse.urlencode({"path": path, "run_uuid": run_id}) for name, path in last.items()}
    return "".join(f"\n\n![{in_markdown(name)}](get-artifact?{queries[name]})" for name in sorted(queries)[:DESCRIBED])
