"""Commands that train and measure: `slrnet train`, `tune`, `evaluate`, `pseudo-label`, `distill`, `profile`, `demo`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from slrnet.cli.arguments import (
    ANNOTATION_FORMATS,
    SKIP_DAMAGED,
    TOLERANCE,
    Argument,
    Run,
    add_protocol,
    annotation_folder,
    checked,
    checkpoint,
    command,
    data_location,
    input_file,
    one_of,
    option,
    output_folder,
    output_location,
    place,
    positive,
    sole,
)
from slrnet.cli.starting import places, shards_for, usual_storage
from slrnet.config import Config, Gating, apply_overrides, load_config
from slrnet.recipes import RECIPES, get_recipe
from slrnet.storage.files import check_writable
from slrnet.storage.names import check_run_name
from slrnet.storage.remote import copy_to, is_remote
from slrnet.storage.shown import LEFT_OUT, say
from slrnet.sweeps.ablations import ABLATIONS
from slrnet.sweeps.space import DEFAULT_SPACE, get_space, space_with
from slrnet.tracking.location import is_named, not_named

if TYPE_CHECKING:
    from slrnet.data.manifest import ShardSet
    from slrnet.launch.prediction import MaskJob
    from slrnet.sweeps.plan import SweepPlan

__all__ = ["demo", "distill", "evaluate", "profile", "pseudo_label", "train", "tune"]


def workers(*, count: int | None = None, of: str = "training processes", failures: int = 0) -> Argument:
    """The options of the worker processes that a command starts; `count` and `failures` are their defaults."""

    def add_workers(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("workers").add_argument
        usual = {None: "one per GPU, else 1; 0: no Ray", 0: "0, this process, without Ray"}.get(count, str(count))
        asked = f"{of}, or fewest:most to follow the cluster's size (default: {usual})"
        add("--num-workers", type=_worker_count(least=1 if count else 0), default=count, metavar="N[:MOST]", help=asked)
        add("--cpus-per-worker", type=positive, metavar="N", help="CPU cores each (default: an equal share)")
        add("--cpu-only", action="store_true", help="use no GPUs")
        wait = "time that a cluster which grows on demand has to get the nodes (default: 0, takes it as it is)"
        add("--wait-for-nodes", dest="wait_minutes", type=_minutes, default=0.0, metavar="MINUTES", help=wait)
        restarts = f"replacements of failed workers (default: {failures})"
        add("--max-failures", type=_count, default=failures, metavar="N", help=restarts)
        hang = "time that a worker may stand still before it ends as failed (default: 600; 0: no limit)"
        add("--hang-limit", type=_minutes, default=600.0, metavar="SECONDS", help=hang)

    return add_workers


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where results go, a folder or an object store."""
    add = parser.add_argument_group("results").add_argument
    where = "folder for runs, seen by all nodes, or its s3:// or gs:// location"
    where += " (default: $SLRNET_STORAGE, else ~/slrnet_runs)"
    add("--storage", type=_storage, default=usual_storage(), metavar="DIR", help=where)
    add("--tracking-uri", metavar="URI", help="MLflow (default: $MLFLOW_TRACKING_URI, else SQLite in --storage)")


