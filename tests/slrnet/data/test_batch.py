"""Batches: that all tensors move together, and parts of them."""

from __future__ import annotations

import pytest
import torch

from slrnet.data.batch import Batch


def _batch(*masks: int | None) -> Batch:
    """An image for each mask, whose pixels count the images from 1; the last one has no image labels."""
    number = len(masks)
    granted = torch.tensor([mask is not None for mask in masks])
    ids = torch.tensor([255 if mask is None else mask for mask in masks], dtype=torch.uint8)
    return Batch(
        images=torch.arange(1, number + 1, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4),
        image_labels=torch.tensor([[1.0, 0.0]]).repeat(number, 1),
        has_image_labels=torch.arange(number) < number - 1,
        keys=tuple("abc"[:number]),
        has_pixel_labels=granted,
        pixel_labels=ids.view(-1, 1, 1).repeat(1, 4, 4) if granted.any() else None,
    )


@pytest.mark.parametrize("mask", [None, 3])
def test_a_part_has_all_labels_of_its_images(mask: int | None) -> None:
    part = _batch(None, mask, None).part(slice(1, 3))
    assert part.keys == ("b", "c")
    assert part.images[:, 0, 0, 0].tolist() == [2, 3]
    assert part.has_image_labels.tolist() == [True, False]
    assert part.has_pixel_labels.tolist() == [mask is not None, False]
    assert (part.pixel_labels is None) == (mask is None)
    assert part.image_labels.shape == (2, 2)


def test_all_tensors_move() -> None:
    batch = _batch(1).to("meta", non_blocking=True)
    values = (batch.images, batch.image_labels, batch.has_image_labels, batch.has_pixel_labels, batch.pixel_labels)
    for value in values:
        assert value is not None
        assert value.device.type == "meta"
    assert batch.keys == ("a",)
    assert _batch(None).to("meta").pixel_labels is None


def test_all_tensors_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning itself needs an accelerator; adding 1 stands in for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.int() + 1)
    batch = _batch(4)
    pinned = batch.pin_memory()
    assert pinned.keys == batch.keys
    assert int(pinned.images[0, 0, 0, 0]) == 2
    assert pinned.image_labels.tolist() == [[2, 1]]
    assert pinned.has_pixel_labels.tolist() == [2]
    assert pinned.pixel_labels is not None
    assert pinned.pixel_labels.unique().tolist() == [5]
