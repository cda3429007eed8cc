"""Measures Ray's overhead: two workers under Ray Train against the same loop under torchrun.

    python benchmarks/ray_overhead.py

Both sides alternate and train the same network on the embedded data with two processes of one thread each (gloo): one
on a private Ray cluster, one without Ray. An epoch lasts from one report to the next; the first epoch is excluded.
Claim for `a core to spare`, where the training processes of both sides use all cores but one: the images/s under Ray
are at least 0.98 of those under torchrun (ratio of the medians over all epochs). `every core` is shown without a claim:
Ray's own processes need a sixth of a core, and on a machine without spare cores they take it from the workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._cluster import NETWORK, submission  # noqa: E402
from ray_jobs.demo import local_cluster  # noqa: E402
from slrnet.config import Config, apply_overrides  # noqa: E402
from slrnet.recipes import demo  # noqa: E402

GOAL = 0.98
SIDES = ("ray", "torchrun")
IMAGES = 256
"""Images per epoch; the workers synchronize and report once per epoch."""
SETTINGS = (
    *NETWORK, "model.decoder_dim=32", "data.crop_size=128", "train.pretrain_epochs=1", "train.checkpoint_every=0",
    "train.precision=fp32",
    "evaluation.every=1000", "evaluation.pseudo_mask_images=2", "evaluation.panel_images=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of both sides (default: 3)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of 32 steps per round (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded training processes (default: 2)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        sys.exit(_compare(options.rounds, options.epochs, options.workers))
    values = {
        "config": _config(options.folder, options.epochs).model_dump(mode="json"),
        "folder": str(options.folder),
        "cores": options.cores,
    }
    if options.side == "ray":
        _through_ray(values, options.workers)
    else:
        _under_torchrun(values)


def _compare(rounds: int, epochs: int, workers: int) -> int:
    from data_prep.demo import build_demo

    all_cores = len(os.sched_getaffinity(0))
    if all_cores < 2:
        raise SystemExit("error: this process may use only one core; it needs two, one of them for Ray's own processes")
    forms = {"a core to spare": all_cores - 1, "every core": all_cores}
    speeds: dict[str, dict[str, list[list[float]]]] = {form: {side: [] for side in SIDES} for form in forms}
    with tempfile.TemporaryDirectory() as temporary:
        build_demo(Path(temporary) / "data", num_train=IMAGES, num_val=4, image_size=160, samples_per_shard=8)
        for number in range(rounds):
            for side in SIDES if number % 2 else reversed(SIDES):
                with _start_of(side, workers) as (start, environment):
                    for form, cores in forms.items():
                        folder = Path(temporary) / f"{side}-{number}-{cores}"
                        command = [*start, str(Path(__file__).resolve()), "--side", side, "--folder", str(folder)]
                        command += ["--epochs", str(epochs), "--workers", str(workers), "--cores", str(cores)]
                        speeds[form][side].append(_speeds(command, environment, folder, f"{side}, {form}"))
    return _report(speeds)


@contextmanager
def _start_of(side: str, workers: int) -> Iterator[tuple[list[str], Mapping[str, str]]]:
    """Yields the command prefix and its environment; for Ray, also runs a cluster meanwhile."""
    if side == "ray":
        with local_cluster("--num-cpus=2") as (address, environment):
            yield submission(address), environment
    else:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        yield run, os.environ


def _speeds(command: list[str], environment: Mapping[str, str], folder: Path, what: str) -> list[float]:
    """Returns the images per second of each epoch of one run."""
    ended = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    if ended.returncode:
        raise SystemExit(f"{what} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    seen = json.loads((folder / "speeds.json").read_text(encoding="utf-8"))
    print(
        f"{what}: {statistics.median(seen['speeds']):.2f} images/s, {seen['reporting']:.3f} s per report, "
        f"rank 0 used {seen['busy']:.1f} s of CPU time",
        flush=True,
    )
    speeds: list[float] = seen["speeds"]
    return speeds


def _report(speeds: Mapping[str, Mapping[str, list[list[float]]]]) -> int:
    failed = False
    for form, sides in speeds.items():
        ours, theirs = (statistics.median(chain(*sides[side])) for side in SIDES)
        ratio = ours / theirs
        pairs = [
            statistics.median(a) / statistics.median(b) for a, b in zip(*(sides[side] for side in SIDES), strict=True)
        ]
        claimed = form == "a core to spare"
        failed |= claimed and ratio < GOAL
        said = f"{'holds' if ratio >= GOAL else 'FAILS'} (>= {GOAL})" if claimed else "no claim"
        print(
            f"{form}: Ray {ours:.2f}, torchrun {theirs:.2f} images/s (medians); ratio {ratio:.3f}, per round "
            f"{min(pairs):.3f} to {max(pairs):.3f}: {said}"
        )
    return int(failed)


def _config(folder: Path, epochs: int) -> Config:
    return apply_overrides(demo(), [*SETTINGS, f"train.epochs={epochs}", f"data.path={folder.parent / 'data'}"])


def train(values: dict[str, Any], process: Any, report: Any) -> None:
    """Runs the training loop of both sides."""
    from slrnet.config import config_from_dict
    from slrnet.data.manifest import load_dataset
    from slrnet.training.trainer import Trainer

    config, folder = config_from_dict(values["config"]), Path(values["folder"])
    _keep_to(values["cores"])
    times: list[float] = []
    spent: list[float] = []

    def note(metrics: Mapping[str, float]) -> None:
        begun = time.perf_counter()
        report(metrics)
        times.append(time.perf_counter())
        spent.append(times[-1] - begun)

    begun = time.process_time()
    shards = load_dataset(config.data.path)
    trainer = Trainer(config, shards, process=process, folder=folder)
    trainer.fit(report=note)
    if process.is_main:
        times = times[:-1]  # the last epoch also runs an evaluation
        speeds = [IMAGES / (end - begin) for begin, end in pairwise(times)]
        record = {"speeds": speeds, "reporting": statistics.median(spent), "busy": time.process_time() - begun}
        (folder / "speeds.json").write_text(json.dumps(record), encoding="utf-8")


def _keep_to(cores: int) -> None:
    """Pins all threads of this process, including Ray's, to the machine's last `cores` cores."""
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), chosen)


def _through_ray(values: dict[str, Any], workers: int) -> None:
    from slrnet.launch.cluster import WorkerRequest
    from slrnet.launch.train import run_job

    plan = WorkerRequest(num_workers=workers, cpus_per_worker=1).plan()
    run_job(train, values | {"cpus": plan.cpus}, folder=Path(values["folder"]), workers=plan)


def _under_torchrun(values: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    from slrnet.distributed.process import configure_process, current_process
    from slrnet.launch.rank import Report

    dist.init_process_group("gloo")
    configure_process(int(os.environ["OMP_NUM_THREADS"]))
    train(values, current_process(torch.device("cpu")), Report())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
