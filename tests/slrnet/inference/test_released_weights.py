"""Published checkpoints: names, second names, refusals. The values are compared on a network of the right shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slrnet import load
from slrnet.config import Config
from slrnet.inference import released_weights
from slrnet.inference.released_weights import PREFIXES, SECOND_NAMES, main, released_checkpoint
from slrnet.models.slrnet import build_model
from slrnet.training.checkpoint import load_checkpoint

CLASSES = ("background", "ant", "bee", "cat")


def thin(config: Config) -> Config:
    """The released configuration with an encoder that is quickly made; its tensors' names do not matter here."""
    model = config.model.model_copy(update={"encoder": "timm:test_resnet", "output_stride": 16, "decoder_dim": 8})
    return config.model_copy(update={"model": model, "cvlr": config.cvlr.model_copy(update={"dim": 8})})


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights of a small network of the released kind, which the reader then expects too."""
    config = thin(released_weights._released_config())
    monkeypatch.setattr(released_weights, "_released_config", lambda: config)
    torch.manual_seed(0)
    model = build_model(config.model, config.cvlr, num_classes=len(CLASSES))
    return {name: torch.randn_like(value) if value.is_floating_point() else value
            for name, value in model.state_dict().items()}  # fmt: skip


def released(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by their released names, some of them twice, with the refinement's constants."""
    back = sorted(((own, theirs) for theirs, own in PREFIXES.items()), key=lambda pair: -len(pair[0]))
    names = {
        name: next(theirs + name.removeprefix(own) for own, theirs in back if name.startswith(own)) for name in ours
    }
    tensors = {names[name]: tensor for name, tensor in ours.items()}
    twice = {
        again + name.removeprefix(first): tensor
        for again, first in SECOND_NAMES.items()
        for name, tensor in tensors.items()
        if name.startswith(first)
    }
    assert len(twice) > 20
    return tensors | twice | {"_aff.aff_x.kernel": torch.ones(8, 1, 3, 3)}


def save(folder: Path, tensors: Any) -> Path:
    torch.save(tensors, folder / "published.pth")
    return folder / "published.pth"


@pytest.mark.parametrize("parallel", [False, True])
def test_every_tensor_finds_its_place(parallel: bool, ours: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {("module." if parallel else "") + name: tensor for name, tensor in released(ours).items()}
    found = released_checkpoint(save(tmp_path, {"state_dict": tensors, "epoch": 29}), classes=CLASSES)
    assert found.model.keys() == ours.keys()
    assert all(torch.equal(found.model[name], ours[name]) for name in ours)
    assert (found.config.cvlr.form, found.config.evaluation.background_power) == ("released", 3.0)


def test_the_command_writes_a_checkpoint_that_predicts(
    ours: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path, released(ours))
    arguments = [str(file), "--out", str(tmp_path / "run"), "--classes", ",".join(CLASSES)]
    assert main(arguments) == 0
    assert load_checkpoint(tmp_path / "run").state.classes == CLASSES
    predictor = load(tmp_path / "run", device="cpu")
    assert predictor(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()).mask.shape == (40, 50)
    assert main(arguments) == 2
    assert "exists; name a new folder" in capsys.readouterr().err


def test_the_encoders_names_are_the_released_ones() -> None:
    config = released_weights._released_config()
    with torch.device("meta"):
        names = build_model(config.model, config.cvlr, num_classes=21).state_dict().keys()
    own = {name.removeprefix("encoder.backbone.") for name in names if name.startswith("encoder.")}
    assert {"conv1a.weight", "b2.bn_branch2a.weight", "b5_2.conv_branch2b1.weight", "b7.bn_branch2b2.bias"} <= own
    assert all(any(name.startswith(prefix) for prefix in PREFIXES.values()) for name in names)


class TestRefusals:
    def refuse(self, tensors: Any, folder: Path, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            released_checkpoint(save(folder, tensors), **({"classes": CLASSES} | options))

    def test_tensors_that_do_not_fit(self, ours: dict[str, Tensor], tmp_path: Path) -> None:
        whole = released(ours)
        missing = {name: tensor for name, tensor in whole.items() if "transform2.bias" not in name}
        self.refuse(missing, tmp_path, r"1 missing \(cvlr.project_out.bias\)")
        self.refuse(whole | {"extra.weight": torch.ones(1)}, tmp_path, "tensor extra.weight is unknown")
        bent = whole | {"fc8_skip.0.weight": torch.ones(48, 7, 1, 1), "newly_added.3.0.weight": torch.ones(48, 7, 1, 1)}
        self.refuse(bent, tmp_path, r"fusion.project.0.weight \(48, 7, 1, 1\) instead of")
        self.refuse(whole | {"newly_added.3.1.bias": torch.zeros(48)}, tmp_path, "one in the released code but differ")
        self.refuse({"backbone.conv1a.weight": torch.ones(1)}, tmp_path, "no mask head")

    def test_classes_and_settings_that_do_not_fit(self, ours: dict[str, Tensor], tmp_path: Path) -> None:
        whole = released(ours)
        self.refuse(whole, tmp_path, "3 foreground classes, 20 are named", classes=released_weights.VOC_CLASSES)
        self.refuse(whole, tmp_path, "predicts the background itself", classes=CLASSES[:3])

    def test_files_that_are_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no weights file"):
            released_checkpoint(tmp_path / "none.pth")
        self.refuse({"state_dict": {"a": torch.ones(1)}, "hook": print}, tmp_path, "could run code")
