"""Starts trainings and other jobs on a Ray cluster or in this process: the one module that imports ray.train.

`launch` runs on the driver. It refuses everything that can be refused before work is lost (settings, data, weights,
storage, tracking server, resources), creates the MLflow run, and then lets Ray Train start one process per worker.
Rank 0 writes the checkpoints into the run's folder. Every node must see that folder under the same path, unless the run
is kept in an object store.
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slrnet.checkpoints.checkpoint import MOST_AT_A_TIME, TrainState, find_checkpoint, read_state, require_free_space
from slrnet.checkpoints.run_store import CONFIG, Kept
from slrnet.config import Config
from slrnet.data.manifest import ShardSet, load_dataset
from slrnet.data.supervision import Supervision, supervision_of
from slrnet.distributed.process import Process, configure_process, current_process
from slrnet.launch.checks import (
    balance_table,
    batch_notes,
    check_folder,
    check_run,
    checkpoint_bytes,
    weights_notes,
    with_absolute_paths,
    with_first_weights,
)
from slrnet.launch.cluster import WorkerPlan, WorkerRequest, await_lost_nodes
from slrnet.launch.rank import Job, Report, train_rank
from slrnet.launch.ray_log import RAY_LOG, ray_lines_in
from slrnet.launch.stopping import (
    Interruption,
    MailboxRequests,
    SignalRequests,
    follow,
    open_mailbox,
    save_before_resize,
)
from slrnet.storage import shown
from slrnet.storage.files import write_json, write_text
from slrnet.storage.lease import owned
from slrnet.storage.names import check_run_name
from slrnet.storage.remote import filesystem_of
from slrnet.tracking.location import resolve_uri
from slrnet.tracking.mlflow import MlflowTracker, create_run
from slrnet.tracking.protocol import RunHandle
from slrnet.tracking.provenance import environment_tags
from slrnet.tracking.run_log import find_failure
from slrnet.tracking.summary import class_tags, description, parameters, result_text
from slrnet.training.requests import Requests

__all__ = ["POINTER", "LaunchOptions", "OnEpoch", "RunResult", "TrainingError", "launch", "run_job", "train_trial"]

OnEpoch = Callable[[Mapping[str, float]], bool | None]
"""Hears the figures of each epoch by their MLflow names, `epoch` (from 1) among them; True ends the training."""

POINTER = "checkpoint.json"
"""File of a checkpoint in Ray's own result that says where ours is, and its metrics."""


class TrainingError(RuntimeError):
    """The training failed; the message is the cause, without the layers around it."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(Kept, WorkerRequest):
    """Where a run is kept and what it runs on; the run itself is a `Config`."""

    resume: bool = False
    """Continue the run of that name from its last checkpoint."""
    lease_patience: float = 0.0
    """Seconds to wait for an owner of the run's folder that gives no sign of life, instead of refusing at once."""

    @property
    def ray_log(self) -> Path:
        """What Ray says besides the run's own lines, on this machine."""
        return self.folder / "logs" / RAY_LOG


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    last: Path
    best: Path
    state: TrainState
    run: RunHandle


def launch(
    config: Config,
    options: LaunchOptions,
    *,
    say: Callable[[str], None] = shown.say,
    on_epoch: OnEpoch | None = None,
) -> RunResult:
    """Trains a run to its end.

    Args:
        config: the run's settings, `data.path` included.
        options: name, storage and workers.
        say: receives the lines to show.
        on_epoch: called here after each epoch; when it returns True, the training ends after the step under way, with
            a checkpoint.

    Raises:
        ValueError: a setting, the data, the weights, the storage, the tracking store or the cluster does not allow the
            run, or another process works in its folder; nothing has been started.
        TrainingError: a worker failed.
        KeyboardInterrupt: a signal ended the training, after a checkpoint unless a second one came.
    """
    check_run_name(options.name)
    config, shards = with_absolute_paths(config)
    with owned(options.lease, f"run folder {options.place}", patience=options.lease_patience):
        return _launch(config, shards, options, say, on_epoch)


