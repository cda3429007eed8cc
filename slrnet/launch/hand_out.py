"""Hands out the parts of a job to Ray actors: whoever is done gets the next part.

So a slow node holds up nobody, a node that joins takes its share, and a node that is lost costs the part that it worked
on, which another actor does again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slrnet.distributed.process import Process, configure_process
from slrnet.distributed.watchdog import Hang, Watchdog, dump_stacks
from slrnet.launch.cluster import WorkerPlan, WorkerRequest, await_lost_nodes
from slrnet.launch.rank import HANG_EXIT_CODE
from slrnet.launch.train import TrainingError
from slrnet.storage.shown import say

__all__ = ["Alive", "Open", "Work", "hand_out"]

Work = Callable[[Iterable[Any]], Iterator[Any]]
"""Does parts of a job; yields a result for each, in their order."""
Alive = Callable[[], None]
"""Says that a part makes progress; a `Work` calls it at least every `hang_limit` seconds."""
Open = Callable[[dict[str, Any], Process, Alive], Work]
"""Makes a process ready to work, given plain values, which include `cpus`, its CPU cores; a module-level function."""


def hand_out(
    open_work: Open,
    values: dict[str, Any],
    parts: Sequence[Any],
    request: WorkerRequest,
    *,
    say: Callable[[str], None] = say,
) -> Iterator[Any]:
    """Does the parts of a job in this process or on Ray actors; yields their results as they come.

    Args:
        open_work: makes a process ready to work.
        values: plain values for it.
        parts: plain values, in the order in which they are handed out; each is done once.
        request: the processes. Up to `max_failures` of them may be lost, besides those of nodes that were taken away
            with notice; one without progress for `hang_limit` seconds ends itself.
        say: receives the lines to show.

    Raises:
        ClusterError: the cluster has too few resources.
        TrainingError: a part failed, or too many processes were lost.
    """
    workers = request.plan(say)
    values = values | {"cpus": workers.cpus}
    try:
        if workers.most:
            yield from _Team(open_work, values, request, workers, say).results(parts)
        else:
            configure_process(None)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            yield from open_work(values, Process(device=device), lambda: None)(parts)
    except TrainingError:
        raise
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # what Ray wraps around the actor's own error
        raise TrainingError(f"{type(cause).__name__}: {cause}") from error


@dataclass
class _Team:
    """The actors of a job, on the driver."""

    open_work: Open
    values: dict[str, Any]
    request: WorkerRequest
    workers: WorkerPlan
    say: Callable[[str], None]
    busy: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    """Actor and part by the reference of what the actor does; the part is None while it makes itself ready."""
    lost: int = 0
    """Actors that died without notice."""

    def results(self, parts: Sequence[Any]) -> Iterator[Any]:
        """Yields the parts' results as they come, and ends the actors."""
        import ray
        from ray.exceptions import RayActorError

        waiting, idle, left = deque(parts), list[Any](), len(parts)
        for _ in range(min(self.workers.most, left)):
            self._start()
        try:
            while left:
                (done,), _ = ray.wait(list(self.busy), num_returns=1)
                actor, part = self.busy.pop(done)
                try:
                    result = ray.get(done)
                except RayActorError as error:
                    self._count(error)
                    waiting.extendleft([] if part is None else [part])
                    self._start()
                else:
                    idle.append(actor)
                    if part is not None:
                        left -= 1
                        yield result
                while idle and waiting:
                    actor, part = idle.pop(), waiting.popleft()
                    self.busy[actor.do.remote(part)] = (actor, part)
        finally:
            for actor in (*idle, *(actor for actor, _ in self.busy.values())):
                ray.kill(actor)

    def _start(self) -> None:
        """Starts an actor; while the cluster has no room for it, it waits, and makes a cluster grow that can."""
        import ray

        actor = (
            ray.remote(_Member)
            .options(
                num_cpus=self.workers.cpus,
                num_gpus=int(self.workers.gpu),
                scheduling_strategy="SPREAD",
                # The job's own priority: at Ray's usual niceness for workers, 15, its daemons push them aside.
                runtime_env={"env_vars": {"RAY_worker_niceness": "0"}},
            )
            .remote()
        )
        opened = actor.open.remote(self.open_work, self.values, self.workers.gpu, self.request.hang_limit)
        self.busy[opened] = (actor, None)

    def _count(self, error: Any) -> None:
        """Counts a lost actor; raises if that is one too many."""
        self.lost += not error.preempted
        if self.lost > self.request.max_failures:
            raise TrainingError(
                f"a worker died: {' '.join(str(error).split())[:500]}; run the same command again, with "
                f"--max-failures {self.lost + 2} to go on with other workers in its place"
            ) from error
        self.say(f"a worker died ({self.lost} of {self.request.max_failures} failures); another one does its part")
        await_lost_nodes()


class _Member:
    """An actor that does parts of a job."""

    def open(self, open_work: Open, values: dict[str, Any], gpu: bool, hang_limit: float) -> None:
        """Makes itself ready."""
        configure_process(values["cpus"])
        self._limit, self._done = hang_limit, 0
        self._work = open_work(values, Process(device=torch.device("cuda" if gpu else "cpu")), self._alive)

    def do(self, part: Any) -> Any:
        """Does a part; returns its result. This process ends if it makes no progress for too long."""
        self._watchdog = Watchdog(Process(), limit=self._limit, store=None, on_hang=_end)
        try:
            (result,) = self._work([part])
        finally:
            self._watchdog.close()
        return result

    def _alive(self) -> None:
        self._done += 1
        self._watchdog.at("predicting", self._done)


def _end(hang: Hang) -> None:
    say(f"no progress on {hang.node}: {hang.message}; ending this worker. Its threads:", error=True)
    dump_stacks()
    os._exit(HANG_EXIT_CODE)
