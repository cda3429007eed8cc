"""Two workers against one, and how long they wait for data: `python benchmarks/workers.py`.

The recipe `voc_wsss_lite` at crop 192, with the same global batch of 8 for one and for two workers of one thread each
(gloo), round after round in turn, on generated photographs of 500x375 pixels. Speeds are those that the trainer logs
for an epoch with pseudo labels. Claimed: two workers are at least 1.85 times as fast as one (ratio of the medians), and
wait for data at most 2 % of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CLAIMED_RATIO, CLAIMED_WAIT = 1.85, 0.02
IMAGES = 64
SETTINGS = (
    "data.crop_size=192", "model.encoder_weights=none", "train.pretrain_epochs=0", "train.checkpoint_every=0",
    "evaluation.every=1000", "evaluation.pseudo_mask_images=1", "evaluation.panel_images=0",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of both sides (default: 3)")
    parser.add_argument("--epochs", type=int, default=3, help=f"of {IMAGES} images, in each round (default: 3)")
    parser.add_argument("--side", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _train(options.side, options.epochs)
        return 0
    return _compare(options.rounds, options.epochs)


def _compare(rounds: int, epochs: int) -> int:
    from benchmarks.loader import write_shards

    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="workers-") as temporary:
        write_shards(Path(temporary), IMAGES)
        for number in range(rounds):
            for workers in (1, 2) if number % 2 else (2, 1):
                folder = Path(temporary) / f"{number}-{workers}"
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
                command += [str(Path(__file__).resolve()), "--side", str(folder), "--epochs", str(epochs)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
                if ended.returncode:
                    raise SystemExit(
                        f"error: {workers} worker(s) ended with {ended.returncode}:\n{ended.stderr[-3000:]}"
                    )
                found[workers] += json.loads((folder / "seen.json").read_text(encoding="utf-8"))
                last = statistics.median(one["speed/images_per_second"] for one in found[workers][-epochs + 1 :])
                print(f"{workers} worker(s): {last:.2f} images/s", flush=True)
    speeds = {n: statistics.median(one["speed/images_per_second"] for one in seen) for n, seen in found.items()}
    waits = {n: statistics.median(one["speed/data_wait_fraction"] for one in seen) for n, seen in found.items()}
    for n, speed in speeds.items():
        every = [one["speed/images_per_second"] for one in found[n]]
        print(f"{n} worker(s): {speed:.2f} images/s ({min(every):.2f} to {max(every):.2f}), waiting {waits[n]:.2%}")
    ratio = speeds[2] / speeds[1]
    print(f"two workers over one: {ratio:.2f} (claimed: at least {CLAIMED_RATIO})")
    print(f"two workers wait for data {waits[2]:.2%} of the time (claimed: at most {CLAIMED_WAIT:.0%})")
    return 0 if ratio >= CLAIMED_RATIO and waits[2] <= CLAIMED_WAIT else 1


def _train(folder: Path, epochs: int) -> None:
    """What each process does."""
    import torch
    import torch.distributed as dist

    from slrnet.config import apply_overrides
    from slrnet.data.manifest import load_dataset
    from slrnet.recipes import voc_wsss_lite
    from slrnet.training.distributed import current_ranks, tune_process
    from slrnet.training.tracking import NullTracker
    from slrnet.training.trainer import Trainer

    dist.init_process_group("gloo")
    tune_process(1)
    ranks, data = current_ranks(torch.device("cpu")), folder.parent / "shards"
    config = apply_overrides(voc_wsss_lite(), [*SETTINGS, f"train.epochs={epochs + 1}", f"data.path={data}"])
    seen: list[dict[str, float]] = []

    def note(metrics: Mapping[str, float]) -> None:
        seen.append({name: value for name, value in metrics.items() if name.startswith("speed/")})

    trainer = Trainer(config, load_dataset(data), ranks=ranks, folder=folder, tracker=NullTracker())
    trainer.fit(report=note, until=epochs)  # not to the end, which would be measured too
    if ranks.is_main:
        (folder / "seen.json").write_text(json.dumps(seen[1:]), encoding="utf-8")  # the first epoch warms up
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
