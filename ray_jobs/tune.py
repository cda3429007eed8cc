# PYTHON_ARGCOMPLETE_OK
"""Searches settings, or runs one of the paper's ablations.

    ray job submit --working-dir . -- python ray_jobs/tune.py --recipe NAME --data DIR --num-samples 20
    ray job submit --working-dir . -- python ray_jobs/tune.py --recipe NAME --data DIR --ablation fig4 --seeds 0 1

By default lambda_reg, T, d and gamma are searched, and poor trials stopped early. --search adds a setting (KIND is
uniform:LOW:HIGH, loguniform:LOW:HIGH, int:LOW:HIGH or choice:A,B,...) or leaves one out (fixed). --scheduler pbt is
population-based training: lambda_reg and gamma change while the trials train.
Exit status: 0, 1 where no trial could be trained, 2 where something was refused before it began.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray_jobs.arguments import add_storage, data_location, parse
from ray_jobs.exit_codes import exit_code
from slrnet.config import apply_overrides, load_config
from slrnet.recipes import RECIPES, get_recipe
from slrnet.sweeps.ablations import ABLATIONS
from slrnet.sweeps.space import DEFAULT_SPACE, get_space, space_with

if TYPE_CHECKING:
    from slrnet.sweeps.plan import SweepPlan


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--recipe", default="voc_wsss", metavar="NAME", help=f"{', '.join(RECIPES)} (default: voc_wsss)")
    start.add_argument("--config", type=Path, metavar="FILE", help="a configuration file instead of a recipe")
    add("--data", type=data_location, metavar="DIR", help="folder of data_prep's shards, or an s3:// or gs:// location")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one setting of all trials")
    add("--search", action="append", default=[], metavar="SECTION.FIELD=KIND:VALUES", help="see above; repeatable")
    add("--num-samples", type=int, default=20, metavar="N", help="trials (default: 20)")
    add("--metric", default="val/miou", metavar="A,B", help="val/ or pseudo_mask/ miou, mfdr, mfnr (default: val/miou)")
    add("--searcher", choices=["auto", "optuna", "random", "grid"], default="auto", help="default: auto, random for pbt, else optuna")
    add("--scheduler", choices=["asha", "pbt", "none"], default="asha", help="stop poor trials (default), or take over")
    add("--grace-epochs", type=int, metavar="N", help="epochs before that (default: pretraining + 1)")
    add("--perturb-every", type=int, default=1, metavar="N", help="epochs between take-overs of pbt (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the searcher (default: 0)")
    add("--ablation", choices=list(ABLATIONS), default="", help="a figure or table of the paper instead of a search")
    add("--variants", nargs="+", default=[], metavar="LABEL", help="some of an ablation's variants (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="of an ablation's trials (default: 0 1)")
    add("--num-workers", type=int, default=1, metavar="N", help="training processes of each trial (default: 1)")
    add("--cpus-per-worker", type=int, metavar="N", help="CPU cores each (default: an equal share)")
    add("--max-concurrent", type=int, metavar="N", help="trials at a time (default: as many as fit)")
    add("--max-failures", type=int, default=1, metavar="N", help="restarts of a failed trial (default: 1)")
    name = parser.add_mutually_exclusive_group()
    name.add_argument("--name", metavar="NAME", help="unique name of the sweep (default: recipe and time)")
    name.add_argument("--resume", metavar="NAME", help="go on with the sweep of that name")
    add_storage(parser)
    add("--dry-run", action="store_true", help="time a step here, say what the sweep would take, and stop")
    add("--price-per-hour", type=float, metavar="X", help="of a worker, in any currency, for --dry-run")
    return parse(parser)


def build_plan(args: argparse.Namespace) -> SweepPlan:
    config = load_config(args.config) if args.config else get_recipe(args.recipe)
    data = [f"data.path={args.data}"] if args.data else []
    tracking = [f"tracking.uri={args.tracking_uri}"] if args.tracking_uri else []
    config = apply_overrides(config, [*data, *tracking, *args.set])
    from slrnet.sweeps.plan import SweepOptions, may_change, plan_sweep

    base = get_space(config.recipe) if config.recipe in RECIPES else DEFAULT_SPACE
    space = space_with([domain for domain in base if args.scheduler != "pbt" or may_change(domain.key)], args.search)
    named = {name: value for name, value in vars(args).items() if name in SweepOptions.__dataclass_fields__}
    named["name"] = args.name or f"{args.ablation or 'sweep'}-{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    options = SweepOptions(metrics=tuple(args.metric.split(",")), **named)
    return plan_sweep(config, options, space=space, ablation=args.ablation, seeds=args.seeds, variants=args.variants)


def tune(args: argparse.Namespace) -> None:
    from slrnet.sweeps.plan import describe, estimate, resume_plan
    from slrnet.sweeps.run import run_sweep

    plan = resume_plan(args.storage, args.resume) if args.resume else build_plan(args)
    print(describe(plan), flush=True)
    if args.dry_run:
        print(estimate(plan, price_per_hour=args.price_per_hour))
        return
    result = run_sweep(plan, resume=bool(args.resume))
    print(f"\n{result.table}\nbest: {result.best.name}; tables and pictures: {plan.folder / 'results'}")
    if result.best_config is not None:
        print(f"train with it: python ray_jobs/train.py --config {result.best_config}")
    print(f"curves: {result.run.how_to_open()}")


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(exit_code(lambda: tune(arguments)))