def _launch(
    config: Config,
    shards: ShardSet,
    options: LaunchOptions,
    say: Callable[[str], None],
    on_epoch: OnEpoch | None,
) -> RunResult:
    """Trains a run whose folder this process holds."""
    folder, store = options.folder, options.store
    if store is not None:
        store.fetch() if options.resume else store.start()
    last = check_folder(folder, resume=options.resume)
    config = config if last else with_first_weights(config, shards)
    workers = options.plan(say)
    supervision = check_run(config, shards, max(1, workers.most))
    require_free_space(folder, MOST_AT_A_TIME * checkpoint_bytes(config, shards))
    training = _Training(config, options, workers, shards, supervision)
    handle = training.create_run(options.resume, None, {})
    write_text(folder / CONFIG, config.to_json())
    if store is not None:
        store.upload(checkpoints=False)
    say(
        f"run {options.name}: {shards.info.name}, setting {config.setting}, {supervision.describe()}; "
        f"{workers}, folder {options.place}"
    )
    if config.train.ema:
        say(f"train.ema={config.train.ema:g}: scores, checkpoints and predictions use weights averaged over steps")
    for note in [*weights_notes(config), *batch_notes(config, workers.most)]:
        say(note)
    if config.data.class_balance:
        say(balance_table(config, shards, supervision))
    say(f"curves and pictures: {handle.how_to_open()}")
    if options.resume and last is None:
        say("resuming a run that has no checkpoint yet: from the beginning")
    try:
        with Interruption() as interruption, ray_lines_in(options.ray_log) if workers.most else nullcontext():
            driver = training.run(handle, interruption=interruption, on_epoch=on_epoch)
    finally:
        if options.ray_log.exists():
            say(f"messages of Ray's own: {options.ray_log}")
    if store is not None:
        store.fetch()
    checkpoints = folder / "checkpoints"
    last, best = find_checkpoint(checkpoints), find_checkpoint(checkpoints, which="best")
    if (
        interruption.number
        and last is not None
        and (state := read_state(last, verify=False)).epoch < config.train.epochs
    ):
        where = f"stopped after step {state.step}; all of it is in {last}"
        driver.finish("KILLED", where)
        storage = options.remote or options.storage
        say(f"{where}; continue with: slrnet train --resume {options.name} --storage {shlex.quote(str(storage))}")
        raise KeyboardInterrupt(interruption.number)
    if last is None or best is None:
        cause = f"the training ended without a checkpoint in {checkpoints}; is the folder shared by all nodes?"
        driver.finish("FAILED", cause)
        raise TrainingError(cause)
    driver.log_artifacts(best, "checkpoint")
    state = training.finish(driver, best)
    return RunResult(last=last, best=best, state=state, run=handle)


def train_trial(
    config: Config,
    options: LaunchOptions,
    *,
    parent: RunHandle,
    workers: WorkerPlan,
    callbacks: Sequence[Any],
    until: int | None = None,
    notes: Mapping[str, float],
    tags: Mapping[str, str],
    searched: Collection[str] = (),
) -> dict[str, float]:
    """Trains one trial of a sweep; an interrupted trial continues from its last checkpoint, in the same MLflow run.

    Args:
        config: the trial's settings, with absolute paths, checked by `check_run`.
        options: the trial's name and storage.
        parent: the sweep's MLflow run.
        workers: the trial's processes.
        callbacks: Ray Train's callbacks, which receive the metrics of every epoch.
        until: epochs after which to stop; None: train all of them.
        notes: values to add to the trial's curves at the step from which it continues.
        tags: tags of the trial's MLflow run, besides those of every training.
        searched: settings that differ between trials, which the page lists for each of them.

    Returns:
        The figures of the last epoch where none was left to train, for nobody has reported them then: the sweep was
        killed after the trial's end and before Tune noted it. Empty otherwise.

    Raises:
        TrainingError: a worker failed; the trial's MLflow run says why.
    """
    shards = load_dataset(config.data.path)
    training = _Training(config, options, workers, shards, supervision_of(config, shards))
    handle = training.create_run(None, parent, tags, searched)
    checkpoints, store = options.folder / "checkpoints", options.store
    if store is not None:
        store.fetch()  # what an interrupted trial has left
    found = _last_state(checkpoints)
    if notes:
        MlflowTracker(handle, once=True).log_metrics(notes, 0 if found is None else found.step)
    driver = training.run(handle, until=until, callbacks=callbacks)
    if store is not None:
        store.fetch()
    best, left = find_checkpoint(checkpoints, which="best"), _last_state(checkpoints)
    driver.finish() if best is None else training.finish(driver, best)
    return {**left.metrics, "epoch": left.epoch} if left and found and left.step == found.step else {}


def _last_state(checkpoints: Path) -> TrainState | None:
    last = find_checkpoint(checkpoints)
    return None if last is None else read_state(last, verify=False)


