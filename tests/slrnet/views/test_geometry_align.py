"""Maps of all views in one frame."""

from __future__ import annotations

import torch

from slrnet.views.geometry import View, align_maps, apply_view, largest_size


def test_the_largest_map_has_the_most_positions() -> None:
    assert largest_size([torch.empty(2, 3, 4, 9), torch.empty(2, 3, 6, 7), torch.empty(2, 3, 5, 8)]) == (6, 7)


def test_maps_come_back_to_the_frame_of_the_crop() -> None:
    """Maps that are linear over the crop survive aligned-corners resizing exactly, so un-warping is exact."""
    ramp = torch.linspace(0, 1, 9).expand(2, 1, 9, 9) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    views = [View(0.5, torch.tensor([True, False])), View(1.0, torch.tensor([False, True])), View(1.0)]
    warped = [apply_view(ramp, view, stride=4) for view in views]
    assert [view.shape[-1] for view in warped] == [5, 9, 9]
    for maps in align_maps(warped, views, size=largest_size(warped)):
        assert maps.shape == (2, 3, 9, 9)
        assert torch.allclose(maps, ramp, atol=1e-5)


def test_the_largest_view_may_exceed_the_crop() -> None:
    maps = [torch.rand(1, 3, 4, 4), torch.rand(1, 3, 6, 6)]
    aligned = align_maps(maps, [View(1.0), View(1.5)], size=largest_size(maps))
    assert {tuple(view.shape[-2:]) for view in aligned} == {(6, 6)}
    assert torch.equal(aligned[1], maps[1])


def test_without_maps_there_is_nothing_to_align() -> None:
    assert align_maps([], [View(1.0), View(0.5)], size=(4, 4)) == []
