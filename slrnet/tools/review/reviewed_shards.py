"""A data set with reviewed masks: that of a review, where each reviewed image has its new mask and a named subset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slrnet.config import Config
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.images import encode_mask
from slrnet.data.manifest import SCHEMA, DataError, ShardSet, SplitView, save_dataset
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.data.supervision import supervision_of
from slrnet.data.tars import ShardWriter
from slrnet.storage.folders import whole_folder
from slrnet.storage.lease import beside, owned

__all__ = ["SUBSET", "write_reviewed"]

SUBSET = "reviewed"
"""Named subset of the images whose mask the next training may see."""
_OWN = ("key", "classes", "subsets", "width", "height")


def write_reviewed(
    shards: ShardSet, config: Config, masks: Mapping[str, npt.NDArray[np.uint8]], out: Path, *, made_by: str
) -> int:
    """Writes a data set in which some training images have new masks; the folder appears when it is complete.

    The subset `reviewed` of the training split holds them, the images whose masks the run's training saw already, and
    those of earlier reviews. A class that a new mask shows joins the image labels, if they are known. All else stays.

    Args:
        shards: the data set.
        config: the run's settings, which say what its training saw.
        masks: (H, W) class ids, 255 for void, by key.
        out: folder to make.
        made_by: the command, for the data set's description.

    Returns:
        The number of images in the subset.

    Raises:
        DataError: there is no mask, a key is not in the training split, or a sample is damaged.
    """
    view = shards.split(config.data.train_split)
    if not masks:
        raise DataError("no mask was accepted or redrawn yet: nothing is there to train on; review some images first")
    places = {key: place for place, key in enumerate(view.keys.to_pylist())}
    if unknown := [key for key in masks if key not in places]:
        raise DataError(f"{unknown[0]!r} is no image of split {view.name!r} of {shards.location}; review this data set")
    members = {places[key] for key in masks} | set(supervision_of(config, shards).pixel_labels.array.tolist())
    if SUBSET in view.subset_names:
        members |= set(np.flatnonzero(view.in_subset(SUBSET)).tolist())
    target = out.expanduser().resolve()
    with owned(beside(target), f"output folder {target}"), whole_folder(target) as folder:
        parts = []
        for split in shards.splits:
            own = shards.split(split)
            for place, name in enumerate(own.shard_names):
                touched = split == view.name and not members.isdisjoint(own.samples_of(place))
                parts.append(
                    _rewrite(shards, own, place, folder / name, masks, members)
                    if touched
                    else _copy(shards, own, place, folder / name)
                )
        info = shards.info
        save_dataset(
            folder,
            [pa.concat_tables(parts)],
            name=f"{info.name}-{SUBSET}",
            classes=info.classes,
            palette=info.palette_array(),
            made_by=made_by,
            depth=info.depth,
        )
    return len(members)


def _copy(shards: ShardSet, view: SplitView, place: int, path: Path) -> pa.Table:
    shutil.copyfile(shards.path_of(path.name), path)
    return view.shard_rows(place)


def _rewrite(
    shards: ShardSet,
    view: SplitView,
    place: int,
    path: Path,
    masks: Mapping[str, npt.NDArray[np.uint8]],
    members: set[int],
) -> pa.Table:
    """Writes a shard anew, with the new masks and the subset; returns its rows."""
    index, palette = SampleIndex(shard_set=shards, split=view), shards.info.palette_array()
    rows = view.shard_rows(place).to_pylist()
    with path.open("wb") as file, ShardWriter(file, path.name) as shard, ShardFiles(index) as files:
        for sample, row in zip(view.samples_of(place), rows, strict=True):
            with index.naming(sample):
                contents = files.read(sample)
            mask, key = contents.get("png"), row["key"]
            classes: set[int] = set(row["classes"])
            if key in masks:
                mask = encode_mask(masks[key], palette)
                classes |= set(np.unique(masks[key]).tolist()) - {0, IGNORE_INDEX}
            subsets = {*row["subsets"], *([SUBSET] if sample in members else [])}
            shard.add(
                key=key,
                split=view.name,
                subsets=sorted(subsets),
                size=(row["width"], row["height"]),
                classes=sorted(classes) if row["has_image_labels"] else None,
                image=contents["jpg"],
                mask=mask,
                notes=_notes(contents, reviewed=key in masks),
            )
    return pa.table(shard.columns, schema=SCHEMA)


def _notes(contents: Mapping[str, bytes], *, reviewed: bool) -> dict[str, Any]:
    """Further entries of the sample's JSON file; how a mask was made is no longer so after a review."""
    notes = {name: value for name, value in json.loads(contents["json"]).items() if name not in _OWN}
    return {"reviewed": True} if reviewed else notes
