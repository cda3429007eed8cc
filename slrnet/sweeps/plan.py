"""Plans a sweep: its options and its search space or ablation, checked before anything starts and kept on disk."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from slrnet.checkpoints.checkpoint import CheckpointError
from slrnet.checkpoints.run_store import Kept
from slrnet.config import Config, ConfigError, apply_overrides
from slrnet.data.manifest import load_dataset
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import protocol_name
from slrnet.launch.checks import check_run, checkpoint_bytes, with_absolute_paths
from slrnet.launch.cluster import WorkerRequest
from slrnet.storage.files import read_json, write_json
from slrnet.storage.folders import mark_folder
from slrnet.storage.names import check_run_name
from slrnet.storage.remote import cached, copy_from, copy_to, patiently
from slrnet.sweeps.ablations import ABLATIONS, Variant, choose_variants
from slrnet.sweeps.space import Domain, apply_values, check_space
from slrnet.tracking.protocol import metric_key

__all__ = [
    "QUANTILE",
    "REDUCTION",
    "SweepOptions",
    "SweepPlan",
    "may_change",
    "plan_sweep",
    "resume_plan",
    "time_step",
    "usual_device",
]

QUANTILE = 0.25
"""Share of a population that takes over each time, and share from which it does."""
REDUCTION = 3.0
"""ASHA's reduction factor: one trial in so many continues past a rung."""
_RECORD = "sweep.json"
_CHANGEABLE = ("weights.", "calibration.", "losses.", "optim.")
"""Sections whose settings can change between epochs: they shape neither the network nor the epochs."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Kept, WorkerRequest):
    """How a sweep runs, and the workers of each trial; what it searches is its space or its ablation."""

    metrics: tuple[str, ...] = ("val/miou",)
    """Metrics to optimize; several of them give a front of trade-offs. `val/miou` is that of the run's protocol."""
    num_samples: int = 20
    """Number of trials; a grid has as many as it has points."""
    searcher: Literal["auto", "optuna", "random", "grid"] = "auto"
    """`optuna` (TPE), `random` or `grid`; `auto` is `random` for `pbt`, else `optuna`."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """`asha` stops poor trials early; with `pbt` poor trials take over weights and settings of good ones
    (`slrnet.sweeps.population`); `none` trains all of them to the end."""
    grace_epochs: int | None = None
    """Epochs before a trial may be stopped or take over; None: one more than the pretraining has."""
    perturb_every: int = 1
    """Epochs from one take-over of `pbt` to the next."""
    num_workers: int | tuple[int, int] = 1
    """Training processes of each trial, 1 or more; a pair: the fewest and the most."""
    cpus_per_worker: int | None = None
    """CPU cores of each process; None: 1, or on GPUs an equal share of the cluster's cores."""
    max_concurrent: int | None = None
    """Trials at a time. None: as many as the cluster has room for at the time; with `wait_minutes` one more, for which
    the cluster grows."""
    max_failures: int = 1
    """How often a failed trial restarts from its last checkpoint."""
    seed: int = 0
    """Seed of the searcher."""
    keep_checkpoints: bool = False
    """Keep all checkpoints of all trials; else the best one of the best trials, and of each trial of an ablation."""

    def __post_init__(self) -> None:
        check_run_name(self.name)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A checked sweep: everything that `--resume` needs."""

    config: Config
    """Settings that all trials share, with absolute paths."""
    options: SweepOptions
    """Options with nothing left open, and the metrics' names as they are logged."""
    space: tuple[Domain, ...]
    """The search space; empty for an ablation."""
    ablation: str
    """Name of the ablation; empty for a search."""
    seeds: tuple[int, ...]
    """Seeds of an ablation's trials."""
    variants: tuple[int, ...] = ()
    """Indices of the ablation's variants that are run."""

    @property
    def chosen_variants(self) -> tuple[Variant, ...]:
        """The ablation's variants that are run."""
        return tuple(ABLATIONS[self.ablation].variants[index] for index in self.variants)

    @property
    def folder(self) -> Path:
        """The sweep's folder, on this machine."""
        return self.options.folder

    def trial(self, name: str) -> Kept:
        """Where a trial is kept, in the sweep's folder or store."""
        remote = self.options.location and f"{self.options.location}/trials"
        return Kept(name=name, storage=cached(remote) if remote else self.folder / "trials", remote=remote)

    @property
    def most_workers(self) -> int:
        """Training processes of a trial, at most."""
        count = self.options.num_workers
        return count[1] if isinstance(count, tuple) else count

    @property
    def recipe_point(self) -> dict[str, Any]:
        """The recipe's own values where they lie in the space: the first trial, to compare with."""
        own = self.config.flat()
        return {domain.key: own[domain.key] for domain in self.space if own[domain.key] in domain}

    @property
    def trials(self) -> int:
        """Number of trials."""
        if self.ablation:
            return len(self.variants) * len(self.seeds)
        if self.options.searcher == "grid":
            return math.prod(len(domain.grid()) for domain in self.space)
        return self.options.num_samples

    def trial_config(self, values: Mapping[str, Any]) -> Config:
        """Builds a trial's configuration from its settings by key; for an ablation also the index of its `variant`."""
        config, rest = self.config, dict(values)
        if self.ablation:
            config = apply_overrides(config, ABLATIONS[self.ablation].variants[rest.pop("variant")].changes)
        return apply_values(config, rest)

    def describe(self) -> str:
        """Describes what the sweep will try, one line each."""
        options = self.options
        if self.ablation:
            title = ABLATIONS[self.ablation].title
            lines = [f"{title}: {len(self.variants)} variants, seeds {', '.join(map(str, self.seeds))}"]
            lines += [f"  {variant.label}: {' '.join(variant.changes)}" for variant in self.chosen_variants]
            return "\n".join([*lines, f"{self.trials} trials, all trained to the end"])
        stop = {
            "asha": f"ASHA may stop trials after {options.grace_epochs} epochs, one in {REDUCTION:g} continues",
            "pbt": f"population-based: after {options.grace_epochs} epochs and every {options.perturb_every} from "
            f"there the worst {100 * QUANTILE:g} % take over weights and settings of the best, which are then changed",
            "none": "all trained to the end",
        }[options.scheduler]
        head = f"{self.trials} trials, {options.searcher} search for {', '.join(options.metrics)}; {stop}"
        return "\n".join([head, *(f"  {domain}" for domain in self.space)])

    def estimate(self, *, price_per_hour: float | None) -> str:
        """Times a training step in this process, and says what the whole sweep takes at most.

        The estimate leaves out measuring after epochs, starting up, and exchanging gradients between workers.
        `price_per_hour` is that of one worker, in any currency.
        """
        workers, device = self.most_workers, usual_device()
        share = -(-self.config.train.batch_size // workers)  # the largest of the ranks' shares
        seconds, steps = time_step(apply_values(self.config, {"train.batch_size": share}), device)
        steps = steps // workers * self.config.train.epochs
        hours = self.trials * workers * steps * seconds / 3600
        cost = "" if price_per_hour is None else f", {hours * price_per_hour:.2f} at {price_per_hour:g} an hour"
        kind = "GPU" if device.type == "cuda" else "CPU worker"
        return (
            f"a step of {share} images takes {seconds:.2f} s here ({device.type}); {self.trials} trials x {steps} "
            f"steps x {workers} worker(s): at most {hours:.1f} {kind} hours{cost}"
        )

    def write(self) -> None:
        """Writes the plan into the sweep's folder, for `resume_plan`."""
        write_json(self.folder / _RECORD, TypeAdapter(SweepPlan).dump_python(self, mode="json"))
        self.upload(_RECORD)

    def upload(self, name: str) -> None:
        """Copies a file or folder of the sweep's folder to the object store, where the sweep is kept in one."""
        if self.options.remote:
            place = f"{self.options.location}/{name}"
            patiently(place, lambda: copy_to(self.folder / name, place))


def usual_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_step(config: Config, device: torch.device) -> tuple[float, int]:
    """Seconds of a training step with pseudo labels in this process, and the number of steps in an epoch."""
    from slrnet.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        shards = load_dataset(config.data.path)
        trainer = Trainer(config, shards, process=Process(device=device), folder=Path(folder))
        times = list(trainer.try_steps(4))
    return statistics.median(times[1:] or times), trainer.loader.steps_per_epoch  # the first step warms up


def plan_sweep(
    config: Config,
    options: SweepOptions,
    *,
    space: Sequence[Domain] = (),
    ablation: str = "",
    seeds: Sequence[int] = (),
    variants: Sequence[str] = (),
) -> SweepPlan:
    """Checks a sweep before anything starts; its parts are those of a `SweepPlan`.

    With the name of an ablation, the space is ignored. `variants` are the paper's labels; none: all variants.

    Raises:
        ValueError: a setting, domain, metric or the data does not allow the sweep, or its folder exists.
    """
    config, shards = with_absolute_paths(config)
    if variants and not ablation:
        raise ConfigError("variants are those of an ablation; give --ablation NAME with --variants, or leave them out")
    plan = SweepPlan(
        config=config,
        options=options,
        space=() if ablation else tuple(space),
        ablation=ablation,
        seeds=tuple(seeds) if ablation else (),
        variants=choose_variants(ablation, variants) if ablation else (),
    )
    for changes in ((), *(variant.changes for variant in plan.chosen_variants)):
        variant_config = apply_overrides(config, changes)
        check_run(variant_config, shards, plan.most_workers)
        checkpoint_bytes(variant_config, shards)  # builds the network, which may refuse its settings
    if not ablation:
        check_space(config, space)
    plan = replace(plan, options=_settled(plan))
    if (store := plan.options.store) is not None:
        store.require_new("sweep")
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise CheckpointError(
            f"sweep folder {plan.folder} exists; continue that sweep with --resume {options.name}, or choose another "
            "--name"
        )
    return plan


def resume_plan(storage: Path, name: str, *, remote: str = "") -> SweepPlan:
    """Reads the plan of an earlier sweep from the folder `storage`, or the object store's location `remote`.

    Raises:
        CheckpointError: there is no sweep of that name.
        RemoteError: the store does not answer or refuses.
    """
    kept = Kept(name=check_run_name(name) if remote else name, storage=storage, remote=remote)
    path = kept.folder / _RECORD
    if (store := kept.store) is not None:
        if not store.exists(_RECORD):
            raise CheckpointError(f"{remote} has no sweep {name!r} to resume; start one with --name {name}")
        mark_folder(store.folder)
        copy_from(f"{store.location}/{_RECORD}", path)
    elif not path.is_file():
        known = sorted(record.parent.name for record in storage.glob(f"*/{_RECORD}"))
        listed = f"sweeps there: {', '.join(known)}" if known else "no sweep is there"
        raise CheckpointError(f"{storage} has no sweep {name!r} to resume; {listed}; start one with --name {name}")
    try:
        record = read_json(path)
        record["options"] |= {"storage": storage, "remote": remote}  # the folder may have moved
        return TypeAdapter(SweepPlan).validate_python(record)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path} is no plan of a sweep: {error}; start the sweep anew with --name") from None


