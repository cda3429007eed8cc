"""A data set as a folder of images and annotation files, so that people can correct its masks in a tool.

images/KEY.jpg with images/KEY.json beside it for labelme, coco.json or coco-polygons.json, SPLIT.txt with the images of
each split, and labels.csv with the image labels that are known. `slrnet prepare folder` reads all of it again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from slrnet.data.annotation_files import AnnotationFormat, AnnotationWriter
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet
from slrnet.data.voc_folder import check_voc_folder
from slrnet.storage.folders import whole_folder

__all__ = ["check_annotation_folder", "write_annotation_folder"]


def check_annotation_folder(
    classes: Sequence[str], out: Path, *, form: AnnotationFormat, tolerance: float, keep_void: bool
) -> AnnotationWriter:
    """Checks what `write_annotation_folder` would refuse before it begins; returns the writer of its annotations.

    Raises:
        DataError: the folder exists, a class has a `;` in its name, or see `AnnotationWriter`.
    """
    path = check_voc_folder(out)
    if separated := [name for name in classes if ";" in name]:
        raise DataError(f"the class {separated[0]!r} has a `;`, which separates labels in labels.csv; rename the class")
    partial = path.with_name(f".{path.name}.partial")
    return AnnotationWriter(
        out=partial,
        labelme=partial / "images",
        classes=classes,
        formats=[form],
        tolerance=tolerance,
        keep_void=keep_void,
    )


def write_annotation_folder(
    shards: ShardSet, out: Path, *, form: AnnotationFormat, tolerance: float, keep_void: bool
) -> list[str]:
    """Writes all samples of a data set to a new folder, which appears when it is complete; those without masks too.

    Args:
        shards: the data set.
        out: folder to make.
        form: form of the annotations.
        tolerance: how much polygons may move a border, pixels.
        keep_void: whether void pixels become shapes of the label `void`.

    Returns:
        Lines about what was left out.

    Raises:
        DataError: a key is in two splits, a sample is damaged, or see `check_annotation_folder`.
    """
    classes = shards.info.classes
    writer = check_annotation_folder(classes, out, form=form, tolerance=tolerance, keep_void=keep_void)
    with whole_folder(out.expanduser().resolve()) as partial:
        images = partial / "images"
        images.mkdir()
        writer.out, writer.labelme = partial, images
        labels = [("image", "labels")]
        for split in shards.splits:
            names = []
            for sample in EvalLoader(shards, split=split):
                image = images / f"{sample.key}.jpg"
                if image.exists():
                    raise DataError(f"key {sample.key!r} is in two splits; prepare a data set whose keys differ")
                image.write_bytes(sample.jpeg)
                names.append(image.name)
                if sample.pixel_labels is not None:
                    writer.add(sample.key, image.name, sample.pixel_labels.numpy())
                if sample.has_image_labels:
                    named = [classes[i + 1] for i in sample.image_labels.nonzero().flatten().tolist()]
                    labels.append((image.name, ";".join(named)))
            (partial / f"{split}.txt").write_text("\n".join(sorted(names)) + "\n", encoding="utf-8")
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([labels[0], *sorted(labels[1:])])
        (partial / "labels.csv").write_text(table.getvalue(), encoding="utf-8")
        return writer.close()
