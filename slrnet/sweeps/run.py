"""Runs sweeps and ablations on a Ray cluster: the one module that imports ray.tune.

Each trial is a whole distributed training. An actor starts it; it takes memory but no CPU core, and sits on the head
node, so that only workers compete for cores and GPUs. The number of trials at a time follows the cluster. Trials keep
their runs under `STORAGE/SWEEP/trials`, a folder or in an object store, and their metrics are read from there. In a
resumed sweep, interrupted trials continue from their last checkpoint.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from slrnet.checkpoints.checkpoint import find_checkpoint
from slrnet.launch.cluster import WorkerPlan, WorkerRequest, cluster_nodes, cluster_resources, largest_share
from slrnet.launch.train import LaunchOptions, TrainingError, train_trial
from slrnet.storage import shown
from slrnet.storage.folders import mark_folder, remove_folder
from slrnet.storage.lease import owned
from slrnet.storage.remote import filesystem_of
from slrnet.sweeps.ablations import ABLATIONS
from slrnet.sweeps.plan import REDUCTION, SweepOptions, SweepPlan
from slrnet.sweeps.population import Member, member_name, train_population
from slrnet.sweeps.results import prune_trials, write_results
from slrnet.sweeps.trials import Mode, Trial, Trials, mode_of, trial_rows
from slrnet.tracking.location import resolve_uri
from slrnet.tracking.mlflow import MlflowTracker, create_run
from slrnet.tracking.protocol import RunHandle
from slrnet.tracking.provenance import environment_tags
from slrnet.tracking.reader import comparison, runs_below

__all__ = ["replay_asha", "run_sweep"]

_COMPARED = 30
"""Trials in the link of a sweep's description, which has 5,000 characters."""
_DRIVER = {"node:__internal_head__": 0.001, "memory": 2**30}
"""Resources of the actor that starts a trial: on the head node, with 865 MB of imported PyTorch, Ray and MLflow."""


def run_sweep(plan: SweepPlan, *, resume: bool = False, say: Callable[[str], None] = shown.say) -> None:
    """Runs a sweep to its end, or with `resume` the rest of the one in its folder; `say` receives the lines to show.

    Raises:
        ValueError: the cluster or the tracking store does not allow it, or another process works in its folder.
        TrainingError: no trial was measured.
    """
    with owned(plan.options.lease, f"sweep folder {plan.options.place}"):
        _run_sweep(plan, resume=resume, say=say)


def _run_sweep(plan: SweepPlan, *, resume: bool, say: Callable[[str], None]) -> None:
    name = plan.options.name
    workers = _workers_of_a_trial(plan.options, say)
    room = _Room(workers, plan.options.max_concurrent, grows=plan.options.wait_minutes > 0)
    parent = _open_parent(plan, resume=resume)
    if not resume:
        if (store := plan.options.store) is not None:
            store.start("sweep")
        plan.write()
    say(f"sweep {name}: {plan.trials} trials, now {room()} at a time with {workers} each; folder {plan.options.place}")
    say(f"curves and pictures: {parent.how_to_open()}")
    driver, sweep = MlflowTracker(parent), _Sweep(plan, parent, workers, room)
    try:
        trained = sweep.train_population(say) if plan.options.scheduler == "pbt" else sweep.train(resume=resume)
    except KeyboardInterrupt:
        driver.finish("KILLED", "interrupted")
        raise
    except Exception as error:
        driver.finish("FAILED", str(error))
        raise
    trials = Trials(trained, plan.options.metrics)
    best = trials.best
    sweep.finish_children(trials)
    if best is None:
        cause = next((trial.error for trial in trained if trial.error), "none was measured")
        driver.finish("FAILED", cause)
        raise TrainingError(f"no trial of sweep {name} has {trials.metrics[0]}; the first error: {cause}")
    sweep.conclude(driver, trials, best, say)


def _workers_of_a_trial(options: SweepOptions, say: Callable[[str], None]) -> WorkerPlan:
    """The workers of a trial; waits for their nodes if the options say so."""
    WorkerRequest.plan(options, say)
    _, gpus = cluster_resources()
    shared = largest_share(cluster_nodes(), gpus, gpu=True) if gpus and not options.cpu_only else 1
    return replace(options, cpus_per_worker=options.cpus_per_worker or shared, wait_minutes=0.0).plan(say)


