"""Kills processes of a sweep and compares it with the same sweep undisturbed.

    python benchmarks/sweep_faults.py [--scheduler none|pbt] [--out FOLDER]

On a private Ray cluster, a small network trains on the embedded data: four trials, two at a time. In the second sweep
one trial's worker is killed (SIGKILL), and once the trial has continued, the driver; then the sweep is resumed. The
third sweep allows no retries, and one of its workers is killed. Claims: the disturbed sweep ends with the same trials,
settings and metrics as the undisturbed one, and with one MLflow run per trial under one parent; the killed trial
continues from a checkpoint; no finished trial is trained again; without a retry, the trial is recorded with its error
and the others finish. Exit status 1 if a claim does not hold. Takes 11 minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from benchmarks._cluster import NETWORK, events_of, kill_driver, submission, words_of  # noqa: E402
from data_prep.demo import build_demo  # noqa: E402
from ray_jobs.demo import local_cluster  # noqa: E402

TRIALS, EPOCHS = 4, 8
SETTINGS = (
    *NETWORK, "model.decoder_dim=8", "data.crop_size=64", f"train.epochs={EPOCHS}", "train.pretrain_epochs=1",
    "train.log_every=1", "train.checkpoint_every=1", "evaluation.pseudo_mask_images=4",
    "evaluation.panel_images=0", "evaluation.background_power=8",
)  # fmt: skip
"""Without `background_power`, such short trainings predict only background, and all trials get the same score."""
SPACES = {
    "none": ("optim.lr=choice:0.005,0.01,0.02,0.04", "weights.consistency=fixed", "cvlr.num_iters=fixed",
             "cvlr.dim=fixed", "calibration.confidence_threshold=fixed"),
    "pbt": (),
}  # fmt: skip
PATIENCE = 900.0
"""Seconds after which waiting fails."""


@dataclass
class Bench:
    """A cluster, and the sweeps submitted to it."""

    address: str
    environment: dict[str, str]
    storage: Path
    scheduler: str

    def start(self, name: str, *, resume: bool = False, retries: int = 1) -> subprocess.Popen[bytes]:
        words = ["--storage", str(self.storage), "--resume" if resume else "--name", name]
        if not resume:
            words += ["--recipe", "demo", "--data", str(self.storage / "data"), "--scheduler", self.scheduler]
            words += ["--searcher", "grid"] if self.scheduler == "none" else []
            words += ["--num-samples", str(TRIALS), "--max-concurrent", "2", "--max-failures", str(retries)]
            words += ["--perturb-every", "3", "--cpus-per-worker", "1"]
            words += [word for text in SPACES[self.scheduler] for word in ("--search", text)]
            words += words_of(SETTINGS)
        log = (self.storage / f"{name}{'-resumed' if resume else ''}.log").open("wb")
        return subprocess.Popen(
            [*submission(self.address), "ray_jobs/tune.py", *words],
            env=self.environment,
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )

    def events(self, trial: Path, kind: str) -> list[dict[str, Any]]:
        return [event for event in events_of(trial) if event["event"] == kind]

    def moving(self, name: str, steps: int) -> Path | None:
        """Returns a running trial that has taken at least `steps` steps and is not near its end, or None."""
        for trial in sorted((self.storage / name / "trials").glob("*")):
            taken = self.events(trial, "step")
            if (
                len(taken) >= steps
                and psutil.pid_exists(taken[-1]["pid"])
                and len(self.events(trial, "epoch")) < EPOCHS - 2
            ):
                return trial
        return None

    def done(self, name: str) -> bool:
        """Returns True if a trial, or a population's first round, has ended."""
        folder = self.storage / name
        if self.scheduler == "pbt":
            record = folder / "population.json"
            return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["rounds"] > 0
        return any(len(self.events(trial, "epoch")) == EPOCHS for trial in (folder / "trials").glob("*"))

    def kill_worker(self, name: str) -> tuple[Path, int]:
        """Kills a trial's worker; returns the trial and its last step."""
        trial = wait(lambda: self.moving(name, 4), "a trial that makes progress")
        last = self.events(trial, "step")[-1]
        os.kill(last["pid"], signal.SIGKILL)
        print(f"{name}: killed the worker of {trial.name} at step {last['step']}", flush=True)
        return trial, int(last["step"])

    def kill_driver(self, name: str) -> None:
        kill_driver("ray_jobs/tune.py", name, str(self.storage))
        print(f"{name}: killed the driver", flush=True)

    def trials(self, name: str) -> list[dict[str, Any]]:
        path = self.storage / name / "results" / "trials.json"
        return list(json.loads(path.read_text(encoding="utf-8"))["trials"]) if path.is_file() else []

    def children(self, name: str) -> list[str]:
        """Returns the statuses of the trials' MLflow runs; fails unless the sweep has exactly one parent run."""
        below = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE key = 'mlflow.parentRunId' AND value = ?"
        with sqlite3.connect(f"file:{self.storage / 'mlflow.db'}?mode=ro", uri=True) as database:
            parents = database.execute("SELECT run_uuid FROM runs WHERE name = ?", (name,)).fetchall()
            if len(parents) != 1:
                raise SystemExit(f"error: MLflow has {len(parents)} runs named {name}; there must be exactly one")
            return sorted(status for (status,) in database.execute(below, parents[0]))


