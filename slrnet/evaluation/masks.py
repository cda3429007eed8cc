"""Measures masks during and after training: predicted masks of a split, and pseudo masks of training images.

What is where: this module predicts images one by one and counts their pixels. `slrnet.evaluation.protocols` names the
protocols, `slrnet.evaluation.metrics` has the counts and their figures, and `slrnet.launch.evaluation` starts an
evaluation of a checkpoint on a cluster and adds the CRF.

Every figure names its protocol. `ss` is one view at the image's own size, no flip, no CRF. Another scale, and gating by
class scores or by true image labels, are part of the protocol's name. Pseudo masks are the refined, fused masks of all
configured views, without flip and color distortion. Image labels gate them, as in the paper's Table 1, if the training
has those labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slrnet.calibration.pseudo_labels import (
    Calibrated,
    calibrate_views,
    make_pseudo_labels,
    possible_classes,
    to_class_ids,
)
from slrnet.config import Config
from slrnet.data.batch import EvalSample
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.manifest import SplitView
from slrnet.data.supervision import Supervision
from slrnet.distributed.process import Process, sum_over_ranks
from slrnet.evaluation.metrics import ConfusionMatrix, merge_over_ranks
from slrnet.evaluation.protocols import gating_labels, protocol_name, pseudo_mask_protocol
from slrnet.inference.forward import fit_image, network_outputs
from slrnet.inference.predictor import predict
from slrnet.models.network import Network
from slrnet.ops.maps import resize
from slrnet.tracking.protocol import metric_key
from slrnet.views.align import align_maps, largest_size
from slrnet.views.geometry import View, apply_view

__all__ = [
    "PseudoMask",
    "Quality",
    "calibrate_sample",
    "count_masks",
    "evaluate_masks",
    "gated_probs",
    "measure_pseudo_masks",
    "pseudo_mask_subset",
    "quality_metrics",
    "view_logits",
]


@dataclass(frozen=True)
class Quality:
    """A confusion matrix over all ranks, the protocol that filled it, and the number of its images."""

    matrix: ConfusionMatrix
    protocol: str
    images: int


@dataclass(frozen=True)
class PseudoMask:
    """The masks of one training image at its own size (H, W), as int64 class ids, 255 where undecided."""

    sample: EvalSample
    raw: Tensor
    refined: Tensor
    pseudo_labels: Tensor


def evaluate_masks(model: Network, samples: Iterable[EvalSample], *, config: Config, process: Process) -> Quality:
    """Compares masks predicted with the protocol `ss` with true ones, over all ranks.

    Args:
        model: the network, in evaluation mode.
        samples: this rank's share of the images; those without a mask are skipped.
        config: the run's settings.
        process: this rank; every rank must make this call.
    """
    masks = (
        (sample, gated_probs(model, sample, config=config, device=process.device).argmax(dim=0).cpu())
        for sample in samples
        if sample.pixel_labels is not None
    )
    return count_masks(masks, num_classes=model.num_classes, protocol=protocol_name(config.evaluation), process=process)


def count_masks(
    masks: Iterable[tuple[EvalSample, Tensor]], *, num_classes: int, protocol: str, process: Process
) -> Quality:
    """Counts predicted masks against true masks, over all ranks.

    Args:
        masks: this rank's images, each with its predicted class ids (H, W); those without a true mask are skipped.
        num_classes: K with the background.
        protocol: name of how the masks were predicted.
        process: this rank; every rank must make this call.
    """
    matrix, images = ConfusionMatrix(num_classes), 0
    for sample, mask in masks:
        if sample.pixel_labels is not None:
            matrix.update(mask, sample.pixel_labels)
            images += 1
    return _merged(matrix, protocol, images, process)


def gated_probs(model: Network, sample: EvalSample, *, config: Config, device: torch.device) -> Tensor:
    """Predicts an image by the protocol `ss`, gating included.

    Args:
        model: the network, in evaluation mode.
        sample: an image of H x W pixels.
        config: the run's settings.
        device: the model's device.

    Returns:
        (K, H, W) probabilities on the device.

    Raises:
        DataError: the protocol gates by image labels, and they are not known.
    """
    return predict(model, sample.image.to(device), config, "ss", gating_labels(sample, config))[0][0]


@torch.no_grad()
def measure_pseudo_masks(
    model: Network,
    samples: Iterable[EvalSample],
    *,
    config: Config,
    process: Process,
    show: Callable[[PseudoMask], None],
) -> tuple[Quality, Quality]:
    """Measures the pseudo masks of training images against their true masks, over all ranks.

    Args:
        model: the network, in evaluation mode.
        samples: this rank's share of the fixed subset.
        config: the run's settings.
        process: this rank; every rank must make this call.
        show: called with each image's masks, for pictures.

    Returns:
        Quality of the refined masks (the most probable class of every pixel), and of the pseudo labels (undecided
        pixels are 255: their share is 1 - coverage).
    """
    dense, kept = ConfusionMatrix(model.num_classes), ConfusionMatrix(model.num_classes)
    images = 0
    for sample in samples:
        masks = _pseudo_mask(model, sample, config=config, device=process.device)
        show(masks)
        if sample.pixel_labels is not None:
            dense.update(masks.refined, sample.pixel_labels)
            kept.update(masks.pseudo_labels, sample.pixel_labels)
            images += 1
    protocol = pseudo_mask_protocol(config)
    return _merged(dense, protocol, images, process), _merged(kept, f"{protocol}, thresholded", images, process)


def quality_metrics(prefix: str, quality: Quality, classes: tuple[str, ...]) -> dict[str, float]:
    """Names the figures of a confusion matrix: PREFIX/miou, mfdr, mfnr and iou/CLASS, fdr/CLASS, fnr/CLASS.

    All are shares in [0, 1]. Classes that occur nowhere are left out.
    """
    matrix = quality.matrix
    values = {f"{prefix}/miou": matrix.miou(), f"{prefix}/mfdr": matrix.mfdr(), f"{prefix}/mfnr": matrix.mfnr()}
    for kind, shares in (("iou", matrix.iou()), ("fdr", matrix.fdr()), ("fnr", matrix.fnr())):
        values |= {metric_key(prefix, kind, name): float(share) for name, share in zip(classes, shares, strict=True)}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def pseudo_mask_subset(split: SplitView, supervision: Supervision, config: Config) -> tuple[int, ...]:
    """Chooses the fixed, seeded subset of training images on which pseudo masks are measured.

    They have a mask to compare with that the training does not see.

    Args:
        split: the training split.
        supervision: which of its labels the training sees.
        config: the run's settings.

    Returns:
        Indices within the split.
    """
    among = (split.with_masks & supervision.members) - supervision.pixel_labels
    return choose_subset(split, config.evaluation.pseudo_mask_images, seed=config.train.seed, among=among)


@torch.no_grad()
def calibrate_sample(model: Network, sample: EvalSample, *, config: Config, device: torch.device) -> Calibrated:
    """Fuses and refines the masks of one whole image, as they are measured: all views, no flip, no color distortion.

    Args:
        model: the network, in evaluation mode.
        sample: a training image.
        config: the run's settings.
        device: the model's device.

    Returns:
        Probabilities of one image at the refinement's resolution, of the classes that it may show.
    """
    logits, images = view_logits(model, sample.image.to(device), config=config)
    known = torch.tensor([sample.has_image_labels and config.setting != "sss"])
    labels = possible_classes(sample.image_labels[None], known)
    return calibrate_views(logits, images, labels.to(device), config.calibration, max_classes=int(labels.sum()))


@torch.no_grad()
def view_logits(model: Network, image: Tensor, *, config: Config) -> tuple[Sequence[Tensor], Tensor]:
    """Computes the logits of one whole image in all views of the run, aligned; no flip, no color distortion.

    Args:
        model: the network, in evaluation mode.
        image: (3, H, W) uint8, on the model's device.
        config: the run's settings.

    Returns:
        Per view (1, K, h, w), and the image as the network saw it, (1, 3, H', W') in [0, 1].
    """
    images = fit_image(image, config)
    views = [View(scale=scale, flip=None) for scale in config.views.scales]
    inputs = [apply_view(images, view, stride=model.encoder.output_stride) for view in views]
    logits = network_outputs(model, inputs, config).logits
    return align_maps(logits, views, size=largest_size(logits)), images


def _merged(matrix: ConfusionMatrix, protocol: str, images: int, process: Process) -> Quality:
    total = int(sum_over_ranks(torch.tensor(images), process))
    return Quality(merge_over_ranks(matrix, process), protocol, total)


def _pseudo_mask(model: Network, sample: EvalSample, *, config: Config, device: torch.device) -> PseudoMask:
    calibrated = calibrate_sample(model, sample, config=config, device=device)
    size = (sample.image.shape[-2], sample.image.shape[-1])
    raw, refined = (
        to_class_ids(resize(probs, size).argmax(dim=1), calibrated.classes)[0].cpu()
        for probs in (calibrated.raw, calibrated.refined)
    )
    return PseudoMask(sample, raw, refined, make_pseudo_labels(calibrated, config.calibration, size=size)[0].cpu())
