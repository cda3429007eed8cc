"""What a sweep is: its options, its search space or ablation, checked before anything is started, and kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from slrnet.checkpoints.checkpoint import CheckpointError
from slrnet.config import Config, ConfigError, apply_overrides, config_from_dict
from slrnet.launch.train import check_run, with_absolute_paths
from slrnet.storage.files import write_json
from slrnet.sweeps.ablations import Variant, choose_variants, get_ablation
from slrnet.sweeps.space import Domain, apply_values, check_space, parse_domain

__all__ = [
    "SweepOptions",
    "SweepPlan",
    "describe",
    "estimate",
    "grid_of",
    "may_change",
    "plan_sweep",
    "resume_plan",
    "trial_config",
    "write_plan",
]

Searcher = Literal["auto", "optuna", "random", "grid"]
Scheduler = Literal["asha", "pbt", "none"]
_RECORD = "sweep.json"
_CHANGEABLE = ("weights.", "calibration.", "losses.", "optim.")
"""Sections whose settings a training may change between epochs: they shape neither network nor epochs."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How a sweep goes; what it searches is its space or its ablation."""

    name: str
    """Unique name; the sweep's folder is storage/name."""
    storage: Path
    """Absolute folder for runs, visible to all nodes."""
    metrics: tuple[str, ...] = ("val/miou",)
    """Figures to optimise; several of them give a front of trade-offs. `val/miou` is that of the run's protocol."""
    num_samples: int = 20
    """Trials; a grid has as many as it has points."""
    searcher: Searcher = "auto"
    """`optuna` (TPE), `random` or `grid`; `auto` is `optuna` where it is installed, else `random`."""
    scheduler: Scheduler = "asha"
    """`asha` stops poor trials early; `pbt` lets poor ones go on from the weights and settings of good ones
    (`slrnet.sweeps.population`); `none` trains all of them to the end."""
    grace_epochs: int | None = None
    """Epochs before a trial may be stopped or take over; None: one more than the pretraining has."""
    perturb_every: int = 1
    """Epochs from one take-over of `pbt` to the next."""
    quantile: float = 0.25
    """Share of the trials that take over each time, and share from which they do."""
    reduction: float = 3.0
    """Of the trials at a rung of ASHA, one in so many goes on."""
    num_workers: int = 1
    """Training processes of each trial."""
    cpus_per_worker: int | None = None
    """CPU cores of each; None: 1, or an equal share of the cluster's cores beside its GPUs."""
    max_concurrent: int | None = None
    """Trials at a time; None: as many as the cluster has room for."""
    max_failures: int = 1
    """Times that a failed trial is started again, from its last checkpoint."""
    seed: int = 0
    """Of the searcher."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep that has been checked: everything that `--resume` needs."""

    config: Config
    """What all trials share, with absolute paths."""
    options: SweepOptions
    """With the metrics' names as they are logged."""
    space: tuple[Domain, ...]
    """Empty for an ablation."""
    ablation: str
    """Name of the ablation; empty for a search."""
    seeds: tuple[int, ...]
    """Of an ablation's trials."""
    variants: tuple[int, ...] = ()
    """Places in the ablation of those that are run."""

    @property
    def chosen_variants(self) -> tuple[Variant, ...]:
        """The ablation's variants that are run."""
        known = get_ablation(self.ablation).variants
        return tuple(known[index] for index in self.variants)

    @property
    def folder(self) -> Path:
        """Where the sweep keeps everything."""
        return self.options.storage / self.options.name

    @property
    def recipe_point(self) -> dict[str, Any]:
        """The recipe's own values where they lie in the space: the first trial, to compare with."""
        own = self.config.flat()
        point = {}
        for domain in self.space:
            value = own[domain.key]
            low, high = domain.values[0], domain.values[-1]
            if value in domain.values if domain.kind == "choice" else low <= value <= high:
                point[domain.key] = value
        return point

    @property
    def trials(self) -> int:
        """How many trials there will be."""
        if self.ablation:
            return len(self.variants) * len(self.seeds)
        if self.options.searcher == "grid":
            return math.prod(len(grid_of(domain)) for domain in self.space)
        return self.options.num_samples


