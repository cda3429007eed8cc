"""One training step as functions: views, network, un-warping, calibration, losses.

What happens is the same in every setting; which labels a batch grants decides which parts exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slrnet.calibration.pseudo_labels import Calibrated, calibrate, threshold, to_class_ids
from slrnet.config import CalibrationConfig, Config, ViewsConfig
from slrnet.data.colour import ColourParams, apply_colour, draw_colour
from slrnet.data.views import View, apply_view, draw_views, invert_view
from slrnet.losses.objective import AlignedOutputs, Objective, objective
from slrnet.models.decoder import resize
from slrnet.models.slrnet import Outputs

__all__ = ["Normalise", "align", "calibrate_views", "make_pseudo_labels", "make_views", "step_generator", "step_losses"]


@dataclass(frozen=True)
class Normalise:
    """The encoder's normalisation and stride: what images need before they enter the network."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    output_stride: int

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to the range that the encoder was trained on."""
        mean = images.new_tensor(self.mean).view(3, 1, 1)
        std = images.new_tensor(self.std).view(3, 1, 1)
        return (images - mean) / std


def step_generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose state is a pure function of the given numbers (seed, epoch, step, rank, ...)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number + 0x632BE59BD9B4E019)) * 0xD1342543DE82EF95 + 1) % 2**64
        state ^= state >> 29
    return torch.Generator().manual_seed(state % 2**63)


def make_views(
    images: Tensor, config: ViewsConfig, normalise: Normalise, generator: torch.Generator
) -> tuple[list[Tensor], list[View]]:
    """Draws the views of a batch.

    Args:
        images: (N, 3, H, W) float in [0, 1].
        config: scales, flips and colours.
        normalise: of the encoder.
        generator: on the CPU.

    Returns:
        Per view the normalised images (N, 3, H_v, W_v), and how to undo the view.
    """
    views = draw_views(len(images), scales=config.scales, flip=config.flip, generator=generator)
    inputs = []
    colour: ColourParams | None = None
    for view in views:
        if colour is None or config.own_colour:
            colour = draw_colour(
                len(images),
                brightness=config.brightness,
                contrast=config.contrast,
                saturation=config.saturation,
                hue=config.hue,
                generator=generator,
            )
        warped = apply_view(images, view, stride=normalise.output_stride)
        inputs.append(normalise(apply_colour(warped, colour)))
    return inputs, views


def align(outputs: Outputs, views: Sequence[View]) -> AlignedOutputs:
    """Un-warps all maps to the frame of the crop, at the size of the largest view's maps."""
    sizes = [(maps.shape[-2], maps.shape[-1]) for maps in outputs.logits]
    size = max(sizes, key=lambda pair: pair[0] * pair[1])

    def invert(maps: list[Tensor]) -> list[Tensor]:
        return [invert_view(view_maps, view, size=size) for view_maps, view in zip(maps, views, strict=bool(maps))]

    return AlignedOutputs(
        logits=invert(outputs.logits),
        auxiliary_logits=invert(outputs.auxiliary_logits),
        codes=invert(outputs.codes),
        class_scores=outputs.class_scores,
        auxiliary_class_scores=outputs.auxiliary_class_scores,
    )


def calibrate_views(
    logits: Sequence[Tensor],
    images: Tensor,
    image_labels: Tensor,
    config: CalibrationConfig,
    *,
    max_classes: int,
) -> Calibrated:
    """Fuses and refines un-warped logits at the refinement's resolution (Eq. 3).

    Args:
        logits: per view (N, K, h, w), un-warped.
        images: (N, 3, H, W) float in [0, 1].
        image_labels: (N, K - 1) multi-hot.
        config: of the calibration.
        max_classes: largest number of classes of an image in the batch.
    """
    height, width = (-(-side // config.refine_stride) for side in images.shape[-2:])
    return calibrate(
        logits,
        resize(images, (height, width)),
        image_labels,
        max_classes=max_classes,
        fusion=config.fusion,
        num_iters=config.refine_iters,
        dilations=config.refine_dilations,
    )


def make_pseudo_labels(calibrated: Calibrated, config: CalibrationConfig, *, size: tuple[int, int]) -> Tensor:
    """Thresholds refined masks at the resolution `size` = (H, W): (N, H, W) int64 class ids, 255 where undecided."""
    labels = threshold(
        resize(calibrated.refined, size),
        confidence_threshold=config.confidence_threshold,
        background_threshold=config.background_threshold,
        floor=config.floor,
    )
    return to_class_ids(labels, calibrated.classes)


def step_losses(
    model: nn.Module,
    images: Tensor,
    image_labels: Tensor,
    *,
    config: Config,
    normalise: Normalise,
    generator: torch.Generator,
    max_classes: int,
    pretraining: bool,
) -> Objective:
    """Runs a batch forward to its loss parts.

    Args:
        model: an `SLRNet`, possibly wrapped for distributed training.
        images: (N, 3, H, W) uint8 crops.
        image_labels: (N, K - 1) multi-hot.
        config: of the run.
        normalise: of the model's encoder.
        generator: on the CPU, for the views.
        max_classes: largest number of classes of an image in the batch.
        pretraining: leave out pseudo labels and their loss.
    """
    images = images.float() / 255
    inputs, views = make_views(images, config.views, normalise, generator)
    if images.is_contiguous(memory_format=torch.channels_last):
        inputs = [view.contiguous(memory_format=torch.channels_last) for view in inputs]
    aligned = align(model(inputs), views)
    pseudo_labels = None
    if not pretraining:
        calibrated = calibrate_views(aligned.logits, images, image_labels, config.calibration, max_classes=max_classes)
        pseudo_labels = make_pseudo_labels(calibrated, config.calibration, size=(images.shape[-2], images.shape[-1]))
    return objective(aligned, pseudo_labels, image_labels, weights=config.weights, losses=config.losses)
