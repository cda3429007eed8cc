"""Curves, pictures and files of a run in MLflow: the one module that imports it.

The driver resolves the store (`resolve_uri`) and creates the run (`create_run`); rank 0 attaches to it with a `Tracker`
made from the returned `RunHandle`, all other ranks use a `NullTracker`. One training is one MLflow run: a restarted or
resumed training attaches to the same run id, and what it makes a second time (the steps between the checkpoint and the
interruption) is left out, so that every curve has one value a step.

MLflow takes seconds to import, so it is imported on first use; its telemetry is off and its notices are silenced.
Everything goes through `MlflowClient` with explicit ids: there is no active run and no global tracking URI.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from slrnet.version import __version__

__all__ = [
    "NOTE_TAG",
    "PORT",
    "WORKFLOW",
    "NullTracker",
    "RunHandle",
    "Tracker",
    "comparison",
    "create_run",
    "environment_tags",
    "find_run",
    "log_onnx_model",
    "logged_pictures",
    "metric_history",
    "metric_key",
    "resolve_uri",
    "run_tags",
    "runs_below",
]

Picture: TypeAlias = "Image.Image | np.ndarray[Any, np.dtype[np.uint8]]"
Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]

# Limits of MLflow's own log_batch and of its parameter and tag columns.
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
MAX_KEY_LENGTH = 250

SERVER_TIMEOUT = 5.0
"""Seconds that a tracking server may take to answer before a run starts."""
PARENT_TAG = "mlflow.parentRunId"
"""MLflow's own tag for the run that another one belongs to."""
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""With it MLflow's page shows runs and charts, and not what it has for language models."""
NOTE_TAG = "mlflow.note.content"
"""MLflow's own tag for a run's description, in Markdown."""
DESCRIBED = 2
"""Pictures in a run's description."""
RESULT = "## Result"
"""Heading of what the end of a run writes into its description."""
PATIENCE = 120.0
"""Seconds that the end of a run waits for a store that does not answer."""
PENDING_LIMIT = 10_000
"""Records kept while a store does not answer."""

_SQLITE = "sqlite:///"
_PACKAGES = ("torch", "torchvision", "ray", "mlflow", "webdataset", "timm", "numpy")
_FINAL_ERRORS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
}
# How MLflow names the files of `log_image`; beside each lies a smaller copy, which ends in another way.
_PICTURE = re.compile(r"(?P<key>[^+%]+)[+%]step[+%](?P<step>\d+)[+%]timestamp[+%](?P<time>\d+)[+%][^+%]+\.png")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """What a process needs to attach to a run; small and picklable, so that it travels to the workers."""

    uri: str
    """MLflow tracking URI as `resolve_uri` returns it."""
    run_id: str
    """MLflow's id of the run."""
    experiment_id: str
    """MLflow's id of the experiment."""

    def how_to_open(self) -> str:
        """One line that says where the run can be looked at: an address, or the command that serves it."""
        if self.uri.startswith("http"):
            return f"{_public(self.uri)}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        place = f"http://127.0.0.1:{PORT}/#/experiments/{self.experiment_id}/runs/{self.run_id}?{WORKFLOW}"
        return f"{place} after `{_dashboard_command(self.uri)}`"


