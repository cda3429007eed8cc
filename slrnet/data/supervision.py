"""Which labels training may use of each sample, and how often it draws the sample (paper Sec. 3.1: D_p, D_c, D_u).

The manifest says which labels a sample has; the setting and the named subset say which ones training may use. This
module alone decides: loaders read no mask and no image label that it does not grant.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_

import numpy as np
import numpy.typing as npt

from slrnet.config import Config, DataConfig, Setting
from slrnet.data.class_balance import ClassLists, balance
from slrnet.data.epoch_plan import Pool
from slrnet.data.manifest import DataError, ShardSet, SplitView
from slrnet.data.sample_set import SampleSet

__all__ = ["Supervision", "plan_supervision", "supervision_of"]


@dataclass(frozen=True)
class Supervision:
    """What training may use of a split."""

    pixel_labels: SampleSet
    """Samples whose mask training may use."""
    image_labels: SampleSet
    """Samples whose image labels are known and training may use."""
    pools: tuple[Pool, ...]
    """The samples that an epoch draws: those with masks that training may use, if any, and the others, if any."""
    first_pools: tuple[Pool, ...] = ()
    """The same for the first epochs, with as many draws in all."""
    first_epochs: int = 0
    """Number of epochs that draw from `first_pools`."""

    def pools_in(self, epoch: int) -> tuple[Pool, ...]:
        """The pools that an epoch, counted from 0, draws from."""
        return self.first_pools if epoch < self.first_epochs else self.pools

    @property
    def draws(self) -> int:
        """Samples that an epoch draws, repeated ones counted each time."""
        return sum(pool.total for pool in self.pools)

    @cached_property
    def members(self) -> SampleSet:
        """The samples that training draws at all."""
        return reduce(or_, (pool.samples for pool in self.pools))

    def describe(self) -> str:
        """Numbers of images by the labels that training uses, and the draws of an epoch, as a line of text."""
        masks, names = self.pixel_labels & self.members, (self.image_labels & self.members) - self.pixel_labels
        rest = self.members - masks - names
        kinds = {"pixel labels": masks, "image labels": names, "no labels": rest}
        counts = ", ".join(f"{len(kind)} with {name}" for name, kind in kinds.items() if len(kind))
        drawn = sum(pool.total for pool in self.pools if len(pool.samples & self.pixel_labels))
        shares = f", {100 * drawn / self.draws:.1f} % of them with pixel labels" if drawn else ""
        first = f"; epochs 1 to {self.first_epochs} draw labeled images alone" if self.first_epochs else ""
        return f"training images: {counts}; {self.draws} draws per epoch{shares}{first}"


def plan_supervision(
    split: SplitView, config: DataConfig, setting: Setting, *, pretrain_epochs: int = 0
) -> Supervision:
    """Decides what training may use of a split.

    Args:
        split: the split to train on.
        config: the data settings: subsets, oversampling and class balance.
        setting: `sss` uses no image labels, `wsss` no masks.
        pretrain_epochs: epochs without pseudo labels, from which `config.pretrain_on` may exclude unlabeled images.

    Raises:
        DataError: there is no such subset, a sample of `pixel_labeled_subset` has no mask, or nothing is left that
            could be trained on.
    """
    everything, nothing = SampleSet.all(split.num_samples), SampleSet.all(0)
    members = SampleSet.of(split.in_subset(config.train_subset)) if config.train_subset else everything
    masks = nothing
    if setting != "wsss":
        masks = SampleSet.of(split.in_subset(config.pixel_labeled_subset)) & members
        _check_masks(split, masks, config)
    names = split.with_image_labels if setting != "sss" else nothing
    if setting == "wsss" and not len(names & members):
        raise DataError(
            f"no sample of split {split.name!r} of {split.folder} that is trained on has image labels, and setting "
            "'wsss' needs them; prepare the data with --labels or --masks, whose classes are the image labels too"
        )
    pools = tuple(
        Pool(samples, _draws(split, samples, config) * times)
        for samples, times in ((masks, config.pixel_oversampling), (members - masks, 1))
        if len(samples)
    )
    labeled = masks | names
    if config.pretrain_on == "all" or not pretrain_epochs or not len(members - labeled):
        return Supervision(masks, names, pools)
    return Supervision(masks, names, pools, _labeled_alone(pools, labeled), pretrain_epochs)


def supervision_of(config: Config, shards: ShardSet) -> Supervision:
    """What a run may use of its training split; errors are those of `plan_supervision` and `ShardSet.split`."""
    split = shards.split(config.data.train_split)
    return plan_supervision(split, config.data, config.setting, pretrain_epochs=config.train.pretrain_epochs)


def _labeled_alone(pools: tuple[Pool, ...], labeled: SampleSet) -> tuple[Pool, ...]:
    """The pools without the unlabeled samples, the others drawn more often: as many draws in all."""
    kept = [pool.part(chosen) for pool in pools if len(chosen := pool.samples & labeled)]
    # Each pool's draws are a whole number; the last one takes what rounding leaves.
    shares = np.array([pool.expected for pool in kept])
    ends = np.rint(np.cumsum(shares) / shares.sum() * sum(pool.total for pool in pools))
    totals = np.diff(ends, prepend=0)
    return tuple(
        Pool(pool.samples, pool.draws * float(own / share))
        for pool, own, share in zip(kept, totals, shares, strict=True)
        if own
    )


def _draws(split: SplitView, samples: SampleSet, config: DataConfig) -> float | npt.NDArray[np.float64]:
    if not config.class_balance:
        return 1.0
    lists = ClassLists.of(split, samples.array)
    return balance(lists, strength=config.class_balance, limit=config.balance_limit).draws


def _check_masks(split: SplitView, masks: SampleSet, config: DataConfig) -> None:
    name = config.pixel_labeled_subset
    if not len(masks):
        raise DataError(
            f"data.pixel_labeled_subset {name!r} and data.train_subset {config.train_subset!r} of split {split.name!r} "
            "have no sample in common; name subsets that overlap"
        )
    without = masks - split.with_masks
    if len(without):
        raise DataError(
            f"{len(without)} of {len(masks)} samples of subset {name!r} of split {split.name!r} have no mask, "
            f"for instance {split.key(int(without.array[0]))!r}; data.pixel_labeled_subset must name samples with "
            "masks: prepare the data with them, or leave them out of the subset"
        )
