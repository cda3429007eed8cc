"""A training step of this project on random images: the trainer's step without a loader, checkpoints or logs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from slrnet.config import Config
from slrnet.cpu import speed_up
from slrnet.cpu.allocator import spare_memory
from slrnet.data.batch import Batch
from slrnet.losses import objective, segmentation
from slrnet.models.network import mixed_precision
from slrnet.models.slrnet import build_network
from slrnet.training.optim import build_optimizer
from slrnet.training.step import find_pseudo_rows, step_generator, step_losses


def random_batch(*, batch: int, crop: int, num_classes: int, present: int, seed: int = 0) -> Batch:
    """Returns images with flat, smooth and noisy parts, each labeled with `present` of the foreground classes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(crop, crop), mode="bilinear", align_corners=True)
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    labels = torch.zeros(batch, num_classes - 1)
    for row in labels:
        row[torch.randperm(num_classes - 1, generator=generator)[:present]] = 1
    none = torch.zeros(batch, dtype=torch.bool)
    keys = tuple(str(index) for index in range(batch))
    return Batch((images * 255).to(torch.uint8), labels, ~none, keys, none)


def our_step(config: Config, batch: Batch, *, num_classes: int) -> Callable[[], float]:
    """Returns a function that takes an optimizer step with pseudo labels on the same batch and returns the loss.

    Every pixel gets a small weight in the cross-entropy. Otherwise the cross-entropy would skip nearly all of them,
    because pseudo labels from random weights are almost never confident.
    """
    torch.manual_seed(0)
    model = build_network(config, num_classes=num_classes, weights=False)
    spare_memory(speed_up(model))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = build_optimizer(model, config.optim, batch_size=len(batch.images))
    images = batch.images.contiguous(memory_format=torch.channels_last)
    channels_last_batch = Batch(images, batch.image_labels, batch.has_image_labels, batch.keys, batch.has_pixel_labels)
    count = iter(range(2**31))

    def step() -> float:
        number = next(count)
        torch.manual_seed(number)
        optimizer.zero_grad(set_to_none=True)
        with (
            mixed_precision(config.train.precision, torch.device("cpu")),
            no_pixel_left_out(),
        ):
            losses = step_losses(
                model,
                channels_last_batch,
                config=config,
                encoder=model.encoder,
                generator=step_generator(number),
                pseudo_rows=find_pseudo_rows(channels_last_batch),
            )
        losses.total.backward()
        loss = float(losses.total.detach())
        optimizer.step()
        return loss

    return step


def no_pixel_left_out() -> AbstractContextManager[object]:
    """Context manager that gives every pixel a small weight; the cross-entropy skips pixels of weight 0."""

    def weigh(*args: Any, **options: Any) -> segmentation.WeighedLabels:
        weighed = segmentation.weigh(*args, **options)
        return weighed._replace(weights=weighed.weights + 1e-3)

    return mock.patch.object(objective, "weigh", weigh)
