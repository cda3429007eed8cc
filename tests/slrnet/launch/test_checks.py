"""The first weights of a run, which its workers may have to fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slrnet.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from slrnet.checkpoints.run_store import RunStore, local_run, on_this_machine
from slrnet.config import apply_overrides
from slrnet.data.manifest import ShardSet
from slrnet.launch.checks import with_first_weights


def test_first_weights_in_an_object_store_are_fetched_by_each_machine(
    tiny_run: Path, tiny_data: ShardSet, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has a copy of its own, which the workers do not see."""
    s3.create_dir("runs")
    source = load_checkpoint(tiny_run)
    parts: dict[str, Any] = {"config": source.config, "state": source.state, "optimizer": {}}
    save_checkpoint(tmp_path / "run" / "checkpoints", model=source.model, **parts)
    RunStore("s3://runs/first", tmp_path / "run").upload()
    copy = local_run("s3://runs/first")
    config = with_first_weights(apply_overrides(source.config, [f"train.init={copy}"]), tiny_data)
    assert config.train.init == f"s3://runs/first/checkpoints/{source.state.name}"
    assert with_first_weights(config, tiny_data) == config
    monkeypatch.setenv("SLRNET_CACHE", str(tmp_path / "worker"))
    fetched = on_this_machine(config.train.init)
    assert tmp_path / "worker" in fetched.parents
    assert load_checkpoint(fetched).model.keys() == source.model.keys()
