"""Measures masks: validation (single scale) and the pseudo masks of training images.

Every figure names its protocol. `ss` is one view at the image's own size, no flip, no CRF; another scale, and gating by
class scores or by true image labels, are part of the protocol's name where they are asked for. Several scales and the
CRF are in `slrnet.inference`. Pseudo masks are the refined, fused masks of all configured views, without flip and
colour distortion. They are gated by image labels, as in the paper's Table 1, where the training has those labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slrnet.calibration.pseudo_labels import Calibrated, to_class_ids
from slrnet.config import Config, EvaluationConfig
from slrnet.data.batch import EvalSample
from slrnet.data.epoch_plan import choose_subset
from slrnet.data.manifest import DataError, SplitView
from slrnet.data.supervision import Supervision
from slrnet.data.views import View, apply_view
from slrnet.models.decoder import resize
from slrnet.models.network import Network, Outputs
from slrnet.training.distributed import Ranks, merge_over_ranks, sum_over_ranks
from slrnet.training.metrics import ConfusionMatrix
from slrnet.training.step import (
    Normalise,
    align,
    calibrate_views,
    make_pseudo_labels,
    mixed_precision,
    possible_classes,
)
from slrnet.training.tracking import metric_key

__all__ = [
    "PseudoMask",
    "Quality",
    "as_model",
    "calibrate_sample",
    "count_masks",
    "evaluate_masks",
    "fit_image",
    "gate",
    "gated_probs",
    "gating_labels",
    "measure_pseudo_masks",
    "network_outputs",
    "predict_single_scale",
    "protocol_name",
    "pseudo_mask_protocol",
    "pseudo_mask_subset",
    "quality_metrics",
    "view_logits",
]


@dataclass(frozen=True)
class Quality:
    """A confusion matrix, the protocol that filled it, and how many images it is of, all ranks together."""

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


def protocol_name(config: EvaluationConfig, protocol: str = "ss") -> str:
    """Name of a protocol (`ss`, `ms`, `ms_crf`), with what deviates from the plain arg max at full size appended."""
    name = protocol
    if protocol != "ss" and config.scales != EvaluationConfig().scales:
        name += f"+scales_{','.join(f'{scale:g}' for scale in config.scales)}"
    if config.scale != 1:
        name += f"+scale_{config.scale:g}"
    if config.gating != "none":
        name += f"+gated_by_{config.gating}"
    if config.background_power != 1:
        name += f"+background_power_{config.background_power:g}"
    return name


def evaluate_masks(
    model: Network, samples: Iterable[EvalSample], *, config: Config, normalise: Normalise, ranks: Ranks
) -> Quality:
    """Compares masks predicted with the protocol `ss` with true ones, over all ranks.

    Args:
        model: in evaluation mode.
        samples: this rank's share of the images; those without a mask are passed over.
        config: of the run.
        normalise: of the encoder.
        ranks: every rank must call this.
    """

    def masks() -> Iterator[tuple[EvalSample, Tensor]]:
        for sample in samples:
            if sample.pixel_labels is not None:
                probs = gated_probs(model, sample, config=config, normalise=normalise, device=ranks.device)
                yield sample, probs.argmax(dim=0).cpu()

    return count_masks(masks(), num_classes=model.num_classes, protocol=protocol_name(config.evaluation), ranks=ranks)


def count_masks(
    masks: Iterable[tuple[EvalSample, Tensor]], *, num_classes: int, protocol: str, ranks: Ranks
) -> Quality:
    """Counts predicted masks (H, W) of this rank's images against their true masks, over all ranks.

    Args:
        masks: images with a true mask, each with its predicted class ids.
        num_classes: K with the background.
        protocol: name of how the masks were predicted.
        ranks: every rank must call this.
    """
    matrix = ConfusionMatrix(num_classes)
    images = 0
    for sample, mask in masks:
        assert sample.pixel_labels is not None
        matrix.update(mask, sample.pixel_labels)
        images += 1
    return _merged(matrix, protocol, images, ranks)


@torch.no_grad()
def predict_single_scale(
    model: Network, image: Tensor, normalise: Normalise, config: Config
) -> tuple[Tensor, Tensor | None]:
    """Predicts images with one view each.

    Args:
        model: in evaluation mode.
        image: (3, H, W) or (N, 3, H, W) uint8.
        normalise: of the encoder.
        config: of the run; the crop's size modulo the stride says which sizes the network is used to.

    Returns:
        (N, K, H, W) probabilities and (N, K - 1) class scores before the sigmoid; None where the network has none.
    """
    inputs = normalise(fit_image(image, config))
    outputs = network_outputs(model, [inputs], config)
    scores = outputs.class_scores[0] if outputs.class_scores else None
    return resize(outputs.logits[0].float().softmax(dim=1), image.shape[-2:]), scores


def gated_probs(
    model: Network, sample: EvalSample, *, config: Config, normalise: Normalise, device: torch.device
) -> Tensor:
    """(K, H, W) probabilities of an image by the protocol `ss`, after gating, on the device.

    Args:
        model: in evaluation mode.
        sample: of H x W pixels.
        config: of the run.
        normalise: of the encoder.
        device: of the model.

    Raises:
        DataError: the protocol gates by image labels, and they are not known.
    """
    probs, scores = predict_single_scale(model, sample.image.to(device), normalise, config)
    return gate(probs, scores, gating_labels(sample, config).to(device), config.evaluation)[0]


def gating_labels(sample: EvalSample, config: Config) -> Tensor:
    """(K - 1,) image labels of an image that is measured, for `gate`.

    Raises:
        DataError: the protocol gates by them, and they are not known.
    """
    if config.evaluation.gating == "image_labels" and not sample.has_image_labels:
        raise DataError(
            f"evaluation.gating is 'image_labels', and image {sample.key!r} has none; use none or scores, or prepare "
            "the data with image labels"
        )
    return sample.image_labels


def gate(probs: Tensor, class_scores: Tensor | None, image_labels: Tensor, config: EvaluationConfig) -> Tensor:
    """Removes classes and weighs the background, as the protocol says.

    Args:
        probs: (N, K, H, W).
        class_scores: (N, K - 1) before the sigmoid; None where the network has none.
        image_labels: (K - 1,) the true ones; used only where the protocol says so.
        config: gating and background power.

    Raises:
        ValueError: the protocol gates by class scores, and the network has none.
    """
    if config.background_power != 1:
        probs = torch.cat([probs[:, :1] ** config.background_power, probs[:, 1:]], dim=1)
    if config.gating == "none":
        return probs
    if config.gating == "image_labels":
        keep = image_labels[None] > 0
    elif class_scores is None:
        raise ValueError("evaluation.gating is 'scores' and a network that predicts the background has none; use none")
    else:
        limit = class_scores.topk(min(config.gating_top, class_scores.shape[1]), dim=1).values[:, -1:]
        keep = (class_scores >= limit) & (class_scores.sigmoid() > config.gating_threshold)
    return torch.cat([probs[:, :1], probs[:, 1:] * keep[:, :, None, None]], dim=1)


@torch.no_grad()
def measure_pseudo_masks(
    model: Network,
    samples: Iterable[EvalSample],
    *,
    config: Config,
    normalise: Normalise,
    ranks: Ranks,
    show: Callable[[PseudoMask], None],
) -> tuple[Quality, Quality]:
    """Measures the pseudo masks of training images against their true masks, over all ranks.

    Args:
        model: in evaluation mode.
        samples: this rank's share of the fixed subset.
        config: of the run.
        normalise: of the encoder.
        ranks: every rank must call this.
        show: called with each image's masks, for pictures.

    Returns:
        Quality of the refined masks (the most probable class of every pixel), and of the pseudo labels (undecided
        pixels are 255: their share is 1 - coverage).
    """
    dense, kept = ConfusionMatrix(model.num_classes), ConfusionMatrix(model.num_classes)
    images = 0
    for sample in samples:
        masks = _pseudo_mask(model, sample, config=config, normalise=normalise, ranks=ranks)
        show(masks)
        if sample.pixel_labels is not None:
            dense.update(masks.refined, sample.pixel_labels)
            kept.update(masks.pseudo_labels, sample.pixel_labels)
            images += 1
    protocol = pseudo_mask_protocol(config)
    return _merged(dense, protocol, images, ranks), _merged(kept, f"{protocol}, thresholded", images, ranks)


def pseudo_mask_protocol(config: Config) -> str:
    """Name of how a run's refined pseudo masks are made."""
    gated = "not gated" if config.setting == "sss" else "gated by image labels"
    return f"fused {len(config.views.scales)} views, refined, {gated}"


