"""Masks as files that annotation tools open: COCO's JSON (run lengths or polygons) and labelme's JSON.

COCO: `coco.json` holds exact run lengths, `coco-polygons.json` polygons. A class of an image is one annotation with all
of its parts, and `iscrowd` is 0: 1 would tell readers to ignore the region. Category ids are the class ids.

labelme: one JSON file for each image, with polygons; those of a class have one group id.

What nothing covers is background. Void pixels are left out, or become shapes of the label `void`. Needs the extra
`coco`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.manifest import DataError
from slrnet.data.outlines import Ring, outlines_of
from slrnet.storage.files import write_text

__all__ = ["ANNOTATION_FORMATS", "TOLERANCE", "VOID", "AnnotationFormat", "AnnotationWriter"]

AnnotationFormat = Literal["coco", "coco-polygons", "labelme"]
"""Forms of annotations."""
ANNOTATION_FORMATS: tuple[AnnotationFormat, ...] = get_args(AnnotationFormat)
"""All forms of annotations."""
TOLERANCE = 1.0
"""How much polygons may move a border by default, pixels."""
VOID = "void"
"""Label of void pixels, which `slrnet prepare folder --annotations` makes void again."""
MOST_LISTED = 10
"""Most images that a message names."""
_Mask = npt.NDArray[np.uint8]


@dataclass(kw_only=True)
class AnnotationWriter:
    """Writes masks, one by one, in the formats asked for; COCO's files appear at the end.

    Raises:
        DataError: the extra is missing, the tolerance is below 0, or void is to be kept and a class is called `void`.
    """

    out: Path
    """Folder of `coco.json` and `coco-polygons.json`."""
    labelme: Path
    """Folder of labelme's files."""
    classes: Sequence[str]
    """Names of the K classes, background first."""
    formats: Sequence[AnnotationFormat]
    tolerance: float = TOLERANCE
    """How much polygons may move a border, pixels; see `outlines_of`."""
    keep_void: bool = False
    """Whether void pixels become shapes of the label `void`; else they are left out and read as background."""
    void: dict[str, int] = field(default_factory=dict, init=False)
    """Number of void pixels that were left out, by image."""
    _images: list[dict[str, Any]] = field(default_factory=list, init=False)
    _annotations: dict[str, list[dict[str, Any]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.formats and (missing := [name for name in ("pycocotools", "shapely") if find_spec(name) is None]):
            raise DataError(
                f"{', '.join(self.formats)} needs {' and '.join(missing)}, not installed; pip install 'slrnet[coco]'"
            )
        if not 0 <= self.tolerance < float("inf"):
            raise DataError(f"the tolerance is {self.tolerance} pixels; 0 or more is needed")
        if self.keep_void and VOID in self.classes:
            raise DataError(f"a class is called {VOID!r}, so void pixels cannot get this label; leave them out")
        self._annotations = {name: [] for name in self.formats if name != "labelme"}

    def add(self, name: str, image: str, mask: _Mask) -> None:
        """Adds an image's mask.

        Args:
            name: labelme's file is NAME.json.
            image: path of the image, relative to `labelme`; `coco.json` has its last part.
            mask: (H, W) ids below K, 255 where void; of the upright image's size.
        """
        labels = {int(i): self._label(int(i)) for i in np.unique(mask)}
        if IGNORE_INDEX in labels and not self.keep_void:
            self.void[name] = int((mask == IGNORE_INDEX).sum())
            del labels[IGNORE_INDEX]
        labels.pop(0, None)
        rings = {} if set(self.formats) == {"coco"} or not labels else outlines_of(mask, tolerance=self.tolerance)
        size = {"width": mask.shape[1], "height": mask.shape[0]}
        self._images.append({"id": len(self._images) + 1, "file_name": Path(image).name, **size})
        for form, entries in self._annotations.items():
            for label in labels:
                shape = _run_lengths(mask == label) if form == "coco" else _flat(rings[label])
                entries.append(self._annotation(len(entries) + 1, label, mask == label, shape))
        if "labelme" in self.formats:
            record = _labelme(image, mask.shape, {labels[i]: rings[i] for i in labels})
            write_text(self.labelme / f"{name}.json", json.dumps(record, ensure_ascii=False, indent=2) + "\n")

    def close(self) -> list[str]:
        """Writes COCO's files; returns what people should know, a line each."""
        for form, entries in self._annotations.items():
            record = {"images": self._images, "annotations": entries, "categories": self._categories()}
            write_text(self.out / f"{form}.json", json.dumps(record, ensure_ascii=False) + "\n")
        if not self.void:
            return []
        more = f" and {len(self.void) - MOST_LISTED} more" if len(self.void) > MOST_LISTED else ""
        return [
            f"left out of {', '.join(self.formats)}: {sum(self.void.values())} void pixels in {len(self.void)} images "
            f"({', '.join(list(self.void)[:MOST_LISTED])}{more}), which become background; label them in the tool, or "
            f"keep them as shapes of the label {VOID!r} with --keep-void"
        ]

    def _label(self, index: int) -> str:
        return VOID if index == IGNORE_INDEX else self.classes[index]

    def _categories(self) -> list[dict[str, Any]]:
        ids = [*range(1, len(self.classes)), *([IGNORE_INDEX] if self.keep_void else [])]
        return [{"id": index, "name": self._label(index), "supercategory": ""} for index in ids]

    def _annotation(self, number: int, label: int, region: npt.NDArray[np.bool_], shape: Any) -> dict[str, Any]:
        rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
        left, top = int(columns[0]), int(rows[0])
        return {
            "id": number,
            "image_id": len(self._images),
            "category_id": label,
            "segmentation": shape,
            "area": int(region.sum()),
            "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
            "iscrowd": 0,
        }


def _run_lengths(region: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's compressed run lengths of a region (H, W)."""
    from pycocotools import mask as coco_mask

    packed = coco_mask.encode(np.asfortranarray(region, dtype=np.uint8))
    return {"size": list(region.shape), "counts": packed["counts"].decode("ascii")}


def _flat(rings: Sequence[Ring]) -> list[list[float]]:
    return [ring.ravel().tolist() for ring in rings]


def _labelme(image: str, shape: tuple[int, ...], rings: Mapping[str, Sequence[Ring]]) -> dict[str, Any]:
    """The content of labelme's file of an image."""
    shapes = [
        {
            "label": label,
            "points": ring.tolist(),
            "group_id": group if len(parts) > 1 else None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for group, (label, parts) in enumerate(rings.items(), start=1)
        for ring in parts
    ]
    size = {"imageHeight": shape[0], "imageWidth": shape[1]}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None, **size}
