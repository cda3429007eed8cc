"""What a training tells the people who run the cluster: gauges that Ray offers to Prometheus, beside MLflow's curves.

Ray puts `ray_` before the names. `deploy/grafana` has a dashboard and alerts for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slrnet.checkpoints.checkpoint import TrainState
from slrnet.training.listener import RunListener

__all__ = ["GAUGES", "OperatorListener", "ray_gauge"]

GAUGES = {
    "slrnet_images_per_second": "Images that all workers train on in a second.",
    "slrnet_data_wait_share": "Share of the time that this worker waited for batches, from 0 to 1.",
    "slrnet_loss": "Loss of the last logged step.",
    "slrnet_step": "Optimizer steps done.",
    "slrnet_steps_total": "Optimizer steps of the whole training.",
    "slrnet_checkpoint_time_seconds": "When the last checkpoint was written, or the training began; Unix time.",
}
"""Name and meaning of each gauge; all have the labels `run` and `rank`."""


def ray_gauge(name: str) -> Any:
    """A gauge of Ray's, in a process that is connected to a cluster."""
    from ray.util.metrics import Gauge

    return Gauge(name, description=GAUGES[name], tag_keys=("run", "rank"))


@dataclass(eq=False)
class OperatorListener(RunListener):
    """Tells a run's gauges too."""

    gauge: Callable[[str], Any] = ray_gauge
    """Makes a gauge, which has `set_default_tags` and `set`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._gauges = {name: self.gauge(name) for name in GAUGES}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": self.folder.name, "rank": str(self.process.rank)})
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    def start(self, state: TrainState, *, total: int) -> None:
        """Tells where the training is."""
        super().start(state, total=total)
        self._tell(slrnet_step=state.step, slrnet_steps_total=total, slrnet_checkpoint_time_seconds=time.time())

    def step(self, done: int, parts: Mapping[str, float], *, rate: float, waited: float, seconds: float) -> None:
        """Tells every `train.log_every` steps what they took."""
        super().step(done, parts, rate=rate, waited=waited, seconds=seconds)
        self._steps, self._seconds, self._waited = self._steps + 1, self._seconds + seconds, self._waited + waited
        if done % self.config.train.log_every == 0 and self._seconds > 0:
            images = self._steps * self.config.train.batch_size
            self._tell(
                slrnet_images_per_second=images / self._seconds,
                slrnet_data_wait_share=self._waited / self._seconds,
                slrnet_loss=parts["loss"],
                slrnet_step=done,
            )
            self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    def checkpoint(self, state: TrainState) -> TrainState:
        """Tells the time."""
        self._tell(slrnet_checkpoint_time_seconds=time.time())
        return super().checkpoint(state)

    def _tell(self, **values: float) -> None:
        for name, value in values.items():
            self._gauges[name].set(float(value))
