"""From a network to its pseudo masks to a second network, by the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.demo import build_demo
from slrnet.checkpoints.checkpoint import TrainState, load_checkpoint, restore_model, save_checkpoint
from slrnet.config import apply_overrides
from slrnet.data.manifest import load_dataset
from slrnet.models.deeplab import DeepLabV3Plus
from slrnet.models.slrnet import build_network
from slrnet.recipes import demo

ROOT = Path(__file__).resolve().parents[2]
TINY = ("model.encoder=timm:test_efficientnet", "model.encoder_weights=none", "model.decoder_dim=8")


def run(script: str, *arguments: str, storage: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "ray_jobs" / script), *arguments],
        env=os.environ | {"SLRNET_STORAGE": str(storage)},
        cwd=storage,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_a_network_is_distilled(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `distill` is not installed")
    data, pseudo = tmp_path / "data", tmp_path / "pseudo"
    build_demo(data, num_train=24, num_val=6, image_size=64, samples_per_shard=6)
    classes = load_dataset(data).info.classes
    usual = "evaluation.background_power=1.0"
    config = apply_overrides(demo(), [*TINY, usual, "data.crop_size=64", f"data.path={data}"])
    torch.manual_seed(0)
    model = build_network(config, num_classes=len(classes))
    state = TrainState(
        epoch=1, step=1, classes=classes, data_fingerprint="-", world_size=1, metrics={"val/miou_ss": 0.125}
    )
    teacher = tmp_path / "teacher"
    save_checkpoint(teacher / "checkpoints", config=config, state=state, model=model.state_dict(), optimizer={})

    common = ("--checkpoint", str(teacher), "--out", str(pseudo), "--protocol", "ss")
    labeled = run("pseudo_label.py", *common, "--voc-folder", str(tmp_path / "voc"), storage=tmp_path)
    assert labeled.returncode == 0, labeled.stderr
    assert "train, ss+gated_by_image_labels, 24 images: miou " in labeled.stdout
    assert len(list((tmp_path / "voc" / "SegmentationClass").glob("*.png"))) == 24
    verified = run("pseudo_label.py", "--verify", str(pseudo), storage=tmp_path)
    assert (verified.returncode, "30 samples are intact" in verified.stdout) == (0, True), verified.stderr

    settings = (*TINY, "data.crop_size=64", "data.workers=0", "train.epochs=2", "model.frozen_stages=0")
    changes = [word for setting in settings for word in ("--set", setting)]
    trained = run(
        "distill.py", "--data", str(pseudo), "--num-workers", "0", "--name", "student", *changes, storage=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    assert "masks by ss+gated_by_image_labels: val/miou_ss 12.5 %" in trained.stdout
    student = load_checkpoint(tmp_path / "student")
    assert isinstance(restore_model(student), DeepLabV3Plus)
    losses = {name.removeprefix("train/epoch_loss_") for name in student.state.metrics if "epoch_loss_" in name}
    assert losses == {"pixel_segmentation", "segmentation", "mask_consistency"}
    assert student.state.metrics["train/epoch_loss_mask_consistency"] == 0
    assert student.state.metrics["train/epoch_loss"] == pytest.approx(
        student.state.metrics["train/epoch_loss_pixel_segmentation"]
    )
    evaluated = run("evaluate.py", "--checkpoint", str(tmp_path / "student"), "--protocol", "ms", storage=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    (record,) = (tmp_path / "student" / "evaluations").glob("*/evaluation.json")
    assert json.loads(record.read_text())["images"] == 6


@pytest.mark.slow
def test_masks_of_the_wrong_splits_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `distill` is not installed")
    build_demo(tmp_path / "data", num_train=8, num_val=4, image_size=64, samples_per_shard=4)
    record = {"job": {"splits": ["train", "val"], "checkpoint": "x", "protocol": "ss"}, "quality": {}}
    (tmp_path / "data" / "pseudo_labels.json").write_text(json.dumps(record))
    result = run("distill.py", "--data", str(tmp_path / "data"), "--num-workers", "0", storage=tmp_path)
    assert result.returncode == 2
    assert "validates on true ones of 'val': make them with --splits train" in result.stderr
