"""A training on a Ray cluster whose nodes come and go: `python benchmarks/nodes.py`.

A head without work on it and nodes of one core each, as processes of this machine. A training with `--num-workers 1:2`
and a checkpoint every three steps loses a node with notice (drained, then killed), gets another one, loses that without
notice (SIGKILL), and then loses the head and all nodes; on a new cluster it is submitted again with --resume. Claimed:
after each of these it goes on with as many workers as there are nodes, at the price of one failure for each node that
goes (`--max-failures 2`), takes at most two intervals of steps again (with
notice none that was finished when the notice was heard), ends at its last step, and MLflow has one value per step.
About 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from benchmarks._cluster import NETWORK, events_of, words_of  # noqa: E402
from ray_jobs.demo import WORKER_PORTS, free_ports, local_cluster, session_of  # noqa: E402
from slrnet.checkpoints.checkpoint import find_checkpoint, load_checkpoint  # noqa: E402
from slrnet.tracking.protocol import RunHandle  # noqa: E402
from slrnet.tracking.reader import metric_history  # noqa: E402

CHECKPOINT_EVERY = 3
PATIENCE = 300.0
"""Seconds within which a training must move after something happened to it."""
SETTINGS = (
    *NETWORK, "model.decoder_dim=8", "data.crop_size=64", "train.pretrain_epochs=1", "train.log_every=1",
    f"train.checkpoint_every={CHECKPOINT_EVERY}", "evaluation.every=1000", "train.epochs=100000",
)  # fmt: skip
LIST_NODES = "import json, ray; ray.init(logging_level='error'); print(json.dumps(ray.nodes()))"


@dataclass
class Machines:
    """A cluster of processes; `close` loses it."""

    folder: Path
    port: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)

    def open(self) -> None:
        (self.port,) = free_ports(1)
        _, self.environment = self.stack.enter_context(local_cluster("--num-cpus=0", port=self.port))

    def add(self, name: str) -> None:
        (agent,) = free_ports(1)
        command = ["ray", "start", "--block", f"--address=127.0.0.1:{self.port}", "--node-ip-address=127.0.0.1"]
        command += ["--num-cpus=1", f'--resources={{"{name}": 1}}', f"--dashboard-agent-listen-port={agent}"]
        command += WORKER_PORTS
        with (self.folder / f"{name}.log").open("w") as log:
            self.nodes[name] = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in (self.folder / f"{name}.log").read_text(encoding="utf-8"):
            if time.monotonic() > deadline or self.nodes[name].poll() is not None:
                raise SystemExit(f"node {name} did not start:\n{(self.folder / f'{name}.log').read_text()[-2000:]}")
            time.sleep(0.2)  # one at a time: two that start together may take the same sockets

    def identity(self, name: str) -> str:
        """Ray's name of a node."""
        address = {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        command = [sys.executable, "-c", LIST_NODES]
        listed = subprocess.run(command, env=self.environment | address, cwd=ROOT, capture_output=True, text=True)
        nodes = json.loads(listed.stdout.splitlines()[-1])
        return next(node["NodeID"] for node in nodes if name in node["Resources"] and node["Alive"])

    def drain(self, name: str, seconds: int) -> None:
        """What a cloud does that takes a spot node away: tells when."""
        command = ["ray", "drain-node", "--address", f"127.0.0.1:{self.port}", "--node-id", self.identity(name)]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=self.environment, cwd=ROOT, check=True)

    def kill(self, name: str) -> None:
        """All processes of a node at once, as when its power goes."""
        node = self.nodes.pop(name)
        for process in psutil.process_iter():
            if session_of(process.pid) == node.pid:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        node.wait()

    def close(self) -> None:
        for name in list(self.nodes):
            self.kill(name)
        self.stack.close()


