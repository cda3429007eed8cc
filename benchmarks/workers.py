"""Compares two workers with one, and measures how long they wait for data: `python benchmarks/workers.py`.

Trains `voc_wsss_lite` at crop 192 with a decoder of 256 channels on generated 500x375 images, with workers of
one thread each (gloo). The sides alternate in rounds. Speeds are those that the trainer logs for an epoch with pseudo
labels. Claims: two workers with 8 images each are at least 1.85 times as fast as one worker with 8 (ratio of the median
images/s), and wait for data at most 2 % of the time. Each side, including its data readers, is pinned to as many cores
as it has workers. Also shown: two workers that share a batch of 8. Their steps do half the work, but the fixed costs
per step are the same: weight conversion, gradient exchange and the optimizer.
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
SIDES = {"one worker": (1, 8), "two workers": (2, 16), "two workers, a shared batch": (2, 8)}
"""Number of workers and global batch size."""
SETTINGS = (
    "data.crop_size=192", "model.decoder_dim=256", "model.encoder_weights=none", "train.pretrain_epochs=0",
    "train.checkpoint_every=0", "calibration.masks=decoder",
    "evaluation.every=1000", "evaluation.pseudo_mask_images=1", "evaluation.panel_images=0",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of all sides (default: 3)")
    parser.add_argument("--epochs", type=int, default=3, help=f"epochs of {IMAGES} images per round (default: 3)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="precision of the training (default: auto)",
    )
    parser.add_argument("--side", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _train(options.side, options)
        return 0
    return _compare(options)


def _compare(options: argparse.Namespace) -> int:
    from benchmarks.loader import SIZE, write_shards

    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="workers-") as temporary:
        write_shards(Path(temporary), IMAGES, SIZE)
        for number in range(options.rounds):
            for side in list(SIDES) if number % 2 else reversed(SIDES):
                seen = _measure(side, Path(temporary) / f"{number}-{'-'.join(map(str, SIDES[side]))}", options)
                found[side] += seen
                print(f"{side}: {_median(seen, 'images_per_second'):.2f} images/s", flush=True)
    speeds = {side: _median(seen, "images_per_second") for side, seen in found.items()}
    waits = {side: _median(seen, "data_wait_fraction") for side, seen in found.items()}
    for side, speed in speeds.items():
        every = [epoch["speed/images_per_second"] for epoch in found[side]]
        print(f"{side}: {speed:.2f} images/s ({min(every):.2f} to {max(every):.2f}), waiting {waits[side]:.2%}")
    one, two, shared = SIDES
    ratio = speeds[two] / speeds[one]
    print(f"two workers over one: {ratio:.2f} (claimed: at least {CLAIMED_RATIO})")
    print(f"two workers that share a batch over one: {speeds[shared] / speeds[one]:.2f}")
    print(f"two workers wait for data {waits[two]:.2%} of the time (claimed: at most {CLAIMED_WAIT:.0%})")
    return 0 if ratio >= CLAIMED_RATIO and waits[two] <= CLAIMED_WAIT else 1


def _measure(side: str, folder: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Runs one side and returns what the trainer logs for each epoch."""
    workers, batch = SIDES[side]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += [str(Path(__file__).resolve()), "--side", str(folder), "--batch", str(batch)]
    command += ["--epochs", str(options.epochs), "--precision", options.precision]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:workers])  # child processes inherit this
    try:
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    finally:
        os.sched_setaffinity(0, cores)
    if ended.returncode:
        raise SystemExit(f"error: {side} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    seen: list[dict[str, float]] = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    return seen


def _median(seen: list[dict[str, float]], name: str) -> float:
    return statistics.median(epoch[f"speed/{name}"] for epoch in seen)


def _train(folder: Path, options: argparse.Namespace) -> None:
    """Trains in one worker process and writes the logged speeds."""
    import torch
    import torch.distributed as dist

    from slrnet.config import apply_overrides
    from slrnet.data.manifest import load_dataset
    from slrnet.distributed.process import configure_process, current_process
    from slrnet.recipes import voc_wsss_lite
    from slrnet.training.trainer import Trainer

    dist.init_process_group("gloo")
    configure_process(1)
    process, data = current_process(torch.device("cpu")), folder.parent / "shards"
    settings = [f"train.epochs={options.epochs + 1}", f"train.batch_size={options.batch}", f"data.path={data}"]
    settings.append(f"train.precision={options.precision}")
    config = apply_overrides(voc_wsss_lite(), [*SETTINGS, *settings])
    seen: list[dict[str, float]] = []

    def note(metrics: Mapping[str, float]) -> None:
        seen.append({name: value for name, value in metrics.items() if name.startswith("speed/")})

    trainer = Trainer(config, load_dataset(data), process=process, folder=folder)
    trainer.fit(report=note, until=options.epochs)  # stops before the last epoch, which also runs an evaluation
    if process.is_main:
        (folder / "seen.json").write_text(json.dumps(seen[1:]), encoding="utf-8")  # the first epoch warms up
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
