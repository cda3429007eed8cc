"""The resources of the Ray cluster, and how many workers a run gets."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slrnet.storage import shown

__all__ = [
    "ClusterError",
    "WorkerPlan",
    "WorkerRequest",
    "await_lost_nodes",
    "cluster_nodes",
    "cluster_resources",
    "largest_share",
    "workers_that_fit",
]

PROJECT_ROOT = Path(__file__).resolve().parents[2]
LOOK_EVERY = 5.0
"""Seconds between two looks at a growing cluster."""
_GCS_ADDRESS = re.compile(r"[^/\s]+:\d+")


class ClusterError(ValueError):
    """The cluster has too few resources, or does not answer."""


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """The processes of a run."""

    least: int
    """The run does not start with fewer; 0: it runs in this process, without Ray."""
    most: int
    """Upper limit; if it is more than `least`, the number follows the cluster's size."""
    cpus: int
    """CPU cores of each process."""
    gpu: bool
    """Whether each process has a GPU."""

    @property
    def count(self) -> str:
        """How many processes: "2", or "2 to 8"."""
        return f"{self.least} to {self.most}" if self.least < self.most else str(max(1, self.most))

    def __str__(self) -> str:
        """Number, cores and GPU, to show."""
        return f"{self.count} worker(s) x {self.cpus} CPU(s){' + 1 GPU' if self.gpu else ''}"


def cluster_resources() -> tuple[int, int]:
    """CPU cores and GPUs of the Ray cluster; connects to it, or starts a local one if there is none."""
    import ray

    if not ray.is_initialized():
        paths = [str(PROJECT_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        # Ray passes the cluster's address to a job, but not to the actors that the job starts. On a machine with two
        # clusters, Ray Train's actor that frees a dead run's cores would then connect to the cluster started last.
        address = os.environ.get("RAY_ADDRESS", "")
        environment |= {"RAY_ADDRESS": address} if _GCS_ADDRESS.fullmatch(address) else {}
        if not sys.stdout.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # a job's log has no color codes
        try:
            ray.init(runtime_env={"env_vars": environment}, log_to_driver=True, logging_level="warning")
        except Exception as error:  # of many kinds, some of them plain `Exception`
            raise ClusterError(
                f"Ray cannot be started or reached ({' '.join(str(error).split())[:300]}); try again when this machine "
                "is less busy, look at the cluster with `ray status`, or train without Ray with --num-workers 0"
            ) from error
    have = ray.cluster_resources()
    return int(have.get("CPU", 0)), int(have.get("GPU", 0))


def cluster_nodes() -> list[tuple[int, int]]:
    """CPU cores and GPUs of each node of the Ray cluster; see `cluster_resources`."""
    import ray

    cluster_resources()  # connects
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(have.get("CPU", 0)), int(have.get("GPU", 0))) for have in nodes]


