"""A small network as a checkpoint, untrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slrnet.config import Config
from slrnet.models.slrnet import build_model
from slrnet.training.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint

CLASSES = ("background", "ant", "bee", "cat")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Checkpoint]:
    """Saves a network with seeded weights, whose masks show several classes, and reads it back."""

    def make(config: Config) -> Checkpoint:
        torch.manual_seed(5)
        predicted = config.predicts_background
        model = build_model(config.model, config.cvlr, num_classes=len(CLASSES), predict_background=predicted)
        torch.nn.init.normal_(model.mask_head.classify.weight, std=3.0)
        with torch.no_grad():  # no class dominates: on noise each has the background's logit on average
            logits = model.eval()([torch.randn(4, 3, 64, 64)]).logits[0]
            model.mask_head.classify.bias += 1 - logits[:, 0 if predicted else 1 :].mean(dim=(0, 2, 3))
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
