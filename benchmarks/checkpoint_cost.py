"""Measures the time that checkpoints cost: `python benchmarks/checkpoint_cost.py [--recipe voc_wsss_lite]`.

Alternates between optimizer steps after a checkpoint and the same number of steps without one. The training thread
copies the checkpoint and a background thread writes it during the steps, so the difference is its full cost. Claim: at
the default interval (`train.checkpoint_minutes`), checkpoints take at most 1 % of the time. A checkpoint costs the same
for any image size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from slrnet.config import Config, apply_overrides  # noqa: E402
from slrnet.data.manifest import load_dataset  # noqa: E402
from slrnet.distributed.process import Process  # noqa: E402
from slrnet.recipes import RECIPES, get_recipe  # noqa: E402
from slrnet.training.trainer import Trainer  # noqa: E402

GOAL = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="voc_wsss_lite", help="default: voc_wsss_lite")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a setting; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements with and without a checkpoint (default: 7)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per measurement (default: 4)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        trainer = _trainer(options, Path(temporary))
        extra, step = _measure(trainer, options.rounds, options.steps)
        size = sum(file.stat().st_size for file in next((Path(temporary) / "run").rglob("checkpoint-*")).iterdir())
    minutes = Config().train.checkpoint_minutes
    cost = statistics.median(extra)
    share = cost / (60 * minutes + cost)
    print(f"{options.recipe}: a step takes {step:.3f} s (median), a checkpoint has {size / 2**20:.1f} MiB")
    print(f"a checkpoint costs {cost:.3f} s (median; {min(extra):.3f} to {max(extra):.3f})")
    print(
        f"{'holds' if share <= GOAL else 'FAILS'}: {100 * share:.2f} % of the time, every {minutes:g} minutes (<= 1 %)"
    )
    sys.exit(share > GOAL)


def _trainer(options: argparse.Namespace, folder: Path) -> Trainer:
    from data_prep.demo import build_demo

    build_demo(folder / "data", num_train=64, num_val=4, image_size=160, samples_per_shard=8)
    small = ["model.encoder_weights=none", "data.crop_size=128", "data.workers=0", "train.batch_size=4"]
    config = apply_overrides(get_recipe(options.recipe), [*small, f"data.path={folder / 'data'}", *options.set])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = Process(device=device)
    return Trainer(config, load_dataset(folder / "data"), process=process, folder=folder / "run")


def _measure(trainer: Trainer, rounds: int, steps: int) -> tuple[list[float], float]:
    """Returns the extra seconds of each checkpoint and the median seconds of a step without one."""
    trainer.wrapped.train()
    batch = next(iter(trainer.loader.epoch(0)))
    for _ in range(2):
        trainer._step(batch, 0, pretraining=False)  # warms up; from the second step on momentum exists
    extra, plain = [], []
    for number in range(rounds):
        seconds = {}
        for saves in (False, True) if number % 2 else (True, False):
            begun = time.perf_counter()
            if saves:
                trainer.state = replace(trainer.state, step=number + 1, unfinished={"loss": 1.0})
                trainer._save()
            for step in range(steps):
                trainer._step(batch, step, pretraining=False)
            if saves:
                trainer.writer.wait()  # include the rest of the write if the steps were too short to hide it
            if trainer.process.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[saves] = time.perf_counter() - begun
        extra.append(seconds[True] - seconds[False])
        plain.append(seconds[False] / steps)
    trainer.writer.close()
    trainer.loader.close()
    return extra, statistics.median(plain)


if __name__ == "__main__":
    main()