def plan_sweep(
    config: Config,
    options: SweepOptions,
    *,
    space: Sequence[Domain] = (),
    ablation: str = "",
    seeds: Sequence[int] = (),
    variants: Sequence[str] = (),
) -> SweepPlan:
    """Checks a sweep before anything is started.

    Args:
        config: what all trials share, `data.path` set.
        options: of the sweep.
        space: what a search tries.
        ablation: instead of a space, a name of `slrnet.sweeps.ablations`.
        seeds: of an ablation's trials.
        variants: labels of an ablation's variants; none: all of them.

    Raises:
        ValueError: a setting, domain, metric or the data does not allow the sweep, or its folder exists.
    """
    config, shards = with_absolute_paths(config)
    check_run(config, shards, options.num_workers)
    chosen = choose_variants(ablation, variants) if ablation else ()
    for index in chosen:
        changes = get_ablation(ablation).variants[index].changes
        check_run(apply_overrides(config, changes), shards, options.num_workers)
    if variants and not ablation:
        raise ConfigError("variants are those of an ablation; give --ablation NAME with --variants, or leave them out")
    if not ablation:
        check_space(config, space)
    options = _settled(config, options, space, ablation)
    folder = options.storage / options.name
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"sweep folder {folder} exists; continue that sweep with --resume {options.name}, or choose another --name"
        )
    return SweepPlan(
        config=config,
        options=options,
        space=() if ablation else tuple(space),
        ablation=ablation,
        seeds=tuple(seeds) if ablation else (),
        variants=chosen,
    )


def resume_plan(storage: Path, name: str) -> SweepPlan:
    """The plan of a sweep that was started before.

    Raises:
        CheckpointError: there is none of that name in the storage folder.
    """
    path = storage / name / _RECORD
    if not path.is_file():
        known = sorted(found.parent.name for found in storage.glob(f"*/{_RECORD}"))
        listed = f"sweeps there: {', '.join(known)}" if known else "no sweep is there"
        raise CheckpointError(f"{storage} has no sweep {name!r} to resume; {listed}; start one with --name {name}")
    record = json.loads(path.read_text(encoding="utf-8"))
    options = record["options"] | {"storage": storage, "metrics": tuple(record["options"]["metrics"])}
    return SweepPlan(
        config=config_from_dict(record["config"]),
        options=SweepOptions(**options),
        space=tuple(parse_domain(text) for text in record["space"]),
        ablation=record["ablation"],
        seeds=tuple(record["seeds"]),
        variants=tuple(record["variants"]),
    )


def describe(plan: SweepPlan) -> str:
    """What will be tried, a line each."""
    options = plan.options
    if plan.ablation:
        ablation = get_ablation(plan.ablation)
        lines = [f"{ablation.title}: {len(plan.variants)} variants, seeds {', '.join(map(str, plan.seeds))}"]
        lines += [f"  {variant.label}: {' '.join(variant.changes)}" for variant in plan.chosen_variants]
        return "\n".join([*lines, f"{plan.trials} trials, all trained to the end"])
    stop = {
        "asha": f"ASHA may stop trials after {options.grace_epochs} epochs, one in {options.reduction:g} goes on",
        "pbt": f"population-based: after {options.grace_epochs} epochs and every {options.perturb_every} from there "
        f"the worst {100 * options.quantile:g} % take over weights and settings of the best, which are then changed",
        "none": "all trained to the end",
    }[options.scheduler]
    head = f"{plan.trials} trials, {options.searcher} search for {', '.join(options.metrics)}; {stop}"
    return "\n".join([head, *(f"  {domain}" for domain in plan.space)])


def estimate(plan: SweepPlan, *, price_per_hour: float | None) -> str:
    """Times a training step in this process, and says what the whole sweep takes at most.

    Measuring after epochs, starting up and the exchange of gradients between workers are left out.

    Args:
        plan: of the sweep.
        price_per_hour: of one worker.
    """
    import tempfile

    import torch

    from slrnet.data.manifest import load_dataset
    from slrnet.distributed.process import Process
    from slrnet.tracking.mlflow import NullTracker
    from slrnet.training.trainer import Trainer

    workers, device = plan.options.num_workers, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = -(-plan.config.train.batch_size // workers)  # the largest of the ranks' shares
    one = apply_values(plan.config, {"train.batch_size": share})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            one, load_dataset(one.data.path), process=Process(device=device), folder=Path(folder), tracker=NullTracker()
        )
        seconds = trainer.time_step()
    steps = trainer.loader.steps_per_epoch // workers * plan.config.train.epochs
    hours = plan.trials * workers * steps * seconds / 3600
    cost = "" if price_per_hour is None else f", {hours * price_per_hour:.2f} at {price_per_hour:g} an hour"
    kind = "GPU" if device.type == "cuda" else "CPU worker"
    return (
        f"a step of {share} images takes {seconds:.2f} s here ({device.type}); {plan.trials} trials x {steps} steps x "
        f"{workers} worker(s): at most {hours:.1f} {kind} hours{cost}"
    )


def write_plan(plan: SweepPlan) -> None:
    """Keeps a plan in its folder, for `resume_plan`."""
    options = asdict(plan.options)
    del options["storage"]
    record = {
        "config": plan.config.model_dump(mode="json"),
        "options": options,
        "space": [str(domain) for domain in plan.space],
        "ablation": plan.ablation,
        "seeds": list(plan.seeds),
        "variants": list(plan.variants),
    }
    write_json(plan.folder / _RECORD, record)