def resolve_uri(uri: str, storage: str | Path) -> str:
    """Decides where the run is tracked, and refuses what would lose it.

    Args:
        uri: `http(s)://...` of a tracking server, `sqlite:////...` with an absolute path, or empty: then
            the environment's `MLFLOW_TRACKING_URI`, and without one a SQLite file `mlflow.db` in `storage`.
        storage: The run's storage folder; created where the SQLite file goes into it.

    Returns:
        A tracking URI that means the same in every process and working directory.

    Raises:
        ValueError: the server does not answer, the SQLite path is relative or cannot be written, `storage` is remote
            and no URI is given, the scheme is one that MLflow no longer writes to or that has no artifact store, or
            `uri` holds a password, which the configuration would carry into every checkpoint.
    """
    if _public(uri) != uri:
        raise ValueError(
            f"tracking URI {_public(uri)} has a user or a password in it, which would be written into checkpoints and "
            "logs; give them as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
    uri = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip()
    if not uri:
        return _default_store(storage)
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
        return uri.rstrip("/")
    if uri.startswith("sqlite:"):
        _check_sqlite(uri)
        return uri
    raise ValueError(
        f"tracking URI {uri!r} cannot be used; MLflow's file stores are retired and a bare database has no place for "
        "artifacts. Allowed are http(s)://HOST:PORT of a running `mlflow server`, sqlite:////ABSOLUTE/PATH/mlflow.db, "
        "or nothing (a SQLite file in the storage folder)"
    )


def create_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    resume: bool | None,
    config_json: str = "",
    parent: RunHandle | None = None,
) -> RunHandle:
    """Opens the one run of a training, on the driver, before any worker starts.

    Args:
        uri: Tracking URI from `resolve_uri`.
        experiment: Experiment; created when missing. With a SQLite store its artifacts go to `mlartifacts` beside
            the database, at an absolute path; a server decides for itself.
        name: Name of the run, unique within the experiment: letters, digits and `_ - .`.
        params: The configuration, flat. MLflow's parameters cannot change, so when a resumed run's value differs from
            the first one, the new value becomes the tag `resumed.KEY`. Values over 6,000 characters are cut here and
            whole in the artifact `config.json`.
        tags: Tags, for instance `environment_tags()` and the data's fingerprint.
        resume: Attach to the run of that name and set it running again; False: the name must be new; None: attach
            where there is such a run, else open one.
        config_json: Text of the artifact `config.json`; empty: `params` as JSON.
        parent: The sweep's run, under which MLflow's page shows this one.

    Returns:
        The handle from which rank 0 makes its `Tracker`.

    Raises:
        ValueError: the name exists and `resume` is off, or does not exist and it is on; the name has other characters;
            the experiment was deleted; or the store refuses the request.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name):
        raise ValueError(f"run name {name!r} is not usable; allowed are up to 200 letters, digits and _ - .")
    client = _client(uri)
    try:
        experiment_id = _experiment(client, uri, experiment)
        run_id = _existing_run(client, experiment_id, experiment, name, resume=resume)
        if run_id is None:
            run_id = str(client.create_run(experiment_id, run_name=name).info.run_id)
        else:
            client.update_run(run_id, status="RUNNING")
        if parent is not None:
            tags = {**tags, PARENT_TAG: parent.run_id}
        _log_start(client, run_id, params, tags, config_json or json.dumps(dict(params), indent=2, default=str))
    except _store_errors() as error:
        raise ValueError(f"the tracking store {_public(uri)} refused the run {name!r}: {error}") from error
    return RunHandle(uri=uri, run_id=run_id, experiment_id=experiment_id)


def find_run(uri: str, storage: str | Path, run_id: str) -> RunHandle | None:
    """A run that a checkpoint names, where its store can be reached and still has it; else None.

    Args:
        uri: `tracking.uri` of the run's configuration.
        storage: the run's storage folder, for the default store.
        run_id: MLflow's id of the run.
    """
    path = Path(storage).expanduser().absolute() / "mlflow.db"
    if not run_id or (not uri and not os.environ.get("MLFLOW_TRACKING_URI") and not path.exists()):
        return None
    try:
        found = resolve_uri(uri, storage)
    except ValueError:
        return None
    try:
        run = _client(found).get_run(run_id)
    except _store_errors():
        return None
    return RunHandle(uri=found, run_id=run_id, experiment_id=str(run.info.experiment_id))


class Tracker:
    """Writes to one run; for rank 0 of the workers and for the driver.

    A store that stops answering does not stop a training: what could not be delivered is kept in order and tried again
    with later calls. What the store refuses for good (the run was deleted, a file has gone since) is logged as an error
    and dropped. `undelivered`, `lost` and `skipped` count.

    Args:
        handle: The run, as `create_run` returned it.
        once: Leave out points and pictures of steps that the run has from an earlier process.
        retry_after: Seconds without another attempt after the store failed to answer.
    """

    def __init__(self, handle: RunHandle, *, once: bool = False, retry_after: float = 30.0) -> None:
        self.handle = handle
        self._known = _KnownSteps() if once else None
        self.skipped = 0
        self.lost = 0
        self._retry_after = retry_after
        self._silent_until = -math.inf
        self._pending: deque[Callable[[Any, str], None]] = deque()

    @property
    def undelivered(self) -> int:
        """Records that wait for the store to answer again."""
        return len(self._pending)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve.

        Args:
            metrics: Values by key. Characters that MLflow does not take become `_`. Values that are not finite have no
                place on a curve: they are left out, and counted in `skipped` and in the run's tag `skipped_values`.
            step: Position on the x axis, >= 0. A step may be logged again after a restart.

        Raises:
            ValueError: two keys become the same one, or a key is empty.
        """
        clean: dict[str, float] = {}
        for key, value in metrics.items():
            safe = _clean_key(key)
            if safe in clean:
                raise ValueError(f"metric {key!r} becomes {safe!r}, which another metric of this step already has")
            clean[safe] = float(value)
        finite = {key: value for key, value in clean.items() if math.isfinite(value)}
        self.skipped += len(clean) - len(finite)
        if finite:
            self._send(_Points(finite, step, int(time.time() * 1000), self._known))

    def undelivered_points(self) -> list[tuple[int, dict[str, float]]]:
        """Step and values of the points that wait for the store: what is lost if this process dies now."""
        return [(record.step, dict(record.values)) for record in self._pending if isinstance(record, _Points)]

    def log_image(self, key: str, image: Picture, step: int) -> None:
        """Adds a picture to the series `key`, which MLflow's page shows as a grid over steps.

        Args:
            key: Name of the series; cleaned as metric keys are.
            image: PIL image, or (H, W), (H, W, 3) or (H, W, 4) uint8.
            step: Position in the series, >= 0.
        """
        safe = _clean_key(key)
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)

        def send(client: Any, run_id: str) -> None:
            if self._known is None or not self._known.has_picture(client, run_id, safe, step):
                # Written before the call returns: MLflow's own queue is lost with the process.
                client.log_image(run_id, picture, key=safe, step=step, synchronous=True)

        self._send(send)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Copies a file into the run's artifacts.

        Raises:
            ValueError: there is no file of that path.
        """
        source = Path(path)
        if not source.is_file():
            raise ValueError(f"{source} is not a file; a folder goes through log_artifacts")
        self._send(lambda client, run_id: client.log_artifact(run_id, _still_there(source), folder or None))

    def log_artifacts(self, path: str | Path, folder: str = "") -> None:
        """Copies a folder's content, a checkpoint for instance, into the run's artifacts.

        Raises:
            ValueError: there is no folder of that path.
        """
        source = Path(path)
        if not source.is_dir():
            raise ValueError(f"{source} is not a folder; a file goes through log_artifact")
        self._send(lambda client, run_id: client.log_artifacts(run_id, _still_there(source), folder or None))

    def log_text(self, text: str, path: str) -> None:
        """Writes a text as the artifact `path`."""
        self._send(lambda client, run_id: client.log_text(run_id, text, path))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; one that exists takes the new value."""
        for key, value in tags.items():
            self._set_tag(key, str(value))

    def describe(self, result: str, pictures: str = "") -> None:
        """Writes what came out at the end of the run's description, in place of what an earlier end wrote there.

        Args:
            result: Markdown, below the heading `RESULT`; all of it is cut to MLflow's 5,000 characters.
            pictures: Folder of pictures, of which the first are shown below; empty for none.
        """

        def send(client: Any, run_id: str) -> None:
            above = client.get_run(run_id).data.tags.get(NOTE_TAG, "").partition(RESULT)[0].rstrip()
            note = f"{above}\n\n{RESULT}\n\n{result}{_last_pictures(client, run_id, pictures)}".lstrip()
            client.set_tag(run_id, NOTE_TAG, note[:MAX_TAG_LENGTH])

        self._send(send)

    def flush(self) -> int:
        """Tries once more to deliver what is pending, without waiting for `retry_after`.

        Returns:
            How many records the store has still not taken.
        """
        self._silent_until = -math.inf
        self._deliver()
        return self.undelivered

    def drain(self) -> int:
        """Delivers what is pending; waits for a store that does not answer, for `PATIENCE` seconds.

        Returns:
            How many records the store has still not taken.
        """
        deadline = time.monotonic() + PATIENCE
        while self.flush() and time.monotonic() < deadline:
            time.sleep(2.0)
        return self.undelivered

    def finish(self, status: Status = "FINISHED", reason: str = "") -> None:
        """Ends the run; waits for a store that does not answer, as `drain` does.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.
            reason: Why it failed or was stopped; becomes the tag `reason`.
        """
        tags = {"reason": reason} if reason else {}
        if self.skipped:
            tags["skipped_values"] = str(self.skipped)
        self.set_tags(tags)
        self._send(lambda client, run_id: client.set_terminated(run_id, status=status))
        missing = self.drain() + self.lost
        if missing:
            _log.error("%d records never reached the tracking store %s", missing, _public(self.handle.uri))

    def _set_tag(self, key: str, value: str) -> None:
        self._send(lambda client, run_id: client.set_tag(run_id, key, value[:MAX_TAG_LENGTH]))

    def _send(self, record: Callable[[Any, str], None]) -> None:
        if len(self._pending) == PENDING_LIMIT:
            self._pending.popleft()
            self.lost += 1
        self._pending.append(record)
        if time.monotonic() >= self._silent_until:
            self._deliver()

    def _deliver(self) -> None:
        while self._pending:
            try:
                self._pending[0](_client(self.handle.uri), self.handle.run_id)
            except _store_errors() as error:
                if not _is_final(error):
                    self._silent_until = time.monotonic() + self._retry_after
                    _log.warning("tracking is behind by %d records: %s", self.undelivered, error)
                    return
                self.lost += 1
                _log.error("the tracking store refused a record, which is dropped: %s", error)
            self._pending.popleft()