def may_change(key: str) -> bool:
    """Whether a setting can change between epochs, as population-based training changes it."""
    return key.startswith(_CHANGEABLE)


def _settled(plan: SweepPlan) -> SweepOptions:
    """The plan's options with everything decided that was left open."""
    config, options = plan.config, plan.options
    population = options.scheduler == "pbt" and not plan.ablation
    if population:
        _check_population(options, plan.space)
    if options.searcher == "grid":
        for domain in plan.space:
            domain.grid()
    if config.evaluation.every != 1 and not plan.ablation:
        raise ConfigError(
            f"evaluation.every is {config.evaluation.every}; a search needs the metrics of each epoch: set it to 1"
        )
    metrics = tuple(_logged_name(metric, config) for metric in options.metrics)
    scheduler = "none" if plan.ablation or len(metrics) > 1 else options.scheduler
    least = config.train.pretrain_epochs + 1
    grace = least if options.grace_epochs is None else options.grace_epochs
    if scheduler != "none":
        if grace < least:
            raise ConfigError(
                f"grace_epochs is {grace}, and the first {config.train.pretrain_epochs} epochs have no pseudo labels: "
                f"their metrics say nothing about a trial; use {least} or more"
            )
        for key in ("train.epochs", "train.pretrain_epochs"):
            if any(domain.key == key for domain in plan.space):
                raise ConfigError(f"{key} cannot be searched while trials are compared by epochs; use --scheduler none")
    searcher = ("random" if population else "optuna") if options.searcher == "auto" else options.searcher
    return replace(options, metrics=metrics, scheduler=scheduler, searcher=searcher, grace_epochs=grace)