def settings(meaning: str = "change one setting; repeatable") -> Argument:
    """--set, which overrides settings of the configuration."""
    return option("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=meaning)


_run_name = checked(check_run_name)


def _trains(recipe: str) -> Callable[[Run], Argument]:
    """The arguments of a command that trains; `recipe` when none is named."""
    names = f"named configuration (default: {recipe}): {', '.join(RECIPES)}"
    data = "folder with shards from `slrnet prepare`, or its s3:// or gs:// location; or a folder of images in folders "
    data += "by class, or with a table labels.csv beside them (default: the embedded demo data)"
    first = "start from the weights of this run or checkpoint; its settings too, if no --recipe or --config is given"
    return command(
        one_of(
            option("--recipe", metavar="NAME", help=names),
            option(
                "--config", type=input_file, metavar="FILE", help="configuration, such as another run's config.json"
            ),
        ),
        option("--data", type=data_location, metavar="DIR", help=data),
        checkpoint("--init", metavar="RUN", help=first),
        settings(),
        workers(),
        one_of(
            option("--name", type=_run_name, metavar="NAME", help="unique name of the run (default: recipe and time)"),
            option(
                "--resume",
                type=_run_name,
                metavar="NAME",
                help="continue the run of that name from its last checkpoint",
            ),
        ),
        option("--resume-if-exists", action="store_true", help="with --name: continue that run if there is one"),
        add_storage,
        default_recipe=recipe,
        interrupted="interrupted; continue the training with --resume NAME",
    )


@_trains("demo")
def train(options: argparse.Namespace) -> None:
    """Train one run: `slrnet train --recipe NAME --data DIR`.

    On a cluster: `ray job submit --working-dir . -- python ray_jobs/train.py --recipe NAME --data DIR`. Without
    --recipe and --data it trains the embedded demo, and builds its shards first if they are missing.
    """
    _launch(options, _configure(options))


@_trains("voc_distill_lite")
def distill(options: argparse.Namespace) -> None:
    """Train DeepLabV3+ on pseudo masks: `slrnet distill --data PSEUDO`.

    PSEUDO is a folder that `slrnet pseudo-label --splits train` made: training images with predicted masks, and the
    validation split with its true ones. Needs the extra `distill`. The options are those of `slrnet train`.
    """
    from slrnet.launch.pseudo_label import check_distillation

    if not (options.data or options.config or options.resume):
        raise ValueError("give --data PSEUDO, the folder that `slrnet pseudo-label` made")
    config = _configure(options)
    say(check_distillation(config))
    _launch(options, config)


@command(
    one_of(
        option("--recipe", default="voc_wsss", metavar="NAME", help=f"{', '.join(RECIPES)} (default: voc_wsss)"),
        option("--config", type=input_file, metavar="FILE", help="a configuration file instead of a recipe"),
    ),
    option("--data", type=data_location, metavar="DIR", help="folder with shards, or its s3:// or gs:// location"),
    settings("change one setting of all trials; repeatable"),
    option("--search", action="append", default=[], metavar="SECTION.FIELD=KIND:VALUES", help="see above; repeatable"),
    option("--num-samples", type=positive, default=20, metavar="N", help="trials (default: 20)"),
    option(
        "--metric", default="val/miou", metavar="A,B", help="val/ or pseudo_mask/ miou, mfdr, mfnr (default: val/miou)"
    ),
    option(
        "--searcher",
        choices=["auto", "optuna", "random", "grid"],
        default="auto",
        help="default: auto, which is random for pbt, else optuna",
    ),
    option(
        "--scheduler", choices=["asha", "pbt", "none"], default="asha", help="stop poor trials (default), or take over"
    ),
    option("--grace-epochs", type=int, metavar="N", help="epochs before that (default: pretraining + 1)"),
    option(
        "--perturb-every", type=positive, default=1, metavar="N", help="epochs between take-overs of pbt (default: 1)"
    ),
    option("--seed", type=int, default=0, metavar="N", help="seed of the searcher (default: 0)"),
    option("--keep-checkpoints", action="store_true", help="keep those of all trials, not of the best ones alone"),
    option("--ablation", choices=ABLATIONS, default="", help="variants of the paper, or of ours, instead of a search"),
    option("--variants", nargs="+", default=[], metavar="LABEL", help="some of an ablation's variants (default: all)"),
    option("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="seeds of an ablation (default: 0 1)"),
    workers(count=1, of="training processes of each trial", failures=1),
    option(
        "--max-concurrent",
        type=positive,
        metavar="N",
        help="trials at a time (default: as many as fit; with --wait-for-nodes one more, for which the cluster grows)",
    ),
    one_of(
        option("--name", type=_run_name, metavar="NAME", help="unique name of the sweep (default: recipe and time)"),
        option("--resume", type=_run_name, metavar="NAME", help="continue the sweep of that name"),
    ),
    add_storage,
    option("--dry-run", action="store_true", help="time a step here, print what the sweep would take, and stop"),
    option("--price-per-hour", type=float, metavar="X", help="price of a worker in any currency, for --dry-run"),
    interrupted="interrupted; continue the sweep with --resume NAME",
)
def tune(options: argparse.Namespace) -> None:
    """Search settings, or run an ablation: one of the paper's, or views_by_cvlr.

        slrnet tune --recipe NAME --data DIR --num-samples 20
        slrnet tune --recipe NAME --data DIR --ablation fig4 --seeds 0 1 2

    On a cluster, submit `python ray_jobs/tune.py` with the same options. By default lambda_reg, T, d and gamma are
    searched, and poor trials stopped early. --search adds a setting (KIND is uniform:LOW:HIGH, loguniform:LOW:HIGH,
    int:LOW:HIGH or choice:A,B,...) or leaves one out (fixed). --scheduler pbt is population-based training: lambda_reg
    and gamma change while the trials train. The exit status is 1 when no trial could be trained.
    """
    from slrnet.sweeps.plan import resume_plan

    storage, remote = places(options.storage)
    plan = resume_plan(storage, options.resume, remote=remote) if options.resume else _plan(options)
    _check_store(plan.config, options, storage)
    say(plan.describe())
    if options.dry_run:
        say(plan.estimate(price_per_hour=options.price_per_hour))
        return
    check_writable(storage, folder=True)
    from slrnet.sweeps.run import run_sweep  # imports Ray Tune, which a dry run does not need

    run_sweep(plan, resume=bool(options.resume))


def _prediction(*, protocol: str, gating: str | None) -> tuple[Argument, ...]:
    """The options of commands that predict a split, in this process or on Ray workers."""
    stated = gating or "as trained"
    return (
        option(
            "--data", type=data_location, metavar="DIR", help="shards (default: what the checkpoint was trained on)"
        ),
        partial(add_protocol, default=protocol),
        option("--gating", choices=get_args(Gating), default=gating, help=f"classes allowed (default: {stated})"),
        settings("change a setting, such as evaluation.scales; repeatable"),
        workers(count=0, of="processes"),
    )


@command(
    checkpoint("--checkpoint", metavar="RUN", required=True),
    option("--split", default="val", metavar="NAME", help="split to measure (default: val)"),
    option("--out", type=output_folder, metavar="DIR", help="for evaluation.json (default: beside the checkpoint)"),
    option("--without", nargs="+", default=[], metavar="CLASS", help="also print the mean IoU without these classes"),
    *_prediction(protocol="ss", gating=None),
)
def evaluate(options: argparse.Namespace) -> None:
    """Measure a checkpoint: `slrnet evaluate --checkpoint RUN --data DIR --split val --protocol ss`.

    `ss` is one scale; `ms` the mean over five scales and their mirror images; `ms_crf` adds a dense CRF (the extra
    `crf`). Gating by class scores or by the true image labels, and the power of the background's probability, are off
    by default; they become part of the protocol's name. `--without person` shows what a class does to the mean: one
    that never occurs alone in training images cannot be learned from image labels.
    """
    from slrnet.checkpoints.run_store import location_of
    from slrnet.launch.evaluation import launch_evaluation, why_untracked
    from slrnet.launch.train import LaunchOptions
    from slrnet.tracking.summary import mean_without, quality_table

    job = _mask_job(options, lambda shards: [options.split])
    checkpoint = job.checkpoint
    mean_without({}, checkpoint.state.classes, options.without)  # refuses unknown names before the work
    run, remote = checkpoint.path.parent.parent, location_of(checkpoint.path.parent.parent)
    out = options.out or check_writable(run / "evaluations", folder=True)
    out = out.expanduser().resolve()
    name = f"{checkpoint.path.name}-{options.split}-{time.strftime('%Y%m%d-%H%M%S')}"
    launched = LaunchOptions(**_fields_of(LaunchOptions, options) | {"name": name, "storage": out})
    result, written = launch_evaluation(job, launched), str(out / name / "evaluation.json")
    if is_remote(remote) and options.out is None:  # the run here is a copy
        copy_to(Path(written), written := f"{remote}/evaluations/{name}/evaluation.json")
    say(quality_table(result["metrics"], tuple(result["classes"])))
    if options.without:
        mean = mean_without(result["metrics"], checkpoint.state.classes, options.without)
        say(f"mean IoU without {', '.join(options.without)}: {100 * mean:.1f} %")
    for protocol, metrics in result["before_crf"].items():
        say(f"before the CRF ({protocol}): mIoU {100 * metrics['val/miou']:.1f} %")
    say(
        f"protocol {result['protocol']}, {result['images']} images of split "
        f"{result['split']}, checkpoint {result['checkpoint']} (epoch {result['epoch']})"
        f"{checkpoint.config.weights_note}; "
        f"written to {written}"
    )
    say(f"MLflow: {result['mlflow'] or why_untracked(checkpoint)}")


@command(
    checkpoint("--checkpoint", metavar="RUN"),
    option("--out", type=output_location, metavar="DIR", help="folder to make, or its s3:// or gs:// location"),
    option("--splits", default="train", metavar="A,B", help="or all (default: train); others are copied"),
    option("--voc-folder", type=output_folder, metavar="DIR", help="also write a folder in VOC's layout"),
    option(
        "--also",
        action="append",
        default=[],
        type=annotation_folder,
        metavar="FORM=DIR",
        help=f"also write a folder for annotation tools, form {', '.join(ANNOTATION_FORMATS)}; repeatable",
    ),
    TOLERANCE,
    option("--keep-void", action="store_true", help="in --also: undecided pixels become shapes of the label void"),
    SKIP_DAMAGED,
    option("--verify", type=place, metavar="DIR", help="instead: compare the shards of DIR with its manifest"),
    *_prediction(protocol="ms", gating="image_labels"),
    interrupted="interrupted; run the same command again to continue",
)
def pseudo_label(options: argparse.Namespace) -> int:
    """Make pseudo masks for a data set: `slrnet pseudo-label --checkpoint RUN --data DIR --out PSEUDO`.

    Writes shards like those of DIR, with the network's masks in the train split (or --splits), and prints how good
    they are if there are true ones. Rerun the same command to resume a job that was stopped; a location in an object
    store gets the data set when it is complete. Images that cannot be read are named and left out.

    `--also labelme=FOLDER` (or coco, coco-polygons) also writes images and annotations that people can correct in a
    tool and give back to `slrnet prepare folder --annotations`. Needs the extra `coco`.
    """
    if options.verify is not None:
        from data_prep.conversion import print_verification

        return print_verification(options.verify, processes=1)
    if options.checkpoint is None or options.out is None:
        raise ValueError("give --checkpoint RUN and --out DIR, or --verify DIR")
    from slrnet.data.annotation_folder import check_annotation_folder, write_annotation_folder
    from slrnet.data.manifest import load_dataset
    from slrnet.data.voc_folder import check_voc_folder, write_voc_folder
    from slrnet.launch.cluster import WorkerRequest
    from slrnet.launch.evaluation import why_untracked
    from slrnet.launch.pseudo_label import launch_pseudo_labels

    job = _mask_job(options, lambda shards: shards.splits if options.splits == "all" else options.splits.split(","))
    if options.voc_folder is not None:
        check_voc_folder(options.voc_folder)
    choice = {"tolerance": options.tolerance, "keep_void": options.keep_void}
    for form, folder in options.also:
        check_annotation_folder(job.shards.info.classes, folder, form=form, **choice)
    if len({folder for _, folder in options.also}) < len(options.also):
        raise ValueError("--also names a folder twice; give each form a folder of its own")
    request = WorkerRequest(**_fields_of(WorkerRequest, options))
    record = launch_pseudo_labels(job, options.out, request=request)
    if options.voc_folder is not None:
        write_voc_folder(load_dataset(options.out), options.voc_folder, splits=job.splits)
    for form, folder in options.also:
        notes = write_annotation_folder(load_dataset(options.out), folder, form=form, **choice)
        say("\n".join([f"{form}: {folder}", *notes]))
    for split, protocols in record["quality"].items():
        for protocol, quality in protocols.items():
            names = ("miou", "mfdr", "mfnr", "coverage")
            shown = ", ".join(f"{name} {100 * quality['metrics'].get(name, float('nan')):.1f} %" for name in names)
            say(f"{split}, {protocol}, {quality['images']} images: {shown}")
    opened = record["mlflow"] or why_untracked(job.checkpoint)
    say(f"pseudo masks: {options.out}{job.checkpoint.config.weights_note}; MLflow: {opened}")
    for name, reason in record["left_out"].items():
        say(f"left out: {name}: {reason}", error=True)
    return LEFT_OUT if record["left_out"] and not options.skip_damaged else 0


@command(
    option("--recipe", required=True, metavar="NAME", help="named configuration"),
    option("--data", type=data_location, required=True, metavar="DIR", help="folder with shards from `slrnet prepare`"),
    settings(),
    option("--out", type=output_folder, required=True, metavar="FOLDER", help="folder for the time line and the table"),
    option("--steps", type=positive, default=5, metavar="N", help="steps to profile (default: 5)"),
    option("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU"),
)
@sole
def profile(options: argparse.Namespace) -> None:
    """Show where a training step spends its time: `slrnet profile --recipe NAME --data DIR --out FOLDER`.

    Takes some optimizer steps in this process, on the GPU if there is one, and writes to FOLDER
        trace.json.gz   every operation on a time line; opens in https://ui.perfetto.dev and chrome://tracing
        stages.md       seconds of each stage per step, and its share
    The table is printed too. Stages of the network are what going forward takes; going backward is one stage. On a GPU
    the seconds are the device's, and may lack what another thread has started going backward (`benchmarks/gpu.py`
    times that).
    """
    import torch

    from slrnet.storage.files import write_text
    from slrnet.tools.profile import profile_steps, stage_table

    config = apply_overrides(get_recipe(options.recipe), [f"data.path={options.data}", *options.set])
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    trace = options.out / "trace.json.gz"
    table = stage_table(profile_steps(config, trace, steps=options.steps, device=device))
    write_text(options.out / "stages.md", table + "\n")
    say(f"{table}\n\ntime line: {trace} (open it in https://ui.perfetto.dev)")


@command(
    settings("change one setting of the training; repeatable"),
    option("--compare", action="store_true", help="instead: SLRNet against its one-view baseline, see above"),
    option("--seeds", type=int, nargs="+", metavar="N", help="seeds of --compare (default: 0 1 2)"),
    interrupted="interrupted; nothing is left running",
)
def demo(options: argparse.Namespace) -> int:
    """Try everything on this machine: `slrnet demo`; `make demo` runs it.

    Starts a private Ray cluster, trains on the embedded data through a submitted job, and shows scores and a picture.
    The cluster listens on loopback only, with a token of its own, and stops at the end, also after Ctrl-C.

    --compare trains SLRNet and its one-view baseline without CVLR on the same data with each of --seeds, without Ray,
    for the same time: the baseline's shorter steps give it more epochs. It prints means, their spread, and the margin
    with its 90 % interval. Three seeds take six trainings.
    """
    if options.compare:
        from data_prep.demo import demo_data
        from slrnet.sweeps.compare import compare

        runs = Path("runs").resolve()
        config = apply_overrides(get_recipe("demo"), options.set)
        config = config if config.data.path else apply_overrides(config, [f"data.path={demo_data(runs)}"])
        folder = runs / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
        say(compare(config, seeds=options.seeds or [0, 1, 2], folder=folder).text + f"\nruns: {folder}")
        return 0
    if options.seeds:
        raise ValueError("--seeds are those of --compare; give both, or a seed with --set train.seed=N")
    from ray_jobs.demo import run_demo

    return run_demo([word for setting in options.set for word in ("--set", setting)])


def _worker_count(*, least: int) -> Callable[[str], int | tuple[int, int]]:
    def convert(text: str) -> int | tuple[int, int]:
        fewest, _, most = text.partition(":")
        if text.isdecimal() and int(text) >= least:
            return int(text)
        if fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most):
            return int(fewest), int(most)
        told = f"{text!r} is not a number of workers from {least}; give one, as 4, or fewest:most, as 2:8"
        raise argparse.ArgumentTypeError(told)

    return convert


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _minutes(text: str) -> float:
    """A time from 0, in the option's unit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; give a number from 0, as 30")
    return value


@checked
def _storage(text: str) -> str:
    """A place for runs: a folder's absolute path, or a location in an object store."""
    if "://" not in text:
        return str(place(text).resolve())
    is_remote(text)
    return text.rstrip("/")


def _configure(options: argparse.Namespace) -> Config:
    """The configuration that the options of `slrnet train` describe.

    Raises:
        ValueError: a recipe, setting, file or run does not exist or does not fit.
    """
    from slrnet.launch.checks import resume_config, run_exists

    storage, remote = places(options.storage)
    check_writable(storage, folder=True)
    if options.resume_if_exists and not options.name:
        raise ValueError("--resume-if-exists continues the run of a name; give --name NAME")
    if options.resume_if_exists and run_exists(storage, options.name, remote=remote):
        options.resume = options.name
    if options.resume and not (options.recipe or options.config):
        config = resume_config(storage, options.resume, remote=remote)
    else:
        config = _named_config(options)
    data = [f"data.path={shards_for(options.data, storage, remote)}"] if options.data else []
    first = [f"train.init={options.init.resolve()}"] if options.init else []
    config = apply_overrides(config, [*data, *first, *options.set, *_tracking(options)])
    _check_store(config, options, storage)
    return config if config.data.path else apply_overrides(config, [f"data.path={shards_for('', storage, remote)}"])


def _named_config(options: argparse.Namespace) -> Config:
    """The settings of --config, --recipe, or the run of --init."""
    if options.config:
        return load_config(options.config)
    if options.init and not options.recipe:
        from slrnet.checkpoints.checkpoint import load_checkpoint

        return load_checkpoint(options.init).config
    return get_recipe(options.recipe or options.default_recipe)


def _launch(options: argparse.Namespace, config: Config) -> None:
    """Train with a configuration, and print the scores and where the results are."""
    from slrnet.launch.train import LaunchOptions, launch
    from slrnet.storage.lease import BEAT, LAPSE
    from slrnet.tracking.summary import next_commands, quality_table

    storage, remote = places(options.storage)
    name = options.resume or options.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    named = {"name": name, "storage": storage, "remote": remote, "resume": bool(options.resume)}
    named["lease_patience"] = LAPSE + BEAT if options.resume_if_exists else 0.0
    result = launch(config, LaunchOptions(**_fields_of(LaunchOptions, options) | named))
    say(f"\nbest checkpoint, epoch {result.state.epoch}: {result.best}")
    say(quality_table(result.state.metrics, result.state.classes))
    say(f"curves and pictures: {result.run.how_to_open()}")
    commands = next_commands(f"{remote}/{name}" if remote else storage / name, config.data.path, result.state.metrics)
    say("next:\n  " + "\n  ".join(commands))


def _fields_of(kind: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The options that a dataclass has fields for."""
    return {name: value for name, value in vars(options).items() if name in kind.__dataclass_fields__}


def _check_store(config: Config, options: argparse.Namespace, storage: Path) -> None:
    """Raise ValueError if only a file (--config, or that of the resumed run) names the tracking store."""
    given = any(text.startswith("tracking.uri=") for text in options.set)
    if not given and not is_named(config.tracking.uri, storage, given=options.tracking_uri or ""):
        raise ValueError(f"{not_named(config.tracking.uri)}, or give it with --tracking-uri")


def _tracking(options: argparse.Namespace) -> list[str]:
    return [f"tracking.uri={options.tracking_uri}"] if options.tracking_uri else []


def _plan(options: argparse.Namespace) -> SweepPlan:
    config = load_config(options.config) if options.config else get_recipe(options.recipe)
    storage, remote = places(options.storage)
    data = [f"data.path={shards_for(options.data, storage, remote)}"] if options.data else []
    config = apply_overrides(config, [*data, *options.set, *_tracking(options)])
    if not config.data.path:
        raise ValueError("give --data DIR, a folder with shards; `slrnet prepare demo --out DIR` makes one to try with")
    from slrnet.sweeps.plan import SweepOptions, may_change, plan_sweep

    base = get_space(config.recipe) if config.recipe in RECIPES else DEFAULT_SPACE
    domains = [domain for domain in base if options.scheduler != "pbt" or may_change(domain.key)]
    name = options.name or f"{options.ablation or 'sweep'}-{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    named = {"name": name, "metrics": tuple(options.metric.split(",")), "storage": storage, "remote": remote}
    sweep = SweepOptions(**_fields_of(SweepOptions, options) | named)
    ablation = {"ablation": options.ablation, "seeds": options.seeds, "variants": options.variants}
    return plan_sweep(config, sweep, space=space_with(domains, options.search), **ablation)


def _mask_job(options: argparse.Namespace, splits: Callable[[ShardSet], Iterable[str]]) -> MaskJob:
    """The job of a command with the options of `_prediction`, for some of the data set's splits."""
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.data.manifest import load_dataset
    from slrnet.launch.prediction import MaskJob

    checkpoint = load_checkpoint(options.checkpoint.expanduser())
    gating = [f"evaluation.gating={options.gating}"] if options.gating else []
    config = apply_overrides(checkpoint.config, [f"evaluation.protocol={options.protocol}", *gating, *options.set])
    shards = load_dataset(options.data or config.data.path)
    return MaskJob(checkpoint, config, shards, tuple(splits(shards)))
