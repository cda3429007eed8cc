"""From a network to its pseudo masks to a second network, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_prep.demo import build_demo
from slrnet.checkpoints.checkpoint import TrainState, load_checkpoint, restore_model, save_checkpoint
from slrnet.cli.main import main
from slrnet.config import apply_overrides
from slrnet.data.manifest import load_dataset
from slrnet.models.deeplab import DeepLabV3Plus
from slrnet.models.slrnet import build_network
from slrnet.recipes import demo
from tests.fixtures import small_encoders  # noqa: F401, registers the small models
from tests.fixtures.jobs import run_job

TINY = ("model.encoder=timm:test_efficientnet", "model.encoder_weights=none", "model.decoder_dim=8")


@pytest.fixture
def place(storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs, in which the jobs work."""
    monkeypatch.setenv("SLRNET_STORAGE", str(storage))
    monkeypatch.chdir(storage)
    return storage


@pytest.mark.slow
def test_a_network_is_distilled(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `distill` is not installed")
    data, pseudo = place / "data", place / "pseudo"
    build_demo(data, num_train=24, num_val=6, image_size=64, samples_per_shard=6)
    classes = load_dataset(data).info.classes
    usual = "evaluation.background_power=1.0"
    config = apply_overrides(demo(), [*TINY, usual, "data.crop_size=64", f"data.path={data}"])
    torch.manual_seed(0)
    model = build_network(config, num_classes=len(classes))
    state = TrainState(
        epoch=1, step=1, classes=classes, data_fingerprint="-", world_size=1, metrics={"val/miou_ss": 0.125}
    )
    teacher = place / "teacher"
    save_checkpoint(teacher / "checkpoints", config=config, state=state, model=model.state_dict(), optimizer={})

    common = ("--checkpoint", str(teacher), "--out", str(pseudo), "--protocol", "ss")
    assert run_job("pseudo_label.py", *common, "--voc-folder", str(place / "voc")) == 0
    assert "train, ss+gated_by_image_labels, 24 images: miou " in capsys.readouterr().out
    assert len(list((place / "voc" / "SegmentationClass").glob("*.png"))) == 24
    assert run_job("pseudo_label.py", "--verify", str(pseudo)) == 0
    assert "30 samples are intact" in capsys.readouterr().out

    settings = (*TINY, "data.crop_size=64", "data.workers=0", "train.epochs=2", "model.frozen_stages=0")
    changes = [word for setting in settings for word in ("--set", setting)]
    assert run_job("distill.py", "--data", str(pseudo), "--num-workers", "0", "--name", "student", *changes) == 0
    assert "masks by ss+gated_by_image_labels: val/miou_ss 12.5 %" in capsys.readouterr().out
    student = load_checkpoint(place / "student")
    assert isinstance(restore_model(student), DeepLabV3Plus)
    losses = {name.removeprefix("train/epoch_loss_") for name in student.state.metrics if "epoch_loss_" in name}
    assert losses == {"pixel_segmentation", "segmentation", "mask_consistency"}
    assert student.state.metrics["train/epoch_loss_mask_consistency"] == 0
    assert student.state.metrics["train/epoch_loss"] == pytest.approx(
        student.state.metrics["train/epoch_loss_pixel_segmentation"]
    )
    assert run_job("evaluate.py", "--checkpoint", str(place / "student"), "--protocol", "ms") == 0
    (record,) = (place / "student" / "evaluations").glob("*/evaluation.json")
    assert json.loads(record.read_text())["images"] == 6


@pytest.mark.slow
def test_a_vision_transformer_teaches_a_small_network_by_three_commands(place: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `distill` is not installed")
    build_demo(place / "data", num_train=16, num_val=4, image_size=64, samples_per_shard=8)

    def slrnet(command: str, *settings: str) -> None:
        small = ("model.encoder_weights=none", "model.decoder_dim=8", "train.epochs=1", "data.workers=0", *settings)
        changes = [] if command.startswith("pseudo-label") else [w for setting in small for w in ("--set", setting)]
        assert main([*command.split(), *changes]) == 0, command

    sizes = ("data.crop_size=70", "model.output_stride=16", "model.skip_stride=4", "model.aspp_dilations=1,2,3")
    slrnet(
        f"train --recipe voc_wsss_lite --data {place}/data --num-workers 0 --name teacher",
        *(
            "model.encoder=timm:small_dinov2",
            "model.frozen_stages=0",
            "calibration.masks=decoder",
            "train.pretrain_epochs=0",
            *sizes,
        ),
    )
    slrnet(f"pseudo-label --checkpoint {place}/teacher --data {place}/data --out {place}/pseudo")
    slrnet(
        f"distill --recipe voc_distill_lite --data {place}/pseudo --num-workers 0 --name student", "data.crop_size=64"
    )
    teacher, student = (load_checkpoint(place / name) for name in ("teacher", "student"))
    assert teacher.config.model.encoder == "timm:small_dinov2"
    assert student.config.model.encoder == "efficientnet_lite0"
    assert isinstance(restore_model(student), DeepLabV3Plus)
    assert student.state.step == 2
    assert student.state.metrics["train/epoch_loss_pixel_segmentation"] > 0
    job = json.loads((place / "pseudo" / "pseudo_labels.json").read_text())["job"]
    assert Path(job["checkpoint"]).is_relative_to(place / "teacher")


def test_masks_of_the_wrong_splits_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `distill` is not installed")
    build_demo(place / "data", num_train=8, num_val=4, image_size=64, samples_per_shard=4)
    record = {"job": {"splits": ["train", "val"], "checkpoint": "x", "protocol": "ss"}, "quality": {}}
    (place / "data" / "pseudo_labels.json").write_text(json.dumps(record))
    assert run_job("distill.py", "--data", str(place / "data"), "--num-workers", "0") == 2
    assert "validates on true ones of 'val': make them with --splits train" in capsys.readouterr().err