class NullTracker(Tracker):
    """The same interface without a run, for ranks other than 0: it checks what it is given and writes nothing."""

    def __init__(self) -> None:
        super().__init__(RunHandle(uri="", run_id="", experiment_id=""))

    def _send(self, record: Callable[[Any, str], None]) -> None:
        return None


def metric_key(*parts: str) -> str:
    """Joins the parts of a metric's name, for instance ("pseudo_mask", "iou", "tv/monitor").

    Returns:
        The parts joined by `/`; within a part, slashes become `-` and other characters that MLflow refuses `_`,
        so that a class name is always one level.
    """
    return "/".join(_clean_key(part.replace("/", "-")) for part in parts)


def log_onnx_model(handle: RunHandle, name: str, file: Path) -> str:
    """Logs an ONNX file as an MLflow model, with its inputs' and outputs' names, types and open sizes as signature.

    Args:
        handle: the run.
        name: of the model, a folder of the run's artifacts: letters, digits and `_ - .`.
        file: written by the export; MLflow stores a copy.

    Returns:
        The model's URI for `mlflow models serve -m URI`, with the store as MLFLOW_TRACKING_URI.

    Raises:
        ValueError: the name is not usable, or the store refuses the model.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(f"model name {name!r} is not usable; allowed are up to 100 letters, digits and _ - .")
    _mlflow()  # its settings are read when it is imported
    import mlflow.onnx as flavour
    import onnx

    model = onnx.load(file)
    with tempfile.TemporaryDirectory() as folder:
        flavour.save_model(
            model,
            f"{folder}/{name}",
            signature=_mlflow().models.ModelSignature(
                _onnx_schema(model.graph.input), _onnx_schema(model.graph.output)
            ),
            pip_requirements=[f"{package}=={_version(package)}" for package in ("mlflow", "onnx", "onnxruntime")],
        )
        try:
            _client(handle.uri).log_artifacts(handle.run_id, folder, "models")
        except _store_errors() as error:
            raise ValueError(f"the tracking store {_public(handle.uri)} refused the model: {error}") from error
    return f"runs:/{handle.run_id}/models/{name}"


def _onnx_schema(values: Any) -> Any:
    types = _mlflow().types
    return types.Schema(
        [
            types.TensorSpec(
                np.dtype(np.float32), [side.dim_value or -1 for side in value.type.tensor_type.shape.dim], value.name
            )
            for value in values
        ]
    )


def metric_history(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    """The curve `key` of a run as (step, value), by step and then by the time of logging; empty when never logged."""
    points = _client(handle.uri).get_metric_history(handle.run_id, _clean_key(key))
    ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
    return [(int(point.step), float(point.value)) for point in ordered]


def run_tags(handle: RunHandle) -> dict[str, str]:
    """The tags of a run."""
    return dict(_client(handle.uri).get_run(handle.run_id).data.tags)


def logged_pictures(handle: RunHandle, folder: str) -> dict[tuple[str, int], Image.Image]:
    """The pictures that were logged as FOLDER/NAME, by (NAME, step); of those logged twice for a step, the last."""
    client, pictures = _client(handle.uri), {}
    paths = _picture_paths(client, handle.run_id, folder)
    with tempfile.TemporaryDirectory() as place:
        for series, path in paths.items():
            with Image.open(client.download_artifacts(handle.run_id, path, place)) as picture:
                pictures[series] = picture.convert("RGB")
    return pictures


def comparison(handles: Sequence[RunHandle]) -> str:
    """Where MLflow's page compares runs of one experiment: with parallel coordinates over the settings that differ."""
    ids = json.dumps([handle.run_id for handle in handles], separators=(",", ":"))
    experiment = json.dumps(sorted({handle.experiment_id for handle in handles}))
    return f"#/compare-runs?{urllib.parse.urlencode({'runs': ids, 'experiments': experiment})}"


