# PYTHON_ARGCOMPLETE_OK
"""Measures a checkpoint: `python ray_jobs/evaluate.py --checkpoint RUN --data DIR --split val --protocol ss`.

`ss` is one scale; `ms` the mean over five scales and their mirror images; `ms_crf` adds a dense CRF (the extra `crf`).
Gating by class scores or by the true image labels, and the power of the background's probability, are off unless asked
for; they become part of the protocol's name.
Exit status: 0, 1 where a worker failed, 2 where something was refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ray_jobs.exit_codes import exit_code  # noqa: E402
from slrnet.checkpoints.run_store import run_argument  # noqa: E402
from slrnet.completion import parse  # noqa: E402
from slrnet.config import GATINGS, PROTOCOLS, apply_overrides  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=run_argument,
        required=True,
        metavar="RUN",
        help="checkpoint, or a run's folder for its best",
    )
    add("--data", metavar="DIR", help="folder with shards (default: what the checkpoint was trained on)")
    add("--split", default="val", metavar="NAME", help="split to measure (default: val)")
    add("--protocol", choices=PROTOCOLS, default="ss", help="default: ss")
    add("--gating", choices=GATINGS, help="classes that may be predicted (default: all, or as trained)")
    add("--set", action="append", default=[], metavar="evaluation.FIELD=VALUE", help="other settings; repeatable")
    add("--num-workers", type=int, default=0, metavar="N", help="Ray workers; 0 (default): in this process")
    add("--cpus-per-worker", type=int, metavar="N", help="CPU cores each (default: an equal share)")
    add("--out", type=Path, metavar="DIR", help="folder for evaluation.json (default: beside the checkpoint)")
    return parse(parser, arguments)


def evaluate(options: argparse.Namespace) -> None:
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.data.manifest import load_dataset
    from slrnet.launch.evaluation import launch_evaluation
    from slrnet.launch.train import LaunchOptions
    from slrnet.tracking.summary import quality_table

    checkpoint = load_checkpoint(options.checkpoint.expanduser())
    changes = [f"evaluation.protocol={options.protocol}"]
    changes += [f"evaluation.gating={options.gating}"] if options.gating else []
    config = apply_overrides(checkpoint.config, [*changes, *options.set])
    out = (options.out or checkpoint.path.parent.parent / "evaluations").expanduser().resolve()
    run = LaunchOptions(
        name=f"{checkpoint.path.name}-{options.split}-{time.strftime('%Y%m%d-%H%M%S')}",
        storage=out,
        num_workers=options.num_workers,
        cpus_per_worker=options.cpus_per_worker,
    )
    shards = load_dataset(options.data or config.data.path)
    result = launch_evaluation(checkpoint, shards, split=options.split, config=config, options=run)
    print(quality_table(result["metrics"], tuple(result["classes"])))
    for protocol, metrics in result["before_crf"].items():
        print(f"before the CRF ({protocol}): mIoU {100 * metrics['val/miou']:.1f} %")
    print(
        f"protocol {result['protocol']}, {result['images']} images of split "
        f"{result['split']}, checkpoint {result['checkpoint']} (epoch {result['epoch']}); "
        f"written to {out / run.name / 'evaluation.json'}"
    )
    print(f"MLflow: {result['mlflow'] or 'the store of the training could not be reached, or has not its run'}")


def main() -> int:
    options = parse_arguments()
    return exit_code(lambda: evaluate(options))


if __name__ == "__main__":
    sys.exit(main())