def _check_population(options: SweepOptions, space: Sequence[Domain]) -> None:
    """Refuses what population-based training cannot do."""
    if options.remote:
        raise ConfigError(
            f"scheduler pbt copies checkpoints between the folders of its trials, and {options.remote} is an object "
            "store; name a folder that all nodes see with --storage, or use --scheduler asha"
        )
    if options.searcher not in ("auto", "random"):
        raise ConfigError(f"scheduler pbt draws its first settings at random; leave out searcher {options.searcher!r}")
    if len(options.metrics) > 1:
        raise ConfigError(f"scheduler pbt goes by one metric, not by {len(options.metrics)}; give one")
    if options.num_samples < 2:
        raise ConfigError(f"a population of {options.num_samples} has nobody to take over from; use 2 samples or more")
    if options.perturb_every < 1:
        raise ConfigError(f"perturb_every is {options.perturb_every}; allowed are 1 epoch or more")
    for domain in space:
        if not may_change(domain.key):
            raise ConfigError(
                f"{domain.key} cannot change while a network trains, as scheduler pbt would; leave it out "
                f"({domain.key}=fixed), or use --scheduler asha. It can change {', '.join(_CHANGEABLE)}*"
            )


def _logged_name(metric: str, config: Config) -> str:
    """Checks a metric's name; `val/miou` gets the protocol that is part of its logged name."""
    known = [f"{group}/{kind}" for group in ("pseudo_mask", "val") for kind in ("miou", "mfdr", "mfnr")]
    if metric not in known:
        raise ConfigError(f"metric {metric!r} is not measured in a sweep; allowed are {', '.join(known)}")
    if metric.startswith("pseudo_mask/") and not config.evaluation.pseudo_mask_images:
        raise ConfigError(f"metric {metric!r} needs evaluation.pseudo_mask_images above 0")
    return metric_key("val", f"miou_{protocol_name(config.evaluation)}") if metric == "val/miou" else metric
