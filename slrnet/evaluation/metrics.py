"""Quality of masks from one confusion matrix: IoU, mFDR (paper Eq. 10), mFNR (Eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor

from slrnet.data.catalog import IGNORE_INDEX

__all__ = ["ConfusionMatrix"]


class ConfusionMatrix:
    """Counts pixels by true class (rows) and predicted class (columns).

    A prediction of 255 on a labeled pixel is in the last column: a false negative of its true class, and a false
    positive of no class. Pixels whose true label is 255 are ignored.

    Args:
        num_classes: K with the background.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Adds pixels: class ids of any shape, 255 for undecided, and true ids of the same shape, 255 for void.

        They are counted on the device of the predictions.

        Raises:
            ValueError: the shapes differ, or an id is neither below K nor 255.
        """
        if predictions.shape != targets.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape; "
                "resize the predictions to the targets"
            )
        classes, targets = self.num_classes, targets.to(predictions.device)
        true, predicted = (self._places(ids) for ids in (targets, predictions))
        # One copy from a GPU: shapes that depend on values, as those of a boolean index, would take several.
        table = torch.zeros((classes + 2) ** 2, dtype=torch.int64, device=true.device)
        index = (true * (classes + 2) + predicted).flatten()
        table = table.scatter_add_(0, index, torch.ones_like(index)).view(classes + 2, classes + 2).cpu()
        for name, ids, wrong in (("targets", targets, table[-1]), ("predictions", predictions, table[:classes, -1])):
            if wrong.any():
                found = int(ids[(self._places(ids) > classes) & (targets != IGNORE_INDEX)][0])
                raise ValueError(f"{name} hold the id {found}; allowed are 0 to {classes - 1} and 255")
        self.counts += table[:classes, :-1]

    def _places(self, ids: Tensor) -> Tensor:
        """Row or column of each id: its own, K for 255, and K + 1 for one that is not allowed."""
        ids = ids.long()
        outside = torch.where(ids == IGNORE_INDEX, self.num_classes, self.num_classes + 1)
        return torch.where((ids >= 0) & (ids < self.num_classes), ids, outside)

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of another matrix of the same classes.

        Raises:
            ValueError: the numbers of classes differ.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"cannot add a confusion matrix of {other.num_classes} classes to one of {self.num_classes}; "
                "merge matrices of one data set"
            )
        self.counts += other.counts

    def iou(self) -> Tensor:
        """Intersection over union, (K,) float64; NaN for a class that is neither true nor predicted anywhere."""
        hits, predicted, true = self._totals()
        return hits / (predicted + true - hits)

    def miou(self) -> float:
        """Mean IoU over the classes that occur, background included; NaN if none does."""
        return float(self.iou().nanmean())

    def fdr(self) -> Tensor:
        """Share of a class's predicted pixels that are not it, (K,); NaN for a class that is never predicted."""
        hits, predicted, _ = self._totals()
        return (predicted - hits) / predicted

    def fnr(self) -> Tensor:
        """Share of a class's true pixels that are not predicted as it, (K,); NaN for a class without pixels."""
        hits, _, true = self._totals()
        return (true - hits) / true

    def mfdr(self) -> float:
        """Mean false discovery rate over the foreground classes (Eq. 10): how unfaithful the masks are."""
        return float(self.fdr()[1:].nanmean())

    def mfnr(self) -> float:
        """Mean false negative rate over the foreground classes (Eq. 11): how incomplete the masks are."""
        return float(self.fnr()[1:].nanmean())

    def coverage(self) -> float:
        """Share of the labeled pixels that have a prediction; NaN without pixels."""
        return float(self.counts[:, : self.num_classes].sum() / self.counts.sum())

    def _totals(self) -> tuple[Tensor, Tensor, Tensor]:
        counts = self.counts.double()
        square = counts[:, : self.num_classes]
        return square.diagonal(), square.sum(dim=0), counts.sum(dim=1)
