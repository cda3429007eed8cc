"""evaluation.protocols."""

from __future__ import annotations

from torch import Tensor

from slrnet.config import Config, EvaluationConfig
from slrnet.data.batch import EvalSample
from slrnet.data.manifest import DataError

__all__ = ["gating_labels", "protocol_name", "pseudo_mask_protocol"]


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


def pseudo_mask_protocol(config: Config) -> str:
    """Name of how a run's refined pseudo masks are made."""
    gated = "not gated" if config.setting == "sss" else "gated by image labels"
    return f"fused {len(config.views.scales)} views, refined, {gated}"


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
