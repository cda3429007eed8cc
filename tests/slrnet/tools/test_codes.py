"""Pictures of codes: what is drawn is what the module computes; mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slrnet.cli.main import main
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.encoders import build_encoder
from slrnet.models.network import Normalize
from slrnet.models.slrnet import SLRNet
from slrnet.tools.codes import CodeMaps, code_maps, draw_code_maps, heat


def model_of(**options: object) -> SLRNet:
    torch.manual_seed(0)
    encoder = build_encoder("timm:test_resnet", weights="none", output_stride=16, frozen_stages=0)
    module = CrossViewLowRank(8, dim=6, num_iters=2, **options)  # type: ignore[arg-type]
    return SLRNet(encoder, num_classes=3, cvlr=module, decoder_dim=8, skip_dim=4, aspp_dilations=(1, 2, 3)).eval()


def normalize_of(model: SLRNet) -> Normalize:
    return Normalize.of(model.encoder)


IMAGE = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))


def test_codes_of_several_numbers_of_iterations() -> None:
    model = model_of()
    maps = code_maps(model, IMAGE, normalize_of(model), [1, 2, 5])
    assert list(maps.codes) == [1, 2, 5]
    for codes in maps.codes.values():
        assert codes.shape == (3, 48, 64)
        np.testing.assert_allclose(codes.sum(axis=0), 1, atol=1e-5)
    assert not np.allclose(maps.codes[1], maps.codes[5], atol=1e-6)
    assert model.cvlr is not None
    assert model.cvlr.num_iters == 2
    assert maps.mask.shape == (48, 64)


def test_atoms_without_names() -> None:
    model = model_of(num_bases=5)
    maps = code_maps(model, IMAGE, normalize_of(model), [3])
    assert maps.codes[3].shape == (5, 48, 64)


def test_the_picture_shows_each_map_in_its_place() -> None:
    codes = np.zeros((3, 20, 40), dtype=np.float32)
    codes[2] = 1
    image = np.full((20, 40, 3), 7, dtype=np.uint8)
    maps = CodeMaps({1: codes, 4: 1 - codes}, np.zeros((20, 40), dtype=np.int64))
    picture = np.asarray(draw_code_maps(image, maps, names=["background", "cat", "dog"], atoms=[0, 2]))
    dark, bright = ([int(value) for value in heat(np.full((1, 1), level, np.float32))[0, 0]] for level in (0, 1))
    for row, (first, second) in enumerate(((dark, bright), (bright, dark))):
        y = 32 + row * (110 + 8) + 55
        colours = [picture[y, 60 + column * 228 + 110].tolist() for column in range(3)]
        assert colours == [[7, 7, 7], first, second]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = SLRNet(model_of().encoder, num_classes=3, cvlr=None, decoder_dim=8, skip_dim=4, aspp_dilations=(1, 2, 3))
    with pytest.raises(ValueError, match="without a low-rank module"):
        code_maps(plain.eval(), IMAGE, normalize_of(plain), [1])
    model = model_of()
    with pytest.raises(ValueError, match=r"num_iters is \[0\]"):
        code_maps(model, IMAGE, normalize_of(model), [0])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["codes", str(tmp_path / "none"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
