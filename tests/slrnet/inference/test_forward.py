"""What the network sees of an image, and the gating of its classes, against values by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from slrnet.config import Config, ConfigError, EvaluationConfig, apply_overrides
from slrnet.inference.forward import Inference, gate
from slrnet.models.encoders import Encoder
from slrnet.models.network import Outputs

PLAIN = Encoder(nn.Identity(), stages=(), channels=(3, 3), strides=(8, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CONFIG = apply_overrides(Config(), ["model.output_stride=16", "data.crop_size=64"])


class Recorder(nn.Module):
    """Keeps the views that it sees; its three classes are the color channels."""

    num_classes = 3
    encoder = PLAIN

    def __init__(self) -> None:
        super().__init__()
        self.views: list[Tensor] = []

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        self.views += views
        return Outputs(list(views), [torch.ones(len(view), 2) for view in views], [], [], [])


def noise(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class TestViewMasks:
    @pytest.mark.parametrize("fusion", ["logits", "probs"])
    def test_pseudo_masks_are_the_probes_and_predictions_the_decoders(self, fusion: str) -> None:
        class Probing(Recorder):
            def forward(self, views: Sequence[Tensor]) -> Outputs:
                return replace(super().forward(views), probe_logits=[-4 * view[..., ::2, ::2] for view in views])

        config = apply_overrides(CONFIG, [f"calibration.fusion={fusion}", "views.scales=1.0"])
        image = noise(64, 64)
        alone, probing = (Inference(network, config) for network in (Recorder(), Probing()))  # type: ignore[arg-type]
        expected = -4 * alone.view_masks(image).images[..., ::2, ::2]
        (masks,) = probing.view_masks(image).masks
        assert torch.allclose(masks, expected.softmax(dim=1) if fusion == "probs" else expected)
        assert torch.equal(probing.single_scale(image)[0], alone.single_scale(image)[0])


class TestPredictSingleScale:
    @pytest.mark.parametrize(
        ("crop", "size", "expected"),
        [
            (64, (37, 53), (32, 48)),
            (65, (37, 53), (33, 49)),
            (64, (5, 7), (16, 16)),
            (65, (5, 7), (17, 17)),
            (64, (64, 80), (64, 80)),
        ],
    )
    def test_the_network_sees_sizes_like_the_crops(
        self, crop: int, size: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        network = Recorder()
        config = apply_overrides(CONFIG, [f"data.crop_size={crop}"])
        image = noise(*size)
        probs, scores = Inference(network, config).single_scale(image)  # type: ignore[arg-type]
        assert [view.shape[-2:] for view in network.views] == [expected]
        assert probs.shape == (1, 3, *size)
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(1, *size))
        assert scores.tolist() == [[1.0, 1.0]]

    @pytest.mark.parametrize(("scale", "expected"), [(0.5, (32, 48)), (2.0, (144, 192)), (0.1, (16, 16))])
    def test_and_the_configured_scale(self, scale: float, expected: tuple[int, int]) -> None:
        network = Recorder()
        config = apply_overrides(CONFIG, [f"evaluation.scale={scale}"])
        image = noise(70, 100)
        probs, _ = Inference(network, config).single_scale(image)  # type: ignore[arg-type]
        assert [view.shape[-2:] for view in network.views] == [expected]
        assert probs.shape == (1, 3, 70, 100)

    @pytest.mark.parametrize("scale", [1.0, 0.5, 1.5])
    def test_released_sizes_are_bicubic_and_fit_no_stride(self, scale: float) -> None:
        """As by Pillow."""
        network, image = Recorder(), noise(37, 53)
        config = apply_overrides(CONFIG, [f"evaluation.scale={scale}", "evaluation.resizing=released"])
        Inference(network, config).single_scale(image)  # type: ignore[arg-type]
        size = (round(53 * scale), round(37 * scale))
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        torch.testing.assert_close(network.views[0] * 255, expected.float(), atol=1.01, rtol=0.0)
        assert float((network.views[0] * 255 - expected).abs().mean()) < 0.02

    def test_released_probabilities_take_two_steps(self) -> None:
        config = apply_overrides(CONFIG, ["evaluation.resizing=released", "evaluation.scale=0.5"])
        logits = torch.zeros(1, 3, 3, 3)
        logits[0, 1, 1, 1] = 4.0

        class Coarse(Recorder):
            def forward(self, views: Sequence[Tensor]) -> Outputs:
                return Outputs([logits], [torch.ones(1, 2)], [], [], [])

        probs, _ = Inference(Coarse(), config).single_scale(noise(8, 10))  # type: ignore[arg-type]
        steps = logits.softmax(dim=1)
        for side in ((4, 5), (8, 10)):
            steps = interpolate(steps, side, mode="bilinear", align_corners=True)
        torch.testing.assert_close(probs, steps)
        at_once = interpolate(logits.softmax(dim=1), (8, 10), mode="bilinear", align_corners=True)
        assert float((probs - at_once).abs().max()) > 0.01

    def test_images_are_normalized(self) -> None:
        class Other(Recorder):
            encoder = Encoder(
                nn.Identity(), stages=(), channels=(3, 3), strides=(8, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.125)
            )

        network = Other()
        Inference(network, CONFIG).single_scale(torch.full((3, 64, 48), 255, dtype=torch.uint8))  # type: ignore[arg-type]
        assert network.views[0][0, :, 3, 4].tolist() == pytest.approx([1.0, 2.0, 4.0])


class TestGate:
    PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 4, 1, 1)
    SCORES = torch.tensor([[0.0, 3.0, -3.0]])  # sigmoids 0.5, 0.95, 0.05
    LABELS = torch.tensor([0.0, 0.0, 1.0])

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, [0.4, 0.3, 0.2, 0.1]),
            ({"gating": "image_labels"}, [0.4, 0.0, 0.0, 0.1]),
            ({"gating": "scores", "gating_threshold": 0.3}, [0.4, 0.3, 0.2, 0.0]),
            ({"gating": "scores", "gating_threshold": 0.9}, [0.4, 0.0, 0.2, 0.0]),
            ({"gating": "scores", "gating_threshold": 0.0}, [0.4, 0.3, 0.2, 0.1]),
            ({"gating": "scores", "gating_threshold": 0.5}, [0.4, 0.0, 0.2, 0.0]),  # strictly above
            ({"gating": "scores", "gating_threshold": 0.0, "gating_top": 1}, [0.4, 0.0, 0.2, 0.0]),
            ({"gating": "scores", "gating_threshold": 0.0, "gating_top": 2}, [0.4, 0.3, 0.2, 0.0]),
            ({"background_power": 3.0}, [0.064, 0.3, 0.2, 0.1]),
            ({"background_power": 2.0, "gating": "image_labels"}, [0.16, 0.0, 0.0, 0.1]),
        ],
    )
    def test_by_hand(self, settings: dict[str, object], expected: list[float]) -> None:
        config = EvaluationConfig(**settings)  # type: ignore[arg-type]
        gated = gate(self.PROBS.clone(), self.SCORES, self.LABELS, config)
        torch.testing.assert_close(gated.flatten(), torch.tensor(expected))

    def test_what_cannot_be_gated_is_refused(self) -> None:
        for gating, scores, message in (
            ("scores", None, "a network that predicts the background has none"),
            ("image_labels", self.SCORES, "there are none"),
        ):
            with pytest.raises(ValueError, match=message):
                gate(self.PROBS, scores, None, EvaluationConfig(gating=gating))


def test_gating_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.gating: Input should be 'none', 'scores' or 'image_labels'"):
        apply_overrides(CONFIG, ["evaluation.gating=labels"])
