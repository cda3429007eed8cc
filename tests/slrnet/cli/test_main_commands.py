"""Every command, for both kinds of networks, with names and folders in which any character occurs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slrnet.cli.main import main
from slrnet.recipes import get_recipe
from tests.fixtures.stores import Stock
from tests.fixtures.tiny_data import WriteTiny

CLASSES = ("background", "猫", "狗", "a/b")
KEYS = ("background", "class_1", "class_2", "a-b")
STRANGE = "my? #50% & 'a' \"b\" 猫: v1@home.."
TINY = [
    *["model.encoder_weights=none", "model.decoder_dim=8", "model.skip_dim=4", "cvlr.dim=8", "data.crop_size=64"],
    *["data.workers=0", "train.batch_size=4", "train.epochs=1", "train.pretrain_epochs=0"],
    *["evaluation.pseudo_mask_images=3", "evaluation.panel_images=1"],
]
SETTINGS = {
    "sss_image_labels": ["setting=sss_image_labels", "data.pixel_labeled_subset=pixels"],
    "sss": ["setting=sss", "data.pixel_labeled_subset=pixels", "model.encoder=timm:test_efficientnet"],
}
"""The first on the default encoder. Image labels alone make the same network: tests/test_journeys.py has them."""


def _settings(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_all_commands(
    setting: str, write_tiny: WriteTiny, stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get_recipe("demo").model.encoder == "efficientnet_lite0"
    place = tmp_path / STRANGE
    data, storage, out = (str(place / name) for name in ("data", "runs", "out"))
    write_tiny(Path(data), classes=CLASSES)
    stock(Path(storage))
    photo = str(place / "photo #1?.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 53, 3), dtype=np.uint8)).save(photo)
    changes = _settings([*TINY, *SETTINGS[setting]])
    train = ["train", "--recipe", "demo", "--data", data, "--storage", storage, "--num-workers", "0", "--name", "run"]
    run = f"{storage}/run"
    commands = [
        [*train, *changes],
        ["evaluate", "--checkpoint", run, "--data", data, "--out", out],
        ["pseudo-label", "--checkpoint", run, "--data", data, "--out", f"{out}/pseudo", "--gating", "none"],
        ["predict", run, photo, "--out", f"{out}/masks"],
        ["report", run, "--out", f"{out}/report.html", "--images", "1"],
        ["codes", run, photo, "--out", f"{out}/codes"],
        ["figures", "fig3", run, "--out", f"{out}/figures", "--images", "1"],
        ["figures", "fig5", run, "--out", f"{out}/figures", "--images", "2"],
        ["figures", "tables", out, "--out", f"{out}/figures"],
        ["export", run, "--out", f"{out}/exported", "--no-onnx"],
        ["profile", "--recipe", "demo", "--data", data, "--out", f"{out}/profile", "--steps", "1", *changes],
        ["class-balance", data],
        ["browse", data, "--out", f"{out}/browse"],
    ]
    printed = {}
    for words in commands:
        assert main(words) == 0, (words[:2], capsys.readouterr().err)
        printed[words[0]] = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [STRANGE]
    assert all(f"{name} " in printed["evaluate"] for name in CLASSES)
    (record,) = (json.loads(path.read_text()) for path in Path(out).glob("*/evaluation.json"))
    assert [key for key in record["metrics"] if key.startswith("val/iou/")] == [f"val/iou/{key}" for key in KEYS]
    assert record["metrics"]["val/miou"] == pytest.approx(
        np.mean([record["metrics"][f"val/iou/{key}"] for key in KEYS])
    )
    page = (Path(out) / "report.html").read_text()
    assert all(f">{name}<" in page for name in CLASSES)
    assert list(json.loads((Path(out) / "masks/predictions.json").read_text())["images"]) == ["photo #1?"]
    assert json.loads((Path(out) / "exported/export.json").read_text())["classes"] == list(CLASSES)
