"""Starts trainings on a Ray cluster, or in this process: the one module that imports Ray.

`launch` runs on the driver. It refuses everything that can be refused before work is lost (settings, data, weights,
storage, tracking server, resources), creates the MLflow run, and then lets Ray Train start one process per worker.
Checkpoints are written by rank 0 into the run's folder, which every node must see under the same path, or which is
copied to and from an object store.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slrnet.checkpoints.checkpoint import (
    MOST_AT_A_TIME,
    CheckpointError,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    require_free_space,
)
from slrnet.checkpoints.run_store import CONFIG, RunStore, run_folder
from slrnet.config import Config, config_from_dict, load_config
from slrnet.data.class_balance import ClassLists, shares, table
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.data.supervision import Supervision, supervision_of
from slrnet.distributed.process import Process, configure_process, current_process, gather_over_ranks
from slrnet.distributed.watchdog import Hang, Watchdog, dump_stacks, shared_store
from slrnet.launch.cluster import WorkerPlan, await_lost_nodes, plan_workers
from slrnet.storage.remote import filesystem_of
from slrnet.tracking.mlflow import NOTE_TAG, NullTracker, RunHandle, Tracker, create_run, environment_tags, resolve_uri
from slrnet.tracking.run_log import RunLog, find_failure
from slrnet.tracking.summary import PICTURES, description, result_text

# The network and the trainer are imported where they are used: Ray's controller reads this module and needs neither.
__all__ = [
    "Job",
    "LaunchOptions",
    "Report",
    "RunResult",
    "TrainingError",
    "check_run",
    "launch",
    "resume_config",
    "run_job",
    "train_trial",
    "with_absolute_paths",
]


class Report:
    """Where a job leaves its figures and hears of what is to come; this one, of a single process, does neither.

    Every worker must call both equally often.
    """

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Leaves figures."""

    def notice(self) -> str:
        """Why the workers may be stopped soon; "" otherwise."""
        return ""


Job = Callable[[dict[str, Any], Process, Report], None]
"""What runs on the workers: a function of plain values, the process's ranks and a place to report to."""

_MOST_CLASSES = 20
"""Rows of the table of classes that a start prints."""

WORKER_ENVIRONMENT = {"env_vars": {"RAY_worker_niceness": "0"}}
"""Of training workers: they run at the job's own priority. At Ray's usual one for workers, 15, its daemons push them
aside whenever they wake up."""
HANG_EXIT_CODE = 75
"""Exit code of a worker whose rank, or one that it waits for, hangs."""
LAST_WORDS = 30.0
"""Seconds that such a worker has to copy its log to an object store."""


class TrainingError(RuntimeError):
    """The training failed; the message is the cause, without the layers around it."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where and on what a run goes; the run itself is a `Config`."""

    name: str
    """Unique name of the run; its folder is storage/name."""
    storage: Path
    """Absolute folder for runs, visible to all nodes; with `remote` this machine's own."""
    remote: str = ""
    """Where runs stay in an object store, such as s3://BUCKET/RUNS; then `storage` is `run_folder` of it, less the
    name, and nodes share no folder. Empty: they stay in `storage`."""
    resume: bool = False
    """Continue the run of that name from its last checkpoint."""
    num_workers: int | tuple[int, int] | None = None
    """Training processes; 0 trains in this process without Ray; a pair: the fewest and the most, as many as the cluster
    has room for at the time; None: one per GPU of the cluster, else 1."""
    cpus_per_worker: int | None = None
    """CPU cores per worker; None: an equal share of the cluster's."""
    cpu_only: bool = False
    """Use no GPUs."""
    wait_minutes: float = 0.0
    """Time that a cluster which grows on demand has to get the nodes of the fewest workers; 0 takes it as it is."""
    max_failures: int = 0
    """Times that a failed worker group is started again from the last checkpoint."""
    hang_limit: float = 600.0
    """Seconds that a rank may stand still before the attempt ends with its name; 0 waits for ever. Below 300 a storage
    that fails for a while, for which a checkpoint waits, is taken for a hang."""

    @property
    def location(self) -> str:
        """Of the run in the object store; empty where it is a folder."""
        return self.remote and f"{self.remote.rstrip('/')}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    last: Path
    best: Path
    state: TrainState
    run: RunHandle


