"""A small network as a checkpoint, untrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slrnet.config import Config
from slrnet.models.slrnet import SLRNet, build_model
from slrnet.training.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint

CLASSES = ("background", "ant", "bee", "cat")


@pytest.fixture(scope="session")
def make_checkpoint(
    spread_classes: Callable[[SLRNet], None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Config], Checkpoint]:
    """Saves a network with seeded weights, whose masks show several classes, and reads it back."""

    def make(config: Config) -> Checkpoint:
        torch.manual_seed(5)
        predicted = config.predicts_background
        model = build_model(config.model, config.cvlr, num_classes=len(CLASSES), predict_background=predicted)
        spread_classes(model)
        state = TrainState(epoch=1, step=1, classes=CLASSES, data_fingerprint="-", world_size=1)
        folder: Path = tmp_path_factory.mktemp("run") / "checkpoints"
        return load_checkpoint(
            save_checkpoint(folder, config=config, state=state, model=model.state_dict(), optimizer={})
        )

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[[Config], Checkpoint], tiny_config: Config) -> Checkpoint:
    """Of the tiny configuration; not to be changed."""
    return make_checkpoint(tiny_config)