def wait(ready: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := ready():
            return value
        time.sleep(0.5)
    raise SystemExit(f"error: waited {PATIENCE:.0f} s for {what}")


def outcome(trials: list[dict[str, Any]], sweep: str) -> list[str]:
    """Returns the trials as comparable strings: settings, status, metrics and schedule, without the sweep's name."""
    kept = ("values", "status", "epochs", "metrics", "curve", "schedule", "error")
    texts = [json.dumps({key: trial[key] for key in kept}, sort_keys=True) for trial in trials]
    return sorted(re.sub(rf"\b{sweep}-", "", text) for text in texts)


def disturbed(bench: Bench) -> dict[str, bool]:
    """Kills a worker and then the driver of the sweep `storm`, and resumes it."""
    job = bench.start("storm")
    trial, step = bench.kill_worker("storm")
    again = wait(lambda: bench.events(trial, "start")[1:], f"the second start of {trial.name}")[0]
    wait(lambda: bench.events(trial, "step")[-1]["step"] > step, "a step after the restart")
    wait(lambda: bench.done("storm"), "a finished trial or round")
    wait(lambda: bench.moving("storm", 1), "another running trial")
    ended = {path for path in trial.parent.glob("*") if len(bench.events(path, "epoch")) == EPOCHS}
    bench.kill_driver("storm")
    job.wait(timeout=PATIENCE)
    starts = {path: len(bench.events(path, "start")) for path in ended}
    code = bench.start("storm", resume=True).wait(timeout=PATIENCE)
    calm, storm = (outcome(bench.trials(name), name) for name in ("calm", "storm"))
    children = bench.children("storm")
    return {
        "the resumed sweep succeeds": code == 0,
        f"the killed trial continues from a checkpoint (killed at step {step}, continued from {again['step']})": (
            again["step"] > 0 and step - 2 <= again["step"] <= step + 1
        ),
        "finished trials are not trained again": all(
            len(bench.events(path, "start")) == n for path, n in starts.items()
        ),
        f"same trials and metrics as the undisturbed sweep ({len(storm)} of {len(calm)})": calm == storm != [],
        f"one child run per trial ({len(children)} of {TRIALS})": (
            len(children) == len(bench.children("calm")) == TRIALS
        ),
        "all child runs are finished": set(children) == {"FINISHED"},
    }


def without_retry(bench: Bench) -> dict[str, bool]:
    """Kills a worker of the sweep `spent`, which allows no retries."""
    job = bench.start("spent", retries=0)
    killed, _ = bench.kill_worker("spent")
    code = job.wait(timeout=PATIENCE)
    others = {trial["name"]: trial for trial in bench.trials("spent")}
    lost = others.pop(killed.name, {"status": "missing", "error": "", "metrics": {}})
    children = bench.children("spent")
    print(f"spent: {killed.name} is recorded as {lost['status']}: {lost['error']}", flush=True)
    return {
        "without a retry the sweep continues": code == 0 and [t["status"] for t in others.values()] == ["finished"] * 3,
        "the lost trial is recorded with its error and no score": (
            lost["status"] == "failed" and "died" in lost["error"] and not lost["metrics"]
        ),
        f"one child run per trial, one of them failed ({len(children)} of {TRIALS})": (
            children == ["FAILED", *["FINISHED"] * 3]
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scheduler", choices=list(SPACES), default="none", help="scheduler of the sweeps (default: none)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep all files there (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, local_cluster() as (address, environment):
        storage = (args.out or Path(temporary)).resolve()
        build_demo(storage / "data", num_train=24, num_val=6, image_size=64, samples_per_shard=6)
        bench = Bench(address, environment | {"OMP_NUM_THREADS": "1"}, storage, args.scheduler)
        begun = time.monotonic()
        if bench.start("calm").wait(timeout=PATIENCE):
            print((storage / "calm.log").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
            raise SystemExit("error: the undisturbed sweep failed")
        print(f"calm: {TRIALS} trials in {time.monotonic() - begun:.0f} s", flush=True)
        claims = disturbed(bench) | without_retry(bench)
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