def launch(config: Config, options: LaunchOptions, *, say: Callable[[str], None] = print) -> RunResult:
    """Trains a run to its end.

    Args:
        config: of the run, `data.path` set.
        options: name, storage, workers.
        say: receives lines for people.

    Raises:
        ValueError: a setting, the data, the weights, the storage, the tracking store or the cluster does not allow the
            run; nothing has been started.
        TrainingError: a worker failed.
    """
    config, shards = with_absolute_paths(config)
    folder = options.storage / options.name
    store = RunStore(options.location, folder) if options.remote else None
    if store is not None:
        store.fetch() if options.resume else store.start()
    last = _check_folder(folder, resume=options.resume)
    workers = _plan_workers(options, say)
    supervision = check_run(config, shards, max(1, workers.most))
    require_free_space(folder, MOST_AT_A_TIME * _checkpoint_bytes(config, shards))
    labels = supervision.describe()
    handle = _create_run(config, options, shards, labels=labels, workers=workers, resume=options.resume)
    (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
    if store is not None:
        store.upload(checkpoints=False)
    say(
        f"run {options.name}: {shards.info.name}, setting {config.setting}, {labels}; "
        f"{workers}, folder {options.location or folder}"
    )
    if config.data.class_balance:
        say(_class_balance(config, shards, supervision))
    say(f"curves and pictures: {handle.how_to_open()}")
    if last is not None:
        state = read_state(last)
        say(f"resuming after {state.epoch} epochs ({state.step} steps) from {last}")
    elif options.resume:
        say("resuming a run that has no checkpoint yet: from the beginning")
    driver = _train_tracked(config, handle, options, workers)
    if store is not None:
        store.fetch()
    return _conclude(config, folder, handle, driver)


def train_trial(
    config: Config,
    options: LaunchOptions,
    *,
    parent: RunHandle,
    workers: WorkerPlan,
    until: int | None = None,
    notes: Mapping[str, float] | None = None,
) -> None:
    """Trains one trial of a sweep within a Tune session, which receives the figures of every epoch.

    A trial that was interrupted goes on from its last checkpoint, in the MLflow run that it has.

    Args:
        config: of the trial, with absolute paths; `check_run` has passed it.
        options: name and storage of the trial.
        parent: the sweep's run.
        workers: of the trial.
        until: stop when so many epochs are finished; None: all of them.
        notes: figures for the trial's curves at the step from which it goes on.

    Raises:
        TrainingError: a worker failed; the trial's run says why.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    shards = load_dataset(config.data.path)
    labels = supervision_of(config, shards).describe()
    handle = _create_run(config, options, shards, labels=labels, workers=workers, resume=None, parent=parent)
    folder = options.storage / options.name
    if notes:
        last = find_checkpoint(folder / "checkpoints")
        Tracker(handle, once=True).log_metrics(notes, 0 if last is None else read_state(last).step)
    driver = _train_tracked(config, handle, options, workers, until=until, callbacks=[TuneReportCallback()])
    best = find_checkpoint(folder / "checkpoints", which="best")
    if best is not None:
        driver.describe(_result(config, folder, read_state(best)), PICTURES)
    driver.finish()


def resume_config(storage: Path, name: str, *, remote: str = "") -> Config:
    """The configuration with which a run was started: its last checkpoint's, or before there is one the run's own.

    Args:
        storage: folder for runs.
        name: of the run.
        remote: place of runs in an object store, from which it is brought to the folder first; empty for none.

    Raises:
        CheckpointError: there is no such run.
        RemoteError: the object store refuses it.
    """
    if remote:
        RunStore(f"{remote.rstrip('/')}/{name}", storage / name).fetch()
    last = _check_folder(storage / name, resume=True)
    return load_config(storage / name / CONFIG) if last is None else load_checkpoint(last).config


def run_job(job: Job, values: dict[str, Any], options: LaunchOptions) -> None:
    """Runs something else than a training, an evaluation for instance, in this process or in Ray Train's workers.

    Args:
        job: a function of a module; it is called in every worker with `values`, its `Process` and a place to report to.
        values: plain values; the job finds its share of the CPU cores added as `cpus`.
        options: workers; name and storage give the folder in which Ray keeps its own state.

    Raises:
        ClusterError: the cluster has less than was asked for.
        TrainingError: a worker failed.
    """
    workers = _plan_workers(options, print)
    try:
        _run(job, values | {"cpus": workers.cpus}, folder=options.storage / options.name, workers=workers)
    except Exception as error:
        cause = _cause(error)
        raise TrainingError(f"{type(cause).__name__}: {cause}") from error


def _train_tracked(
    config: Config,
    handle: RunHandle,
    options: LaunchOptions,
    workers: WorkerPlan,
    *,
    until: int | None = None,
    callbacks: Sequence[Any] = (),
) -> Tracker:
    """Trains; a run that fails says why. Returns the run's tracker, the run not yet ended."""
    driver = Tracker(handle)
    folder = options.storage / options.name
    values = {"config": config.model_dump(mode="json"), "folder": str(folder), "handle": handle}
    values |= {"location": options.location, "until": until}
    values["hang_limit"] = options.hang_limit if workers.most else 0.0  # this process is the user's
    begun = time.time()
    try:
        place = options.location or folder
        _run(_train, values, folder=place, workers=workers, failures=options.max_failures, callbacks=callbacks)
    except KeyboardInterrupt:
        driver.finish("KILLED", "interrupted")
        raise
    except Exception as error:
        if options.remote:
            RunStore(options.location, folder).fetch_logs()
        failure = find_failure(folder, since=begun, dead=_dead_ranks(error))
        cause = f"{type(_cause(error)).__name__}: {_cause(error)}" if failure is None else str(failure)
        driver.set_tags({} if failure is None else failure.tags())
        driver.finish("FAILED", cause)
        raise TrainingError(cause) from error
    return driver


def _train(values: dict[str, Any], process: Process, report: Report) -> None:
    from slrnet.training.trainer import Trainer

    config = config_from_dict(values["config"])
    handle: RunHandle = values["handle"]
    store = _open_store(values["location"], process)
    folder = Path(values["folder"]) if store is None else store.folder
    log = RunLog(folder, rank=process.rank)
    tracker = Tracker(handle, once=True) if process.is_main else NullTracker()
    watchdog = Watchdog(
        process,
        limit=values["hang_limit"],
        store=shared_store(process),
        on_hang=lambda hang: _end_hang(hang, log, store),
    )
    try:
        trainer = Trainer(
            config,
            load_dataset(config.data.path),
            process=process,
            folder=folder,
            tracker=tracker,
            run_id=handle.run_id,
            log=log,
            watchdog=watchdog,
            upload=None if store is None else store.upload,
        )
        trainer.resume()
        log.write("start", step=trainer.state.step, world_size=process.world_size)
        trainer.fit(report=report, notice=report.notice, until=values["until"])
        tracker.drain()
    except Exception as error:
        position = watchdog.position
        log.write(
            "failure",
            step=position.step,
            place=position.place,
            exception=type(error).__name__,
            message=" ".join(str(error).split())[:2000],
        )
        raise
    finally:
        watchdog.close()
        if store is not None:
            store.upload_rest()


def _open_store(location: str, process: Process) -> RunStore | None:
    """The run's place in an object store, from which all ranks bring the same checkpoints to their nodes."""
    if not location:
        return None
    store = RunStore(location, run_folder(location), rank=process.rank)
    store.fetch(gather_over_ranks(store.checkpoints() if process.is_main else [], process)[0])
    return store


def _end_hang(hang: Hang, log: RunLog, store: RunStore | None) -> None:
    """Ends this process: its main thread waits where no exception can reach it."""
    log.write("hang", rank=hang.rank, node=hang.node, step=hang.step, exception="hang", message=hang.message)
    print(f"{hang.message}; ending this rank. Its threads:", file=sys.stderr, flush=True)
    dump_stacks()
    if store is not None:
        last = threading.Thread(target=store.upload_rest, daemon=True)
        last.start()
        last.join(LAST_WORDS)
    os._exit(HANG_EXIT_CODE)


def _run(
    job: Job,
    values: dict[str, Any],
    *,
    folder: Path | str,
    workers: WorkerPlan,
    failures: int = 0,
    callbacks: Sequence[Any] = (),
) -> None:
    """Runs a job in this process (no workers) or in Ray Train's workers; `callbacks` are Ray Train's.

    Ray keeps its own state in `folder`, a path or a location in an object store.
    """
    if workers.most == 0:
        configure_process(None)
        job(values, Process(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")), Report())
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it shows every line of a worker twice
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    system, place = filesystem_of(folder) if isinstance(folder, str) else (None, str(folder))
    TorchTrainer(
        _on_worker,
        train_loop_config={"job": job, "values": values, "cpus": workers.cpus},
        scaling_config=ScalingConfig(
            num_workers=workers.most if workers.least == workers.most else (workers.least, workers.most),
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus},
        ),
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        # A new name each time: Ray would take a second start in the same folder for a continuation of the first.
        run_config=RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=f"{place}/ray",
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=failures),
            worker_runtime_env=WORKER_ENVIRONMENT,
            callbacks=[_knows_lost_nodes(), *callbacks],
        ),
    ).fit()