@dataclass(frozen=True)
class _Room:
    """How many trials run at a time, as the cluster is now; at least one, which waits if there is no room."""

    workers: WorkerPlan
    most: int | None
    """As the user says."""
    grows: bool
    """Whether the cluster grows for trials that wait."""

    def __call__(self) -> int:
        cpus, gpus = cluster_resources()
        fits = cpus // (self.workers.least * self.workers.cpus)
        fits = min(fits, gpus // self.workers.least) if self.workers.gpu else fits
        return max(1, self.most or fits + 1 if self.grows else min(fits, self.most or fits))


class _Follows:
    """A searcher whose number of trials at a time follows the cluster."""

    room: _Room
    max_concurrent = property(lambda self: self.room(), lambda self, value: None)


class _Grid(_Follows, BasicVariantGenerator):
    def __init__(self, room: _Room, **options: Any) -> None:
        self.room = room
        super().__init__(**options)


class _Limiter(_Follows, ConcurrencyLimiter):
    def __init__(self, room: _Room, searcher: Any) -> None:
        self.room = room
        super().__init__(searcher, max_concurrent=1)


def _open_parent(plan: SweepPlan, *, resume: bool) -> RunHandle:
    """The sweep's MLflow run, below which the trials have theirs."""
    tracking = plan.config.tracking
    tags = environment_tags() | {"slrnet.recipe": plan.config.recipe, "slrnet.folder": str(plan.options.place)}
    tags["slrnet.sweep"] = plan.ablation or "search"
    asked = f"ablation {plan.ablation}" if plan.ablation else "search over " + ", ".join(d.key for d in plan.space)
    note = (
        f"- {asked}: {plan.trials} trials of recipe **{plan.config.recipe}**, setting **{plan.config.setting}**, "
        f"encoder **{plan.config.model.encoder}**\n- data `{plan.config.data.path}`\n"
        f"- commit {tags['git_commit'][:12]}, folder `{plan.options.place}`"
    )
    return create_run(
        resolve_uri(tracking.uri, plan.options.remote or plan.options.storage),
        tracking.experiment,
        plan.options.name,
        params={f"search.{domain.key}": str(domain).partition("=")[2] for domain in plan.space},
        tags=tags,
        resume=None if resume else False,
        config_json=plan.config.to_json(),
        description=note,
    )


@dataclass(frozen=True)
class _Sweep:
    """A sweep under way: its plan, its MLflow run, the workers of a trial, and the trials at a time."""

    plan: SweepPlan
    parent: RunHandle
    workers: WorkerPlan
    room: _Room

    def train(self, *, resume: bool) -> list[Trial]:
        """Trains all trials of a search or an ablation."""
        results = self._fit("tune", _param_space(self.plan), _tune_config(self.plan, self.room), resume=resume)
        return [_trial_of(self.plan, result) for result in results]

    def train_population(self, say: Callable[[str], None]) -> list[Trial]:
        """Trains the members of a population round by round."""

        def train_round(until: int, members: Mapping[int, Member]) -> dict[int, str]:
            config = tune.TuneConfig(search_alg=_Grid(self.room), trial_dirname_creator=attrgetter("trial_id"))
            space = {"member": tune.grid_search(list(members))}
            results = self._fit(f"tune-{until:04d}", space, config, resume=True, until=until, members=members)
            return {result.config["member"]: _error_of(result) for result in results}

        return train_population(self.plan, train_round, say=say)

    def _fit(self, name: str, space: dict[str, Any], config: Any, *, resume: bool, **job: Any) -> list[Any]:
        """Runs trials with Tune, which keeps its state as `name` in the sweep's folder; returns a result for each.

        Raises:
            TrainingError: Tune itself failed.
        """
        trainable = tune.with_resources(tune.with_parameters(_trial, sweep=self, **job), _DRIVER)
        plan, store = self.plan, self.plan.options.store
        system, storage = (None, str(plan.folder)) if store is None else filesystem_of(store.location)
        state = f"{storage}/{name}"
        if resume and tune.Tuner.can_restore(state, storage_filesystem=system):
            again = {"resume_unfinished": True, "resume_errored": True}
            tuner = tune.Tuner.restore(state, trainable, storage_filesystem=system, **again)
        else:
            if store is not None:
                store.remove(name)  # of a sweep killed before its first trial
            else:
                remove_folder(plan.folder / name, within=plan.folder)
                mark_folder(plan.folder / name)
            run_config = tune.RunConfig(
                name=name,
                storage_path=storage,
                storage_filesystem=system,
                failure_config=tune.FailureConfig(max_failures=plan.options.max_failures),
                callbacks=[_Progress(plan)],
                verbose=0,
            )
            tuner = tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run_config)
        try:
            return list(tuner.fit())
        except tune.TuneError as error:  # of Tune itself, with a traceback for a text; a trial's ends in its result
            cause = _last_line(error)
            raise TrainingError(f"Ray Tune ended: {cause}; continue with --resume {plan.options.name}") from error

    def finish_children(self, trials: Trials) -> None:
        """Ends the runs of trials that were stopped early or killed, and uploads the best one's checkpoint."""
        children, best = runs_below(self.parent), trials.best
        for trial in (trial for trial in trials.all if trial.name in children):
            handle, status = children[trial.name]
            tracker = MlflowTracker(handle)
            if trial.schedule:
                tracker.log_text(json.dumps(list(trial.schedule), indent=2), "schedule.json")
            tracker.set_tags({"slrnet.trial_status": trial.status})
            if status == "RUNNING":
                tracker.finish("FAILED" if trial.status == "failed" else "FINISHED", trial.error)
            if trial is best:
                kept = self.plan.trial(trial.name)
                if (store := kept.store) is not None:
                    store.fetch_best()
                if (checkpoint := find_checkpoint(kept.folder / "checkpoints", which="best")) is not None:
                    tracker.log_artifacts(checkpoint, "checkpoint")

    def conclude(self, driver: MlflowTracker, trials: Trials, best: Trial, say: Callable[[str], None]) -> None:
        """Shows the results, and writes them into the sweep's folder and its MLflow run."""
        plan, folder = self.plan, self.plan.folder / "results"
        table = write_results(plan, trials, replay=_replay(plan, trials, self.room()))
        plan.upload(folder.name)
        driver.log_artifacts(folder)
        driver.log_metrics({name: value for name, value in best.metrics.items() if name.count("/") == 1}, 0)
        driver.set_tags({"slrnet.best_trial": best.name})
        command = f"slrnet train --config {folder / 'best_config.json'}"
        following = "" if plan.ablation else f"\n\nNext: `{command}`"
        trial_runs = [handle for handle, _ in runs_below(self.parent).values()][:_COMPARED]
        link = f"[Trials side by side, with parallel coordinates]({comparison(trial_runs)})"
        driver.describe(f"Best trial: {best.name}{following}\n\n{link}\n\n{table}")
        driver.finish()
        say(f"\n{table}\nbest: {best.name}; tables and pictures: {folder}")
        if plan.options.remote:
            say(f"all of it is in {plan.options.place}")
        if not plan.options.keep_checkpoints:
            say(prune_trials(plan, trials))
        if not plan.ablation:
            say(f"train with it: {command}")
        say(f"curves: {self.parent.how_to_open()}")


