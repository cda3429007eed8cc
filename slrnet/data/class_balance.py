"""Class-balanced sampling for long-tailed data: how often to draw each image so that classes come in wanted shares.

The share of a class is the share of its occurrences among all image labels that an epoch draws. The target lies between
the natural shares p (strength 0) and equal ones (strength 1): proportional to p^(1 - strength). Draws are the ones
nearest to one per image, in relative entropy, whose shares meet the target, found by iterative scaling: an image's
draws are a product of its classes' factors. A limit on draws per image bounds what a rare class can ask for; where it
binds, or where classes always come together, the target is missed, and the table shows by how much.

An epoch draws as many samples as without balancing, each as often as expected (see `slrnet.data.epoch_plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slrnet.data.manifest import SplitView
from slrnet.data.sample_set import Places

__all__ = ["Balance", "ClassLists", "balance", "shares", "table"]

_ITERATIONS = 300
_STEP = 0.7
"""Exponent of a scaling step; below 1, as an image of several classes feels the factor of each."""
_CLOSE_ENOUGH = 1e-3
_LARGEST = 20.0
"""Largest logarithm of a class's factor."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClassLists:
    """Image labels of n images as pairs, one for each class that an image has."""

    images: Places
    """(E,) places in 0..n-1."""
    classes: Places
    """(E,) foreground ids in 1..K-1."""
    num_images: int
    num_classes: int
    """K, background included."""

    @classmethod
    def of(cls, split: SplitView, samples: Places) -> Self:
        """The image labels of some samples of a split; samples without known labels have none."""
        classes = split.column("classes").take(pa.array(samples))
        images, ids = pc.list_parent_indices(classes), pc.list_flatten(classes)
        return cls(images.to_numpy(), ids.to_numpy().astype(np.int64), len(samples), split.num_classes)

    def occurrences(self, draws: Floats) -> Floats:
        """(K - 1,) how often each foreground class is drawn, given (n,) draws."""
        return _sums(self.classes - 1, draws[self.images], self.num_classes - 1)


@dataclass(frozen=True)
class Balance:
    """Draws per image and what they make of the classes; shares are of the K - 1 foreground classes and sum to 1."""

    draws: Floats
    """(n,) expected draws of each image per epoch."""
    images: Places
    """(K - 1,) images that show each class."""
    natural: Floats
    """(K - 1,) share of each class where every image is drawn once."""
    target: Floats
    """(K - 1,) wanted share; 0 where no image shows the class."""
    expected: Floats
    """(K - 1,) share that the draws give."""


def balance(lists: ClassLists, *, strength: float, limit: float) -> Balance:
    """Finds the draws, as many as there are images; images without any class are drawn once.

    Args:
        lists: image labels.
        strength: 0 (as the data are) to 1 (all classes equally often).
        limit: greatest number of draws of an image per epoch, 1 or more.

    Raises:
        ValueError: strength or limit out of range.
    """
    if not 0 <= strength <= 1 or limit < 1:
        raise ValueError(f"strength is {strength} and limit {limit}; allowed are 0 to 1, and 1 or more")
    unbalanced = shares(lists, np.ones(lists.num_images), strength=strength)
    if not len(lists.images) or not strength:
        return unbalanced
    return shares(lists, _scale(lists, unbalanced.target, limit), strength=strength)


def shares(lists: ClassLists, draws: Floats, *, strength: float) -> Balance:
    """What (n,) draws of each image per epoch make of the classes; `strength`, 0 to 1, gives the target."""
    images, drawn = lists.occurrences(np.ones(lists.num_images)), lists.occurrences(draws)
    natural = images / max(1.0, images.sum())
    target = np.where(images > 0, np.maximum(natural, 1e-300) ** (1 - strength), 0.0)
    target /= max(1e-300, target.sum())
    return Balance(draws, images.astype(np.int64), natural, target, drawn / max(1.0, drawn.sum()))


def table(balance: Balance, classes: Sequence[str], *, most: int | None = None) -> str:
    """Shares of the foreground classes in percent, rarest class first.

    Args:
        balance: the shares.
        classes: names of all K classes, background first.
        most: greatest number of rows, half for the rarest and half for the most frequent classes; None for all.
    """
    order = np.argsort(balance.images, kind="stable").tolist()
    shown = order if most is None or len(order) <= most else [*order[: most // 2], *order[-(most - most // 2) :]]
    width = max(len("class"), *(len(classes[i + 1]) for i in shown))
    lines = [f"{'class':{width}} {'images':>8} {'natural %':>10} {'target %':>9} {'expected %':>11}"]
    for place, i in enumerate(shown):
        if len(shown) < len(order) and place == most // 2:  # type: ignore[operator]
            lines.append(f"... {len(order) - len(shown)} more classes")
        shares = (100 * float(part[i]) for part in (balance.natural, balance.target, balance.expected))
        cells = "{:>10.3f} {:>9.3f} {:>11.3f}".format(*shares)
        lines.append(f"{classes[i + 1]:{width}} {int(balance.images[i]):>8} {cells}")
    off = np.abs(balance.expected - balance.target).sum() / 2
    lines.append(
        f"{100 * off:.2f} % of the drawn labels are off the target; images are drawn {balance.draws.min():.2f} to "
        f"{balance.draws.max():.2f} times per epoch"
    )
    return "\n".join(lines)


def _scale(lists: ClassLists, target: Floats, limit: float) -> Floats:
    """Draws whose occurrences have the target's shares: the factors of missed classes grow, step by step."""
    logs = np.zeros(lists.num_classes - 1)
    draws = np.ones(lists.num_images)
    present = target > 0
    # The mean number of classes of the images that show a class shortens its steps.
    sizes = np.bincount(lists.images, minlength=lists.num_images).astype(np.float64)
    crowding = lists.occurrences(sizes) / np.maximum(1, lists.occurrences(draws))
    for _ in range(_ITERATIONS):
        exponents = _sums(lists.images, logs[lists.classes - 1], lists.num_images)
        draws = _normalize(exponents, sizes > 0, limit)
        drawn = lists.occurrences(draws)
        ratio = np.log(target[present] * drawn.sum() / np.maximum(drawn[present], 1e-300))
        if np.abs(ratio).max() < _CLOSE_ENOUGH:
            break
        logs[present] += _STEP * np.clip(ratio, -1, 1) / crowding[present]
        logs = np.clip(logs, -_LARGEST, _LARGEST)  # where the limit binds, a factor would grow without bound
    return draws


def _sums(places: Places, values: Floats, length: int) -> Floats:
    """(length,) sums of the values by their places."""
    sums: Floats = np.bincount(places, weights=values, minlength=length).astype(np.float64)
    return sums


def _normalize(exponents: Floats, labeled: npt.NDArray[np.bool_], limit: float) -> Floats:
    """Draws proportional to exp(exponents) for labeled images, at most `limit`, on average 1; 1 for the others."""
    draws = np.ones(len(exponents))
    weights = np.exp(exponents[labeled] - exponents[labeled].max())
    total, capped = float(labeled.sum()), np.zeros(len(weights), dtype=np.bool_)
    while True:
        free = weights[~capped].sum()
        scaled = np.where(capped, limit, weights * ((total - limit * capped.sum()) / max(free, 1e-300)))
        over = (scaled > limit) & ~capped
        if not over.any():
            draws[labeled] = scaled
            return draws
        capped |= over