def _picture_paths(client: Any, run_id: str, folder: str) -> dict[tuple[str, int], str]:
    latest = dict[tuple[str, int], tuple[int, str]]()
    for file in client.list_artifacts(run_id, "images"):
        found = _PICTURE.fullmatch(Path(file.path).name)
        if found and found["key"].startswith(f"{folder}~"):
            series = (found["key"].removeprefix(f"{folder}~"), int(found["step"]))
            latest[series] = max(latest.get(series, (0, "")), (int(found["time"]), file.path))
    return {series: path for series, (_, path) in latest.items()}


def _last_pictures(client: Any, run_id: str, folder: str) -> str:
    """Markdown that shows the first pictures of a folder, each at its last step; MLflow's page serves them."""
    paths = _picture_paths(client, run_id, folder) if folder else {}
    last = {name: paths[name, step] for name, step in sorted(paths)}
    queries = {name: urllib.parse.urlencode({"path": path, "run_uuid": run_id}) for name, path in last.items()}
    return "".join(f"\n\n![{name}](get-artifact?{queries[name]})" for name in sorted(queries)[:DESCRIBED])


def runs_below(parent: RunHandle) -> dict[str, tuple[RunHandle, str]]:
    """The runs of a sweep: handle and status (`RUNNING`, `FINISHED`, `FAILED`, `KILLED`) by run name."""
    client, found, token = _client(parent.uri), {}, None
    while True:
        page = client.search_runs(
            [parent.experiment_id],
            filter_string=f"tags.`{PARENT_TAG}` = '{parent.run_id}'",
            max_results=500,
            page_token=token,
        )
        for run in page:
            handle = RunHandle(uri=parent.uri, run_id=run.info.run_id, experiment_id=parent.experiment_id)
            found[str(run.info.run_name)] = (handle, str(run.info.status))
        token = page.token
        if not token:
            return found


