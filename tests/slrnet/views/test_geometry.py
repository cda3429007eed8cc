"""Views: sizes by hand, exact and near inverses, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from slrnet.config import ViewsConfig
from slrnet.views.geometry import View, apply_view, draw_views, invert_view, view_size


@pytest.mark.parametrize(
    ("side", "scale", "stride", "expected"),
    [
        (321, 1.0, 8, 321),
        (321, 0.5, 8, 161),
        (321, 1.5, 8, 481),
        (192, 0.5, 16, 96),
        (192, 0.75, 32, 160),  # 144 lies between 128 and 160; the larger one
        (375, 1.0, 8, 375),
        (375, 0.5, 8, 185),  # 187.5: 184 and 185 below, 192 and 193 above
        (375, 2.0, 8, 752),  # 750: 745 below, 752 above
        (33, 0.5, 16, 17),
        (33, 0.1, 16, 17),  # never under one stride
        (97, 0.51, 1, 49),  # stride 1 takes any size
    ],
)
def test_view_size(side: int, scale: float, stride: int, expected: int) -> None:
    assert view_size((side, 192), scale, stride=stride)[0] == expected


@given(
    side=st.integers(16, 700), scale=st.floats(0.2, 3.0).filter(lambda s: s != 1.0), stride=st.sampled_from([8, 16, 32])
)
@settings(max_examples=100, deadline=None)
def test_view_size_is_the_nearest_that_fits(side: int, scale: float, stride: int) -> None:
    size = view_size((64, side), scale, stride=stride)[1]
    allowed = (side % stride,) if side % stride in (0, 1) else (0, 1)
    fitting = [s for s in range(stride, 4 * 700) if s % stride in allowed]
    assert size in fitting
    assert abs(size - scale * side) == min(abs(s - scale * side) for s in fitting)


def test_scale_one_mirrors_the_flagged_images_and_inverts_exactly() -> None:
    images = torch.rand(3, 2, 5, 4)
    view = View(1.0, torch.tensor([True, False, True]))
    out = apply_view(images, view, stride=8)
    for i, mirrored in enumerate((True, False, True)):
        for x in range(4):
            assert torch.equal(out[i, :, :, x], images[i, :, :, 3 - x if mirrored else x])
    assert torch.equal(invert_view(out, view, size=(5, 4)), images)


def test_nothing_to_do_returns_the_images() -> None:
    images = torch.rand(1, 3, 16, 16)
    assert apply_view(images, View(1.0), stride=8) is images
    assert invert_view(images, View(0.5), size=(16, 16)) is images


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_resizing_comes_before_mirroring(scale: float) -> None:
    """Whatever order is taken inside, the result is resize then mirror."""
    images = torch.rand(2, 3, 32, 33, generator=torch.Generator().manual_seed(0))
    flip = torch.tensor([True, False])
    size = view_size((32, 33), scale, stride=8)
    resized = functional.interpolate(images, size=size, mode="bilinear", align_corners=True)
    expected = torch.stack([resized[0].flip(-1), resized[1]])
    torch.testing.assert_close(apply_view(images, View(scale, flip), stride=8), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 2.0])
def test_inverse_of_a_smooth_map_is_close(scale: float) -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 65), torch.linspace(0, 1, 65), indexing="ij")
    maps = torch.stack([torch.sin(3 * x + y), x * y]).expand(2, 2, 65, 65)
    view = View(scale, torch.tensor([False, True]))
    back = invert_view(apply_view(maps, view, stride=16), view, size=(65, 65))
    torch.testing.assert_close(back, maps, atol=2e-3, rtol=0.0)
    linear = x.expand(1, 1, 65, 65)
    again = invert_view(apply_view(linear, View(scale), stride=16), View(scale), size=(65, 65))
    torch.testing.assert_close(again, linear, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("size", [(4, 4), (9, 7)])
def test_gradient_flows_through_the_inverse(size: tuple[int, int]) -> None:
    maps = torch.rand(2, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    view = View(0.5, torch.tensor([True, False]))
    assert torch.autograd.gradcheck(lambda m: invert_view(m, view, size=size), (maps,))
    assert torch.autograd.gradgradcheck(lambda m: invert_view(m, view, size=size).square(), (maps,))


@pytest.mark.parametrize("channels", [1, 3, 21])
def test_maps_of_either_layout_are_mirrored_alike(channels: int) -> None:
    maps, flip = torch.rand(3, channels, 4, 5), torch.tensor([True, False, True])
    expected = torch.stack([one.flip(-1) if flipped else one for one, flipped in zip(maps, flip, strict=True)])
    for layout in (torch.contiguous_format, torch.channels_last):
        own = maps.clone(memory_format=layout).requires_grad_()
        out = invert_view(own, View(1.0, flip), size=(4, 5))
        assert torch.equal(out, expected)
        assert out.is_contiguous(memory_format=layout)
        out.backward(expected)
        assert own.grad is not None
        assert torch.equal(own.grad, maps)


def test_draws_are_one_coin_per_image_and_view() -> None:
    views = draw_views(400, ViewsConfig(), generator=torch.Generator().manual_seed(2))
    again = draw_views(400, ViewsConfig(), generator=torch.Generator().manual_seed(2))
    assert [view.scale for view in views] == [1.0, 0.5]
    flips = [view.flip for view in views]
    assert flips[0] is not None
    assert flips[1] is not None
    assert not torch.equal(flips[0], flips[1])
    for view, same in zip(views, again, strict=True):
        assert view.flip is not None
        assert same.flip is not None
        assert torch.equal(view.flip, same.flip)
        assert 140 < int(view.flip.sum()) < 260
    assert draw_views(4, ViewsConfig(scales=(2.0,), flip=False), generator=torch.Generator()) == [View(2.0, None)]
