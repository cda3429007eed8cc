"""Training and prediction on a GPU that is not there: devices, dtypes, layouts, and where the host waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.shard_writer import verify
from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.config import Config, apply_overrides
from slrnet.data.manifest import ShardSet
from slrnet.distributed.process import Process
from slrnet.launch.prediction import MaskJob
from slrnet.launch.pseudo_label import launch_pseudo_labels
from slrnet.models import decoder, frozen_norm
from slrnet.models.encoders import Encoder
from slrnet.tools.predict import load_predictor
from slrnet.training.listener import Listener
from slrnet.training.trainer import Trainer
from slrnet.views import geometry
from tests.fixtures.fake_cuda import FakeCuda, fake_gpu

ONE_WAIT = {("copy to the host", "trainer.py"): 1}
"""Where the host waits in a step: for the losses, after the optimizer."""
BETWEEN_STEPS = {
    ("copy to the host", "trainer.py"),
    ("a value is read", "trainer.py"),  # the loss scale
    ("copy to the host", "checkpoint.py"),
    ("copy to the host", "metrics.py"),
    ("copy to the host", "masks.py"),
    ("copy to the device", "metrics.py"),
    ("copy to the device", "masks.py"),
    ("copy to the device", "cvlr.py"),  # first values of `cvlr.method=nmf` and others
}
"""Where it waits when it measures and saves."""
SLICED = {("aten::convolution_backward", "trainer.py")}
"""Gradients that are slices or sums of several layouts, with some settings: the foreground's logits in float32, say."""
FEW = (
    "model.encoder=timm:test_resnet", "model.decoder_dim=16", "calibration.refine_dilations=[1]",
    "train.precision=auto", "train.batch_size=8", "train.epochs=1", "train.pretrain_epochs=0",
    "evaluation.pseudo_mask_images=1",
)  # fmt: skip
"""An epoch of one step, and its measurements. A GPU resizes fewer than 16 channels in another layout."""
PIXELS = "data.pixel_labeled_subset=pixels"


class Watcher(Listener):
    """Keeps what the fake GPU saw of each step."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu = gpu
        self.waits: list[dict[tuple[str, str], int]] = []

    def at(self, place: str, step: int) -> None:
        if place == "waiting for data":
            self.gpu.waits.clear()

    def step(self, done: int, parts: Mapping[str, float], **_: float) -> None:
        self.waits.append(dict(self.gpu.waits))
        assert torch.backends.cudnn.benchmark  # steps have one size
        assert self.gpu.convolutions > 20


def start(config: Config, data: ShardSet, folder: Path, listener: Listener) -> Trainer:
    return Trainer(config, data, process=Process(device=torch.device("cuda:0")), folder=folder, listener=listener)


def run(
    changes: tuple[str, ...],
    config: Config,
    data: ShardSet,
    folder: Path,
    capability: tuple[int, int],
    layouts: AbstractSet[tuple[str, str]] = frozenset(),
) -> Trainer:
    """A training with its measurements and checkpoints."""
    config = apply_overrides(config, [*FEW, *changes])
    with fake_gpu(capability) as gpu:
        watcher = Watcher(gpu)
        trainer = start(config, data, folder, watcher)
        trainer.fit(report=lambda metrics: None)
    assert watcher.waits == [ONE_WAIT] * trainer.loader.steps_per_epoch
    assert set(gpu.waits) <= BETWEEN_STEPS
    assert not torch.backends.cudnn.benchmark  # what is measured has all sizes
    assert gpu.layouts.keys() <= layouts, "convolutions whose operands are not channels last"
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.device.type == "cuda" for parameter in trained)
    return trainer


@pytest.mark.parametrize(
    ("changes", "capability"),
    [((), (9, 0)), (("setting=sss_image_labels", PIXELS, "data.pixel_oversampling=1", "train.accumulation=2"), (7, 5))],
    ids=["bfloat16", "float16 with masks"],
)
def test_a_training_waits_once_a_step(
    changes: tuple[str, ...],
    capability: tuple[int, int],
    tiny_config: Config,
    tiny_data: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = capability < (8, 0)
    if half:  # every value that comes from this GPU is 0, the loss scale too
        monkeypatch.setattr("slrnet.training.trainer.SMALLEST_SCALE", 0.0)
    trainer = run(changes, tiny_config, tiny_data, tmp_path, capability)
    assert trainer.scaler.is_enabled() == half
    if half:
        with fake_gpu(capability):
            resumed = start(trainer.config, tiny_data, tmp_path, Listener())
            assert resumed.resume()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("train.precision=fp32", "cvlr.implementation=recompute", "cvlr.num_iters=3"),
        ("cvlr.implementation=reference", "optim.name=adamw", "optim.clip_norm=1.0"),
        ("cvlr.form=released", "model.auxiliary_views=first", "calibration.supervision=kl"),
        ("cvlr.method=nmf", "setting=sss", PIXELS),
        (
            *("calibration.supervision=cps", "calibration.rule=normalized", "calibration.fusion=probs"),
            *("model.encoder=timm:test_efficientnet", "model.frozen_stages=0"),
        ),
        ("views.scales=[1.0,0.5,0.75]", "evaluation.gating=scores", "model.skip_share=0.3", "model.lift_skip=true"),
        (
            *("model.encoder=timm:vit_base_patch14_dinov2", "data.crop_size=322", "train.batch_size=16"),
            *("model.decoder_dim=256", "optim.name=adamw", "optim.layer_decay=0.8"),
            *("calibration.feature_share=0.5", "calibration.feature_source=attention"),
            *("setting=sss_image_labels", PIXELS, "data.pixel_oversampling=4"),  # an epoch of 16 images
        ),
    ],
    ids=" ".join,
)
def test_other_trainings_wait_once_a_step(
    changes: tuple[str, ...], tiny_config: Config, tiny_data: ShardSet, tmp_path: Path
) -> None:
    run(changes, tiny_config, tiny_data, tmp_path, (9, 0), SLICED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("evaluation.protocol=ms", "evaluation.gating=scores"),
        ("inference.tile_above=100", "inference.tile_size=32", "inference.tile_overlap=8"),
    ],
    ids=["one scale", "scales", "tiles"],
)
def test_predictions(changes: tuple[str, ...], tiny_run: Path, h100: FakeCuda) -> None:
    checkpoint = load_checkpoint(tiny_run)
    config = apply_overrides(checkpoint.config, ["evaluation.precision=auto", *changes])
    predict = load_predictor(replace(checkpoint, config=config), device="cuda:0")
    found = predict(np.zeros((48, 64, 3), np.uint8))
    assert found.mask.shape == (48, 64)


@pytest.mark.slow
def test_pseudo_labels(tiny_run: Path, tiny_data: ShardSet, tmp_path: Path, h100: FakeCuda) -> None:
    """From the checkpoint to whole shards, by the command's own function."""
    checkpoint = load_checkpoint(tiny_run)
    config = apply_overrides(checkpoint.config, ["evaluation.precision=auto", "evaluation.gating=image_labels"])
    record = launch_pseudo_labels(MaskJob(checkpoint, config, tiny_data, ("train",)), tmp_path / "shards")
    assert record["quality"]["train"]
    assert verify(tmp_path / "shards") == []
    assert h100.waits