def workers_that_fit(nodes: Sequence[tuple[int, int]], cpus: int, *, gpu: bool) -> int:
    """How many workers of `cpus` cores, each with a GPU if `gpu`, the nodes hold; a worker lies on one node."""
    return sum(min(cores // cpus, gpus if gpu else cores) for cores, gpus in nodes)


def largest_share(nodes: Sequence[tuple[int, int]], count: int, *, gpu: bool) -> int:
    """The most cores, and at least 1, that each of `count` workers can have."""
    cores = max((cores for cores, _ in nodes), default=0)
    shares = (share for share in range(cores, 1, -1) if workers_that_fit(nodes, share, gpu=gpu) >= count)
    return next(shares, 1)


@dataclass(frozen=True, kw_only=True)
class WorkerRequest:
    """The processes that a run asks for."""

    num_workers: int | tuple[int, int] | None = None
    """Training processes; 0 trains in this process without Ray; a pair: the fewest and the most, as many as the cluster
    has room for at the time; None: one per GPU of the cluster, else 1."""
    cpus_per_worker: int | None = None
    """CPU cores per worker; None: as many as all of them can have, each on one node."""
    cpu_only: bool = False
    """Use no GPUs."""
    wait_minutes: float = 0.0
    """Minutes to wait for the nodes of the fewest workers on a cluster that grows on demand, with GPUs unless
    `cpu_only`; 0 takes the cluster as it is."""
    max_failures: int = 0
    """How often failed workers are replaced; a training goes on from its last checkpoint."""
    hang_limit: float = 600.0
    """Seconds without progress after which a worker ends and says where it was; 0 never ends it. Below 300, a storage
    outage during a checkpoint counts as a hang."""

    def plan(self, say: Callable[[str], None] = shown.say) -> WorkerPlan:
        """Decides how many workers the run gets of the cluster; `say` receives a line a minute while waiting.

        Raises:
            ClusterError: the cluster has too few resources.
        """
        count, cpus = self.num_workers, self.cpus_per_worker
        if count == 0:
            return WorkerPlan(least=0, most=0, cpus=cpus or os.cpu_count() or 1, gpu=False)
        if self.wait_minutes:
            self._await_nodes(say)
        have_cpus, have_gpus = cluster_resources()
        gpu = have_gpus > 0 and not self.cpu_only
        least, most = count if isinstance(count, tuple) else (count or max(1, have_gpus * gpu),) * 2
        if gpu and least > have_gpus:
            raise ClusterError(
                f"{least} workers with a GPU each were asked for, the cluster has {have_gpus} GPUs and {have_cpus} "
                f"CPUs; lower --num-workers to {have_gpus}, add nodes, or wait for them with --wait-for-nodes"
            )
        nodes = cluster_nodes()
        share = cpus or largest_share(nodes, min(most, have_gpus) if gpu else most, gpu=gpu)
        if workers_that_fit(nodes, share, gpu=gpu) < least:
            raise ClusterError(
                f"{least} workers with {share} CPUs each were asked for, the cluster has {have_cpus} CPUs and "
                f"{have_gpus} GPUs on {len(nodes)} node(s), {max(cores for cores, _ in nodes)} CPUs at most on one; "
                "lower --num-workers or --cpus-per-worker, add nodes, or wait for them with --wait-for-nodes"
            )
        return WorkerPlan(least=least, most=most, cpus=share, gpu=gpu)

    def _await_nodes(self, say: Callable[[str], None]) -> None:
        """Asks the cluster to grow until the fewest workers fit, and waits for it."""
        from ray.autoscaler.sdk import request_resources

        least = self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers or 1
        cpus, gpu = self.cpus_per_worker or 1, not self.cpu_only
        cluster_resources()  # connects
        begun = told = time.monotonic()
        request_resources(bundles=[{"CPU": cpus} | ({"GPU": 1} if gpu else {})] * least)
        try:
            while True:
                have_cpus, have_gpus = cluster_resources()
                if workers_that_fit(cluster_nodes(), cpus, gpu=gpu) >= least:
                    return
                now = time.monotonic()
                has = f"the cluster has {have_cpus} CPUs and {have_gpus} GPUs"
                wants = f"{least} worker(s) of {cpus} CPU(s){' and a GPU' if gpu else ''}"
                if now - begun > 60 * self.wait_minutes:
                    raise ClusterError(
                        f"after {self.wait_minutes:g} minutes {has}, too little for {wants}; see `ray status` for why "
                        "it does not grow, lower --num-workers, or wait longer with --wait-for-nodes"
                    )
                if now - told >= 60:
                    told = now
                    say(f"waiting for nodes: {has}; needed: {wants}")
                time.sleep(LOOK_EVERY)
        finally:
            request_resources(bundles=[])


def await_lost_nodes(*, seconds: float = 60.0) -> set[str]:
    """Waits until Ray has noticed which of its nodes are gone; returns at once if all of them answer.

    Ray needs several failed health checks to notice. Until then it would place new workers on a lost node and count
    their end as one more failure. Returns the IDs of nodes that Ray still takes for alive after `seconds`, although
    they do not answer.
    """
    import ray

    silent = {node["NodeID"] for node in ray.nodes() if node["Alive"] and not _answers(node)}
    deadline = time.monotonic() + seconds
    while silent and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY / 10)
        silent &= {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return silent


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=3).close()
    except OSError:
        return False
    return True
