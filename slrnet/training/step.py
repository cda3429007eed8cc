"""One training step as functions: views, network, un-warping, calibration, losses.

The steps are the same in every setting; the labels that a batch grants decide which loss parts exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from slrnet.calibration.pseudo_labels import calibrate_views, make_pseudo_labels, possible_classes, seed_labels
from slrnet.config import Config, ViewsConfig
from slrnet.data.batch import Batch
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.losses.objective import Labels, Objective, objective
from slrnet.models.encoders import Encoder
from slrnet.models.network import Network, Outputs
from slrnet.ops.compiled import with_compiler
from slrnet.ops.maps import widened
from slrnet.views.color import apply_color, draw_color
from slrnet.views.geometry import View, align_maps, apply_view, draw_views, invert_view, largest_size

__all__ = [
    "PseudoRows",
    "ViewsOfBatch",
    "align",
    "find_pseudo_rows",
    "losses_of",
    "make_views",
    "step_generator",
    "step_losses",
]


def step_generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose state is a pure function of the given numbers (seed, epoch, step, rank, ...)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number + 0x632BE59BD9B4E019)) * 0xD1342543DE82EF95 + 1) % 2**64
        state ^= state >> 29
    return torch.Generator().manual_seed(state % 2**63)


class ViewsOfBatch(NamedTuple):
    """The views of a batch of N crops."""

    inputs: list[Tensor]
    """Per view (N, 3, H_v, W_v) normalized images."""
    views: list[View]
    """How to undo each view."""
    crops: Tensor
    """(N, 3, H, W) the crops in [0, 1]; their colors are distorted if all views share one distortion."""


def make_views(
    images: Tensor,
    config: ViewsConfig,
    encoder: Encoder,
    generator: torch.Generator,
    *,
    batch_size: int | None = None,
    first: int = 0,
    compiled: bool = False,
) -> ViewsOfBatch:
    """Draws the views of a batch (N, 3, H, W), float in [0, 1], with a CPU generator.

    The images are number `first` and the following ones of a batch of `batch_size`, None for N. All of that batch is
    drawn: an image gets the same views whichever worker has it. If `compiled`, one kernel distorts colors.
    """
    whole, rows = len(images) if batch_size is None else batch_size, slice(first, first + len(images))
    views = [view.part(rows) for view in draw_views(whole, config, generator=generator)]

    def distort(colors: Tensor) -> Tensor:
        drawn = draw_color(whole, config, generator=generator).part(rows)
        return with_compiler(apply_color, compiled)(colors, drawn)

    if not config.own_color:
        images = distort(images)
    warped = _warp(images, views, config, encoder)
    inputs = [encoder.normalize(distort(view) if config.own_color else view) for view in warped]
    return ViewsOfBatch(inputs, views, images)


def _warp(images: Tensor, views: Sequence[View], config: ViewsConfig, encoder: Encoder) -> Iterator[Tensor]:
    stride = encoder.size_step if config.sizes == "fitted" else None
    return (apply_view(images, view, stride=stride) for view in views)


def align(outputs: Outputs, views: Sequence[View], *, unwarp: Literal["logits", "probs"] = "logits") -> Outputs:
    """Un-warps all maps to the frame of the crop, at the size of the largest view's maps; see `views.unwarp`."""
    size, names = largest_size(outputs.logits), ("logits", "auxiliary_logits", "codes")
    aligned: dict[str, Any] = {name: align_maps(getattr(outputs, name), views, size=size) for name in names}
    if outputs.probe_logits:
        size = largest_size(outputs.probe_logits)
        for name in ("probe_logits", "probe_activations"):
            aligned[name] = align_maps(getattr(outputs, name), views, size=size)
    if unwarp == "probs":
        aligned["unwarped_probs"] = align_maps(outputs.probs, views, size=size)
    return replace(outputs, **aligned)


@dataclass(frozen=True)
class PseudoRows:
    """Which images of a batch need pseudo labels; computed on the CPU, so that no step waits for the device."""

    rows: Tensor | None
    """(M,) int64 on the CPU; None for all images of the batch."""
    max_classes: int
    """Largest number of foreground classes that one of these images may show."""

    @property
    def exist(self) -> bool:
        """Whether there is such an image."""
        return self.rows is None or len(self.rows) > 0


def find_pseudo_rows(batch: Batch) -> PseudoRows:
    """Images of a batch on the CPU without a true mask, and how many classes they may show: all if unlabeled."""
    rows = None if not batch.has_pixel_labels.any() else (~batch.has_pixel_labels).nonzero()[:, 0]
    labels = possible_classes(batch.image_labels, batch.has_image_labels)
    labels = labels if rows is None else labels[rows]
    return PseudoRows(rows, int(labels.sum(dim=1).max()) if len(labels) else 0)