def environment_tags() -> dict[str, str]:
    """Versions and the git commit of the code, as tags; nothing that names the host or its user.

    The commit is that of the checkout which holds this package. Code that was uploaded or installed carries no history:
    then it is the environment's `SLRNET_GIT_COMMIT`, and without one "unknown". `git_state` is "clean", "dirty"
    (tracked or new files differ from the commit) or "unknown".
    """
    commit, state = _git_state(Path(__file__).resolve())
    tags = {"git_commit": commit, "git_state": state, "version.slrnet": __version__}
    # The name under which MLflow's page shows it.
    tags["mlflow.source.git.commit"] = commit
    tags["version.python"] = platform.python_version()
    for package in _PACKAGES:
        tags[f"version.{package}"] = _version(package)
    return tags


def _default_store(storage: str | Path) -> str:
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(storage)):
        raise ValueError(
            f"storage {str(storage)!r} is remote, and a SQLite file needs a local folder; "
            "start `mlflow server` and give its address as tracking.uri (or MLFLOW_TRACKING_URI)"
        )
    uri = f"{_SQLITE}{Path(storage).expanduser().absolute() / 'mlflow.db'}"
    _check_sqlite(uri)
    return uri


def _check_sqlite(uri: str) -> None:
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or not path.is_absolute():
        raise ValueError(
            f"tracking URI {uri!r} depends on the working directory, which differs between the processes of a run; "
            f"write the absolute path with four slashes, for instance {_SQLITE}{path.absolute()}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create {path.parent} for the tracking store: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"the tracking store {path} cannot be written; give another storage folder or tracking.uri")
    # MLflow would try to open any other file again and again for minutes.
    if path.exists() and path.stat().st_size and _first_bytes(path) != b"SQLite format 3\0":
        raise ValueError(f"{path} exists and is no SQLite database; move it away or give another tracking.uri")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=SERVER_TIMEOUT):
            return
    except urllib.error.HTTPError as error:
        # A server that wants credentials, or that sits behind a prefix, answers with 4xx; a gateway without one, 5xx.
        if error.code < 500:
            return
        reason = f"HTTP status {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    raise ValueError(
        f"the tracking server at {_public(uri)} does not answer ({reason}); "
        "start it with `mlflow server --host 0.0.0.0 --port 5000 --backend-store-uri sqlite:////DATA/mlflow.db "
        "--artifacts-destination /DATA/artifacts`, or leave tracking.uri empty"
    )


