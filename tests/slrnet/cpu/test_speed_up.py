"""The door of the room: which modules are replaced, that the numbers stay, and that nothing else opens it."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from slrnet.config import Config, ModelConfig
from slrnet.cpu import speed_up
from slrnet.cpu.convolutions import StandInConv2d
from slrnet.cpu.few_taps import FewTapsConv2d
from slrnet.models import wide_resnet38
from slrnet.models.encoders import Encoder
from slrnet.models.network import Network
from slrnet.models.slrnet import SLRNet, build_network
from slrnet.models.wide_resnet38 import WideResNet38

CROPS = (33, 65, 97, 121, 161, 193, 225, 257, 289, 321)


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, StandInConv2d)]


@pytest.fixture(scope="module")
def lite() -> Network:
    torch.manual_seed(0)
    model = ModelConfig(encoder="efficientnet_lite0", encoder_weights="none")
    return build_network(Config(model=model), num_classes=4)


def test_a_network_is_built_of_plain_modules(lite: Network) -> None:
    assert replaced(lite) == []
    assert "Winograd" not in str(lite)


def test_parameters_keep_their_names_and_objects(lite: Network) -> None:
    before = {name: id(tensor) for name, tensor in lite.state_dict(keep_vars=True).items()}
    assert speed_up(lite) is lite
    assert {name: id(tensor) for name, tensor in lite.state_dict(keep_vars=True).items()} == before
    assert len(replaced(lite)) > 20


def test_again_changes_nothing(lite: Network) -> None:
    modules = dict(speed_up(lite).named_modules())
    assert dict(speed_up(lite).named_modules()) == modules


class _Stage(NamedTuple):
    """A row of the encoder's table, narrow."""

    name: str
    num_blocks: int
    mid_channels: int
    out_channels: int
    natural_stride: int
    dropout: float | None


def narrow_network(monkeypatch: pytest.MonkeyPatch) -> SLRNet:
    """The network with WideResNet-38, a block of few channels at each stage."""
    narrow = [
        _Stage(spec.name, 1, 4, 8, spec.natural_stride, 0.0 if spec.dropout else None) for spec in wide_resnet38._STAGES
    ]
    monkeypatch.setattr(wide_resnet38, "_STAGES", narrow)
    torch.manual_seed(0)
    backbone = WideResNet38()
    encoder = Encoder(backbone, stages=backbone.stages, channels=backbone.channels, strides=backbone.strides)
    encoder.freeze(stages=1, batch_norm=False)  # as in training; its maps are the largest
    config = ModelConfig(decoder_dim=8, skip_dim=4, dropout=0.0, gate_rate=0.0)
    return SLRNet(encoder, config, num_classes=3, cvlr=None).double()


def step(network: SLRNet, images: Tensor) -> list[Tensor]:
    """The masks of two views, one half as large, and the gradients of the parameters."""
    network.zero_grad()
    half = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear")
    logits = network([images, half]).logits
    sum((view.square().mean() for view in logits), images.new_zeros(())).backward()  # type: ignore[no-untyped-call]
    return [*(view.detach() for view in logits), *(one.grad for one in network.parameters() if one.grad is not None)]


@pytest.mark.slow
def test_a_training_step_at_any_crop_is_that_of_the_plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    network = narrow_network(monkeypatch).train()
    images = {crop: torch.randn(1, 3, crop, crop, dtype=torch.float64) for crop in CROPS}
    plain = {crop: step(network, images[crop]) for crop in CROPS}
    speed_up(network)
    sizes: dict[int, set[bool]] = {crop: set() for crop in CROPS}
    crop = CROPS[0]

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FewTapsConv2d)
        sizes[crop].add(module._few_taps(inputs[0]))

    for module in network.modules():
        if isinstance(module, FewTapsConv2d):
            module.register_forward_pre_hook(note)
    for crop in CROPS:
        for ours, theirs in zip(step(network, images[crop]), plain[crop], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        assert True in sizes[crop], "no convolution leaves the padding out"


IMPORTS = """
import sys
import torch
import slrnet.checkpoints.checkpoint, slrnet.data.train_loader, slrnet.data.transforms, slrnet.inference
import slrnet.launch.evaluation, slrnet.launch.pseudo_label, slrnet.losses.objective, slrnet.training.trainer
from slrnet.ops.cross_entropy import sums_and_gradients

meta = torch.zeros(2, 3, 4, 4, device="meta")
sums_and_gradients(meta, torch.zeros(2, 8, 8, dtype=torch.int64, device="meta"), torch.zeros(2, 8, 8, device="meta"))
print([name for name in sys.modules if name.startswith("slrnet.cpu")])
images = torch.zeros(2, 3, 4, 4)
sums_and_gradients(images, torch.zeros(2, 8, 8, dtype=torch.int64), torch.zeros(2, 8, 8))
print([name for name in sys.modules if name.startswith("slrnet.cpu")])
"""


@pytest.mark.slow
def test_other_devices_import_nothing_of_the_room() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    elsewhere, on_cpu = run.stdout.splitlines()
    assert elsewhere == "[]"
    assert "slrnet.cpu.cross_entropy" in on_cpu