def quality_metrics(prefix: str, quality: Quality, classes: tuple[str, ...]) -> dict[str, float]:
    """Named figures of a confusion matrix: PREFIX/miou, mfdr, mfnr and iou/CLASS, fdr/CLASS, fnr/CLASS.

    All are shares in [0, 1]. Classes that occur nowhere are left out.
    """
    matrix = quality.matrix
    values = {
        f"{prefix}/miou": matrix.miou(),
        f"{prefix}/mfdr": matrix.mfdr(),
        f"{prefix}/mfnr": matrix.mfnr(),
    }
    for kind, shares in (("iou", matrix.iou()), ("fdr", matrix.fdr()), ("fnr", matrix.fnr())):
        values |= {metric_key(prefix, kind, name): float(share) for name, share in zip(classes, shares, strict=True)}
    return _finite(values)


def _merged(matrix: ConfusionMatrix, protocol: str, images: int, ranks: Ranks) -> Quality:
    total = int(sum_over_ranks(torch.tensor(images), ranks))
    return Quality(merge_over_ranks(matrix, ranks), protocol, total)


def pseudo_mask_subset(split: SplitView, supervision: Supervision, config: Config) -> tuple[int, ...]:
    """Indices of the fixed, seeded subset of training images on which pseudo masks are measured.

    They are images with a mask to compare with that the training does not see.

    Args:
        split: that is trained on.
        supervision: which labels the training sees of it.
        config: of the run.
    """
    among = (split.with_masks & supervision.members) - supervision.pixel_labels
    return choose_subset(split, config.evaluation.pseudo_mask_images, seed=config.train.seed, among=among)