def _knows_lost_nodes() -> Any:
    """A callback of Ray Train, called before workers that failed are started again."""
    from ray.train import UserCallback

    class KnowsLostNodes(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            await_lost_nodes()

    return KnowsLostNodes()


def _on_worker(arguments: dict[str, Any]) -> None:
    from ray.train.torch import get_device

    _silence_reports()
    configure_process(arguments["cpus"])
    device = get_device()
    assert isinstance(device, torch.device)
    arguments["job"](arguments["values"], current_process(device), _RayReport())


class _RayReport(Report):
    """To Ray Train, and from it the nodes that will be taken away."""

    def __call__(self, metrics: Mapping[str, float]) -> None:
        import ray.train

        ray.train.report(dict(metrics))

    def notice(self) -> str:
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None:
            return ""
        left = "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
        return f"the node of rank {', '.join(map(str, info.preempted_ranks))} will be taken away{left}"


def _silence_reports() -> None:
    """Ray prints all metrics of each report, which the progress lines say better; its logger has the file's name."""
    for name in list(logging.root.manager.loggerDict):
        if name.endswith("execution/context.py"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _conclude(config: Config, folder: Path, handle: RunHandle, driver: Tracker) -> RunResult:
    checkpoints = folder / "checkpoints"
    last, best = find_checkpoint(checkpoints), find_checkpoint(checkpoints, which="best")
    if last is None or best is None:
        raise TrainingError(
            f"the training ended without a checkpoint in {checkpoints}; is the folder shared by all nodes?"
        )
    state = read_state(best)
    driver.log_artifacts(best, "checkpoint")
    driver.describe(_result(config, folder, state), PICTURES)
    driver.finish()
    return RunResult(folder=folder, last=last, best=best, state=state, run=handle)


def _result(config: Config, folder: Path, state: TrainState) -> str:
    return result_text(state.metrics, state.classes, epoch=state.epoch, folder=folder, data=config.data.path)


def with_absolute_paths(config: Config) -> tuple[Config, ShardSet]:
    """The configuration and its data set, with paths that mean the same in the folders in which Ray's workers run.

    Raises:
        ValueError: there is no such data set, or the encoder's weights are missing.
    """
    from slrnet.models.encoders import resolve_weights

    shards = load_dataset(config.data.path)
    weights = resolve_weights(config.model.encoder, config.model.encoder_weights)
    changes = {
        "data": config.data.model_copy(update={"path": shards.location}),
        "model": config.model.model_copy(update={"encoder_weights": weights}),
    }
    return config.model_copy(update=changes), shards


def _check_folder(folder: Path, *, resume: bool) -> Path | None:
    last = find_checkpoint(folder / "checkpoints")
    if resume and last is None and not (folder / CONFIG).exists():
        raise CheckpointError(_nothing_to_resume(folder))
    if not resume and folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"run folder {folder} exists; continue that run with --resume {folder.name}, or choose another --name"
        )
    return last


def _nothing_to_resume(folder: Path) -> str:
    others = sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG}"))
    known = f"runs there: {', '.join(others)}" if others else "there are none"
    return f"there is no run {folder.name!r} in {folder.parent} to resume; {known}; start it with --name"


