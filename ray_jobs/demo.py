"""Everything on this machine: a private Ray cluster, a submitted job, scores, a picture. `slrnet demo` runs it.

The cluster listens on loopback only, with token authentication and a token of its own. It stops at the end, also after
Ctrl-C. Other Ray clusters on the machine keep running.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from data_prep.demo import drawn_demo
from slrnet.storage.shown import say
from slrnet.tracking.provenance import environment_tags

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (ROOT / "pyproject.toml").is_file()
"""Whether this is a checkout, which Ray gets a copy of; an installed package is there already."""
HOME = ROOT if CHECKOUT else Path.cwd()
RUNS = HOME / "runs"
WORKER_PORTS = ("--min-worker-port=0", "--max-worker-port=0")
"""Use any free ports: another cluster on this machine may use the default range."""
START_LIMIT = 180.0
"""Seconds that the cluster may take to answer; Ray itself gives up after 30, so it may need several starts."""


def run_demo(options: list[str]) -> int:
    """Run the demo with further options of ray_jobs/train.py; returns 0, or 1 if the job failed."""
    started = time.monotonic()
    name = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    upload = ["--working-dir", "."] if CHECKOUT else []
    program = ["python", "ray_jobs/train.py"] if CHECKOUT else [sys.executable, "-m", "slrnet", "train"]
    drawing = ThreadPoolExecutor(1).submit(drawn_demo, RUNS)  # while Ray starts
    with local_cluster() as (address, environment):
        drawing.result()
        job = ["ray", "job", "submit", "--log-color", "false", "--address", address, *upload]
        job += ["--", *program, "--name", name, "--storage", str(RUNS), *workers(), *options]
        say("$ " + " ".join(job))
        code = run(job, environment)
    if code:
        say(f"error: the job failed (exit code {code}); its messages are above", error=True)
        return 1
    conclude(name)
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def workers() -> list[str]:
    """Without a GPU, two workers where there are two cores: one thread each is faster than two in one worker."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["--num-workers", "2"] if cores > 1 and shutil.which("nvidia-smi") is None else []


@contextmanager
def local_cluster(*options: str, port: int | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """Start a Ray head on loopback with its own token.

    Args:
        options: further options of `ray start`.
        port: where further nodes join; None for any free port.

    Yields:
        The job server's address, and the environment for commands that talk to it.
    """
    folder = Path(tempfile.mkdtemp(prefix="slrnet-ray-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    free, dashboard, client, agent = free_ports(4)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # a job with files of its own could not use these processes
        "PYTHONUNBUFFERED": "1",
        "SLRNET_GIT_COMMIT": environment_tags()["git_commit"],  # Ray leaves .git behind
    }
    for inherited in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.pop(inherited, None)
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port or free}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--temp-dir={folder / 'ray'}", "--include-log-monitor=true", "--no-monitor"]
    command += [f"--dashboard-agent-listen-port={agent}", *WORKER_PORTS, *options]  # the agent takes the jobs
    say("starting a local Ray cluster with token authentication")
    address, log, deadline = f"http://127.0.0.1:{dashboard}", folder / "head.log", time.monotonic() + START_LIMIT
    health = (f"{address}/api/jobs/", f"http://127.0.0.1:{agent}/api/local_raylet_healthz")
    head = start(command, environment, log)
    try:
        while not wait_for(health, token, head, log, deadline):
            say("Ray gave up, as it does on a busy machine; starting it once more")
            stop(head)
            head = start(command, environment, log)
        yield address, environment
    finally:
        stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a Ray head in a session of its own, with its output in a file."""
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=environment, cwd=HOME, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def run(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command in the project's root, its output passed on; ends it with this process."""
    process = subprocess.Popen(command, env=environment, cwd=HOME)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait(timeout=20)
        raise


def wait_for(pages: Sequence[str], token: Path, head: subprocess.Popen[bytes], log: Path, deadline: float) -> bool:
    """Waits until all pages answer: that of the server that takes jobs, and that of the agent that starts them.

    Returns:
        False if Ray timed out and ended.

    Raises:
        SystemExit: it ended otherwise, or the deadline (`time.monotonic`) has passed.
    """
    headers = {"Authorization": f"Bearer {token.read_text(encoding='utf-8')}"}
    missing = list(pages)
    while missing and time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(urllib.request.Request(missing[0], headers=headers), timeout=30) as answer:
                missing = missing[answer.status == 200 :]
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    if not missing:
        return True
    if time.monotonic() < deadline and "timed out during startup" in log.read_text(encoding="utf-8"):
        return False
    raise SystemExit(f"error: Ray did not start; the end of its log:\n{log.read_text(encoding='utf-8')[-3000:]}")


def stop(head: subprocess.Popen[bytes]) -> None:
    """Ends all processes of the head's session: Ray gives its workers process groups of their own."""
    members = [process for process in psutil.process_iter() if session_of(process.pid) == head.pid]
    head.terminate()  # the head ends its children in order
    with suppress(subprocess.TimeoutExpired):
        head.wait(timeout=5)
    for process in members:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(timeout=10)


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def conclude(name: str) -> None:
    """Draws what the run learned and says where everything is."""
    from slrnet.tools.figures.progress import write_pictures  # PyTorch is not needed before

    validation, *history = write_pictures(RUNS / name)
    say(f"validation images, masks and truth: {validation}")
    for path in history:
        say(f"pseudo labels of training images, epoch by epoch: {path}")
    python = Path(sys.executable)
    shown = python.relative_to(HOME) if python.is_relative_to(HOME) else python
    say(f"MLflow page: {shown} -m slrnet dashboard --storage {RUNS}")
    say(f"masks of your own images, in a page: {shown} -m slrnet app {RUNS / name}")


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["demo", *sys.argv[1:]]))
