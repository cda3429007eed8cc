"""Checkpoints written beside the training: as they were when saved, in order; failures heal or are told."""

from __future__ import annotations

import errno
import logging
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from slrnet.checkpoints import checkpoint as checkpoint_module
from slrnet.checkpoints.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from slrnet.config import Config


def state(epoch: int) -> TrainState:
    return TrainState(epoch=epoch, step=10 * epoch, classes=("background",), data_fingerprint="", world_size=1)


def save(writer: CheckpointWriter, epoch: int) -> torch.Tensor:
    weights = torch.full((4,), float(epoch))
    writer.save(state(epoch), model={"a": weights}, optimizer={"state": {0: {"momentum": [weights, 1]}}})
    return weights


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`failures` attempts fail; every pause is noted instead of slept."""
    storage: dict[str, Any] = {"failures": 0, "attempts": 0, "pauses": [], "now": 0.0}

    def refuse(*arguments: Any, **named: Any) -> Path:
        storage["attempts"] += 1
        if storage["attempts"] <= storage["failures"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_checkpoint(*arguments, **named)

    def sleep(seconds: float) -> None:
        storage["pauses"].append(seconds)
        storage["now"] += seconds

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", refuse)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: storage["now"])
    return storage


def test_what_the_training_changes_afterwards_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = threading.Event()

    def wait(*arguments: Any, **named: Any) -> Path:
        assert changed.wait(60)
        return save_checkpoint(*arguments, **named)

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", wait)
    writer = CheckpointWriter(tmp_path, Config())
    weights = save(writer, 1)
    weights.zero_()  # the thread has not begun to write
    changed.set()
    writer.wait()
    checkpoint = load_checkpoint(tmp_path / "checkpoint-0001")
    assert checkpoint.model["a"].tolist() == [1.0] * 4
    assert checkpoint.optimizer["state"][0]["momentum"][0].tolist() == [1.0] * 4


def test_they_appear_in_order_and_old_ones_go(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, Config())
    for epoch in range(1, 6):
        save(writer, epoch)
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0004", "checkpoint-0005"]


def test_a_storage_that_fails_for_a_while_is_tried_again(
    tmp_path: Path, storage: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    storage["failures"] = 6
    writer = CheckpointWriter(tmp_path, Config(), patience=70.0)
    with caplog.at_level(logging.WARNING):
        save(writer, 1)
        writer.wait()
    assert storage["pauses"] == [1, 2, 4, 8, 16, 30]
    assert "checkpoint-0001 cannot be written ([Errno 28] No space left on device); trying again in 1 s" in caplog.text
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-0001"


def test_a_storage_that_stays_away_ends_the_training_with_the_reason(tmp_path: Path, storage: dict[str, Any]) -> None:
    writer = CheckpointWriter(tmp_path, Config(), patience=10.0)
    save(writer, 1)
    writer.wait()
    storage["failures"] = 99
    save(writer, 2)
    with pytest.raises(CheckpointError, match=r"checkpoint-0002 could not be written .* for 7 s: .*No space left"):
        save(writer, 3)
    writer.wait()  # told once
    writer.close()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-0001"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0001"]


@pytest.mark.parametrize(("model", "optimizer"), [(10_000, 1), (1, 10_000)])
def test_a_file_that_the_storage_refuses_is_told_as_such(model: int, optimizer: int, tmp_path: Path) -> None:
    """The process may not write more than 4 KiB into a file, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"tensors could not be written \(.* MiB free\)"):
            save_checkpoint(
                tmp_path,
                config=Config(),
                state=state(1),
                model={"a": torch.ones(model)},
                optimizer={"b": torch.ones(optimizer)},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
