"""Kills a training's processes at random and compares the result with an undisturbed training: `make chaos`.

    python benchmarks/chaos.py [--kills 20] [--seed 0] [--out FOLDER]

Two workers on a private Ray cluster train a small network on the embedded data, with an MLflow server on loopback. In
the second training, faults occur at random moments while steps are being taken: a worker is killed (SIGKILL; Ray
restarts it), the driver is killed (SIGKILL; the run is resubmitted with --resume), the tracking server is killed
(SIGKILL; restarted some seconds later), or the storage fails (the checkpoint folder is missing for some seconds).

Claims: the training finishes; its final weights equal the undisturbed ones bit for bit; MLflow has one run with one
value per step, equal to the undisturbed ones; each fault repeats at most two checkpoint intervals of steps, because a
checkpoint may be half written when the next one is due. Also printed: the seconds until training continues. Takes about
15 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._cluster import NETWORK, events_of, kill_driver, submission, words_of  # noqa: E402
from ray_jobs.demo import free_ports, local_cluster  # noqa: E402
from slrnet.checkpoints.checkpoint import load_whole  # noqa: E402
from slrnet.tracking.protocol import RunHandle  # noqa: E402
from slrnet.tracking.reader import metric_history  # noqa: E402

CHECKPOINT_EVERY = 3
SETTINGS = (
    *NETWORK, "model.decoder_dim=16", "data.crop_size=64", "evaluation.every=4", "train.pretrain_epochs=2",
    "train.log_every=1", f"train.checkpoint_every={CHECKPOINT_EVERY}",
    "evaluation.pseudo_mask_images=2", "evaluation.panel_images=1",
)  # fmt: skip
TIMING = ("speed/images_per_second", "speed/data_wait_fraction")
"""Curves that measure time, which differ between runs."""
PATIENCE = 240.0
"""Seconds without progress after which the training counts as dead."""


@dataclass
class DisturbedRun:
    """A training and the faults injected into it."""

    rng: random.Random
    storage: Path
    submit: Callable[[str, bool], subprocess.Popen[bytes]]
    server: Server
    job: subprocess.Popen[bytes] | None = None
    kills: list[tuple[str, int, int, float]] = field(default_factory=list)
    """Kind, step at the fault, repeated steps, seconds until training continued."""

    @property
    def folder(self) -> Path:
        return self.storage / "storm"

    def run(self, kills: int) -> None:
        kinds = list(self.faults())
        self.job = self.submit("storm", False)
        for index in range(kills):
            self.wait_for_steps(self.rng.randint(2, 3 * CHECKPOINT_EVERY))
            time.sleep(self.rng.random())
            kind = kinds[index % len(kinds)] if index < len(kinds) else self.rng.choice(kinds)
            before, count, begun = self.step(), len(self.events()), time.monotonic()
            self.faults()[kind]()
            self.await_motion(count, other_process=kind in ("worker", "driver"))
            starts = [event["step"] for event in self.events()[count:] if event["event"] == "start"]
            again = max(0, before - starts[0]) if starts else 0
            self.kills.append((kind, before, again, time.monotonic() - begun))
            print(f"kill {index + 1}/{kills}: {kind} at step {before}, {again} step(s) repeated, continued after "
                  f"{self.kills[-1][-1]:.1f} s", flush=True)  # fmt: skip
        assert self.job is not None
        if self.job.wait(timeout=1200):
            raise SystemExit("the training did not finish")

    def faults(self) -> Mapping[str, Callable[[], None]]:
        return {
            "worker": self.kill_worker,
            "driver": self.kill_driver,
            "tracking": self.kill_tracking,
            "storage": self.take_storage,
        }

    def kill_worker(self) -> None:
        rank = self.rng.randrange(2)
        pid = [event["pid"] for event in self.events(rank)][-1]
        os.kill(pid, signal.SIGKILL)

    def kill_driver(self) -> None:
        kill_driver("ray_jobs/train.py", "storm")
        assert self.job is not None
        self.job.wait(timeout=120)
        self.job = self.submit("storm", True)

    def kill_tracking(self) -> None:
        self.server.kill()
        time.sleep(self.rng.uniform(1, 4))
        self.server.start()

    def take_storage(self) -> None:
        """Replaces the checkpoint folder by a file for some seconds, so nothing can be written."""
        place, away = self.folder / "checkpoints", self.folder / "checkpoints-away"
        place.rename(away)
        place.touch()
        time.sleep(self.rng.uniform(1, 4))
        place.unlink()
        away.rename(place)

    def wait_for_steps(self, steps: int) -> None:
        reached = self.step() + steps
        self.wait(lambda: self.step() >= reached)

    def await_motion(self, count: int, *, other_process: bool) -> None:
        """Waits for a step after the first `count` events; if `other_process`, only new workers' steps count."""
        old = {event["pid"] for event in self.events()[:count]} if other_process else set()

        def moves() -> bool:
            return any(event["event"] == "step" and event["pid"] not in old for event in self.events()[count:])

        self.wait(moves)

    def wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > deadline or (self.job is not None and self.job.poll() is not None):
                raise SystemExit(
                    "the training ended or makes no progress; use fewer --kills, or check its log in the --out folder"
                )
            time.sleep(0.1)

    def step(self) -> int:
        return max((event["step"] for event in self.events() if event["event"] == "step"), default=0)

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        return events_of(self.folder, rank)


