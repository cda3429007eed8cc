"""Two nodes of a real Ray cluster that share no folder: all they have in common is an S3 server and an MLflow server.

The second node has file systems of its own where the first has its caches and Ray its files, so the same paths lead
to other files, as on two machines.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from data_prep.demo import build_demo
from ray_jobs.demo import WORKER_PORTS, free_ports, local_cluster, stop
from slrnet.data.manifest import load_dataset
from tests.fixtures.servers import serving
from tests.ray_jobs.test_cluster import TINY, wait_until

ROOT = Path(__file__).resolve().parents[2]
OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]
RUN_ALL = "import json, sys; from slrnet.cli.main import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"

pytestmark = pytest.mark.slow


@contextmanager
def second_node(port: int, environment: dict[str, str], own: list[Path]) -> Iterator[None]:
    """A node with one core that joins at `port` and has file systems of its own, empty at first, at the paths `own`."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    alone = environment | {"RAY_AUTH_TOKEN": token.read_text(encoding="utf-8")}
    del alone["RAY_AUTH_TOKEN_PATH"]
    mounts = " && ".join(f"mount -t tmpfs tmpfs '{folder}'" for folder in own)
    agent, *_ = free_ports(1)
    ray = ["ray", "start", "--block", f"--address=127.0.0.1:{port}", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    ray += [f"--dashboard-agent-listen-port={agent}", *WORKER_PORTS]
    with tempfile.TemporaryFile() as log:

        def joined() -> bool:
            said = os.pread(log.fileno(), 2**20, 0).decode(errors="replace")
            assert node.poll() is None, said
            return "Ray runtime started" in said

        node = subprocess.Popen(
            [*OWN_MOUNTS, "sh", "-c", f'{mounts} && cd / && {{ "$@" || "$@"; }}', "sh", *ray],  # a busy machine
            env=alone,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_until(joined)
            assert Path(f"/proc/{node.pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
            yield
        finally:
            stop(node)


def test_everything_goes_through_the_store(s3: Any, tmp_path: Path, storage: Path) -> None:
    """A training by a worker on each node, its evaluation, its pseudo masks, and a network distilled from them."""
    if shutil.which("unshare") is None or subprocess.run([*OWN_MOUNTS, "true"], check=False).returncode:
        pytest.skip("needs a user who may give a process mounts of its own (`unshare --mount`)")
    build_demo(tmp_path / "shards", num_train=24, num_val=6, image_size=64, samples_per_shard=6)
    s3.create_dir("all")
    fs.copy_files(str(tmp_path / "shards"), "all/shards", destination_filesystem=s3)
    shutil.rmtree(tmp_path / "shards")
    (port,) = free_ports(1)
    settings = [word for setting in TINY for word in ("--set", setting)]
    workers, run = ["--num-workers", "2"], "s3://all/runs/first"
    runs = ["--storage", "s3://all/runs", *settings, *workers]
    commands = [
        ["train", "--recipe", "demo", "--data", "s3://all/shards", "--name", "first", *runs],
        ["evaluate", "--checkpoint", run, *workers],
        ["pseudo-label", "--checkpoint", run, "--protocol", "ss", "--out", "s3://all/masks", *workers],
        ["distill", "--data", "s3://all/masks", "--name", "second", *runs],
    ]
    with (
        serving(storage) as tracking,
        local_cluster("--num-cpus=1", port=port) as (_, environment),
        second_node(port, environment, [tmp_path, Path(environment["RAY_AUTH_TOKEN_PATH"]).parent]),
    ):
        environment |= {"RAY_ADDRESS": f"127.0.0.1:{port}", "MLFLOW_TRACKING_URI": tracking}
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("2 worker(s) x 1 CPU(s)") == 2  # each node has one core
    files = [info.path for info in s3.get_file_info(fs.FileSelector("all", recursive=True)) if info.is_file]
    stored = {re.sub(r"(?<=-val-)[\d-]+", "TIME", path.removeprefix("all/")) for path in files if "/ray/" not in path}
    assert stored >= {
        *(f"runs/{run}/logs/rank-{rank}.jsonl" for run in ("first", "second") for rank in (0, 1)),
        *(f"runs/{run}/checkpoints/checkpoint-0001/model.safetensors" for run in ("first", "second")),
        "runs/first/evaluations/checkpoint-0001-val-TIME/evaluation.json",
    }
    assert {path for path in stored if path.startswith("masks/")} == {
        *(f"masks/train-{shard:06}.tar" for shard in range(4)),
        *(f"masks/{name}" for name in ("val-000000.tar", "manifest.parquet", "dataset.json", "pseudo_labels.json")),
    }
    masks = load_dataset("s3://all/masks")
    assert len(masks.split("train").with_masks) == masks.split("train").num_samples == 24
