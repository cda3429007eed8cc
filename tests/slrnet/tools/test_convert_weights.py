"""Published checkpoints: names, second names, refusals. The values are compared on a network of the right shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slrnet import load
from slrnet.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from slrnet.cli.main import main
from slrnet.config import Config, Setting
from slrnet.models.slrnet import build_network
from slrnet.tools import convert_weights as released_weights
from slrnet.tools.convert_weights import PREFIXES, SECOND_NAMES, released_checkpoint

CLASSES = ("background", "ant", "bee", "cat")


def thin(config: Config) -> Config:
    """The released configuration with an encoder that is quickly made; its tensors' names do not matter here."""
    model = config.model.model_copy(update={"encoder": "timm:test_resnet", "output_stride": 16, "decoder_dim": 8})
    return config.model_copy(update={"model": model, "cvlr": config.cvlr.model_copy(update={"dim": 8})})


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights of a small network of the released kind, which the reader then expects too."""
    return small_network("wsss", monkeypatch)


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The same of pixel labels and unlabeled images: the heads predict the background."""
    return small_network("sss", monkeypatch)


def small_network(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    whole = released_weights._released_config
    monkeypatch.setattr(released_weights, "_released_config", lambda setting: thin(whole(setting)))
    config = thin(whole(setting))
    torch.manual_seed(0)
    model = build_network(config, num_classes=len(CLASSES))
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
    assert (found.config.cvlr.form, found.config.recipe) == ("released", "voc_wsss_released")


@pytest.mark.parametrize(
    ("setting", "recipe", "power"),
    [(None, "voc_wsss_released", 3.0), ("wsss", "voc_wsss_released", 3.0),
     ("sss_image_labels", "voc_sss_image_labels_released", 1.0)],
)  # fmt: skip
def test_two_settings_have_the_same_tensors_and_are_measured_differently(
    setting: Setting | None, recipe: str, power: float, ours: dict[str, Tensor], tmp_path: Path
) -> None:
    config = released_checkpoint(save(tmp_path, released(ours)), classes=CLASSES, setting=setting).config
    assert (config.setting, config.recipe) == (setting or "wsss", recipe)
    assert (config.evaluation.gating, config.evaluation.background_power) == ("scores", power)
    assert config.evaluation.resizing == "released"


def one_stage(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of 1-Stage by its names: no auxiliary head, no CVLR, the encoder's modules without a prefix."""
    named = {name.removeprefix("backbone."): tensor for name, tensor in released(ours).items()}
    foreign = ("aux_head.", "factorization_reconstruction.", "newly_added.", "fixed_layers.")
    return {name: tensor for name, tensor in named.items() if not name.startswith(foreign)}


@pytest.fixture
def ours_one_stage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights of 1-Stage's parts; the encoder is WideResNet-38 by name and shape, made of one number each."""
    whole = released_weights._released_config
    monkeypatch.setattr(
        released_weights,
        "_released_config",
        lambda setting: whole(setting).model_copy(
            update={"model": whole(setting).model.model_copy(update={"decoder_dim": 8})}
        ),
    )
    config = released_weights._stage_one(released_weights._released_config("wsss"))
    with torch.device("meta"):
        state = build_network(config, num_classes=len(CLASSES)).state_dict()
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()}


def test_one_stage_is_the_network_without_cvlr(ours_one_stage: dict[str, Tensor]) -> None:
    tensors = one_stage(ours_one_stage)
    assert {"conv1a.weight", "b5_2.conv_branch2b1.weight", "b7.conv_branch2b2.weight", "bn7.bias"} <= tensors.keys()
    assert released_weights.rename_released(tensors, source="file").keys() == ours_one_stage.keys()


def test_a_one_stage_checkpoint_is_read(
    ours_one_stage: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released_weights, "read_tensors", lambda path: one_stage(ours_one_stage))
    found = released_checkpoint(tmp_path / "published.pth", classes=CLASSES)
    assert found.model.keys() == ours_one_stage.keys()
    evaluation = found.config.evaluation
    assert not found.config.cvlr.enabled
    assert (evaluation.gating, evaluation.gating_threshold, evaluation.background_power) == ("scores", 0.1, 3.0)
    assert evaluation.scales == (1.0, 0.5, 1.5, 2.0)
    with pytest.raises(ValueError, match="is of 1-Stage; use wsss$"):
        released_checkpoint(tmp_path / "published.pth", classes=CLASSES, setting="sss_image_labels")
    lacking = {name: tensor for name, tensor in one_stage(ours_one_stage).items() if name != "bn7.bias"}
    monkeypatch.setattr(released_weights, "read_tensors", lambda path: lacking)
    with pytest.raises(ValueError, match=r"does not fit 1-Stage with WideResNet-38; tensors: 1 missing \(encoder"):
        released_checkpoint(tmp_path / "published.pth", classes=CLASSES)
    resnet = {f"layer1.{name}": tensor for name, tensor in lacking.items()}
    monkeypatch.setattr(released_weights, "read_tensors", lambda path: resnet)
    with pytest.raises(ValueError, match="of no 1-Stage with WideResNet-38"):
        released_checkpoint(tmp_path / "published.pth", classes=CLASSES)


def test_every_tensor_of_the_setting_without_image_labels_finds_its_place(
    ours_alone: dict[str, Tensor], tmp_path: Path
) -> None:
    """One output more for the background in both heads; no scores to gate by, and the authors' thresholds."""
    found = released_checkpoint(save(tmp_path, released(ours_alone)), classes=CLASSES)
    assert found.model.keys() == ours_alone.keys()
    assert all(torch.equal(found.model[name], ours_alone[name]) for name in ours_alone)
    assert [found.model[f"{head}.classify.weight"].shape[0] for head in ("mask_head", "auxiliary_head")] == [4, 4]
    config = found.config
    assert (config.setting, config.evaluation.gating, config.evaluation.background_power) == ("sss", "none", 1.0)
    calibration = config.calibration
    assert (calibration.confidence_threshold, calibration.background_threshold, calibration.floor) == (0.8, 0.9, 0.6)
    (tmp_path / "run").mkdir()
    path = save_checkpoint(
        tmp_path / "run" / "checkpoints", config=config, state=found.state, model=found.model, optimizer={}
    )
    prediction = load(path, device="cpu")(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy())
    assert prediction.mask.shape == (40, 50)
    assert prediction.class_scores is None


def test_the_command_writes_a_checkpoint_that_predicts(
    ours: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path, released(ours))
    arguments = [str(file), "--out", str(tmp_path / "run"), "--classes", ",".join(CLASSES)]
    assert main(["convert-weights", *arguments]) == 0
    assert "trained in setting wsss; to measure: gating scores, background to the power 3" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run").state.classes == CLASSES
    predictor = load(tmp_path / "run", device="cpu")
    assert predictor(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()).mask.shape == (40, 50)
    assert main(["convert-weights", *arguments]) == 2
    assert "exists; name a new folder" in capsys.readouterr().err


def test_the_encoders_names_are_the_released_ones() -> None:
    config = released_weights._released_config("wsss")
    with torch.device("meta"):
        names = build_network(config, num_classes=21).state_dict().keys()
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
        self.refuse(whole, tmp_path, "predicts 3 classes, 21 with the background", classes=released_weights.VOC_CLASSES)
        self.refuse(whole, tmp_path, "predicts 3 classes, 2 with the background are named", classes=CLASSES[:2])
        # Three names fit a mask head of three that predicts the background, but the other head says otherwise.
        mixed = whole | {name: torch.ones(4, *whole[name].shape[1:]) for name in whole if "aux_head.4." in name or
                         name.startswith("newly_added.8.4.")}  # fmt: skip
        self.refuse(mixed, tmp_path, r"auxiliary_head.classify.weight \(4, 8, 1, 1\) instead of \(3, 8, 1, 1\)")

    def test_a_setting_that_the_heads_contradict(
        self, ours: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        message = r"setting 'sss' does not fit .*predicts 3 classes of the 4 named; use wsss or sss_image_labels"
        self.refuse(released(ours), tmp_path, message, setting="sss")
        self.refuse(released(small_network("sss", monkeypatch)), tmp_path, "; use sss$", setting="wsss")

    def test_files_that_are_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no weights file"):
            released_checkpoint(tmp_path / "none.pth")
        self.refuse({"state_dict": {"a": torch.ones(1)}, "hook": print}, tmp_path, "could run code")
