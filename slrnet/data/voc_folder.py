"""A data set as a folder in PASCAL VOC's layout, for programs that read no shards.

JPEGImages/KEY.jpg, SegmentationClass/KEY.png (palette PNGs, void 255) and ImageSets/Segmentation/SPLIT.txt. If all
classes are VOC's, masks have VOC's ids; else they keep their own, and labels.txt names them, the background first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slrnet.data.catalog import VOC_CLASSES, voc_ids, voc_palette
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.images import encode_mask
from slrnet.data.manifest import DataError, ShardSet
from slrnet.storage.folders import whole_folder

__all__ = ["check_voc_folder", "write_voc_folder"]


def check_voc_folder(out: Path) -> Path:
    """Absolute path of a folder that does not exist yet or is empty; raises `DataError` if it is neither."""
    path = out.expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} exists; give another folder")
    return path


def write_voc_folder(shards: ShardSet, out: Path, *, splits: Sequence[str]) -> None:
    """Writes the named splits of a data set to a new folder, which appears when it is complete.

    Samples without a mask get none.

    Raises:
        DataError: the folder exists, a key is in two of the splits, or a sample is damaged.
    """
    path = check_voc_folder(out)
    classes = shards.info.classes
    ours = not set(classes) <= set(VOC_CLASSES)
    table = np.arange(256, dtype=np.uint8) if ours else voc_ids(classes)
    palette = shards.info.palette_array() if ours else voc_palette()
    with whole_folder(path) as partial:
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (partial / folder).mkdir(parents=True)
        if ours:
            (partial / "labels.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        for view in map(shards.split, splits):
            for sample in EvalLoader(shards, split=view.name):
                image = partial / "JPEGImages" / f"{sample.key}.jpg"
                if image.exists():
                    raise DataError(f"key {sample.key!r} is in two of the splits; write them into folders of their own")
                image.write_bytes(sample.jpeg)
                if sample.pixel_labels is not None:
                    data = encode_mask(table[sample.pixel_labels.numpy()], palette)
                    (partial / "SegmentationClass" / f"{sample.key}.png").write_bytes(data)
            text = "\n".join(sorted(view.keys.to_pylist())) + "\n"
            (partial / "ImageSets" / "Segmentation" / f"{view.name}.txt").write_text(text)