@dataclass(frozen=True)
class _Training:
    """A training and the MLflow run around it."""

    config: Config
    options: LaunchOptions
    workers: WorkerPlan
    shards: ShardSet
    supervision: Supervision

    def create_run(
        self, resume: bool | None, parent: RunHandle | None, tags: Mapping[str, str], searched: Collection[str] = ()
    ) -> RunHandle:
        """Opens the MLflow run, with some more tags; see `slrnet.tracking.mlflow.create_run`."""
        config, options, data, tags = self.config, self.options, self.shards.info, environment_tags() | dict(tags)
        about = {"data": data.name, "labels": self.supervision.describe(), "commit": tags["git_commit"]}
        tags |= {
            "slrnet.data": data.name,
            "slrnet.data_fingerprint": data.fingerprint,
            "slrnet.world_size": self.workers.count,
            "slrnet.global_batch": str(config.train.batch_size),
            "slrnet.setting": config.setting,
            "slrnet.encoder": config.model.encoder,
            "slrnet.recipe": config.recipe,
            "slrnet.folder": str(options.place),
        }
        tags |= class_tags(data.classes)
        uri = resolve_uri(config.tracking.uri, options.remote or options.storage) if parent is None else parent.uri
        run: dict[str, Any] = {"params": parameters(config, searched), "tags": tags, "resume": resume}
        run |= {"parent": parent, "data": (data.name, data.fingerprint, config.data.path)}
        run["description"] = description(config, folder=options.folder, **about)
        return create_run(uri, config.tracking.experiment, options.name, config_json=config.to_json(), **run)

    def run(
        self,
        handle: RunHandle,
        *,
        until: int | None = None,
        callbacks: Sequence[Any] = (),
        interruption: Interruption | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> MlflowTracker:
        """Trains, and records in MLflow why a run failed. Returns the run's tracker; the run has not ended yet."""
        driver, options, workers, folder = MlflowTracker(handle), self.options, self.workers, self.options.folder
        values = {"config": self.config.model_dump(mode="json"), "folder": str(folder), "handle": handle}
        values |= {"location": options.location, "until": until}
        values["hang_limit"] = options.hang_limit if workers.most else 0.0  # without Ray this is the user's process
        begun, place = time.time(), options.place
        try:
            rest: dict[str, Any] = {"failures": options.max_failures, "callbacks": callbacks, "on_epoch": on_epoch}
            run_job(train_rank, values, folder=place, workers=workers, interruption=interruption, **rest)
        except KeyboardInterrupt:
            driver.finish("KILLED", "interrupted")
            raise
        except Exception as error:
            if (store := options.store) is not None:
                store.fetch_logs()
            failure = find_failure(folder, since=begun, dead=_dead_ranks(error))
            cause = f"{type(_cause(error)).__name__}: {_cause(error)}" if failure is None else str(failure)
            driver.set_tags({} if failure is None else failure.tags())
            driver.finish("FAILED", cause)
            raise TrainingError(cause) from error
        return driver

    def finish(self, driver: MlflowTracker, best: Path) -> TrainState:
        """Ends the MLflow run with the scores of the best checkpoint; returns its state."""
        state, folder, data = read_state(best, verify=False), self.options.folder, self.config.data.path
        driver.describe(result_text(state.metrics, state.classes, epoch=state.epoch, folder=folder, data=data))
        driver.finish()
        return state


# Ray Train.


def run_job(
    job: Job,
    values: dict[str, Any],
    *,
    folder: Path | str,
    workers: WorkerPlan,
    failures: int = 0,
    callbacks: Sequence[Any] = (),
    interruption: Interruption | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Runs a job in this process (no workers) or in Ray Train's workers, whose state Ray keeps in `folder`.

    Args:
        job: what each process runs.
        values: the job's own, plain values.
        folder: a folder that all nodes see, or a location in an object store.
        workers: the processes.
        failures: how often failed workers are replaced.
        callbacks: further callbacks of Ray Train.
        interruption: asks the job to stop; None: nothing asks it.
        on_epoch: hears the metrics that rank 0 reports; True asks the job to stop.
    """
    if workers.most == 0:
        configure_process(workers.cpus if workers.cpus != os.cpu_count() else None)
        report = _LocalReport(interruption, on_epoch)
        job(values, Process(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")), report)
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it shows every line of a worker twice
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    mailbox = None if interruption is None else open_mailbox()
    own_callbacks = [_lost_node_callback(), *([] if mailbox is None else [_resize_callback(mailbox)])]
    system, place = filesystem_of(folder) if isinstance(folder, str) else (None, str(folder))
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"job": job, "values": values, "cpus": workers.cpus, "mailbox": mailbox},
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
            # A node that is taken away with notice counts as no failure, however often.
            failure_config=FailureConfig(max_failures=failures, max_preemption_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            # The job's own priority: at Ray's usual niceness for workers, 15, its daemons push them aside.
            worker_runtime_env={"env_vars": {"RAY_worker_niceness": "0"}},
            callbacks=[*own_callbacks, *callbacks],
        ),
    )
    if interruption is None or not (interruption.can_be_asked or on_epoch):
        trainer.fit()
    else:
        _fit_beside(trainer, interruption, mailbox, on_epoch)


def _fit_beside(trainer: Any, interruption: Interruption, mailbox: Any, on_epoch: OnEpoch | None) -> None:
    """Fits in a thread, as Ray would else take over the signals of this one, which here ask the workers to stop.

    What the workers tell reaches the caller here, in its own process.
    """
    import ray

    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    def ended() -> bool:
        thread.join(0.2)
        return not thread.is_alive()

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    follow(
        ended,
        interruption,
        hear=lambda: ray.get(mailbox.hear.remote()),
        stop=lambda: mailbox.ask.remote("stop"),
        on_epoch=on_epoch,
    )
    if errors:
        raise errors[0]


def _resize_callback(mailbox: Any) -> Any:
    """A callback of Ray Train that lets the workers write a checkpoint before their number changes and they end."""
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class SaveBeforeResize(ControllerCallback):
        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            save_before_resize(mailbox)

    return SaveBeforeResize()


def _lost_node_callback() -> Any:
    """A callback of Ray Train that waits for Ray to notice lost nodes before failed workers restart."""
    from ray.train import UserCallback

    class AwaitLostNodes(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            await_lost_nodes()

    return AwaitLostNodes()


def _on_worker(arguments: dict[str, Any]) -> None:
    from ray.train.torch import get_device

    # Ray prints all metrics of each report, which the progress lines show; its logger is named after its source file.
    for name in list(logging.root.manager.loggerDict):
        if name.endswith("execution/context.py"):
            logging.getLogger(name).setLevel(logging.WARNING)
    configure_process(arguments["cpus"])
    device = get_device()
    assert isinstance(device, torch.device)
    process, mailbox = current_process(device), arguments["mailbox"]
    requests = MailboxRequests(mailbox) if process.is_main and mailbox is not None else None
    arguments["job"](arguments["values"], process, _RayReport(requests, mailbox))


class _LocalReport(Report):
    """Tells the caller, in whose process the job runs, and asks it whether to go on."""

    def __init__(self, interruption: Interruption | None, on_epoch: OnEpoch | None) -> None:
        super().__init__(None if interruption is None else SignalRequests(interruption))
        self._interruption, self._on_epoch = interruption, on_epoch

    def __call__(self, metrics: Mapping[str, float], *, checkpoint: str = "") -> None:
        if self._interruption and self._on_epoch:
            self._interruption.wanted |= bool(self._on_epoch(metrics))


class _RayReport(Report):
    """Reports to Ray Train, and asks it which nodes will be taken away.

    With a mailbox, rank 0 also tells the driver, and a report of a checkpoint says where it is; Tune takes what a trial
    reports for numbers.
    """

    def __init__(self, requests: Requests | None, mailbox: Any) -> None:
        super().__init__(requests)
        self._mailbox = mailbox

    def __call__(self, metrics: Mapping[str, float], *, checkpoint: str = "") -> None:
        import ray.train

        main = not ray.train.get_context().get_world_rank()
        if main and self._mailbox is not None:
            self._mailbox.tell.remote(dict(metrics))
        if not (checkpoint and self._mailbox is not None and main):
            ray.train.report(dict(metrics))
            return
        # Ray keeps metrics only with a checkpoint; ours is where it is, and this one says where.
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / POINTER, {"checkpoint": checkpoint, "metrics": metrics})
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))

    def notice(self) -> str:
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None:
            return ""
        left = "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
        return f"the node of rank {', '.join(map(str, info.preempted_ranks))} will be taken away{left}"


def _dead_ranks(error: BaseException) -> list[int]:
    """Ranks whose process ended without an error of its own."""
    from ray.exceptions import RayActorError

    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    return [rank for rank, failure in failures.items() if isinstance(_cause(failure), RayActorError)]


def _cause(error: BaseException) -> BaseException:
    """The first error in a worker, without the layers that Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _cause(failures[min(failures)])
    wrapped = (getattr(error, name, None) for name in ("_base_exc", "cause", "health_check_failure"))
    inner = next((layer for layer in wrapped if isinstance(layer, BaseException) and layer is not error), None)
    return error if inner is None else _cause(inner)