@torch.no_grad()
def calibrate_sample(
    model: Network, sample: EvalSample, *, config: Config, normalise: Normalise, device: torch.device
) -> Calibrated:
    """Fuses and refines the masks of one whole image, as they are measured: all views, no flip, no colour distortion.

    Args:
        model: in evaluation mode.
        sample: a training image.
        config: of the run.
        normalise: of the encoder.
        device: of the model.

    Returns:
        Probabilities of one image at the refinement's resolution, of the classes that it may show.
    """
    logits, images = view_logits(model, sample.image.to(device), config=config, normalise=normalise)
    known = torch.tensor([sample.has_image_labels and config.setting != "sss"])
    labels = possible_classes(sample.image_labels[None], known)
    return calibrate_views(logits, images, labels.to(device), config.calibration, max_classes=int(labels.sum()))


@torch.no_grad()
def view_logits(
    model: Network, image: Tensor, *, config: Config, normalise: Normalise
) -> tuple[Sequence[Tensor], Tensor]:
    """The logits of one whole image in all views of the run, un-warped; no flip, no colour distortion.

    Args:
        model: in evaluation mode.
        image: (3, H, W) uint8 on the model's device.
        config: of the run.
        normalise: of the encoder.

    Returns:
        Per view (1, K, h, w), and the image as the network saw it, (1, 3, H', W') in [0, 1].
    """
    images = fit_image(image, config)
    views = [View(scale=scale, flip=None) for scale in config.views.scales]
    inputs = [normalise(apply_view(images, view, stride=normalise.output_stride)) for view in views]
    return align(network_outputs(model, inputs, config), views).logits, images


def _pseudo_mask(
    model: Network, sample: EvalSample, *, config: Config, normalise: Normalise, ranks: Ranks
) -> PseudoMask:
    calibrated = calibrate_sample(model, sample, config=config, normalise=normalise, device=ranks.device)
    size = (sample.image.shape[-2], sample.image.shape[-1])
    raw, refined = (
        to_class_ids(resize(probs, size).argmax(dim=1), calibrated.classes)[0].cpu()
        for probs in (calibrated.raw, calibrated.refined)
    )
    return PseudoMask(sample, raw, refined, make_pseudo_labels(calibrated, config.calibration, size=size)[0].cpu())


def fit_image(image: Tensor, config: Config, scale: float = 1.0) -> Tensor:
    """Scales images to what the network is used to.

    Args:
        image: (3, H, W) or (N, 3, H, W) uint8.
        config: of the run.
        scale: beside `evaluation.scale`.

    Returns:
        (N, 3, H', W') in [0, 1]; its sides have the crop's remainder by the output stride.
    """
    stride = config.model.output_stride
    rest = config.data.crop_size % stride
    scale = scale * config.evaluation.scale
    size = [max(1, round((side * scale - rest) / stride)) * stride + rest for side in image.shape[-2:]]
    images = image[None] if image.ndim == 3 else image
    return resize(images.float() / 255, (size[0], size[1]))


def network_outputs(model: Network, views: Sequence[Tensor], config: Config) -> Outputs:
    """What a network gives for views when masks are measured or predicted, in `evaluation.precision`.

    Args:
        model: in evaluation mode.
        views: each (N, 3, H, W), normalised, on the model's device.
        config: of the run.
    """
    with mixed_precision(config.evaluation.precision, views[0].device):
        return model([as_model(view) for view in views])  # type: ignore[no-any-return]


def as_model(images: Tensor) -> Tensor:
    """The memory format in which convolutions are fast."""
    return images.contiguous(memory_format=torch.channels_last)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value == value}