def step_losses(
    model: nn.Module,
    batch: Batch,
    *,
    config: Config,
    encoder: Encoder,
    generator: torch.Generator,
    pseudo_rows: PseudoRows | None,
    labeler: Network | None = None,
    first: int = 0,
    pixel_labeled_share: Tensor | None = None,
) -> Objective:
    """Runs a batch, or a part of it, forward to its loss parts.

    The model may be wrapped for distributed training; `encoder` is its encoder. The CPU `generator` draws the views of
    the global batch, in which the first image of this part has the number `first`. `pseudo_rows` is what
    `find_pseudo_rows` says of the batch; None leaves out pseudo labels and their loss. The `labeler`, on the model's
    device, makes the pseudo labels if `calibration.source` is not `training`. For `pixel_labeled_share` see `Labels`.
    """
    assert (labeler is None) == (config.calibration.source == "training"), config.calibration.source
    with record_function("slrnet: views"):
        images = batch.floats(encoder.dtype)
        inputs, views, distorted = make_views(
            images,
            config.views,
            encoder,
            generator,
            batch_size=max(config.train.batch_size, first + len(images)),
            first=first,
            compiled=config.train.compile,
        )
    with record_function("slrnet: network"):
        outputs = model(inputs)
    guide = None
    if labeler is not None and pseudo_rows is not None and pseudo_rows.exist:
        with record_function("slrnet: labeler"):
            guide = _label(labeler, images, views, config.views, encoder)
    images = distorted if config.calibration.refine_image == "distorted" else images
    options: dict[str, Any] = {"pseudo_rows": pseudo_rows, "guide": guide, "pixel_labeled_share": pixel_labeled_share}
    return losses_of(outputs, views, images, batch, config=config, **options)


@torch.no_grad()
def _label(labeler: Network, images: Tensor, views: Sequence[View], config: ViewsConfig, encoder: Encoder) -> Outputs:
    """The outputs in evaluation mode for these views of the crops in their own colors.

    It comes after the training pass: under autocast, older releases of PyTorch keep weights that were cast without a
    gradient, and the training pass would then find these.
    """
    training = labeler.training
    outputs: Outputs = labeler.eval()([encoder.normalize(view) for view in _warp(images, views, config, encoder)])
    labeler.train(training)
    return outputs


def losses_of(
    outputs: Outputs,
    views: Sequence[View],
    images: Tensor,
    batch: Batch,
    *,
    config: Config,
    pseudo_rows: PseudoRows | None,
    guide: Outputs | None = None,
    pixel_labeled_share: Tensor | None = None,
) -> Objective:
    """Computes the loss parts from the outputs for all views of the crops `images`, (N, 3, H, W) float in [0, 1].

    `guide` are the outputs for the same views that make the pseudo labels; None: `outputs`.
    """
    with record_function("slrnet: alignment"):
        aligned = align(outputs, views, unwarp=config.views.unwarp)
        source = aligned if guide is None else align(guide, views, unwarp=config.views.unwarp)
    with record_function("slrnet: calibration"):
        features = None
        if config.calibration.feature_share:
            told = (outputs if guide is None else guide).features[0]
            features = _to_crop(told, views[0], attends=config.calibration.feature_source == "attention")
        pseudo_labels = seeds = None
        if pseudo_rows is None and aligned.probe_activations:
            seeds = seed_labels(aligned.probe_activations, batch.image_labels)
        if pseudo_rows is not None:
            pseudo_labels = _pseudo_labels(source, images, batch, config, pseudo_rows, features)
    with record_function("slrnet: losses"):
        pixel_labels = batch.pixel_labels
        if pixel_labels is None:
            pixel_labels = torch.full_like(images[:, 0], IGNORE_INDEX, dtype=torch.int64)
        labels = Labels(
            image_labels=batch.image_labels,
            has_image_labels=None if config.setting == "sss" else batch.has_image_labels,
            pixel_labels=None if config.setting == "wsss" else pixel_labels.long(),
            has_pixel_labels=batch.has_pixel_labels,
            pseudo_labels=pseudo_labels,
            seeds=seeds,
            pixel_labeled_share=pixel_labeled_share,
        )
        divergence = config.calibration.supervision == "kl"
        return objective(aligned, labels, weights=config.weights, losses=config.losses, divergence=divergence)


def _to_crop(features: Tensor, view: View, *, attends: bool) -> Tensor:
    """Un-warps `Outputs.features` of a view; of attention, (N, h w, h, w), both ends are places in the view."""
    size = (features.shape[-2], features.shape[-1])
    features = invert_view(widened(features), view, size=size)
    return invert_view(features.flatten(2).mT.unflatten(2, size), view, size=size) if attends else features


def _pseudo_labels(
    aligned: Outputs,
    images: Tensor,
    batch: Batch,
    config: Config,
    pseudo_rows: PseudoRows,
    features: Tensor | None,
) -> Tensor:
    """(N, H, W) int64 from the average of the views, or (V, N, H, W) if each view has its own or another's labels."""
    settings, rows, size = config.calibration, pseudo_rows.rows, (images.shape[-2], images.shape[-1])
    possible = possible_classes(batch.image_labels, batch.has_image_labels)
    void = images.new_full((len(images), *size), IGNORE_INDEX, dtype=torch.int64)
    if rows is not None:
        rows = rows.to(images.device, non_blocking=True)
        images, possible = images[rows], possible[rows]
        features = None if features is None else features[rows]

    def make(views: Sequence[Tensor]) -> Tensor:
        if not len(images):
            return void
        views = views if rows is None else [view.detach()[rows] for view in views]
        kinds: dict[str, Any] = {"max_classes": pseudo_rows.max_classes, "compiled": config.train.compile}
        calibrated = calibrate_views(views, images, possible, settings, features=features, **kinds)
        labels = make_pseudo_labels(calibrated, settings, size=size)
        return labels if rows is None else void.index_copy(0, rows, labels)

    masks = aligned.masks_to_fuse(settings.fusion)
    if settings.supervision == "mvmc":
        return make(masks)
    own = [make([view]) for view in masks]
    return torch.stack(own if settings.supervision == "kl" else [*own[1:], own[0]])
