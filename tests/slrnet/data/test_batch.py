"""Batches: what is put together, and that all tensors move together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slrnet.data.batch import TrainSample, collate


def _sample(key: str, mask: int | None) -> TrainSample:
    return TrainSample(
        key=key,
        image=torch.full((3, 4, 4), len(key), dtype=torch.uint8),
        image_labels=torch.tensor([1.0, 0.0]),
        pixel_labels=None if mask is None else torch.full((4, 4), mask, dtype=torch.uint8),
    )


def test_without_masks_there_are_no_pixel_labels() -> None:
    batch = collate([_sample("a", None), _sample("bb", None)])
    assert batch.keys == ("a", "bb")
    assert batch.images.shape == (2, 3, 4, 4)
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.image_labels.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert batch.has_image_labels.tolist() == [True, True]
    assert batch.has_pixel_labels.tolist() == [False, False]
    assert batch.pixel_labels is None


def test_an_image_without_a_mask_is_void_beside_one_that_has_it() -> None:
    batch = collate([_sample("a", None), _sample("b", 2)])
    assert batch.has_pixel_labels.tolist() == [False, True]
    assert batch.pixel_labels is not None
    assert batch.pixel_labels.dtype == torch.uint8
    assert batch.pixel_labels[0].unique().tolist() == [255]
    assert batch.pixel_labels[1].unique().tolist() == [2]


def test_images_without_image_labels_are_told_apart() -> None:
    batch = collate([_sample("a", None), replace(_sample("b", None), has_image_labels=False)])
    assert batch.has_image_labels.tolist() == [True, False]


@pytest.mark.parametrize("mask", [None, 3])
def test_a_part_has_all_labels_of_its_images(mask: int | None) -> None:
    whole = collate([_sample("a", None), _sample("bb", mask), replace(_sample("ccc", None), has_image_labels=False)])
    part = whole.part(slice(1, 3))
    assert part.keys == ("bb", "ccc")
    assert part.images[:, 0, 0, 0].tolist() == [2, 3]
    assert part.has_image_labels.tolist() == [True, False]
    assert part.has_pixel_labels.tolist() == [mask is not None, False]
    assert (part.pixel_labels is None) == (mask is None)
    assert part.image_labels.shape == (2, 2)


def test_all_tensors_move() -> None:
    batch = collate([_sample("a", 1)]).to("meta", non_blocking=True)
    values = (batch.images, batch.image_labels, batch.has_image_labels, batch.has_pixel_labels, batch.pixel_labels)
    for value in values:
        assert value is not None
        assert value.device.type == "meta"
    assert batch.keys == ("a",)
    assert collate([_sample("a", None)]).to("meta").pixel_labels is None


def test_all_tensors_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning itself needs an accelerator; adding 1 stands in for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.int() + 1)
    batch = collate([_sample("a", 4)])
    pinned = batch.pin_memory()
    assert pinned.keys == batch.keys
    assert int(pinned.images[0, 0, 0, 0]) == 2
    assert pinned.image_labels.tolist() == [[2, 1]]
    assert pinned.has_pixel_labels.tolist() == [2]
    assert pinned.pixel_labels is not None
    assert pinned.pixel_labels.unique().tolist() == [5]