@cache
def _mlflow() -> Any:
    # Read at import. The retries are few because `Tracker` has its own, which does not hold up the training.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


@cache
def _client(uri: str) -> Any:
    return _mlflow().MlflowClient(tracking_uri=uri)


def _store_errors() -> tuple[type[Exception], ...]:
    # OSError covers refused connections and full disks (requests' exceptions are OSErrors).
    return (_mlflow().exceptions.MlflowException, OSError)


def _still_there(path: Path) -> str:
    # MLflow copies a folder that has gone while the store was away as an empty one, without a word.
    if not path.exists():
        raise FileNotFoundError(f"{path} was removed before the tracking store took it")
    return str(path)


def _is_final(error: Exception) -> bool:
    # Everything else may pass: servers that restart, gateways, locked SQLite files, full disks.
    code = str(getattr(error, "error_code", ""))
    return code in _FINAL_ERRORS or isinstance(error, (FileNotFoundError, PermissionError))


def _dashboard_command(uri: str) -> str:
    database = Path(uri.removeprefix(_SQLITE))
    if database.name == "mlflow.db":
        return shlex.join(["python", "-m", "slrnet.tools.dashboard", "--storage", str(database.parent)])
    return shlex.join(["mlflow", "server", "--host", "127.0.0.1", "--backend-store-uri", uri])


