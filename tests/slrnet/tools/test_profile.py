"""Profiles of training steps: all stages are there, the time line can be read, mistakes are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from slrnet.cli.main import main
from slrnet.config import Config
from slrnet.tools.profile import profile_steps, stage_table

STAGES = {"views", "network", "alignment", "calibration", "losses", "backward", "agreement", "optimizer"}
PARTS = {"encoder", "aspp", "fusion", "auxiliary_head", "cvlr", "cue_injection", "gate", "mask_head"}


@pytest.mark.slow
def test_all_stages_are_seen(tiny_config: Config, tmp_path: Path) -> None:
    found = profile_steps(tiny_config, tmp_path / "trace.json.gz", steps=1, device="cpu")
    assert set(found.stages) == STAGES | PARTS
    assert len(found.seconds) == 1
    outer = sum(found.stages[name] for name in STAGES)
    assert 0.5 * found.seconds[0] < outer < 1.01 * found.seconds[0], "stages neither overlap nor leave most out"
    assert sum(found.stages[name] for name in PARTS) <= found.stages["network"]
    with gzip.open(tmp_path / "trace.json.gz", "rt", encoding="utf-8") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"slrnet: {name}" for name in STAGES | PARTS} <= names
    table = stage_table(found).splitlines()
    assert len(table) == 2 + len(STAGES | PARTS) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nothing"], "nothing"),
        (["--set", "train.epochs=-1"], "train.epochs"),
        (["--data", "nowhere"], "nowhere"),
        (["--steps", "100000"], "lower --steps"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--recipe", "demo", "--data", tiny_config.data.path, "--out", str(tmp_path), "--device", "cpu"]
    network = ["model.encoder=timm:test_resnet", "model.encoder_weights=none", "model.frozen_stages=0"]
    assert main(["profile", *usual, *(word for text in network for word in ("--set", text)), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gz"))
