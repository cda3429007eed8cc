"""Sweeps and ablations on a Ray cluster: the one module that imports ray.tune.

Each trial is a whole distributed training, started by a small actor that takes no CPU core and sits on the head node,
so that only workers compete for cores and GPUs. Trials keep their runs under `STORAGE/SWEEP/trials`; a sweep that was
killed goes on with finished trials kept and interrupted ones from their last checkpoint.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slrnet.ablations import get_ablation
from slrnet.search import Domain
from slrnet.training.checkpoint import find_checkpoint
from slrnet.training.cluster import ClusterError, Workers, cluster_resources
from slrnet.training.ray_loop import LaunchOptions, TrainingError, train_trial
from slrnet.training.sweep_plan import SweepOptions, SweepPlan, grid_of, trial_config, write_plan
from slrnet.training.sweep_results import Trial, best_trial, mode_of, write_results
from slrnet.training.tracking import NOTE_TAG, RunHandle, Tracker, create_run, environment_tags, resolve_uri, runs_below

__all__ = ["SweepResult", "run_sweep"]

_HEAD = {"node:__internal_head__": 0.001}


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep leaves."""

    trials: list[Trial]
    best: Trial
    """By the first metric."""
    best_config: Path | None
    """A file for `ray_jobs/train.py --config`; None for ablations."""
    table: str
    """Markdown, also in `results/summary.md`."""
    run: RunHandle


def run_sweep(plan: SweepPlan, *, resume: bool = False, say: Callable[[str], None] = print) -> SweepResult:
    """Runs a sweep to its end, or the rest of one.

    Args:
        plan: from `plan_sweep`, or with `resume` from `resume_plan`.
        resume: go on with the sweep that the plan's folder holds.
        say: receives lines for people.

    Raises:
        ValueError: the cluster or the tracking store does not allow it.
        TrainingError: no trial reached an end.
    """
    options = plan.options
    workers, concurrent = _room(options)
    parent = _open_parent(plan, resume=resume)
    if not resume:
        write_plan(plan)
    say(f"sweep {options.name}: {plan.trials} trials, {concurrent} at a time with {workers} each; folder {plan.folder}")
    say(f"curves and pictures: {parent.how_to_open()}")
    driver = Tracker(parent)
    try:
        results = _fit(plan, parent, workers, concurrent=concurrent, resume=resume)
    except KeyboardInterrupt:
        driver.finish("KILLED", "interrupted")
        raise
    except Exception as error:
        driver.finish("FAILED", str(error))
        raise
    trials = [_trial_of(plan, result) for result in results]
    best = best_trial(trials, options.metrics[0])
    _finish_children(plan, parent, trials, best)
    if best is None:
        cause = next((trial.error for trial in trials if trial.error), "none was measured")
        driver.finish("FAILED", cause)
        raise TrainingError(f"no trial of sweep {options.name} has {options.metrics[0]}; the first error: {cause}")
    folder = plan.folder / "results"
    config = None if plan.ablation else trial_config(plan, best.values)
    table = write_results(trials, plan.options.metrics, folder, ablation=plan.ablation, best_config=config)
    driver.log_artifacts(folder)
    driver.log_metrics({name: value for name, value in best.metrics.items() if "/iou/" not in name}, 0)
    driver.set_tags({"slrnet.best_trial": best.name})
    following = "" if config is None else f"\n\nNext: `python ray_jobs/train.py --config {folder / 'best_config.json'}`"
    driver.describe(f"Best trial: {best.name}{following}\n\n{table}")
    driver.finish()
    path = folder / "best_config.json" if config is not None else None
    return SweepResult(trials=trials, best=best, best_config=path, table=table, run=parent)