def _public(uri: str) -> str:
    """The URI without the credentials that it may hold."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _experiment(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith(_SQLITE):
            location = Path(uri.removeprefix(_SQLITE)).with_name("mlartifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=location, tags={KIND_TAG: KIND}))
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"the experiment {name!r} was deleted from the tracking store; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or set another tracking.experiment"
        )
    if KIND_TAG not in found.tags:
        client.set_experiment_tag(found.experiment_id, KIND_TAG, KIND)
    return str(found.experiment_id)


def _existing_run(client: Any, experiment_id: str, experiment: str, name: str, *, resume: bool | None) -> str | None:
    runs = client.search_runs([experiment_id], filter_string=f"attributes.run_name = '{name}'", max_results=10)
    if runs and resume is False:
        raise ValueError(
            f"the experiment {experiment!r} has a run {name!r} already; go on with it by `--resume {name}`, "
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


def _log_start(client: Any, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str], config: str) -> None:
    entities = _mlflow().entities
    earlier = client.get_run(run_id).data
    known: dict[str, str] = earlier.params
    if "reason" in earlier.tags:
        client.delete_tag(run_id, "reason")
    values = {_clean_key(key): _param_text(value) for key, value in params.items()}
    new = [entities.Param(key, value) for key, value in values.items() if key not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS_PER_BATCH])
    changed = {f"resumed.{key}": value for key, value in values.items() if known.get(key, value) != value}
    if NOTE_TAG in earlier.tags:  # people may have added to it
        tags = {key: value for key, value in tags.items() if key != NOTE_TAG}
    for key, value in {**tags, **changed}.items():
        client.set_tag(run_id, key, str(value)[:MAX_TAG_LENGTH])
    client.log_text(run_id, config, "config.json")


class _KnownSteps:
    """Steps that a run has from earlier processes; asked for once per curve, when the store answers."""

    def __init__(self) -> None:
        self._keys: frozenset[str] | None = None
        self._steps: dict[str, frozenset[int]] = {}
        self._pictures: frozenset[str] | None = None

    def has_point(self, client: Any, run_id: str, key: str, step: int) -> bool:
        if self._keys is None:
            self._keys = frozenset(client.get_run(run_id).data.metrics)
        if key in self._keys and key not in self._steps:
            self._steps[key] = frozenset(point.step for point in client.get_metric_history(run_id, key))
        return step in self._steps.get(key, ())

    def has_picture(self, client: Any, run_id: str, key: str, step: int) -> bool:
        if self._pictures is None:
            names = (file.path.rsplit("/", 1)[-1] for file in client.list_artifacts(run_id, "images"))
            self._pictures = frozenset(name.split("+timestamp+")[0] for name in names)
        return f"{key.replace('/', '~')}+step+{step}" in self._pictures  # as MLflow names the files


@dataclass(frozen=True)
class _Points:
    """A record: one point of each of some curves."""

    values: Mapping[str, float]
    step: int
    timestamp: int
    """Milliseconds since the epoch."""
    known: _KnownSteps | None

    def __call__(self, client: Any, run_id: str) -> None:
        metric = _mlflow().entities.Metric
        points = [
            metric(key, value, self.timestamp, self.step)
            for key, value in self.values.items()
            if self.known is None or not self.known.has_point(client, run_id, key, self.step)
        ]
        for start in range(0, len(points), MAX_METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=points[start : start + MAX_METRICS_PER_BATCH])


def _param_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 4] + " ..."


def _clean_key(key: str) -> str:
    levels = (re.sub(r"[^A-Za-z0-9_\-. ]", "_", level).strip() for level in key.split("/"))
    # MLflow refuses keys that a file path would read otherwise: empty levels, "." and "..".
    clean = "/".join(level for level in levels if level.strip("."))
    if not clean:
        raise ValueError(f"{key!r} is no key; it needs a letter, a digit or one of _ -")
    return clean[:MAX_KEY_LENGTH]


def _git_state(file: Path) -> tuple[str, str]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A package installed inside somebody else's checkout must not report that one's commit.
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "HEAD")
        return commit, "dirty" if git("status", "--porcelain") else "clean"
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SLRNET_GIT_COMMIT", "unknown"), "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


PORT = 5000
"""Where the page is unless told otherwise."""


WORKFLOW = "workflowType=machine_learning"
"""With it the page shows trainings, and not what it has for language models."""
