"""Trains one run: `ray job submit --working-dir . -- python ray_jobs/train.py --recipe NAME --data DIR`.

Without --recipe and --data it trains the embedded demo, building its shards first if they are missing.
Exit status: 0, 1 where the training failed, 2 where something was refused before it began.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ray_jobs.exit_codes import exit_code  # noqa: E402
from slrnet.config import Config, apply_overrides, load_config  # noqa: E402
from slrnet.recipes import RECIPES, get_recipe  # noqa: E402


def folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no folder; mount the storage on all nodes and give its path")
    return Path(text).expanduser().resolve()


def parse_arguments(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--recipe", metavar="NAME", help=f"named configuration (default: demo): {', '.join(RECIPES)}")
    start.add_argument("--config", type=Path, metavar="FILE", help="configuration, such as another run's config.json")
    parser.add_argument("--data", metavar="DIR", help="folder with shards from data_prep/ (default: the embedded demo)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one setting")
    add = parser.add_argument
    add("--num-workers", type=int, metavar="N", help="training processes (default: one per GPU, else 1); 0: no Ray")
    add("--cpus-per-worker", type=int, metavar="N", help="CPU cores each (default: an equal share)")
    add("--max-failures", type=int, default=0, metavar="N", help="restarts of failed workers (default: 0)")
    name = parser.add_mutually_exclusive_group()
    name.add_argument("--name", metavar="NAME", help="unique name of the run (default: recipe and time)")
    name.add_argument("--resume", metavar="NAME", help="continue the run of that name from its last checkpoint")
    where = os.environ.get("SLRNET_STORAGE", "~/slrnet_runs")
    told = "folder for runs, seen by all nodes (default: $SLRNET_STORAGE, else ~/slrnet_runs)"
    add("--storage", type=folder, default=where, metavar="DIR", help=told)
    add("--tracking-uri", metavar="URI", help="MLflow (default: $MLFLOW_TRACKING_URI, else SQLite in --storage)")
    return parser.parse_args()


def build_config(options: argparse.Namespace, storage: Path, recipe: str) -> Config:
    from slrnet.training.ray_loop import resume_config

    if options.resume and not (options.recipe or options.config):
        config = resume_config(storage, options.resume)
    else:
        config = load_config(options.config) if options.config else get_recipe(options.recipe or recipe)
    data = options.data or config.data.path or demo_data(storage)
    tracking = [f"tracking.uri={options.tracking_uri}"] if options.tracking_uri else []
    return apply_overrides(config, [f"data.path={Path(data).expanduser().resolve()}", *options.set, *tracking])


def demo_data(storage: Path) -> str:
    from data_prep.demo import build_demo

    hint = "Real data: ray_jobs/train.py --recipe voc_wsss --data SHARDS, with shards from data_prep/voc.py."
    print(f"No --data given: training on the embedded, synthetic demo data. {hint}", flush=True)
    if not (storage / "demo_data").exists():
        build_demo(storage / "demo_data")
    return str(storage / "demo_data")


def train(options: argparse.Namespace, recipe: str, check: Callable[[Config], None]) -> None:
    check(config := build_config(options, options.storage, recipe))  # before PyTorch and Ray, which take seconds
    from slrnet.training.ray_loop import LaunchOptions, launch
    from slrnet.training.summary import quality_table

    run = LaunchOptions(
        name=options.resume or options.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
        storage=options.storage,
        resume=bool(options.resume),
        num_workers=options.num_workers,
        cpus_per_worker=options.cpus_per_worker,
        max_failures=options.max_failures,
    )
    result = launch(config, run)
    print(f"\nbest checkpoint, epoch {result.state.epoch}: {result.best}")
    print(quality_table(result.state.metrics, result.state.classes))
    print(f"curves and pictures: {result.run.how_to_open()}")


def main(about: str | None, recipe: str, check: Callable[[Config], None]) -> int:
    options = parse_arguments(about)
    return exit_code(lambda: train(options, recipe, check))


if __name__ == "__main__":
    sys.exit(main(__doc__, "demo", lambda config: None))
