# PYTHON_ARGCOMPLETE_OK
"""The MLflow page over the runs of a storage folder: `python -m slrnet.tools.dashboard`. `make dashboard` runs it.

Serves on loopback only, until Ctrl-C. Without --storage it takes $SLRNET_STORAGE, else ~/slrnet_runs; where neither
has runs, those of `make demo` in the folder runs.

Exit status: the server's; 2 where there is nothing to show or the port is taken.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from slrnet.completion import parse
from slrnet.tracking.page import PORT, runs_address

__all__ = ["check_port", "default_storages", "main", "serve_command"]

DATABASE = "mlflow.db"


def default_storages() -> list[Path]:
    """Where runs are looked for without being told: the default storage, then the demo's folder below this one."""
    usual = Path(os.environ.get("SLRNET_STORAGE", "") or "~/slrnet_runs").expanduser().absolute()
    return [usual, Path("runs").absolute()]


def serve_command(database: Path, port: int) -> list[str]:
    """The command that serves a SQLite store on loopback, with one process and without MLflow's own jobs."""
    server = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*server, "--backend-store-uri", f"sqlite:///{database}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command until the server ends; returns the exit status."""
    options = parse(_parser(), arguments)
    try:
        database = _database(options.storage)
        check_port(options.port)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"runs of {database.parent}: {runs_address(options.port)} (some seconds to start; Ctrl-C ends it)", flush=True
    )
    # MLflow's jobs are for language models, and take five processes.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(serve_command(database, options.port), env=os.environ | quiet)
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.wait()
        return 0


def _database(storage: Path | None) -> Path:
    places = [storage.expanduser().absolute()] if storage else default_storages()
    found = [place / DATABASE for place in places if (place / DATABASE).is_file()]
    if found:
        return found[0]
    raise ValueError(
        f"there are no runs yet: no {DATABASE} in {' or '.join(map(str, places))}; train something (`make demo`), or "
        "name the folder of runs with --storage DIR. Runs that were tracked elsewhere (MLFLOW_TRACKING_URI, "
        "--tracking-uri) are on that server's page"
    )


def check_port(port: int) -> None:
    """Refuses a port of 127.0.0.1 that something listens on already.

    Raises:
        ValueError: it does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ValueError(f"port {port} is taken, perhaps by an earlier call; give another --port") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slrnet.tools.dashboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--storage", type=Path, metavar="DIR", help="folder of runs (default: see above)")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="on 127.0.0.1 (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
