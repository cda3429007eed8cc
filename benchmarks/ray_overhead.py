"""What Ray costs, two workers of Ray Train against the same loop under torchrun: `python benchmarks/ray_overhead.py`.

Both train the same network on the embedded data with two processes of one thread (gloo), side after side in turn, on a
private Ray cluster and without one. An epoch counts from one report to the next, the first one not at all. Claimed: the
images per second through Ray are at least 0.98 of those under torchrun (ratio of the medians over all epochs). Ray's
own processes take about a seventh of a core: on a machine that has no more cores than workers, they take it from these.
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
from collections.abc import Mapping
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
IMAGES = 512
"""Of an epoch: the workers report once in each, and wait for each other."""
SETTINGS = (
    *NETWORK, "model.decoder_dim=32", "data.crop_size=128", "train.pretrain_epochs=1", "train.checkpoint_every=0",
    "train.precision=fp32",
    "evaluation.every=1000", "evaluation.pseudo_mask_images=2", "evaluation.panel_images=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of both sides (default: 3)")
    parser.add_argument("--epochs", type=int, default=5, help="of 64 steps each, in each round (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    parser.add_argument("--side", choices=("ray", "torchrun"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "ray":
        _through_ray(options.folder, options.epochs, options.workers)
    elif options.side == "torchrun":
        _under_torchrun(options.folder, options.epochs)
    else:
        sys.exit(_compare(options.rounds, options.epochs, options.workers))


def _compare(rounds: int, epochs: int, workers: int) -> int:
    from data_prep.demo import build_demo

    found: dict[str, list[list[float]]] = {"ray": [], "torchrun": []}
    with tempfile.TemporaryDirectory() as temporary, local_cluster("--num-cpus=2") as (address, environment):
        build_demo(Path(temporary) / "data", num_train=IMAGES, num_val=4, image_size=160, samples_per_shard=8)
        submit = submission(address)
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        for number in range(rounds):
            for side in ("ray", "torchrun") if number % 2 else ("torchrun", "ray"):
                folder = Path(temporary) / f"{side}-{number}"
                start = submit if side == "ray" else run
                command = [*start, str(Path(__file__).resolve()), "--side", side]
                command += ["--folder", str(folder), "--epochs", str(epochs), "--workers", str(workers)]
                ended = subprocess.run(
                    command, env=environment | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True
                )
                if ended.returncode:
                    raise SystemExit(f"{side} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
                seen = json.loads((folder / "speeds.json").read_text(encoding="utf-8"))
                found[side].append(seen["speeds"])
                speed = statistics.median(seen["speeds"])
                print(
                    f"{side}: {speed:.2f} images/s, {seen['reporting']:.3f} s for a report, "
                    f"rank 0 busy for {seen['busy']:.1f} s",
                    flush=True,
                )
    return _report(found)


def _report(found: Mapping[str, list[list[float]]]) -> int:
    medians = {side: statistics.median(chain(*rounds)) for side, rounds in found.items()}
    ratio = medians["ray"] / medians["torchrun"]
    pairs = [
        statistics.median(ours) / statistics.median(theirs)
        for ours, theirs in zip(found["ray"], found["torchrun"], strict=True)
    ]
    print(f"images/s (median): Ray {medians['ray']:.2f}, torchrun {medians['torchrun']:.2f}")
    print(
        f"{'holds' if ratio >= GOAL else 'FAILS'}: ratio {ratio:.3f} (>= {GOAL}); of the rounds {min(pairs):.3f} to "
        f"{max(pairs):.3f}"
    )
    return int(ratio < GOAL)


def _config(folder: Path, epochs: int) -> Config:
    return apply_overrides(demo(), [*SETTINGS, f"train.epochs={epochs}", f"data.path={folder.parent / 'data'}"])


def train(values: dict[str, Any], ranks: Any, report: Any) -> None:
    """The loop of both sides."""
    from slrnet.config import config_from_dict
    from slrnet.data.manifest import load_dataset
    from slrnet.training.tracking import NullTracker
    from slrnet.training.trainer import Trainer

    config, folder = config_from_dict(values["config"]), Path(values["folder"])
    times: list[float] = []
    spent: list[float] = []

    def note(metrics: Mapping[str, float]) -> None:
        begun = time.perf_counter()
        report(metrics)
        times.append(time.perf_counter())
        spent.append(times[-1] - begun)

    begun = time.process_time()
    shards = load_dataset(config.data.path)
    trainer = Trainer(config, shards, ranks=ranks, folder=folder, tracker=NullTracker())
    trainer.fit(report=note)
    if ranks.is_main:
        speeds = [IMAGES / (end - begin) for begin, end in pairwise(times[:-1])]  # the last one is measured too
        found = {"speeds": speeds, "reporting": statistics.median(spent), "busy": time.process_time() - begun}
        (folder / "speeds.json").write_text(json.dumps(found), encoding="utf-8")


def _through_ray(folder: Path, epochs: int, workers: int) -> None:
    from slrnet.training.ray_loop import LaunchOptions, run_job

    values = {"config": _config(folder, epochs).model_dump(mode="json"), "folder": str(folder)}
    run_job(
        train, values, LaunchOptions(name=folder.name, storage=folder.parent, num_workers=workers, cpus_per_worker=1)
    )


def _under_torchrun(folder: Path, epochs: int) -> None:
    import torch
    import torch.distributed as dist

    from slrnet.training.distributed import current_ranks, tune_process
    from slrnet.training.ray_loop import Report

    dist.init_process_group("gloo")
    tune_process(int(os.environ["OMP_NUM_THREADS"]))
    values = {"config": _config(folder, epochs).model_dump(mode="json"), "folder": str(folder)}
    train(values, current_ranks(torch.device("cpu")), Report())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