def trial_config(plan: SweepPlan, values: Mapping[str, Any]) -> Config:
    """The configuration of a trial.

    Args:
        plan: of the sweep.
        values: settings by key; an ablation's trials also have the number of their `variant`.
    """
    config, rest = plan.config, dict(values)
    if plan.ablation:
        config = apply_overrides(config, get_ablation(plan.ablation).variants[rest.pop("variant")].changes)
    return apply_values(config, rest)


def _settled(config: Config, options: SweepOptions, space: Sequence[Domain], ablation: str) -> SweepOptions:
    """Options with everything decided that could be left open."""
    searcher = options.searcher
    if options.scheduler == "pbt" and not ablation:
        searcher = _check_population(options, space)
    if searcher == "auto":
        searcher = "optuna" if find_spec("optuna") else "random"
    if searcher == "optuna" and not find_spec("optuna"):
        raise ConfigError("searcher 'optuna' needs the extra `sweep`: pip install 'slrnet[sweep]'; or use random")
    if searcher == "grid":
        for domain in space:
            grid_of(domain)
    if config.evaluation.every != 1 and not ablation:
        raise ConfigError(
            f"evaluation.every is {config.evaluation.every}; a search needs figures of each epoch: set it to 1"
        )
    metrics = tuple(_logged_name(metric, config) for metric in options.metrics)
    scheduler: Scheduler = "none" if ablation or len(metrics) > 1 else options.scheduler
    least = config.train.pretrain_epochs + 1
    grace = options.grace_epochs if options.grace_epochs is not None else least
    if scheduler != "none":
        _check_grace(config, grace, least, space)
    changes = {"searcher": searcher, "scheduler": scheduler, "grace_epochs": grace, "metrics": metrics}
    return SweepOptions(**{**asdict(options), **changes})


def may_change(key: str) -> bool:
    """Whether a training may change a setting between epochs, as population-based training does."""
    return key.startswith(_CHANGEABLE)


def _check_population(options: SweepOptions, space: Sequence[Domain]) -> Searcher:
    """Refuses what population-based training cannot do; its first settings are drawn at random."""
    if options.searcher not in ("auto", "random"):
        raise ConfigError(f"scheduler pbt draws its first settings at random; leave out searcher {options.searcher!r}")
    if len(options.metrics) > 1:
        raise ConfigError(f"scheduler pbt goes by one metric, not by {len(options.metrics)}; give one")
    if options.num_samples < 2:
        raise ConfigError(f"a population of {options.num_samples} has nobody to take over from; use 2 samples or more")
    if options.perturb_every < 1 or not 0 < options.quantile <= 0.5:
        raise ConfigError(
            f"perturb_every is {options.perturb_every} and quantile {options.quantile}; allowed are 1 epoch or more, "
            "and shares up to 0.5"
        )
    for domain in space:
        if not may_change(domain.key):
            raise ConfigError(
                f"{domain.key} cannot change while a network trains, as scheduler pbt would; leave it out "
                f"({domain.key}=fixed), or use --scheduler asha. It can change {', '.join(_CHANGEABLE)}*"
            )
    return "random"


def _check_grace(config: Config, grace: int, least: int, space: Sequence[Domain]) -> None:
    if grace < least:
        raise ConfigError(
            f"grace_epochs is {grace}, and the first {config.train.pretrain_epochs} epochs have no pseudo labels: "
            f"trials would be stopped by figures that say nothing; use {least} or more"
        )
    for domain in space:
        if domain.key in ("train.epochs", "train.pretrain_epochs"):
            raise ConfigError(
                f"{domain.key} cannot be searched while trials are compared by epochs; use --scheduler none"
            )


def _logged_name(metric: str, config: Config) -> str:
    """Checks a metric's name; `val/miou` gets the protocol that is part of its name."""
    from slrnet.evaluation.protocols import protocol_name
    from slrnet.tracking.mlflow import metric_key

    kinds = ["miou", "mfdr", "mfnr"]
    known = [*(f"pseudo_mask/{kind}" for kind in kinds), *(f"val/{kind}" for kind in kinds)]
    if metric not in known:
        raise ConfigError(f"metric {metric!r} is not measured in a sweep; allowed are {', '.join(known)}")
    if metric.startswith("pseudo_mask/") and not config.evaluation.pseudo_mask_images:
        raise ConfigError(f"metric {metric!r} needs evaluation.pseudo_mask_images above 0")
    return metric_key("val", f"miou_{protocol_name(config.evaluation)}") if metric == "val/miou" else metric


def grid_of(domain: Domain) -> list[Any]:
    """All values of a domain.

    Raises:
        ConfigError: it has no end of them.
    """
    if domain.kind == "choice":
        return list(domain.values)
    if domain.kind == "int":
        return list(range(domain.values[0], domain.values[1] + 1))
    raise ConfigError(f"a grid needs choices; write {domain.key}=choice:A,B,C instead of {str(domain)!r}")