def _trial(
    values: Mapping[str, Any], *, sweep: _Sweep, until: int | None = None, members: Mapping[int, Member] | None = None
) -> None:
    """Runs in a trial's actor; a population's member trains one round with its present settings, kept as curves."""
    plan, tags, notes = sweep.plan, {}, {}
    name = f"{plan.options.name}-{tune.get_context().get_trial_id()}"
    changes: set[str] = set()
    if plan.ablation:
        variants = ABLATIONS[plan.ablation].variants
        tags["slrnet.variant"] = variants[values["variant"]].label
        changes = {change.partition("=")[0] for index in plan.variants for change in variants[index].changes}
    if members is not None:
        member = members[values["member"]]
        name, values = member_name(plan, member.index), member.values
        sources = ", ".join(f"{member_name(plan, c.source)} after epoch {c.epoch}" for c in member.schedule[1:])
        notes = {f"setting/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        tags |= {"slrnet.exploited_from": sources} if sources else {}
    unreported = train_trial(
        plan.trial_config(values),
        LaunchOptions(**vars(plan.trial(name)), hang_limit=plan.options.hang_limit),
        parent=sweep.parent,
        workers=sweep.workers,
        callbacks=[TuneReportCallback()],
        until=until,
        notes=notes,
        tags=tags,
        searched=changes | values.keys(),
    )
    if unreported:  # Tune takes no trial that ends without the metrics of its search
        tune.report(unreported)


def _param_space(plan: SweepPlan) -> dict[str, Any]:
    if plan.ablation:
        return {"variant": tune.grid_search(list(plan.variants)), "train.seed": tune.grid_search(list(plan.seeds))}
    if plan.options.searcher == "grid":
        return {domain.key: tune.grid_search(domain.grid()) for domain in plan.space}
    kinds = {
        "choice": lambda *choices: tune.choice(list(choices)),
        "int": lambda low, high: tune.randint(low, high + 1),
        "uniform": tune.uniform,
        "loguniform": tune.loguniform,
    }
    return {domain.key: kinds[domain.kind](*domain.values) for domain in plan.space}


def _tune_config(plan: SweepPlan, room: _Room) -> tune.TuneConfig:
    options, first = plan.options, [plan.recipe_point]
    modes = [mode_of(metric) for metric in options.metrics]
    goal: dict[str, Any] = {"metric": options.metrics[0], "mode": modes[0]}
    if len(modes) > 1:
        goal = {"metric": list(options.metrics), "mode": modes}
    # Tune's own limit of trials at a time has no effect on this searcher of grids and random draws.
    search: Any = _Grid(room)
    if options.searcher == "optuna" and not plan.ablation:
        search = _Limiter(room, OptunaSearch(points_to_evaluate=first, seed=options.seed, **goal))
    elif options.searcher == "random" and not plan.ablation:
        search = _Grid(room, points_to_evaluate=first, random_state=options.seed)
    asha = None
    if options.scheduler == "asha":
        rungs = {"grace_period": options.grace_epochs, "reduction_factor": REDUCTION}
        asha = ASHAScheduler(time_attr="epoch", max_t=plan.config.train.epochs, **rungs, **goal)
    return tune.TuneConfig(
        search_alg=search,
        scheduler=asha,
        num_samples=1 if plan.ablation or options.searcher == "grid" else options.num_samples,
        trial_dirname_creator=attrgetter("trial_id"),
    )


@dataclass(frozen=True)
class _Progress(tune.Callback):
    """Prints what trials report."""

    plan: SweepPlan

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        done, metric = sum(other.is_finished() for other in trials), self.plan.options.metrics[0]
        shown.say(
            f"trial {trial.trial_id}, epoch {result.get('epoch')}/{self.plan.config.train.epochs}: {metric} "
            f"{100 * result.get(metric, math.nan):.1f} % ({done} of {self.plan.trials} trials done)",
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        shown.say(f"trial {trial.trial_id} failed; the sweep continues")


def _trial_of(plan: SweepPlan, result: Any) -> Trial:
    name, values = f"{plan.options.name}-{Path(result.path).name}", dict(result.config)
    planned = plan.trial_config(values).train.epochs
    trial = Trial(name=name, values=values, planned=planned, error=_error_of(result))
    kept = plan.trial(name)
    if (store := kept.store) is not None:
        store.fetch_logs()
    return trial.measured(trial_rows(kept.folder), plan.options.metrics[0])


def _error_of(result: Any) -> str:
    """The last line of a trial's error, without the exception's name where it is ours; empty where it has none."""
    if result.error is None:
        return ""
    return _last_line(result.error).removeprefix(f"{TrainingError.__module__}.{TrainingError.__name__}: ")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


def _replay(plan: SweepPlan, trials: Trials, concurrent: int) -> dict[str, int]:
    """Epochs that ASHA would have given the trials of a search without early stopping; empty for other sweeps."""
    options = plan.options
    curves = {trial.name: trial.curve for trial in trials.all if trial.status == "finished" and None not in trial.curve}
    alike = len(curves) > 1 and len({len(curve) for curve in curves.values()}) == 1
    if plan.ablation or options.scheduler != "none" or len(options.metrics) > 1 or not alike:
        return {}
    mode, grace = mode_of(options.metrics[0]), options.grace_epochs or 1
    return replay_asha(curves, mode=mode, grace=grace, reduction=REDUCTION, concurrent=concurrent)


def replay_asha(
    curves: Mapping[str, Sequence[float | None]], *, mode: Mode, grace: int, reduction: float, concurrent: int
) -> dict[str, int]:
    """The epochs that ASHA would have given each trial, if it had seen these curves while all trained at equal speed.

    Args:
        curves: a metric after each epoch, by trial, in the order in which trials start; all of one length.
        mode: whether a higher or a lower value is better.
        grace: epochs before a trial may be stopped.
        reduction: one trial in so many continues.
        concurrent: trials at a time.
    """
    longest = max(map(len, curves.values()))
    scheduler = ASHAScheduler(
        time_attr="epoch", metric="score", mode=mode, max_t=longest, grace_period=grace, reduction_factor=reduction
    )
    waiting, trained = deque(SimpleNamespace(trial_id=name) for name in curves), dict.fromkeys(curves, 0)
    running: list[SimpleNamespace] = []
    while waiting or running:
        while waiting and len(running) < concurrent:
            running.append(waiting.popleft())
            scheduler.on_trial_add(None, running[-1])
        for trial in tuple(running):
            epoch = trained[trial.trial_id] = trained[trial.trial_id] + 1
            result = {"epoch": epoch, "score": curves[trial.trial_id][epoch - 1]}
            if scheduler.on_trial_result(None, trial, result) == scheduler.STOP or epoch == longest:
                running.remove(trial)
    return trained
