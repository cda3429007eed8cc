"""The dense CRF: edges come back, impossible classes do not, and helper processes give what one call gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from slrnet.config import CrfConfig
from slrnet.inference import crf
from slrnet.inference.crf import crf_masks, dense_crf, require_crf

pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
Array = npt.NDArray[Any]


def scene(seed: int = 0, size: tuple[int, int] = (40, 56)) -> tuple[Array, Array, Array]:
    """A picture whose right part is red, its true mask, and coarse and noisy probabilities of it."""
    rng = np.random.default_rng(seed)
    true = np.zeros(size, dtype=np.uint8)
    true[:, 24:] = 1
    image = np.where(true[..., None] == 1, [220, 40, 40], [60, 90, 60]) + rng.integers(-8, 9, (*size, 3))
    blurred = np.clip((np.arange(size[1]) - 20) / 16, 0, 1)[None] * np.ones(size)  # its edge lies 4 pixels off
    foreground = np.clip(0.25 + 0.5 * blurred + rng.normal(0, 0.15, size), 0.02, 0.98)
    return image.astype(np.uint8), true, np.stack([1 - foreground, foreground]).astype(np.float32)


def test_masks_take_the_edges_of_the_image() -> None:
    image, true, probs = scene()
    before = (probs.argmax(axis=0) == true).mean()
    refined = dense_crf(image, probs, CrfConfig())
    after = (refined.argmax(axis=0) == true).mean()
    assert before < 0.93
    assert after > 0.99
    assert refined.shape == probs.shape
    np.testing.assert_allclose(refined.sum(axis=0), 1, atol=1e-5)


def test_a_class_that_is_nowhere_does_not_come_back() -> None:
    image, _, probs = scene()
    padded = np.concatenate([probs[:1], np.zeros_like(probs[:1]), probs[1:]])
    refined = dense_crf(image, padded, CrfConfig())
    assert not refined[1].any()
    np.testing.assert_array_equal(refined[[0, 2]], dense_crf(image, probs, CrfConfig()))


def test_a_single_class_needs_no_field() -> None:
    image, _, probs = scene()
    only = np.concatenate([probs[:1], np.zeros_like(probs[:1])])
    refined = dense_crf(image, only, CrfConfig())
    assert (refined[0] == 1).all()
    assert not refined[1].any()


def test_sizes_must_agree() -> None:
    image, _, probs = scene()
    with pytest.raises(ValueError, match=r"\(40, 55, 3\) and probs \(2, 40, 56\) differ in size"):
        dense_crf(image[:, 1:], probs, CrfConfig())


def test_helper_processes_give_the_same_masks_in_order() -> None:
    scenes = [scene(seed, (30 + seed, 44)) for seed in range(7)]
    items = [(name, image, np.insert(probs, 1, 0, axis=0)) for name, (image, _, probs) in enumerate(scenes)]
    found = list(crf_masks(iter(items), CrfConfig(), processes=2))
    assert [name for name, _, _ in found] == list(range(7))
    for (_, mask, confidence), (_, image, probs) in zip(found, items, strict=True):
        assert mask.dtype == np.uint8
        refined = dense_crf(image, probs, CrfConfig())
        np.testing.assert_array_equal(mask, refined.argmax(axis=0))
        np.testing.assert_array_equal(confidence, refined.max(axis=0))


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'slrnet\[crf\]'.*or use the protocol ms"):
        require_crf()
    with pytest.raises(ValueError, match="ms_crf needs pydensecrf2"):
        next(crf_masks(iter([]), CrfConfig(), processes=1))
