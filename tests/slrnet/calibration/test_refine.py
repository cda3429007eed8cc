"""Refinement against pixel-by-pixel sums, flat and photographed regions, and what must not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from slrnet.calibration.refine import (
    DILATIONS,
    _refine_by_products,
    _refine_by_slices,
    affinities,
    refine,
    scaled_dilations,
)
from slrnet.ops.maps import resize

Array = npt.NDArray[np.float64]


def refined_in_loops(image: Tensor, probs: Tensor, num_iters: int, dilations: tuple[int, ...]) -> Array:
    """One image (3, H, W) and its masks (K, H, W), pixel by pixel and neighbor by neighbor, in float64."""
    colors, masks = image.double().numpy(), probs.double().numpy()
    height, width = colors.shape[1:]
    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    around = {}
    for y in range(height):
        for x in range(width):
            places = [(min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)) for dy, dx in steps]
            samples = np.array([colors[:, v, u] for v, u in places])
            std = np.sqrt(((samples - samples.mean(axis=0)) ** 2).sum(axis=0) / (len(samples) - 1))
            neighbors = [place for place, step in zip(places, steps, strict=True) if step != (0, 0)]
            kernel = [np.mean(-np.abs(colors[:, v, u] - colors[:, y, x]) / (1e-8 + 0.1 * std)) for v, u in neighbors]
            powers = np.exp(np.array(kernel) - max(kernel))
            around[y, x] = list(zip(neighbors, powers / powers.sum(), strict=True))
    for _ in range(num_iters):
        after = np.zeros_like(masks)
        for (y, x), weighted in around.items():
            for (v, u), weight in weighted:
                after[:, y, x] += weight * masks[:, v, u]
        masks = after
    return masks


def two_pass_affinities(images: Tensor, dilations: tuple[int, ...] = DILATIONS) -> Tensor:
    """The weights in float64 with a two-pass standard deviation, by indexing with clamped coordinates."""
    images = images.double()
    height, width = images.shape[-2:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    samples = torch.stack(
        [
            images[:, :, (rows + dy * d).clamp(0, height - 1), (columns + dx * d).clamp(0, width - 1)]
            for d in dilations
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        ],
        dim=1,
    )
    kernel = (-(samples - images.unsqueeze(1)).abs() / (1e-8 + 0.1 * samples.std(dim=1, keepdim=True))).mean(dim=2)
    neighbors = [index for index in range(9 * len(dilations)) if index % 9 != 4]
    return kernel[:, neighbors].softmax(dim=1)


def draw(n: int, k: int, height: int, width: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, height, width, generator=generator)
    return images, (3 * torch.randn(n, k, height, width, generator=generator)).softmax(dim=1)


class TestRefine:
    @pytest.mark.parametrize(
        ("size", "dilations", "num_iters"),
        [((6, 7), (1, 2), 1), ((6, 7), (1, 2), 4), ((5, 4), (3,), 2), ((7, 9), DILATIONS, 2), ((1, 5), (1, 4), 1)],
    )
    def test_equals_loops(self, size: tuple[int, int], dilations: tuple[int, ...], num_iters: int) -> None:
        images, probs = draw(2, 3, *size)
        out = refine(images, probs, num_iters=num_iters, dilations=dilations)
        for n in range(2):
            expected = refined_in_loops(images[n], probs[n], num_iters, dilations)
            np.testing.assert_allclose(out[n].numpy(), expected, rtol=0, atol=2e-6)

    def test_defaults_are_the_published_ones(self) -> None:
        images, probs = draw(1, 2, 6, 6)
        expected = refine(images, probs, num_iters=10, dilations=(1, 2, 4, 8, 12, 24))
        assert torch.equal(refine(images, probs), expected)

    def test_worked_by_hand(self) -> None:
        """A black and a white pixel: five of the eight neighbors of each, border repeated, are like it.

        Of nine samples three are the other color: variance 3 * 6 / 9 / 8 = 1/4. The other color lies 1 / (0.1 / 2) =
        20 away, so that a neighbor of the own color (5 of 8) weighs 1 / (5 + 3 exp(-20)).
        """
        image = torch.tensor([[[0.0, 1.0]]]).repeat(1, 3, 1, 1)
        probs = torch.tensor([[[[0.2, 0.8]]]])
        other = 3 * np.exp(-20.0) / (5 + 3 * np.exp(-20.0))
        out = refine(image, probs, num_iters=1, dilations=(1,))
        assert out.flatten().tolist() == pytest.approx([0.2 + 0.6 * other, 0.8 - 0.6 * other], abs=1e-7)

    @given(
        height=st.integers(1, 9),
        width=st.integers(1, 9),
        num_iters=st.integers(0, 3),
        dilations=st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple),
        levels=st.sampled_from([1, 2, 255]),
        seed=st.integers(0, 100),
    )
    @settings(max_examples=30, deadline=None)
    def test_keeps_probabilities(
        self, height: int, width: int, num_iters: int, dilations: tuple[int, ...], levels: int, seed: int
    ) -> None:
        images, probs = draw(2, 4, height, width, seed=seed)
        images = (images * levels).round() / levels
        out = refine(images, probs, num_iters=num_iters, dilations=dilations)
        assert torch.allclose(out.sum(dim=1), torch.ones(2, height, width), atol=1e-5)
        assert bool((out >= probs.amin(dim=(2, 3), keepdim=True) - 1e-5).all())
        assert bool((out <= probs.amax(dim=(2, 3), keepdim=True) + 1e-5).all())

    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_channels_do_not_mix(self, channels: int) -> None:
        """Few channels take shifted slices and several the sparse product, which round differently."""
        images, probs = draw(2, 5, 8, 7)
        some = slice(1, 1 + channels)
        whole = refine(images, probs, num_iters=3)
        torch.testing.assert_close(refine(images, probs[:, some], num_iters=3), whole[:, some], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("channels", [2, 5])
    def test_the_same_input_gives_the_same_bits(self, channels: int) -> None:
        images, probs = draw(2, channels, 40, 37)
        assert torch.equal(refine(images, probs, num_iters=3), refine(images, probs, num_iters=3))

    def test_images_do_not_mix(self) -> None:
        images, probs = draw(2, 3, 8, 7)
        alone, together = refine(images[1:], probs[1:], num_iters=3), refine(images, probs, num_iters=3)[1:]
        torch.testing.assert_close(alone, together, atol=1e-7, rtol=0)  # threads may share the work otherwise

    def test_mirroring_commutes(self) -> None:
        images, probs = draw(1, 3, 8, 7)
        mirrored = refine(images.flip(-1), probs.flip(-1), num_iters=3)
        assert torch.allclose(mirrored, refine(images, probs, num_iters=3).flip(-1), atol=1e-6)

    def test_masks_stop_at_edges_of_color(self) -> None:
        """Left half black, right half white; a noisy mask of the left half becomes even on either side."""
        images = torch.zeros(1, 3, 12, 12)
        images[..., 6:] = 1
        noise = 0.4 * torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        mask = torch.where(images[:, :1] == 0, 1 - noise, noise)
        out = refine(images, mask, num_iters=10, dilations=(1, 2))
        left, right = out[..., :6], out[..., 6:]
        assert float(left.min()) > 0.7
        assert float(right.max()) < 0.3
        assert float(left.std()) < 0.3 * float(mask[..., :6].std())

    def test_no_iterations_give_the_masks_back(self) -> None:
        images, probs = draw(1, 3, 4, 4)
        assert torch.equal(refine(images, probs, num_iters=0), probs)

    def test_no_gradient_no_writing_and_float32(self) -> None:
        images, probs = draw(1, 3, 6, 6)
        kept = images.clone(), probs.clone()
        with torch.autocast("cpu", torch.bfloat16):
            out = refine(images.requires_grad_(), probs.requires_grad_(), num_iters=2)
        assert not out.requires_grad
        assert out.dtype == torch.float32
        assert torch.equal(images, kept[0])
        assert torch.equal(probs, kept[1])
        assert torch.equal(out, refine(*kept, num_iters=2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda i, p: ((i, p[..., :-1]), {}), r"of one size; resize the images"),
            (lambda i, p: ((i[:1], p), {}), "must be"),
            (lambda i, p: ((i[0], p), {}), "must be"),
            (lambda i, p: ((i, p), {"dilations": ()}), "at least one"),
            (lambda i, p: ((i, p), {"dilations": (1, 0)}), r"\(1, 0\); allowed"),
        ],
    )
    def test_mistakes_are_named(self, change: Callable[[Tensor, Tensor], Any], message: str) -> None:
        arguments, options = change(*draw(2, 3, 4, 4))
        with pytest.raises(ValueError, match=message):
            refine(*arguments, **options)


@pytest.mark.parametrize("size", [(9, 14), (1, 30), (31, 2)])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_both_forms_agree(channels: int, size: tuple[int, int]) -> None:
    images, probs = draw(2, channels, *size)
    weights = affinities(images, dilations=DILATIONS)
    results = [run(probs, weights, 3, DILATIONS) for run in (_refine_by_products, _refine_by_slices)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [
        (0, (104, 104), (1, 2, 4, 8, 12, 24)),
        (81, (81, 81), (1, 2, 4, 8, 12, 24)),
        (81, (32, 32), (1, 2, 3, 5, 9)),
        (40, (100, 64), (2, 4, 8, 16, 24, 48)),
    ],
)
def test_dilations_scale_with_the_root_of_the_area(side: int, size: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert scaled_dilations((1, 2, 4, 8, 12, 24), side=side, size=size) == expected


class TestFlatRegions:
    """Where colors hardly differ, moments of the colors themselves would lose the standard deviation to rounding."""

    @pytest.mark.parametrize("level", [0.0, 0.7, 0.9137, 1.0])
    def test_a_constant_image_weighs_all_neighbors_alike(self, level: float) -> None:
        assert torch.allclose(affinities(torch.full((1, 3, 9, 9), level)), torch.tensor(1 / 48), atol=1e-7)

    @pytest.mark.parametrize("spread", [1e-7, 1e-6, 1e-4, 1e-2])
    @pytest.mark.parametrize("level", [0.3, 0.9])
    def test_near_constant_images(self, level: float, spread: float) -> None:
        images = level + spread * torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(affinities(images).double(), two_pass_affinities(images), rtol=0, atol=5e-6)

    def test_an_outlier_in_a_flat_region(self) -> None:
        """The pixel itself is the outlier: the worst case for moments of differences from the pixel."""
        images = torch.full((1, 3, 31, 31), 0.8)
        images[..., 15, 15] = 0.1
        assert torch.allclose(affinities(images).double(), two_pass_affinities(images), rtol=0, atol=5e-6)

    def test_photographs_with_saturated_regions(self, voc6: Path) -> None:
        paths = sorted((voc6 / "JPEGImages").glob("*.jpg"))[:30]
        small = {path: np.asarray(Image.open(path).convert("RGB").resize((48, 48))) for path in paths}
        saturated = sorted(paths, key=lambda path: -np.mean((small[path] >= 254).all(axis=-1)))[:3]
        assert np.mean((small[saturated[0]] >= 254).all(axis=-1)) > 0.02
        for path in saturated:
            photo = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
            images = resize(photo, (48, 48))
            assert torch.allclose(affinities(images).double(), two_pass_affinities(images), rtol=0, atol=5e-6)


def test_features_guide_as_a_loop_over_pixels_says() -> None:
    """Softmax over the neighbors of ten times the cosine; half of each weight comes from colors."""
    torch.manual_seed(0)
    images, probs, features = torch.rand(2, 3, 5, 6), torch.rand(2, 2, 5, 6), torch.randn(2, 4, 5, 6)
    colors, expected = affinities(images, dilations=(1, 2)), torch.zeros_like(probs)
    steps = [(d * y, d * x) for d in (1, 2) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    for n in range(2):
        for row in range(5):
            for column in range(6):
                places = [(min(max(row + y, 0), 4), min(max(column + x, 0), 5)) for y, x in steps]
                own = features[n, :, row, column]
                cosines = [torch.cosine_similarity(own, features[n, :, r, c], dim=0) for r, c in places]
                weights = (10 * torch.stack(cosines)).softmax(dim=0)
                for index, (r, c) in enumerate(places):
                    weight = (weights[index] + colors[n, index, row, column]) / 2
                    expected[n, :, row, column] += weight * probs[n, :, r, c]
    guide = {"features": features, "feature_share": 0.5}
    out = refine(images, probs, num_iters=1, dilations=(1, 2), **guide)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected)


def test_attention_guides_as_a_loop_over_pixels_says() -> None:
    """A pixel's neighbors weigh as much as its token attends to theirs; 4 x 3 pixels, 2 x 2 tokens."""
    torch.manual_seed(0)
    images, probs, attention = torch.rand(2, 3, 4, 3), torch.rand(2, 2, 4, 3), torch.rand(2, 4, 4)
    attention = attention + attention.mT
    token_rows, token_columns = [0, 0, 1, 1], [0, 0, 1]  # thirds and halves of the way; a tie goes to the even one
    colors, expected = affinities(images, dilations=(1, 2)), torch.zeros_like(probs)
    steps = [(d * y, d * x) for d in (1, 2) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    for n in range(2):
        for row in range(4):
            for column in range(3):
                places = [(min(max(row + y, 0), 3), min(max(column + x, 0), 2)) for y, x in steps]
                token = 2 * token_rows[row] + token_columns[column]
                shares = [attention[n, token, 2 * token_rows[r] + token_columns[c]] for r, c in places]
                for index, (r, c) in enumerate(places):
                    weight = (shares[index] / sum(shares) + colors[n, index, row, column]) / 2
                    expected[n, :, row, column] += weight * probs[n, :, r, c]
    guide = {"features": attention.unflatten(2, (2, 2)), "feature_share": 0.5, "attends": True}
    out = refine(images, probs, num_iters=1, dilations=(1, 2), **guide)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected)
