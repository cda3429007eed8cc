"""How sure a network is of its masks of training images, from what the training may see of them and nothing else.

No file of a mask is read: a person may review a data set whose other masks are there to measure with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from slrnet.calibration.pseudo_labels import possible_classes
from slrnet.data.batch import EvalSample
from slrnet.data.manifest import DataError
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.data.supervision import Supervision, supervision_of
from slrnet.evaluation.examine import EvaluationTarget
from slrnet.inference.forward import Inference
from slrnet.losses.objective import classification_loss

__all__ = ["Doubt", "candidates", "look", "measure_doubts", "read_unmasked"]

Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """How sure the network is of one image's mask."""

    key: str
    """The image's name."""
    confidence: float
    """Share of the chosen class in a pixel's probabilities, mean over the pixels, in [0, 1]."""
    disagreement: float
    """Share of the pixels to which two views give different classes, in [0, 1]."""
    loss: float | None
    """Classification loss, >= 0; None if the training sees no image labels of it."""
    doubt: float = 0.0
    """Mean over these three of the image's rank among those with as many classes, from 0, the surest, to 1."""


def candidates(target: EvaluationTarget) -> tuple[Supervision, list[int]]:
    """What the run's training may see, and the training images whose mask it may not see: indices in the split.

    Raises:
        DataError: it sees the masks of all of them.
    """
    supervision = supervision_of(target.config, target.shards)
    left = (supervision.members - supervision.pixel_labels).array.tolist()
    if not left:
        raise DataError(f"the run trains on the masks of all images of {target.shards.location}: none is to review")
    return supervision, left


def read_unmasked(target: EvaluationTarget, supervision: Supervision, indices: Sequence[int]) -> Iterator[EvalSample]:
    """Reads training images with the image labels that training may use, and no mask.

    Raises:
        DataError: an image is damaged.
    """
    view = target.shards.split(target.config.data.train_split)
    index = SampleIndex(shard_set=target.shards, split=view)
    with ShardFiles(index) as files:
        for place in indices:
            with index.naming(place):
                contents, row = files.contents(files.locate(place, masks=False)), view.row(place)
                known = bool(supervision.image_labels.has([place])[0])
                yield EvalSample(
                    key=row.key,
                    image=index.decode(row, contents),
                    pixel_labels=None,
                    image_labels=index.image_labels([row if known else None])[0],
                    has_image_labels=known,
                    jpeg=bytes(contents["jpg"]),
                )


@torch.no_grad()
def look(inference: Inference, sample: EvalSample) -> tuple[Mask, Doubt]:
    """The network's mask (H, W) of an image, and how sure it is; classes that the image labels exclude do not occur."""
    image, known = sample.image.to(inference.device), torch.tensor([sample.has_image_labels])
    allowed = torch.cat([torch.ones(1), possible_classes(sample.image_labels[None], known)[0]]) > 0
    allowed = allowed.to(image.device)[:, None, None]
    probs, scores = inference.single_scale(image)
    highest, mask = (probs[0] * allowed).max(dim=0)
    share = highest / (probs[0] * allowed).sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    views = [view[0].masked_fill(~allowed, -torch.inf).argmax(dim=0) for view in inference.view_masks(image)[0]]
    differ = torch.stack([view != views[0] for view in views]).any(dim=0)
    doubt = Doubt(
        key=sample.key,
        confidence=round(float(share.mean()), 6),
        disagreement=round(float(differ.float().mean()), 6),
        loss=_loss(scores, sample),
    )
    return mask.to(torch.uint8).cpu().numpy(), doubt


def measure_doubts(target: EvaluationTarget) -> list[tuple[int, Doubt]]:
    """Ranks the images that `candidates` names: index in the training split and figures, the most doubtful first.

    Ranks are among images with equally many known classes. Among all, images with many classes would come first, and
    those that a person corrects would be none of the data's usual ones.

    Raises:
        DataError: see `candidates` and `read_unmasked`.
    """
    from scipy.stats import rankdata  # importing it takes a second

    supervision, indices = candidates(target)
    samples = tqdm(read_unmasked(target, supervision, indices), total=len(indices), unit="image", disable=None)
    looked = [(look(target.inference, sample)[1], int(sample.image_labels.sum())) for sample in samples]
    found, classes = [one for one, _ in looked], np.array([shown for _, shown in looked])
    columns = [[-one.confidence for one in found], [one.disagreement for one in found]]
    if all(one.loss is not None for one in found):
        columns.append([one.loss or 0.0 for one in found])
    means = np.zeros(len(found))
    for alike in (classes == shown for shown in np.unique(classes)):
        ranks = rankdata(np.array(columns)[:, alike], axis=1) - 0.5
        means[alike] = ranks.mean(axis=0) / alike.sum()
    ranked = [
        (index, Doubt(**vars(one) | {"doubt": round(float(mean), 6)}))
        for index, one, mean in zip(indices, found, means, strict=True)
    ]
    return sorted(ranked, key=lambda pair: (-pair[1].doubt, pair[1].key))


def _loss(scores: Tensor | None, sample: EvalSample) -> float | None:
    if scores is None or not sample.has_image_labels:
        return None
    return round(float(classification_loss(scores.cpu(), sample.image_labels[None])[0]), 6)