# --- Planted faults ---------------------------------------------------------------------------------------------------


def _flip_left_on_the_host(maps: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip.view(-1, 1, 1, 1), maps.flip(-1), maps)


def _slow_constants(self: Encoder, images: Tensor) -> Tensor:
    mean = torch.tensor(self.mean, device="cpu").to(images.device).view(3, 1, 1)
    return (images - mean).contiguous()


def _mirrored_by_index(maps: Tensor, flip: Tensor | None) -> Tensor:
    chosen = torch.ones(len(maps), dtype=torch.bool, device=maps.device)
    return torch.cat([maps[chosen].flip(-1), maps[~chosen]])


def _size_asked_for(maps: Tensor, size: tuple[int, int]) -> Tensor:
    assert float(maps.detach().sum()) == 0
    return decoder.F.interpolate(maps, size, mode="bilinear", align_corners=True)


def _gradient_of_another_dtype(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    (factor,) = ctx.saved_tensors
    return gradients[0] * factor.float(), None, None, None, None, None


FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "an operand on the host": (geometry, "_mirror", _flip_left_on_the_host, "device"),
    "a shape that depends on values": (geometry, "_mirror", _mirrored_by_index, "nonzero|dynamic|data"),
    "a gradient of another dtype": (frozen_norm._FixedAffine, "backward", _gradient_of_another_dtype, "torch.float32"),
}
"""Where a fault is planted that a step fails of, and a pattern of the message."""


@pytest.fixture
def h100() -> Iterator[FakeCuda]:
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture
def small(tiny_config: Config) -> Config:
    return apply_overrides(tiny_config, [*FEW, "train.batch_size=2", "calibration.refine_iters=1"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_stops_the_step(
    fault: str, small: Config, tiny_data: ShardSet, tmp_path: Path, h100: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, replacement, message = FAULTS[fault]
    trainer = start(small, tiny_data, tmp_path, Listener())
    monkeypatch.setattr(owner, name, staticmethod(replacement) if name == "backward" else replacement)
    with pytest.raises((RuntimeError, AssertionError), match=f"(?i){message}"):
        next(trainer.try_steps(1))


def test_planted_faults_of_speed_are_listed(
    small: Config, tiny_data: ShardSet, tmp_path: Path, h100: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is read, a copy that waits, and convolutions that are not channels last."""
    trainer = start(small, tiny_data, tmp_path, Listener())
    monkeypatch.setattr(decoder, "resize", _size_asked_for)
    monkeypatch.setattr(Encoder, "normalize", _slow_constants)
    h100.waits.clear()
    next(trainer.try_steps(1))
    assert h100.waits.keys() - ONE_WAIT.keys() == {("a value is read", "decoder.py"), ("copy to the device", "step.py")}
    assert h100.layouts