def check_run(config: Config, shards: ShardSet, world_size: int) -> Supervision:
    """Refuses everything about data and batch that a worker would stumble over.

    Args:
        config: of the run.
        shards: its data set.
        world_size: number of workers.

    Returns:
        Which labels the training sees.

    Raises:
        ValueError: a split or subset is missing, or the batch does not fit the workers or the data.
    """
    from slrnet.training.trainer import check_batch

    check_batch(config, world_size)
    shards.split(config.data.val_split)
    supervision = supervision_of(config, shards)
    if supervision.draws < config.train.batch_size:
        raise ValueError(
            f"an epoch of split {config.data.train_split!r} has {supervision.draws} samples, fewer than "
            f"train.batch_size {config.train.batch_size}; use a batch of {supervision.draws} or less"
        )
    return supervision


def _class_balance(config: Config, shards: ShardSet, supervision: Supervision) -> str:
    """What class balancing will do, as a table."""
    samples = np.concatenate([pool.samples.array for pool in supervision.pools])
    draws = np.concatenate([np.broadcast_to(pool.draws, len(pool.samples)) for pool in supervision.pools])
    lists = ClassLists.of(shards.split(config.data.train_split), samples)
    return table(shares(lists, draws, strength=config.data.class_balance), shards.info.classes, most=_MOST_CLASSES)