def _room(options: SweepOptions) -> tuple[Workers, int]:
    """The workers of a trial, and how many trials fit at a time."""
    cpus, gpus = cluster_resources()
    per_worker = options.cpus_per_worker or (max(1, cpus // gpus) if gpus else 1)
    by_cpus = cpus // (options.num_workers * per_worker)
    room = min(by_cpus, gpus // options.num_workers) if gpus else by_cpus
    if room < 1:
        raise ClusterError(
            f"a trial asks for {options.num_workers} worker(s) with {per_worker} CPU(s){' and a GPU' if gpus else ''} "
            f"each, the cluster has {cpus} CPUs and {gpus} GPUs; lower --num-workers or --cpus-per-worker"
        )
    workers = Workers(least=options.num_workers, most=options.num_workers, cpus=per_worker, gpu=gpus > 0)
    return workers, min(room, options.max_concurrent or room)


def _open_parent(plan: SweepPlan, *, resume: bool) -> RunHandle:
    tracking = plan.config.tracking
    tags = environment_tags() | {"slrnet.recipe": plan.config.recipe, "slrnet.folder": str(plan.folder)}
    tags["slrnet.sweep"] = plan.ablation or "search"
    asked = f"ablation {plan.ablation}" if plan.ablation else "search over " + ", ".join(d.key for d in plan.space)
    tags[NOTE_TAG] = (
        f"- {asked}: {plan.trials} trials of recipe **{plan.config.recipe}**, setting **{plan.config.setting}**, "
        f"encoder **{plan.config.model.encoder}**\n- data `{plan.config.data.path}`\n"
        f"- commit {tags['git_commit'][:12]}, folder `{plan.folder}`"
    )
    return create_run(
        resolve_uri(tracking.uri, plan.options.storage),
        tracking.experiment,
        plan.options.name,
        params={f"search.{domain.key}": str(domain).partition("=")[2] for domain in plan.space},
        tags=tags,
        resume=None if resume else False,
        config_json=plan.config.to_json(),
    )


def _trial(values: dict[str, Any], *, job: dict[str, Any]) -> None:
    """What a trial's actor runs."""
    from ray import tune

    plan: SweepPlan = job["plan"]
    options = LaunchOptions(
        name=f"{plan.options.name}-{tune.get_context().get_trial_id()}", storage=plan.folder / "trials"
    )
    train_trial(trial_config(plan, values), options, parent=job["parent"], workers=job["workers"])


def _fit(
    plan: SweepPlan,
    parent: RunHandle,
    workers: Workers,
    *,
    concurrent: int,
    resume: bool,
) -> Iterable[Any]:
    """Runs all trials; Tune's results, one for each."""
    from ray import tune

    job = {"plan": plan, "parent": parent, "workers": workers}
    trainable = tune.with_resources(tune.with_parameters(_trial, job=job), _HEAD)
    state = plan.folder / "tune"
    if resume and tune.Tuner.can_restore(str(state)):
        tuner = tune.Tuner.restore(str(state), trainable, resume_unfinished=True, resume_errored=True)
    else:
        shutil.rmtree(state, ignore_errors=True)  # a sweep killed before its first trial
        tuner = tune.Tuner(
            trainable,
            param_space=_param_space(plan),
            tune_config=_tune_config(plan, concurrent),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(plan.folder),
                failure_config=tune.FailureConfig(max_failures=plan.options.max_failures),
                callbacks=[_progress(plan)],
                verbose=0,
            ),
        )
    results: Iterable[Any] = tuner.fit()
    return results


def _param_space(plan: SweepPlan) -> dict[str, Any]:
    from ray import tune

    if plan.ablation:
        variants = list(range(len(get_ablation(plan.ablation).variants)))
        return {"variant": tune.grid_search(variants), "train.seed": tune.grid_search(list(plan.seeds))}
    return {domain.key: _tune_domain(domain, grid=plan.options.searcher == "grid") for domain in plan.space}


def _tune_domain(domain: Domain, *, grid: bool) -> Any:
    from ray import tune

    if grid:
        return tune.grid_search(grid_of(domain))
    if domain.kind == "choice":
        return tune.choice(list(domain.values))
    low, high = domain.values
    if domain.kind == "int":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if domain.kind == "loguniform" else tune.uniform(low, high)


def _tune_config(plan: SweepPlan, concurrent: int) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    options = plan.options
    whole = plan.ablation or options.searcher == "grid"
    modes = [mode_of(metric) for metric in options.metrics]
    aim: dict[str, Any] = {"metric": options.metrics[0], "mode": modes[0]} if len(modes) == 1 else {}
    start = [] if whole else [plan.recipe_point]
    if options.searcher == "optuna" and not whole:
        from ray.tune.search.optuna import OptunaSearch

        many = {} if len(modes) == 1 else {"metric": list(options.metrics), "mode": modes}
        search: Any = OptunaSearch(points_to_evaluate=start, seed=options.seed, **many)
    else:
        # Tune's own limit does not reach this one.
        search = BasicVariantGenerator(
            points_to_evaluate=start or None, random_state=options.seed, max_concurrent=concurrent
        )
    scheduler = None
    if options.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="epoch",
            max_t=plan.config.train.epochs,
            grace_period=options.grace_epochs,
            reduction_factor=options.reduction,
        )
    return tune.TuneConfig(
        search_alg=search,
        scheduler=scheduler,
        num_samples=1 if whole else options.num_samples,
        max_concurrent_trials=None if isinstance(search, BasicVariantGenerator) else concurrent,
        trial_dirname_creator=lambda trial: trial.trial_id,
        **aim,
    )


def _progress(plan: SweepPlan) -> Any:
    """Prints what trials report; a Tune callback, which Tune pickles."""
    from ray.tune import Callback

    epochs, metric = plan.config.train.epochs, plan.options.metrics[0]

    class Progress(Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            done = sum(other.is_finished() for other in trials)
            value = result.get(metric, math.nan)
            print(
                f"trial {trial.trial_id}, epoch {result.get('epoch')}/{epochs}: {metric} {100 * value:.1f} % "
                f"({done} of {plan.trials} trials done)",
                flush=True,
            )

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            print(f"trial {trial.trial_id} failed; the sweep goes on", flush=True)

    return Progress()


def _trial_of(plan: SweepPlan, result: Any) -> Trial:
    name = f"{plan.options.name}-{Path(result.path).name}"
    values = dict(result.config)
    if result.error is not None:
        return Trial(name=name, values=values, status="failed", epochs=0, metrics={}, error=_last_line(result.error))
    frame = result.metrics_dataframe
    metric = plan.options.metrics[0]
    rows = [] if frame is None else frame.to_dict("records")
    figures = [
        {key: value for key, value in row.items() if key.partition("/")[0] in ("pseudo_mask", "val")} for row in rows
    ]
    sign = 1 if mode_of(metric) == "max" else -1
    scored = [row for row in figures if math.isfinite(row.get(metric, math.nan))]
    best = max(scored, key=lambda row: sign * row[metric], default={})
    epochs = max((int(row["epoch"]) for row in rows), default=0)
    done = epochs >= trial_config(plan, values).train.epochs
    return Trial(name=name, values=values, status="finished" if done else "stopped early", epochs=epochs, metrics=best)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


def _finish_children(plan: SweepPlan, parent: RunHandle, trials: Sequence[Trial], best: Trial | None) -> None:
    """Ends the runs of trials that were stopped early or killed, and gives the best one its checkpoint."""
    children = runs_below(parent)
    for trial in trials:
        handle, status = children.get(trial.name, (None, ""))
        if handle is None:
            continue
        tracker = Tracker(handle)
        tracker.set_tags({"slrnet.trial_status": trial.status})
        if status == "RUNNING":
            tracker.finish("FAILED" if trial.status == "failed" else "FINISHED", trial.error)
    if best is not None and best.name in children:
        checkpoint = find_checkpoint(plan.folder / "trials" / best.name / "checkpoints", which="best")
        if checkpoint is not None:
            Tracker(children[best.name][0]).log_artifacts(checkpoint, "checkpoint")