@dataclass
class Story:
    """A training and what happens to it."""

    machines: Machines
    storage: Path
    data: Path
    job: subprocess.Popen[bytes] | None = None
    findings: dict[str, bool] = field(default_factory=dict)

    def submit(self, *arguments: str) -> None:
        # Not through the job server: nodes of one machine would unpack the project over each other.
        command = [sys.executable, "ray_jobs/train.py", "--storage", str(self.storage), "--num-workers", "1:2"]
        command += ["--cpus-per-worker", "1", "--cpu-only", "--max-failures", "2", *arguments]
        with (self.storage / "job.log").open("a") as log:
            environment = self.machines.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.machines.port}"}
            self.job = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def events(self) -> list[dict[str, Any]]:
        return events_of(self.storage / "nodes")

    def step(self) -> int:
        return max((event["step"] for event in self.events() if event["event"] == "step"), default=0)

    def await_workers(self, what: str, workers: int, act: Callable[[], None], *, lost: int) -> None:
        """Does something, and waits until a group of that size has taken four steps."""
        count, before, begun = len(self.events()), self.step(), time.monotonic()
        act()
        self.wait(lambda: self._moves(count, workers), what)
        new = self.events()[count:]
        start = [event for event in new if event["event"] == "start"][-1]["step"]
        reached = max([before, *(event["step"] for event in new[: _first_start(new)] if event["event"] == "step")])
        self.findings[
            f"{what}: {workers} worker(s), going on after step {start} of {reached}, {time.monotonic() - begun:.0f} s"
        ] = reached - start <= lost

    def _moves(self, count: int, workers: int) -> bool:
        new = self.events()[count:]
        starts = [place for place, event in enumerate(new) if event["event"] == "start"]
        if not starts or new[starts[-1]]["world_size"] != workers:
            return False
        return sum(event["event"] == "step" for event in new[starts[-1] :]) >= 4

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            ended = self.job is not None and self.job.poll() is not None
            if time.monotonic() > deadline or ended:
                log = (self.storage / "job.log").read_text(encoding="utf-8")[-6000:]
                raise SystemExit(f"FAILS: {what}: the training {'ended' if ended else 'does not move'}:\n{log}")
            time.sleep(0.2)

    def take_node(self, name: str) -> None:
        """With notice: the node goes some seconds after the training has heard of it."""
        heard = len([event for event in self.events() if event["event"] == "notice"])
        self.machines.drain(name, 40)
        self.wait(
            lambda: len([event for event in self.events() if event["event"] == "notice"]) > heard, "the notice is heard"
        )
        time.sleep(3)
        self.machines.kill(name)

    def restart_head(self) -> None:
        self.machines.close()
        assert self.job is not None
        self.job.kill()
        self.job.wait()
        self.machines.stack = ExitStack()
        self.machines.open()
        for name in ("e", "f"):
            self.machines.add(name)
        self.submit("--resume", "nodes", "--wait-for-nodes", "3", "--set", f"train.epochs={self.step() // 8 + 12}")


def _first_start(events: list[dict[str, Any]]) -> int:
    return next(place for place, event in enumerate(events) if event["event"] == "start")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        machines = Machines(folder)
        try:
            story = _tell(machines, folder)
        finally:
            machines.close()
        story.findings |= _end(story)
    for finding, holds in story.findings.items():
        print(f"{'holds' if holds else 'FAILS'}: {finding}")
    sys.exit(not all(story.findings.values()))


def _tell(machines: Machines, folder: Path) -> Story:
    from data_prep.demo import build_demo

    build_demo(folder / "data", num_train=64, num_val=4, image_size=72, samples_per_shard=8)
    story = Story(machines, folder / "runs", folder / "data")
    story.storage.mkdir()
    machines.open()
    for name in ("a", "b"):
        machines.add(name)
    first = ["--recipe", "demo", "--data", str(story.data), "--name", "nodes", "--wait-for-nodes", "3"]
    first += words_of(SETTINGS)
    at_most = 2 * CHECKPOINT_EVERY
    story.await_workers("two nodes", 2, lambda: story.submit(*first), lost=0)
    story.await_workers("a node is taken away with notice", 1, lambda: story.take_node("b"), lost=at_most)
    story.await_workers("a node comes", 2, lambda: machines.add("c"), lost=at_most)
    story.await_workers("a node is lost", 1, lambda: machines.kill("c"), lost=at_most)
    story.await_workers("the head is lost with all nodes", 2, story.restart_head, lost=at_most)
    assert story.job is not None
    if story.job.wait(timeout=PATIENCE):
        raise SystemExit("FAILS: the training did not finish")
    return story


def _end(story: Story) -> dict[str, bool]:
    """What is claimed of the finished run."""
    last = find_checkpoint(story.storage / "nodes" / "checkpoints")
    assert last is not None
    checkpoint = load_checkpoint(last)
    steps = 8 * checkpoint.config.train.epochs
    handle = RunHandle(
        uri=f"sqlite:///{story.storage / 'mlflow.db'}", run_id=checkpoint.state.run_id, experiment_id="1"
    )
    counts = Counter(step for step, _ in metric_history(handle, "train/loss"))
    return {
        f"it ends at step {checkpoint.state.step}": checkpoint.state.step == steps,
        f"MLflow has {len(counts)} of {steps} steps, each once": counts == Counter(range(1, steps + 1)),
    }


if __name__ == "__main__":
    main()
