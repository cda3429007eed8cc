"""Pictures of codes: what is drawn is what the module computes; mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slrnet.cli.main import main
from slrnet.config import Config, ModelConfig, apply_overrides
from slrnet.inference.forward import Inference
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.encoders import build_encoder
from slrnet.models.slrnet import SLRNet
from slrnet.tools.codes import CodeMaps, code_maps, draw_code_maps, heat

SMALL = ModelConfig(
    encoder="timm:test_resnet",
    encoder_weights="none",
    output_stride=16,
    frozen_stages=0,
    decoder_dim=8,
    skip_dim=4,
    aspp_dilations=(1, 2, 3),
)


def model_of(**options: Any) -> SLRNet:
    torch.manual_seed(0)
    encoder = build_encoder(SMALL)
    module = CrossViewLowRank(8, dim=6, num_iters=2, **options)
    return SLRNet(encoder, SMALL, num_classes=3, cvlr=module).eval()


IMAGE = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
CONFIG = apply_overrides(Config(), ["model.output_stride=16", "data.crop_size=64"])


def test_codes_of_several_numbers_of_iterations() -> None:
    model = model_of()
    maps = code_maps(Inference(model, CONFIG), IMAGE, [1, 2, 5])
    assert list(maps.codes) == [1, 2, 5]
    for codes in maps.codes.values():
        assert codes.shape == (3, 48, 64)
        np.testing.assert_allclose(codes.sum(axis=0), 1, atol=1e-5)
    assert not np.allclose(maps.codes[1], maps.codes[5], atol=1e-6)
    assert model.cvlr is not None
    assert model.cvlr.num_iters == 2
    assert maps.mask.shape == (48, 64)


def test_atoms_without_names() -> None:
    model = model_of(method="free", num_bases=5)
    maps = code_maps(Inference(model, CONFIG), IMAGE, [3])
    assert maps.codes[3].shape == (5, 48, 64)
    means = maps.codes[3].mean(axis=(1, 2))
    assert list(maps.choose_atoms(["background", "cat", "dog"])) == np.argsort(-means).tolist()


def test_the_largest_classes_of_the_mask_are_drawn_unless_others_are_named() -> None:
    mask = np.array([[2, 2, 2, 1], [0, 0, 0, 0]])
    maps = CodeMaps({1: np.zeros((4, 2, 4), dtype=np.float32)}, mask)
    classes = ["background", "cat", "dog", "cow"]
    assert maps.choose_atoms(classes) == {0: "background", 2: "dog", 1: "cat"}
    assert maps.choose_atoms(classes, ["cow"]) == {3: "cow"}
    with pytest.raises(ValueError, match="there is no class 'bee'; the checkpoint's are background, cat, dog, cow"):
        maps.choose_atoms(classes, ["bee"])


def test_the_picture_shows_each_map_in_its_place() -> None:
    codes = np.zeros((3, 20, 40), dtype=np.float32)
    codes[2] = 1
    image = np.full((20, 40, 3), 7, dtype=np.uint8)
    maps = CodeMaps({1: codes, 4: 1 - codes}, np.zeros((20, 40), dtype=np.int64))
    picture = np.asarray(draw_code_maps(image, maps, ["background", "cat", "dog"], ["background", "dog"]))
    dark, bright = ([int(value) for value in heat(np.full((1, 1), level, np.float32))[0, 0]] for level in (0, 1))
    for row, (first, second) in enumerate(((dark, bright), (bright, dark))):
        y = 10 + row * (24 + 110 + 10) + 24 + 55
        columns = [picture.shape[1] - 230 * (3 - column) + 110 for column in range(3)]
        colours = [picture[y, x].tolist() for x in columns]
        assert colours == [[7, 7, 7], first, second]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = SLRNet(model_of().encoder, SMALL, num_classes=3, cvlr=None)
    with pytest.raises(ValueError, match="without a low-rank module"):
        code_maps(Inference(plain.eval(), CONFIG), IMAGE, [1])
    model = model_of()
    with pytest.raises(ValueError, match=r"num_iters is \[0\]"):
        code_maps(Inference(model, CONFIG), IMAGE, [0])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["codes", str(tmp_path / "none"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
