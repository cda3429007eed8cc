"""What runs in each process of a job: the training of one rank, and how jobs report."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slrnet.checkpoints.run_store import RunStore, run_folder
from slrnet.config import config_from_dict
from slrnet.data.manifest import load_dataset
from slrnet.distributed.process import Process, configure_arithmetic
from slrnet.distributed.watchdog import Hang, Watchdog, dump_stacks, shared_store
from slrnet.storage.shown import say
from slrnet.tracking.mlflow import MlflowTracker, watch_node
from slrnet.tracking.protocol import NullTracker, RunHandle
from slrnet.tracking.run_log import RunLog
from slrnet.training.requests import Requests

__all__ = ["HANG_EXIT_CODE", "Job", "Report", "train_rank"]


class Report:
    """Takes a job's metrics and announces preemption; this one, for a single process, does neither.

    Every worker must call both equally often.

    Args:
        requests: what others may ask of the job; None: nothing.
    """

    def __init__(self, requests: Requests | None = None) -> None:
        self.requests = requests or Requests()

    def __call__(self, metrics: Mapping[str, float], *, checkpoint: str = "") -> None:
        """Takes metrics, and where the checkpoint that has them is; "" without one."""

    def notice(self) -> str:
        """Says why the workers may be stopped soon; "" otherwise."""
        return ""


Job = Callable[[dict[str, Any], Process, Report], None]
"""What runs in each process: a function of plain values, the process, and where to report."""

HANG_EXIT_CODE = 75
"""Exit code of a worker whose rank, or one that it waits for, hangs."""
LOG_UPLOAD_SECONDS = 30.0
"""Seconds that a hanging worker has to copy its log to an object store before it exits."""


def train_rank(values: dict[str, Any], process: Process, report: Report) -> None:
    """Trains one rank of a run; a `Job`.

    Args:
        values: `config`, the run's settings as plain values; `folder`, its folder, and `location`, its object store
            or ""; `handle`, its `RunHandle`; `until`, the epochs after which to stop, or None; `hang_limit`, seconds
            without progress after which the process exits, or 0.
        process: this rank.
        report: receives the metrics of each epoch.
    """
    from slrnet.launch.memory import say_memory
    from slrnet.launch.operators import OperatorListener
    from slrnet.training.listener import RunListener
    from slrnet.training.trainer import Trainer

    config = config_from_dict(values["config"])
    configure_arithmetic(deterministic=config.train.deterministic, tf32=config.train.tf32)
    handle: RunHandle = values["handle"]
    store = _open_store(values["location"], process)
    folder = Path(values["folder"]) if store is None else store.folder
    log = RunLog(folder, rank=process.rank)
    tracker = MlflowTracker(handle, once=True) if process.is_main else NullTracker()
    first_of_its_node = os.environ.get("LOCAL_RANK", "0") == "0"  # set by Ray Train
    leave_node = watch_node(handle, socket.gethostname()) if first_of_its_node else None
    limit, shared = values["hang_limit"], shared_store(process)
    watchdog = Watchdog(process, limit=limit, store=shared, on_hang=lambda hang: _end_hang(hang, log, store))
    try:
        shards, upload = load_dataset(config.data.path), None if store is None else store.upload
        parts: dict[str, Any] = {"tracker": tracker, "log": log, "watchdog": watchdog}
        kind: type[RunListener] = OperatorListener if _on_ray() else RunListener
        listener = kind(config, shards.info, process=process, folder=folder, **parts)
        if process.is_main and process.device.type == "cuda":
            say_memory(config, shards.info.num_classes, process)
        trainer = Trainer(config, shards, process=process, folder=folder, listener=listener, upload=upload)
        place = f"{values['location'] or folder}/checkpoints"
        resumed = trainer.resume(lambda name: None if store is None else store.fetch_one(name))
        log.write("start", step=trainer.state.step, world_size=process.world_size)
        if resumed and process.is_main:
            state = trainer.state
            say(f"resuming after {state.epoch} epochs ({state.step} steps) from {place}/{state.name}")

        def tell(metrics: Mapping[str, float]) -> None:
            report(metrics, checkpoint=f"{place}/{trainer.state.name}")

        trainer.fit(report=tell, notice=report.notice, requests=report.requests, until=values["until"])
        tracker.drain()
    except Exception as error:
        position, message = watchdog.position, " ".join(str(error).split())[:2000]
        cause = {"exception": type(error).__name__, "message": message}
        log.write("failure", step=position.step, place=position.place, **cause)
        raise
    finally:
        watchdog.close()
        if leave_node is not None:
            leave_node()
        if store is not None:
            store.upload_rest()


def _on_ray() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _open_store(location: str, process: Process) -> RunStore | None:
    """The run's place in an object store. Rank 0 copies all checkpoints to its node; others later the one it chose."""
    if not location:
        return None
    store = RunStore(location, run_folder(location), rank=process.rank)
    if process.is_main:
        store.fetch()
    return store


def _end_hang(hang: Hang, log: RunLog, store: RunStore | None) -> None:
    """Ends this process: its main thread waits where no exception can reach it."""
    log.write("hang", rank=hang.rank, node=hang.node, step=hang.step, exception="hang", message=hang.message)
    say(f"{hang.message}; ending this rank. Its threads:", error=True)
    dump_stacks()
    if store is not None:
        upload = threading.Thread(target=store.upload_rest, daemon=True)
        upload.start()
        upload.join(LOG_UPLOAD_SECONDS)
    os._exit(HANG_EXIT_CODE)
