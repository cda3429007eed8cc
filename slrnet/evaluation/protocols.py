"""Names of protocols: a score is comparable only with scores of the same name.

`slrnet.evaluation.masks` measures by them, and `slrnet.launch.evaluation` starts an evaluation.
"""

from __future__ import annotations

from torch import Tensor

from slrnet.config import Config, EvaluationConfig
from slrnet.data.batch import EvalSample
from slrnet.data.manifest import DataError

__all__ = ["gating_labels", "protocol_name", "pseudo_mask_protocol"]


def protocol_name(config: EvaluationConfig, protocol: str = "ss") -> str:
    """Names a protocol (`ss`, `ms`, `ms_crf`), followed by what differs from the plain arg max at full size."""
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
    """Names the way in which a run makes its refined pseudo masks."""
    gated = "not gated" if config.setting == "sss" else "gated by image labels"
    return f"fused {len(config.views.scales)} views, refined, {gated}"


def gating_labels(sample: EvalSample, config: Config) -> Tensor:
    """Returns the image labels (K - 1,) of an image for `gate`.

    Raises:
        DataError: the protocol gates by image labels, and they are not known.
    """
    if config.evaluation.gating == "image_labels" and not sample.has_image_labels:
        raise DataError(
            f"evaluation.gating is 'image_labels', and image {sample.key!r} has none; use none or scores, or prepare "
            "the data with image labels"
        )
    return sample.image_labels
