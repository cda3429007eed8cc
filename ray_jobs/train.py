# PYTHON_ARGCOMPLETE_OK
"""Trains one run: `ray job submit --working-dir . -- python ray_jobs/train.py --recipe NAME --data DIR`.

Without --recipe and --data it trains the embedded demo, building its shards first if they are missing.
Exit status: 0, 1 where the training failed, 2 where something was refused before it began.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ray_jobs.arguments import add_storage, add_workers, data_location, places_of  # noqa: E402
from ray_jobs.exit_codes import exit_code  # noqa: E402
from slrnet.completion import parse  # noqa: E402
from slrnet.config import Config, apply_overrides, load_config  # noqa: E402
from slrnet.recipes import RECIPES, get_recipe  # noqa: E402


def parse_arguments(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--recipe", metavar="NAME", help=f"named configuration (default: demo): {', '.join(RECIPES)}")
    start.add_argument("--config", type=Path, metavar="FILE", help="configuration, such as another run's config.json")
    data = "folder with shards from data_prep/, or its s3:// or gs:// location (default: the embedded demo data)"
    parser.add_argument("--data", metavar="DIR", help=data)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one setting")
    add_workers(parser)
    name = parser.add_mutually_exclusive_group()
    name.add_argument("--name", metavar="NAME", help="unique name of the run (default: recipe and time)")
    name.add_argument("--resume", metavar="NAME", help="continue the run of that name from its last checkpoint")
    add_storage(parser, remote=True)
    return parse(parser)


def build_config(options: argparse.Namespace, storage: Path, remote: str, recipe: str) -> Config:
    from slrnet.launch.checks import resume_config

    if options.resume and not (options.recipe or options.config):
        config = resume_config(storage, options.resume, remote=remote)
    else:
        config = load_config(options.config) if options.config else get_recipe(options.recipe or recipe)
    data = options.data or config.data.path or demo_data(storage)
    tracking = [f"tracking.uri={options.tracking_uri}"] if options.tracking_uri else []
    return apply_overrides(config, [f"data.path={data_location(data)}", *options.set, *tracking])


def demo_data(storage: Path) -> str:
    from data_prep.demo import build_demo

    hint = "Real data: ray_jobs/train.py --recipe voc_wsss --data SHARDS, with shards from data_prep/voc.py."
    print(f"No --data given: training on the embedded, synthetic demo data. {hint}", flush=True)
    if not (storage / "demo_data").exists():
        build_demo(storage / "demo_data")
    return str(storage / "demo_data")


def train(options: argparse.Namespace, recipe: str, check: Callable[[Config], None]) -> None:
    storage, remote = places_of(options.storage)
    check(config := build_config(options, storage, remote, recipe))  # before PyTorch and Ray, which take seconds
    from slrnet.launch.train import LaunchOptions, launch
    from slrnet.tracking.summary import quality_table

    run = LaunchOptions(
        name=options.resume or options.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
        storage=storage,
        remote=remote,
        resume=bool(options.resume),
        num_workers=options.num_workers,
        cpus_per_worker=options.cpus_per_worker,
        cpu_only=options.cpu_only,
        wait_minutes=options.wait_for_nodes,
        max_failures=options.max_failures,
        hang_limit=options.hang_limit,
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
