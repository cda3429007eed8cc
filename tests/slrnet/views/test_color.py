"""Color jitter against torchvision, image by image, and values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from slrnet.config import ViewsConfig
from slrnet.views.color import ColorParams, apply_color, draw_color

OFF = ColorParams(brightness=None, contrast=None, saturation=None, hue=None)


def _images(n: int) -> Tensor:
    """Random pixels, and rows of those where two channels tie, all are equal, or a channel is 0 or 1."""
    images = torch.rand(n, 3, 12, 10, generator=torch.Generator().manual_seed(3))
    images[:, 1, 0] = images[:, 0, 0]
    images[:, 2, 1] = images[:, 1, 1]
    images[:, 2, 2] = images[:, 0, 2]
    images[:, :, 3] = images[:, :1, 3]
    images[:, :, 4] = images[:, :, 4].round()
    return images


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.013, 0.0, 0.07, 0.31, 0.5])
def test_hue_equals_torchvision(shift: float) -> None:
    images = _images(2)
    ours = apply_color(images, ColorParams(None, None, None, hue=torch.tensor([shift, -shift])))
    theirs = torch.stack([tv.adjust_hue(images[0], shift), tv.adjust_hue(images[1], -shift)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0.0)


def test_each_distortion_equals_torchvision() -> None:
    images, factors = _images(3), torch.tensor([0.4, 1.0, 1.7])
    for name, adjust in (
        ("brightness", tv.adjust_brightness),
        ("contrast", tv.adjust_contrast),
        ("saturation", tv.adjust_saturation),
    ):
        ours = apply_color(images, ColorParams(**{**dict.fromkeys(OFF.__slots__), name: factors}))
        theirs = torch.stack([adjust(image, float(f)) for image, f in zip(images, factors, strict=True)])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0.0)


def test_distortions_are_chained_in_the_documented_order() -> None:
    images = _images(4)
    generator = torch.Generator().manual_seed(1)
    params = draw_color(4, ViewsConfig(), generator=generator)
    assert params.brightness is not None
    assert params.contrast is not None
    assert params.saturation is not None
    assert params.hue is not None
    before = images.clone()
    ours = apply_color(images, params)
    assert torch.equal(images, before), "the input is left as it is"
    for i, image in enumerate(images):
        out = tv.adjust_brightness(image, float(params.brightness[i]))
        out = tv.adjust_contrast(out, float(params.contrast[i]))
        out = tv.adjust_saturation(out, float(params.saturation[i]))
        torch.testing.assert_close(ours[i], tv.adjust_hue(out, float(params.hue[i])), atol=1e-5, rtol=0.0)


def test_a_third_of_a_turn_makes_red_green() -> None:
    red = torch.tensor([1.0, 0.25, 0.25]).view(1, 3, 1, 1)
    turned = apply_color(red, ColorParams(None, None, None, hue=torch.tensor([1.0 / 3.0])))
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.25, 1.0, 0.25]))


def test_off_changes_nothing() -> None:
    images = _images(2)
    off = ViewsConfig(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    params = draw_color(2, off, generator=torch.Generator().manual_seed(0))
    assert params == OFF
    assert apply_color(images, params) is images


def test_draws_depend_on_the_generator_alone_and_stay_in_range() -> None:
    def draw(seed: int, contrast: float) -> ColorParams:
        generator = torch.Generator().manual_seed(seed)
        config = ViewsConfig(brightness=0.2, contrast=contrast, saturation=1.0)
        return draw_color(500, config, generator=generator)

    first, again, other, no_contrast = draw(5, 0.3), draw(5, 0.3), draw(6, 0.3), draw(5, 0.0)
    for name, middle, strength in (("brightness", 1, 0.2), ("contrast", 1, 0.3), ("saturation", 1, 1), ("hue", 0, 0.1)):
        values = getattr(first, name)
        assert torch.equal(values, getattr(again, name))
        assert not torch.equal(values, getattr(other, name))
        offsets = (values - middle) / strength
        assert offsets.abs().max() <= 1.0 + 1e-5
        assert offsets.min() < -0.95
        assert offsets.max() > 0.95
    assert first.hue is not None
    assert no_contrast.hue is not None
    assert torch.equal(first.hue, no_contrast.hue), "switching one distortion off leaves the others' draws"