def _checkpoint_bytes(config: Config, shards: ShardSet) -> int:
    from slrnet.models.slrnet import network_of

    with torch.device("meta"):
        model = network_of(config, num_classes=shards.info.num_classes, weights=False)
    values: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    momentum: int = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    return values + momentum


def _create_run(
    config: Config,
    options: LaunchOptions,
    shards: ShardSet,
    *,
    labels: str,
    workers: WorkerPlan,
    resume: bool | None,
    parent: RunHandle | None = None,
) -> RunHandle:
    environment, folder = environment_tags(), options.storage / options.name
    note = description(config, data=shards.info.name, labels=labels, commit=environment["git_commit"], folder=folder)
    tags = environment | {
        NOTE_TAG: note,
        "slrnet.data": shards.info.name,
        "slrnet.data_fingerprint": shards.info.fingerprint,
        "slrnet.world_size": workers.count,
        "slrnet.global_batch": str(config.train.batch_size),
        "slrnet.setting": config.setting,
        "slrnet.encoder": config.model.encoder,
        "slrnet.recipe": config.recipe,
        "slrnet.folder": options.location or str(folder),
    }
    return create_run(
        resolve_uri(config.tracking.uri, options.remote or options.storage) if parent is None else parent.uri,
        config.tracking.experiment,
        options.name,
        params=config.flat(),
        tags=tags,
        resume=resume,
        config_json=config.to_json(),
        parent=parent,
    )


def _plan_workers(options: LaunchOptions, say: Callable[[str], None]) -> WorkerPlan:
    return plan_workers(
        options.num_workers,
        cpus=options.cpus_per_worker,
        cpu_only=options.cpu_only,
        wait_minutes=options.wait_minutes,
        say=say,
    )


def _dead_ranks(error: BaseException) -> list[int]:
    """Ranks whose process ended by itself."""
    from ray.exceptions import RayActorError

    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    return [rank for rank, failure in failures.items() if isinstance(_cause(failure), RayActorError)]


def _cause(error: BaseException) -> BaseException:
    """The first error in a worker, without the layers that Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _cause(failures[min(failures)])
    wrapped = (getattr(error, name, None) for name in ("_base_exc", "cause", "health_check_failure"))
    inner = next((found for found in wrapped if isinstance(found, BaseException) and found is not error), None)
    return error if inner is None else _cause(inner)
