"""MLflow's page over the runs of a storage folder (`slrnet dashboard`), and where commands look for runs by default."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from slrnet.storage.shown import say
from slrnet.tracking.location import database_uri

__all__ = ["check_port", "default_storages", "newest_run", "serve", "serve_command"]

DATABASE = "mlflow.db"


def default_storages() -> list[Path]:
    """Returns the folders in which to look for runs: the default storage, then the demo's folder `runs`."""
    usual = Path(os.environ.get("SLRNET_STORAGE") or "~/slrnet_runs").expanduser().absolute()
    return [usual, Path("runs").absolute()]


def newest_run(storages: Sequence[Path]) -> Path:
    """Finds the run with the newest checkpoint, in the first folder that has one; raises ValueError if none has."""
    from slrnet.checkpoints.checkpoint import CheckpointError, read_state  # imports PyTorch, which takes seconds

    for storage in storages:
        checkpoints = sorted(storage.glob("*/checkpoints/checkpoint-*"), key=lambda path: path.stat().st_mtime)
        for path in reversed(checkpoints):
            with suppress(CheckpointError):
                read_state(path)  # older ones are not read: they may be many and large
                return path.parents[1]
    raise ValueError(
        f"there is no run with a checkpoint in {' or '.join(map(str, storages))}; train one with `make demo`, or name "
        "one: slrnet app CHECKPOINT_OR_RUN"
    )


def serve_command(database: Path, port: int) -> list[str]:
    """Returns the command that serves a SQLite store on loopback, with one worker process."""
    server = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*server, "--backend-store-uri", database_uri(database)]


def serve(storage: Path | None, port: int) -> int:
    """Serves the page of the runs in `storage`, or in the first default folder that has some, until Ctrl-C.

    Returns:
        The server's exit status; 0 after Ctrl-C.

    Raises:
        ValueError: there are no runs, or the port is taken.
    """
    places = [storage.expanduser().absolute()] if storage else default_storages()
    database = next((place / DATABASE for place in places if (place / DATABASE).is_file()), None)
    if database is None:
        raise ValueError(
            f"there are no runs yet: no {DATABASE} in {' or '.join(map(str, places))}; train something (`make demo`), "
            "or name the folder of runs with --storage DIR. Runs that were tracked elsewhere (MLFLOW_TRACKING_URI, "
            "--tracking-uri) are on that server's page"
        )
    check_port(port)
    from slrnet.tracking.reader import runs_page  # imports MLflow, which takes seconds

    page = f"http://127.0.0.1:{port}/{runs_page(database_uri(database))}"
    say(f"runs of {database.parent}: {page} (some seconds to start; Ctrl-C ends it)")
    # MLflow's own jobs are for language models, and take five processes.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(serve_command(database, port), env=os.environ | quiet)
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()  # Ctrl-C has reached it already, SIGTERM has not
        server.wait()
        return 0


def check_port(port: int) -> None:
    """Raises ValueError if another program listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ValueError(f"port {port} is taken, perhaps by an earlier call; give another --port") from None
