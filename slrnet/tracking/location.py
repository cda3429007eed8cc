"""Where runs are tracked and shown: tracking URIs, and how MLflow's page is addressed."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from slrnet.storage.shown import without_secrets

__all__ = ["PORT", "WORKFLOW", "database_of", "database_uri", "is_named", "not_named", "resolve_uri"]

VARIABLE = "MLFLOW_TRACKING_URI"

SQLITE = "sqlite:///"
"""How the URI of a database file begins."""
ESCAPED = "sqlite+pysqlite:///"
"""How it begins if the path has a `?` or `%`, which are percent-encoded. MLflow would make a folder of the encoded name
for a URI that begins with `SQLITE`."""
SERVER_TIMEOUT = 5.0
"""Seconds that a tracking server may take to answer before a run starts."""
API = "/api/2.0/mlflow/experiments/search?max_results=1"
"""What is asked of a tracking server before a run starts."""
PORT = 5000
"""Default port of the page."""
WORKFLOW = "workflowType=machine_learning"
"""In an address: the page shows runs and charts instead of its views for language models."""


def resolve_uri(uri: str, storage: str | Path) -> str:
    """Decides where the run is tracked, and refuses what would lose it.

    Args:
        uri: `http(s)://...` of a tracking server, `sqlite:////...` with an absolute path, or empty: then
            the environment's `MLFLOW_TRACKING_URI`, and without one a SQLite file `mlflow.db` in `storage`.
        storage: the run's storage folder; created if the SQLite file goes into it.

    Returns:
        A tracking URI that means the same in every process and working directory.

    Raises:
        ValueError: the store cannot be reached or written, has no place for artifacts, or depends on the working
            directory; or it holds a password, which the configuration would carry into every checkpoint.
    """
    uri = (uri or os.environ.get(VARIABLE, "")).strip()
    if without_secrets(uri) != uri:
        raise ValueError(
            f"the tracking URI {without_secrets(uri)} is given with a user, a password or options, which would get "
            "into checkpoints and logs; give it without, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in "
            "the environment"
        )
    if not uri:
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(storage)):
            raise ValueError(
                f"storage {str(storage)!r} is remote, and a SQLite file needs a local folder; "
                "start `mlflow server` and give its address as tracking.uri (or MLFLOW_TRACKING_URI)"
            )
        uri = database_uri(Path(storage).expanduser().absolute() / "mlflow.db")
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
        return uri.rstrip("/")
    if uri.startswith(("sqlite:", ESCAPED)):
        _check_sqlite(uri)
        return uri
    raise ValueError(
        f"tracking URI {uri!r} cannot be used; MLflow's file stores are retired and a bare database has no place for "
        "artifacts. Allowed are http(s)://HOST:PORT of a running `mlflow server`, sqlite:////ABSOLUTE/PATH/mlflow.db, "
        "or nothing (a SQLite file in the storage folder)"
    )


def database_uri(database: Path) -> str:
    """The tracking URI of a SQLite file; any character may be in its path."""
    path = str(database)
    encoded = path.replace("%", "%25").replace("?", "%3F")
    return f"{SQLITE}{path}" if encoded == path else f"{ESCAPED}{encoded}"


def database_of(uri: str) -> Path | None:
    """The SQLite file of a tracking URI; None for a server's."""
    for beginning in (SQLITE, ESCAPED):
        if uri.startswith(beginning):
            return Path(urllib.parse.unquote(uri.removeprefix(beginning)))
    return None


def is_named(uri: str, storage: str | Path, *, given: str = "") -> bool:
    """Whether to use the store that a file names: `given` or the environment names it too, or it is in `storage`.

    A file may come from others. Their server would get the credentials of the environment, and their path could be that
    of a database of another program, to which MLflow would add its tables.
    """
    database = database_of(uri)
    beside = database is not None and database.resolve().parent == Path(storage).expanduser().resolve()
    named = [given, os.environ.get(VARIABLE, "")]
    return not uri or beside or uri.rstrip("/") in [name.strip().rstrip("/") for name in named if name]


def not_named(uri: str) -> str:
    """Says that a file names a store that nobody else names, and what to do."""
    return (
        f"the tracking store {without_secrets(uri)} is named by a file alone, and not used; if it is yours, set "
        f"{VARIABLE} to it"
    )


def _check_sqlite(uri: str) -> None:
    path = database_of(uri)
    if path is not None and "?" in uri:
        raise ValueError(
            f"tracking URI {uri!r} has a `?`, where options begin; for the file of that name, give {database_uri(path)}"
        )
    if path is None or not path.is_absolute():
        path = path or Path(uri.partition(":")[2].lstrip("/"))
        raise ValueError(
            f"tracking URI {uri!r} depends on the working directory, which differs between the processes of a run; "
            f"write the absolute path with four slashes, for instance {SQLITE}{path.absolute()}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create {path.parent} for the tracking store: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"the tracking store {path} cannot be written; give another storage folder or tracking.uri")
    # MLflow would try for minutes to open a file of another format.
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise ValueError(f"{path} exists and is no SQLite database; move it or give another tracking.uri")


def _check_server(uri: str) -> None:
    """Asks what trainings will ask: `/health` answers under any name, the rest only under names that it allows."""
    uri = uri.rstrip("/")
    host = urllib.parse.urlsplit(uri).netloc
    start = "`mlflow server --host 0.0.0.0 --port 5000 --backend-store-uri sqlite:////DATA/mlflow.db "
    start += f"--artifacts-destination /DATA/artifacts --allowed-hosts {host}`"
    try:
        with urllib.request.urlopen(uri + API, timeout=SERVER_TIMEOUT):
            return
    except urllib.error.HTTPError as error:
        said = error.read(200).decode(errors="replace")
        if error.code == 403 and "Invalid Host" in said:
            raise ValueError(
                f"the tracking server at {uri} refuses requests under the name {host}; start it with {start}"
            ) from None
        if error.code == 404:
            raise ValueError(
                f"{uri} answers, but has no MLflow API (HTTP status 404 for {API}); give the address of an "
                f"`mlflow server`, with the path before {API.partition('?')[0]} if it has one"
            ) from None
        if error.code < 500:  # it asks for credentials, which MLflow's client takes from the environment
            return
        reason = f"HTTP status {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error))
    raise ValueError(
        f"the tracking server at {uri} does not answer ({reason}); start it with {start}, or leave tracking.uri empty"
    )
