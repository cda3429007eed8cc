"""The gauges that operators see, and that the dashboard and the alerts ask for them."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrnet.checkpoints.checkpoint import TrainState
from slrnet.config import Config, apply_overrides
from slrnet.data.manifest import ShardSet
from slrnet.distributed.process import Process
from slrnet.launch.operators import GAUGES, OperatorListener
from tests.fixtures.recording_tracker import RecordingTracker

GRAFANA = Path(__file__).resolve().parents[3] / "deploy" / "grafana"
NAME = re.compile(r"ray_(slrnet_\w+)")


class Gauge:
    def __init__(self, name: str) -> None:
        self.name, self.values, self.tags = name, list[float](), dict[str, str]()

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def set(self, value: float) -> None:
        self.values.append(value)


def test_a_training_tells_its_speed_its_loss_and_its_checkpoints(
    tiny_config: Config, tiny_data: ShardSet, tmp_path: Path
) -> None:
    gauges: dict[str, Gauge] = {}

    def gauge(name: str) -> Gauge:
        return gauges.setdefault(name, Gauge(name))

    config = apply_overrides(tiny_config, ["train.log_every=2", "train.batch_size=4"])
    parts: dict[str, Any] = {"tracker": RecordingTracker(), "process": Process(), "gauge": gauge}
    listener = OperatorListener(config, tiny_data.info, folder=tmp_path / "voc", **parts)
    state = TrainState(epoch=1, step=10, classes=tiny_data.info.classes, data_fingerprint="", world_size=1)
    begun = time.time()
    listener.start(state, total=40)
    for done, (seconds, waited) in enumerate([(2.0, 0.5), (2.0, 1.5), (1.0, 0.0), (1.0, 0.5)], 11):
        listener.step(done, {"loss": 0.5 * done}, rate=0.1, waited=waited, seconds=seconds)
    listener.checkpoint(replace(state, step=12))
    listener.close()
    assert {name: gauge.values for name, gauge in gauges.items() if "time" not in name} == {
        "slrnet_images_per_second": [2 * 4 / 4.0, 2 * 4 / 2.0],
        "slrnet_data_wait_share": [0.5, 0.25],
        "slrnet_loss": [6.0, 7.0],
        "slrnet_step": [10, 12, 14],
        "slrnet_steps_total": [40],
    }
    written = gauges["slrnet_checkpoint_time_seconds"].values
    assert begun <= written[0] <= written[1] <= time.time()
    assert all(gauge.tags == {"run": "voc", "rank": "0"} for gauge in gauges.values())


def asked() -> list[tuple[str, str]]:
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    alerts = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())
    panels = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [(rule["alert"], rule["expr"]) for group in alerts["groups"] for rule in group["rules"]]
    assert len(rules) == 2
    return panels + rules


@pytest.mark.parametrize(("title", "expression"), asked())
def test_what_is_shown_and_watched_is_told(title: str, expression: str) -> None:
    assert set(NAME.findall(expression)) <= set(GAUGES)
    assert NAME.search(expression)
    assert expression.count("(") == expression.count(")")


def test_every_gauge_is_shown() -> None:
    assert {name for _, expression in asked() for name in NAME.findall(expression)} == set(GAUGES)
