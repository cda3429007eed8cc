"""Trains on a Ray cluster that loses and gains nodes: `python benchmarks/nodes.py`.

The cluster is a head without workers and nodes of one core each, all processes on this machine. A training with
`--num-workers 1:2` and a checkpoint every three steps loses a node with notice (drained, then killed), gains another,
loses it without notice (SIGKILL), and then loses the head and all nodes; it is resubmitted with --resume on a new
cluster. Claims: after each event, training continues with one worker per node; each lost node costs one failure
(`--max-failures 2`); at most two checkpoint intervals of steps are repeated (with notice, no step that was finished
when the notice arrived); training ends at its last step; MLflow has one value per step. Takes about 6 minutes on two
cores.
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
from slrnet.checkpoints.checkpoint import load_whole  # noqa: E402
from slrnet.tracking.protocol import RunHandle  # noqa: E402
from slrnet.tracking.reader import metric_history  # noqa: E402

CHECKPOINT_EVERY = 3
PATIENCE = 300.0
"""Seconds within which training must continue after an event."""
SETTINGS = (
    *NETWORK, "model.decoder_dim=8", "data.crop_size=64", "train.pretrain_epochs=1", "train.log_every=1",
    f"train.checkpoint_every={CHECKPOINT_EVERY}", "evaluation.every=1000", "train.epochs=100000",
)  # fmt: skip
LIST_NODES = "import json, ray; ray.init(logging_level='error'); print(json.dumps(ray.nodes()))"


@dataclass
class Machines:
    """A Ray cluster of local processes; `close` kills all of its nodes."""

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
            time.sleep(0.2)  # one at a time: two nodes that start together may use the same sockets

    def identity(self, name: str) -> str:
        """Returns Ray's id of a node."""
        address = {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        command = [sys.executable, "-c", LIST_NODES]
        listed = subprocess.run(command, env=self.environment | address, cwd=ROOT, capture_output=True, text=True)
        nodes = json.loads(listed.stdout.splitlines()[-1])
        return next(node["NodeID"] for node in nodes if name in node["Resources"] and node["Alive"])

    def drain(self, name: str, seconds: int) -> None:
        """Announces a node's removal and its deadline, as a cloud does before it reclaims a spot node."""
        command = ["ray", "drain-node", "--address", f"127.0.0.1:{self.port}", "--node-id", self.identity(name)]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=self.environment, cwd=ROOT, check=True)

    def kill(self, name: str) -> None:
        """Kills all processes of a node at once, as in a power failure."""
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
class Scenario:
    """A training and the events that it must survive."""

    machines: Machines
    storage: Path
    data: Path
    job: subprocess.Popen[bytes] | None = None
    findings: dict[str, bool] = field(default_factory=dict)

    def submit(self, *arguments: str) -> None:
        # Bypasses the job server: nodes on one machine would overwrite each other's copy of the project.
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
        """Calls `act` and waits until a group of `workers` workers has taken four steps."""
        count, before, begun = len(self.events()), self.step(), time.monotonic()
        act()
        self.wait(lambda: self._moves(count, workers), what)
        new = self.events()[count:]
        start = [event for event in new if event["event"] == "start"][-1]["step"]
        reached = max([before, *(event["step"] for event in new[: _first_start(new)] if event["event"] == "step")])
        self.findings[
            f"{what}: {workers} worker(s), continued after step {start} of {reached}, {time.monotonic() - begun:.0f} s"
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
                raise SystemExit(f"FAILS: {what}: the training {'ended' if ended else 'makes no progress'}:\n{log}")
            time.sleep(0.2)

    def take_node(self, name: str) -> None:
        """Removes a node with notice: kills it some seconds after the training has received the notice."""
        heard = len([event for event in self.events() if event["event"] == "notice"])
        self.machines.drain(name, 40)
        self.wait(
            lambda: len([event for event in self.events() if event["event"] == "notice"]) > heard,
            "receiving the notice",
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
            scenario = _run_scenario(machines, folder)
        finally:
            machines.close()
        scenario.findings |= _final_claims(scenario)
    for finding, holds in scenario.findings.items():
        print(f"{'holds' if holds else 'FAILS'}: {finding}")
    sys.exit(not all(scenario.findings.values()))


def _run_scenario(machines: Machines, folder: Path) -> Scenario:
    from data_prep.demo import build_demo

    build_demo(folder / "data", num_train=64, num_val=4, image_size=72, samples_per_shard=8)
    scenario = Scenario(machines, folder / "runs", folder / "data")
    scenario.storage.mkdir()
    machines.open()
    for name in ("a", "b"):
        machines.add(name)
    first = ["--recipe", "demo", "--data", str(scenario.data), "--name", "nodes", "--wait-for-nodes", "3"]
    first += words_of(SETTINGS)
    at_most = 2 * CHECKPOINT_EVERY
    scenario.await_workers("two nodes", 2, lambda: scenario.submit(*first), lost=0)
    scenario.await_workers("a node is removed with notice", 1, lambda: scenario.take_node("b"), lost=at_most)
    scenario.await_workers("a node joins", 2, lambda: machines.add("c"), lost=at_most)
    scenario.await_workers("a node is killed", 1, lambda: machines.kill("c"), lost=at_most)
    scenario.await_workers("the head and all nodes are lost", 2, scenario.restart_head, lost=at_most)
    assert scenario.job is not None
    if scenario.job.wait(timeout=PATIENCE):
        raise SystemExit("FAILS: the training did not finish")
    return scenario


def _final_claims(scenario: Scenario) -> dict[str, bool]:
    """Returns the claims about the finished run."""
    checkpoint = load_whole(scenario.storage / "nodes" / "checkpoints")
    assert checkpoint is not None
    steps = 8 * checkpoint.config.train.epochs
    handle = RunHandle(
        uri=f"sqlite:///{scenario.storage / 'mlflow.db'}", run_id=checkpoint.state.run_id, experiment_id="1"
    )
    counts = Counter(step for step, _ in metric_history(handle, "train/loss"))
    return {
        f"training ends at step {checkpoint.state.step}": checkpoint.state.step == steps,
        f"MLflow has {len(counts)} of {steps} steps, each once": counts == Counter(range(1, steps + 1)),
    }


if __name__ == "__main__":
    main()
