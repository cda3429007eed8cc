"""Ray's own lines go to a file, those of a training to the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slrnet.launch.ray_log import ray_lines_in


class Dispatcher:
    """As Ray's."""

    def __init__(self, show: Callable[[Any], None]) -> None:
        self.handlers: list[tuple[str, Callable[[Any], None]]] = [("ray_print_logs", show)]

    def add_handler(self, name: str, act: Callable[[Any], None]) -> None:
        self.handlers.append((name, act))

    def remove_handler(self, name: str) -> None:
        self.handlers = [pair for pair in self.handlers if pair[0] != name]

    def emit(self, actor: str, *lines: str, pid: str | int = 7) -> None:
        for _, act in self.handlers:
            act({"actor_name": actor, "pid": pid, "is_err": True, "lines": list(lines)})


def test_lines_of_ray_go_to_the_log_and_those_of_the_training_to_the_terminal(tmp_path: Path) -> None:
    shown: list[str] = []
    dispatcher, log = Dispatcher(lambda batch: shown.extend(batch["lines"])), tmp_path / "logs" / "ray.log"
    frightening = "[2026-01-02 03:04:05,678 E 12 34] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher'"
    with ray_lines_in(log, dispatcher):
        dispatcher.emit("TrainController", "Requesting resources: {'CPU': 2} * 1", "Traceback (most recent call last):")
        dispatcher.emit("RayTrainWorker", "Setting up process group for: env://", "step 6/210, loss 1.4", frightening)
        dispatcher.emit("", "no node type has 3 GPUs", pid="autoscaler")
        dispatcher.emit("", "a worker was killed: the node's memory is full", pid="raylet")
    dispatcher.emit("TrainController", "after it")
    lacking = ["no node type has 3 GPUs", "a worker was killed: the node's memory is full"]
    assert shown == ["step 6/210, loss 1.4", *lacking, "after it"]
    assert log.read_text().splitlines() == [
        "TrainController: Requesting resources: {'CPU': 2} * 1",
        "TrainController: Traceback (most recent call last):",
        "RayTrainWorker: Setting up process group for: env://",
        f"RayTrainWorker: {frightening}",
    ]


def test_a_log_that_cannot_be_written_and_a_ray_without_a_dispatcher_end_nothing(tmp_path: Path) -> None:
    shown: list[str] = []
    dispatcher = Dispatcher(lambda batch: shown.extend(batch["lines"]))
    (tmp_path / "logs").touch()
    with ray_lines_in(tmp_path / "logs" / "ray.log", dispatcher):
        dispatcher.emit("TrainController", "lost")
        dispatcher.emit("RayTrainWorker", "kept")
    with ray_lines_in(tmp_path / "ray.log", object()):
        pass
    assert shown == ["kept"]
