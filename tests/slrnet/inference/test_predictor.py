"""Predictors: several scales, images as people have them, gating, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import slrnet
from slrnet.checkpoints.checkpoint import Checkpoint, CheckpointError, restore_model
from slrnet.config import Config, apply_overrides
from slrnet.data.depth import Depth
from slrnet.inference import forward
from slrnet.inference.forward import Inference
from slrnet.inference.predictor import rgb_array
from slrnet.models.slrnet import SLRNet
from slrnet.ops.maps import resize
from slrnet.tools.predict import load_predictor


def picture(height: int = 70, width: int = 90, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tensor(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> SLRNet:
    return restore_model(checkpoint).eval()


class TestPredictMultiScale:
    def test_is_the_mean_over_scales_and_mirror_images(self, model: SLRNet, tiny_config: Config) -> None:
        config = apply_overrides(tiny_config, ["evaluation.scales=1.0,0.5"])
        image = tensor(picture())
        expected, scores = [], []
        with torch.no_grad():
            for scale in (1.0, 0.5):
                inputs = model.encoder.normalize(Inference(model, config).fit(image, scale))
                for flip in (False, True):
                    out = model([inputs.flip(-1) if flip else inputs])
                    probs = out.logits[0].softmax(dim=1)
                    expected.append(resize(probs.flip(-1) if flip else probs, (70, 90)))
                    scores.append(out.class_scores[0])
        probs, class_scores = Inference(model, config).multi_scale(image)
        torch.testing.assert_close(probs, torch.stack(expected).mean(dim=0))
        torch.testing.assert_close(class_scores, torch.stack(scores).mean(dim=0))
        assert not torch.allclose(probs, Inference(model, config).single_scale(image)[0], atol=1e-3)

    def test_a_mirrored_image_has_the_mirrored_mask(self, model: SLRNet, tiny_config: Config) -> None:
        config = apply_overrides(tiny_config, ["evaluation.scales=1.0,1.5"])
        image = tensor(picture(64, 80))
        straight, _ = Inference(model, config).multi_scale(image)
        mirrored, _ = Inference(model, config).multi_scale(image.flip(-1))
        torch.testing.assert_close(mirrored.flip(-1), straight, atol=1e-5, rtol=1e-4)
        single, _ = Inference(model, config).single_scale(image.flip(-1))
        assert not torch.allclose(single.flip(-1), Inference(model, config).single_scale(image)[0], atol=1e-3)

    def test_large_images_go_through_the_network_one_at_a_time(
        self, model: SLRNet, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = torch.stack([tensor(picture(seed=seed)) for seed in (0, 1)])
        counts: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0][0])))
        try:
            together = Inference(model, tiny_config).multi_scale(images)
            monkeypatch.setattr(forward, "_LARGE", 64 * 64)
            alone = Inference(model, tiny_config).multi_scale(images)
        finally:
            hook.remove()
        scales = tiny_config.evaluation.scales
        large = [Inference(model, tiny_config).fit(images, scale)[0, 0].numel() > 64 * 64 for scale in scales]
        assert any(large)
        assert not all(large)
        assert counts == [4] * len(scales) + [n for own in large for n in ([1] * 4 if own else [4])]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other)

    def test_scales_multiply_the_configured_one(self, model: SLRNet, tiny_config: Config) -> None:
        image = tensor(picture(64, 96))
        left = apply_overrides(tiny_config, ["evaluation.scales=0.5", "evaluation.scale=2.0"])
        right = apply_overrides(tiny_config, ["evaluation.scales=1.0"])
        torch.testing.assert_close(
            Inference(model, left).multi_scale(image)[0], Inference(model, right).multi_scale(image)[0]
        )


class TestPredictor:
    @pytest.mark.parametrize("protocol", ["ss", "ms", "ms_crf"])
    def test_a_prediction_is_complete(self, checkpoint: Checkpoint, protocol: Any) -> None:
        if protocol == "ms_crf":
            pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
        found = slrnet.load(checkpoint.path, protocol=protocol, device="cpu")(picture(37, 53))
        assert (found.mask.shape, found.mask.dtype) == ((37, 53), np.uint8)
        assert found.probs.shape == (4, 37, 53)
        np.testing.assert_allclose(found.probs.sum(axis=0), 1, atol=1e-4)
        np.testing.assert_array_equal(found.mask, found.probs.argmax(axis=0))
        assert found.class_scores.shape == (3,)
        assert ((found.class_scores > 0) & (found.class_scores < 1)).all()

    def test_a_picture_and_its_array_are_the_same(self, checkpoint: Checkpoint) -> None:
        predictor = load_predictor(checkpoint, device="cpu")
        pixels = picture()
        np.testing.assert_array_equal(predictor(Image.fromarray(pixels)).probs, predictor(pixels).probs)

    @pytest.mark.parametrize("protocol", ["ss", "ms"])
    def test_a_batch_gives_what_its_images_give(self, checkpoint: Checkpoint, protocol: Any) -> None:
        predictor = load_predictor(checkpoint, protocol=protocol, device="cpu")
        images = [picture(40, 56, 1), picture(56, 40, 2), picture(40, 56, 3), picture(40, 56, 4)]
        sizes: list[int] = []
        predictor.inference.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0][0])))
        together = predictor.predict_batch(images)
        assert set(sizes) == ({3, 1} if protocol == "ss" else {6, 2})
        for image, found in zip(images, together, strict=True):
            alone = predictor(image)
            assert found.probs is not None
            np.testing.assert_allclose(found.probs, alone.probs, atol=1e-5)
            np.testing.assert_allclose(found.class_scores, alone.class_scores, atol=1e-5)
        assert predictor.predict_batch([]) == []

    def test_large_images_go_by_tiles(
        self, make_checkpoint: Callable[[Config], Checkpoint], tiny_config: Config
    ) -> None:
        settings = ["inference.tile_above=9000", "inference.tile_size=64", "inference.tile_overlap=32"]
        predictor = load_predictor(make_checkpoint(apply_overrides(tiny_config, settings)), device="cpu")
        sizes: list[tuple[int, ...]] = []
        predictor.inference.model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0][0].shape)))
        blocks = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        image = blocks.repeat(16, axis=0).repeat(16, axis=1)  # 96 x 144
        found = predictor(image)
        assert found.probs is None
        assert (found.mask.shape, found.mask.dtype) == ((96, 144), np.uint8)
        assert set(sizes) == {(1, 3, 64, 64)}
        assert len(sizes) == 2 * 4
        corner = predictor(image[:64, :64])
        np.testing.assert_array_equal(found.mask[:32, :24], corner.mask[:32, :24])  # no other tile reaches there
        assert found.class_scores is not None
        assert corner.class_scores is not None
        assert (found.class_scores >= corner.class_scores - 1e-6).all()
        assert predictor(image[:60]).probs is not None  # 60 x 144 is below the limit

    def test_gating_by_class_scores(self, make_checkpoint: Callable[[Config], Checkpoint], tiny_config: Config) -> None:
        config = apply_overrides(tiny_config, ["evaluation.gating=scores", "evaluation.gating_threshold=1.0"])
        found = load_predictor(make_checkpoint(config), device="cpu")(picture())
        assert not found.probs[1:].any()
        assert not found.mask.any()

    @pytest.mark.parametrize("protocol", ["ss", "ms"])
    def test_without_class_scores(
        self, make_checkpoint: Callable[[Config], Checkpoint], tiny_config: Config, protocol: Any
    ) -> None:
        config = apply_overrides(tiny_config, ["setting=sss", "data.pixel_labeled_subset=pixels"])
        found = slrnet.load(make_checkpoint(config).path, protocol=protocol, device="cpu")(picture(37, 53))
        assert found.class_scores is None
        assert found.probs.shape == (4, 37, 53)
        assert len(np.unique(found.mask)) > 1

    def test_refusals(
        self, checkpoint: Checkpoint, make_checkpoint: Callable[[Config], Checkpoint], tiny_config: Config
    ) -> None:
        with pytest.raises(ValueError, match="protocol is 'xl'; allowed are ss, ms, ms_crf"):
            load_predictor(checkpoint, protocol="xl")  # type: ignore[arg-type]
        gated = make_checkpoint(apply_overrides(tiny_config, ["evaluation.gating=image_labels"]))
        with pytest.raises(ValueError, match="gating is image_labels, and an image to predict has none"):
            load_predictor(gated)
        with pytest.raises(ValueError, match=r"shape \(70, 90\) and type uint8; \(H, W, 3\) uint8 is needed"):
            load_predictor(checkpoint, device="cpu")(picture()[..., 0])
        with pytest.raises(CheckpointError):
            slrnet.load("/nowhere")


class TestRgbArray:
    def test_orientation_is_applied(self) -> None:
        pixels = picture(20, 30)
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = 6  # turn clockwise to see it upright
        np.testing.assert_array_equal(rgb_array(image), np.rot90(pixels, -1))

    def test_transparent_parts_are_white(self) -> None:
        layer = np.full((4, 6, 4), 10, dtype=np.uint8)
        layer[:, :3, 3], layer[:, 3:, 3] = 0, 255
        upright = rgb_array(Image.fromarray(layer))
        assert (upright[:, :3] == 255).all()
        assert (upright[:, 3:] == 10).all()

    def test_transparent_palette_entries_too(self) -> None:
        image = Image.new("P", (4, 2), 1)
        image.putpalette([0, 0, 0, 200, 100, 50])
        image.info["transparency"] = 1
        assert (rgb_array(image) == 255).all()

    def test_grey_and_palette_and_cmyk_become_rgb(self) -> None:
        grey = Image.new("L", (5, 4), 77)
        assert (rgb_array(grey) == 77).all()
        palette = Image.new("P", (5, 4), 1)
        palette.putpalette([0, 0, 0, 200, 100, 50])
        assert rgb_array(palette)[0, 0].tolist() == [200, 100, 50]
        assert rgb_array(Image.new("CMYK", (5, 4), (0, 255, 255, 0)))[0, 0].tolist() == [255, 0, 0]

    def test_sixteen_bits_are_scaled_by_the_depth(self) -> None:
        image = Image.fromarray(np.array([[0, 2056, 4095]], dtype=np.uint16))
        assert rgb_array(image, Depth.parse("12"))[0, :, 0].tolist() == [0, 128, 255]
        with pytest.raises(ValueError, match="uint16 samples, here from 0 to 4095: say which values become black"):
            rgb_array(image)