class Server:
    """An MLflow server on loopback."""

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "mlflow.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.3)
        raise SystemExit("the MLflow server does not answer")

    def ask(self, question: str, **values: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}/api/2.0/mlflow/{question}",
            data=json.dumps(values).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of faults (default: 20)")
    parser.add_argument("--epochs", type=int, help="number of epochs of 8 steps each (default: 6 per kill)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed for the times and kinds of faults (default: 0)"
    )
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    options.epochs = options.epochs or max(12, 6 * options.kills)
    with tempfile.TemporaryDirectory() as temporary, _surroundings(options, Path(temporary)) as storm:
        calm = storm.submit("calm", False)
        begun = time.monotonic()
        if calm.wait(timeout=1200):
            raise SystemExit("the undisturbed training failed")
        print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
        begun = time.monotonic()
        storm.run(options.kills)
        print(f"disturbed: {time.monotonic() - begun:.0f} s")
        failed = _report(storm)
    sys.exit(failed)


@contextmanager
def _surroundings(options: argparse.Namespace, temporary: Path) -> Iterator[DisturbedRun]:
    """Creates the data, the tracking server and the cluster, and closes them at the end."""
    from data_prep.demo import build_demo

    storage = (options.out or temporary / "runs").resolve()
    storage.mkdir(parents=True, exist_ok=True)
    data = temporary / "shards"
    build_demo(data, num_train=64, num_val=4, image_size=72, samples_per_shard=8)
    server = Server(storage)
    server.start()
    settings = words_of((*SETTINGS, f"train.epochs={options.epochs}"))
    with local_cluster() as (address, environment):

        def submit(name: str, resume: bool) -> subprocess.Popen[bytes]:
            command = [*submission(address), "ray_jobs/train.py", "--storage", str(storage)]
            command += ["--resume" if resume else "--name", name]
            command += ["--num-workers", "2", "--cpus-per-worker", "1", "--max-failures", "-1"]
            command += ["--tracking-uri", server.address]
            command += [] if resume else ["--recipe", "demo", "--data", str(data), *settings]
            with (storage / f"{name}.log").open("a") as log:
                return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

        try:
            yield DisturbedRun(random.Random(options.seed), storage, submit, server)
        finally:
            server.kill()


def _report(storm: DisturbedRun) -> int:
    """Prints each claim and whether it holds; returns 1 if one does not."""
    first, second = (load_whole(storm.storage / name / "checkpoints") for name in ("calm", "storm"))
    assert first is not None
    assert second is not None
    equal = first.state.step == second.state.step and all(
        tensor.equal(second.model[name]) for name, tensor in first.model.items()
    )
    runs, curves = _curves(storm.server)
    calm_curves, storm_curves = curves["calm"], curves["storm"]
    repeated = sum(
        count - 1 for points in storm_curves.values() for count in Counter(step for step, _ in points).values()
    )
    differing = [key for key in calm_curves if key not in TIMING and calm_curves[key] != storm_curves.get(key)]
    again = [kill[2] for kill in storm.kills]
    claims = {
        f"{len(storm.kills)} kills ({dict(Counter(kill[0] for kill in storm.kills))}), and the training finished": True,
        f"final weights after step {second.state.step} equal bit for bit": equal,
        f"one MLflow run ({runs} in total with the undisturbed one)": runs == 2,
        f"one value per step in each of {len(storm_curves)} curves ({repeated} repeated)": repeated == 0,
        f"same values as the undisturbed run ({len(differing)} curves differ: {differing[:5]})": not differing,
        f"repeated steps per kill: {max(again)} at most, median {statistics.median(again):g}; a checkpoint every "
        f"{CHECKPOINT_EVERY} steps": max(again) <= 2 * CHECKPOINT_EVERY,
    }
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    for kind in storm.faults():
        times = [kill[3] for kill in storm.kills if kill[0] == kind]
        if times:
            print(f"{kind}: continued after {statistics.median(times):.1f} s (median of {len(times)})")
    return 0 if all(claims.values()) else 1


def _curves(server: Server) -> tuple[int, dict[str, dict[str, list[tuple[int, float]]]]]:
    """Returns the number of runs in the store and each run's curves by run name and metric."""
    experiments = server.ask("experiments/search", max_results=100)["experiments"]
    ids = [experiment["experiment_id"] for experiment in experiments]
    runs = server.ask("runs/search", experiment_ids=ids, max_results=100).get("runs", [])
    found = {}
    for run in runs:
        info = run["info"]
        handle = RunHandle(uri=server.address, run_id=info["run_id"], experiment_id=info["experiment_id"])
        found[info["run_name"]] = {
            metric["key"]: metric_history(handle, metric["key"]) for metric in run["data"].get("metrics", [])
        }
    return len(runs), found


if __name__ == "__main__":
    main()
