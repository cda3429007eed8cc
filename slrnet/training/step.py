"""One training step as functions: views, network, un-warping, calibration, losses.

What happens is the same in every setting; which labels a batch grants decides which parts exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from slrnet.calibration.pseudo_labels import Calibrated, calibrate, threshold, to_class_ids
from slrnet.config import CalibrationConfig, Config, Precision, ViewsConfig
from slrnet.data.batch import Batch
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.colour import ColourParams, apply_colour, draw_colour
from slrnet.data.views import View, apply_view, draw_views, invert_view
from slrnet.losses.objective import AlignedOutputs, Labels, Objective, objective
from slrnet.models.decoder import resize
from slrnet.models.encoders import Encoder
from slrnet.models.network import Outputs

__all__ = [
    "Normalise",
    "PseudoRows",
    "align",
    "calibrate_views",
    "find_pseudo_rows",
    "losses_of",
    "make_pseudo_labels",
    "make_views",
    "mixed_precision",
    "possible_classes",
    "step_generator",
    "step_losses",
]


@dataclass(frozen=True)
class Normalise:
    """The encoder's normalisation and stride: what images need before they enter the network."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    output_stride: int

    @classmethod
    def of(cls, encoder: Encoder) -> Normalise:
        """What an encoder needs."""
        return cls(encoder.mean, encoder.std, encoder.output_stride)

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
        image_labels: (N, K - 1) multi-hot, the classes that each image may show.
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


@dataclass(frozen=True)
class PseudoRows:
    """Which images of a batch need pseudo labels; found on the CPU, so that no step waits for the device."""

    rows: Tensor | None
    """(M,) int64 on the CPU; None for all images of the batch."""
    max_classes: int
    """Largest number of foreground classes that one of them may show."""


def find_pseudo_rows(batch: Batch) -> PseudoRows:
    """Images without a true mask, and how many classes they may show: all of them where their labels are unknown.

    Args:
        batch: on the CPU.
    """
    rows = None if not batch.has_pixel_labels.any() else (~batch.has_pixel_labels).nonzero()[:, 0]
    labels = possible_classes(batch.image_labels, batch.has_image_labels)
    labels = labels if rows is None else labels[rows]
    return PseudoRows(rows, int(labels.sum(dim=1).max()) if len(labels) else 0)


def possible_classes(image_labels: Tensor, has_image_labels: Tensor) -> Tensor:
    """(N, K - 1) multi-hot: the image labels, or every class where they are unknown."""
    return torch.where(has_image_labels[:, None], image_labels, 1.0)


def mixed_precision(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a training's forward passes: autocast to bfloat16, or none.

    Args:
        precision: `train.precision`. `auto` is bfloat16 where the hardware multiplies matrices of it, as GPUs do from
            Ampere on, and CPUs with AMX.
        device: where the network is.
    """
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported()
    else:
        capable = device.type == "cpu" and _cpu_multiplies_bfloat16()
    wanted = precision == "bf16" or (precision == "auto" and capable)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _cpu_multiplies_bfloat16() -> bool:
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not tell
    return capabilities.get("amx_bf16", False)


def step_losses(
    model: nn.Module,
    batch: Batch,
    *,
    config: Config,
    normalise: Normalise,
    generator: torch.Generator,
    pseudo_rows: PseudoRows,
    pretraining: bool,
) -> Objective:
    """Runs a batch forward to its loss parts.

    Args:
        model: an `SLRNet`, possibly wrapped for distributed training.
        batch: crops and the labels that they grant.
        config: of the run.
        normalise: of the model's encoder.
        generator: on the CPU, for the views.
        pseudo_rows: of the batch.
        pretraining: leave out pseudo labels and their loss.
    """
    with record_function("slrnet: views"):
        images = batch.floats()
        inputs, views = make_views(images, config.views, normalise, generator)
        inputs = [view.contiguous(memory_format=torch.channels_last) for view in inputs]
    with record_function("slrnet: network"):
        outputs = model(inputs)
    return losses_of(outputs, views, images, batch, config=config, pseudo_rows=pseudo_rows, pretraining=pretraining)


def losses_of(
    outputs: Outputs,
    views: Sequence[View],
    images: Tensor,
    batch: Batch,
    *,
    config: Config,
    pseudo_rows: PseudoRows,
    pretraining: bool,
) -> Objective:
    """From the network's outputs to the loss parts.

    Args:
        outputs: of the network, for all views.
        views: how to undo each.
        images: (N, 3, H, W) float in [0, 1], the crops.
        batch: of the crops.
        config: of the run.
        pseudo_rows: of the batch.
        pretraining: leave out pseudo labels and their loss.
    """
    with record_function("slrnet: alignment"):
        aligned = align(outputs, views)
    with record_function("slrnet: calibration"):
        pseudo_labels = None if pretraining else _pseudo_labels(aligned, images, batch, config, pseudo_rows)
    with record_function("slrnet: losses"):
        labels = Labels(
            image_labels=batch.image_labels,
            has_image_labels=None if config.setting == "sss" else batch.has_image_labels,
            pixel_labels=None if config.setting == "wsss" else _pixel_labels(batch),
            has_pixel_labels=batch.has_pixel_labels,
            pseudo_labels=pseudo_labels,
        )
        divergence = config.calibration.supervision == "kl"
        return objective(aligned, labels, weights=config.weights, losses=config.losses, divergence=divergence)


def _pixel_labels(batch: Batch) -> Tensor:
    if batch.pixel_labels is not None:
        return batch.pixel_labels.long()
    size = (len(batch.images), *batch.images.shape[-2:])
    return torch.full(size, IGNORE_INDEX, dtype=torch.int64, device=batch.images.device)


def _pseudo_labels(
    aligned: AlignedOutputs, images: Tensor, batch: Batch, config: Config, pseudo_rows: PseudoRows
) -> Tensor:
    """(N, H, W) int64 from the average of the views, or (V, N, H, W) where each view has its own or another one's.

    Images that have a true mask are not calibrated at all and are 255 all over.
    """
    views, supervision = aligned.logits, config.calibration.supervision
    if supervision == "mvmc":
        return _pseudo_labels_of(views, images, batch, config, pseudo_rows)
    own = [_pseudo_labels_of([view], images, batch, config, pseudo_rows) for view in views]
    return torch.stack(own if supervision == "kl" else [*own[1:], own[0]])


def _pseudo_labels_of(
    logits: Sequence[Tensor], images: Tensor, batch: Batch, config: Config, pseudo_rows: PseudoRows
) -> Tensor:
    possible = possible_classes(batch.image_labels, batch.has_image_labels)
    size = (images.shape[-2], images.shape[-1])
    rows = pseudo_rows.rows
    if rows is not None:
        rows = rows.to(images.device, non_blocking=True)
        logits, images, possible = [view.detach()[rows] for view in logits], images[rows], possible[rows]
    made = images.new_full((len(batch.images), *size), IGNORE_INDEX, dtype=torch.int64)
    if len(images):
        calibrated = calibrate_views(logits, images, possible, config.calibration, max_classes=pseudo_rows.max_classes)
        found = make_pseudo_labels(calibrated, config.calibration, size=size)
        made = found if rows is None else made.index_copy(0, rows, found)
    return made
