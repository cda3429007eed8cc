"""Exports of annotation tools, read in one form: labelme, CVAT, Label Studio, COCO, Supervisely.

`read_annotations` reads an export, `rasterize` makes the mask of one of its images. Each tool has a module, whose
docstring says what is an area, what is a label, what is left out, and which of two shapes lies on top.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from data_prep.annotations.coco import read_coco
from data_prep.annotations.cvat import read_cvat
from data_prep.annotations.export import AnnotationExport, ImageAnnotation, find_files, rasterize, reserved_id
from data_prep.annotations.label_studio import read_label_studio
from data_prep.annotations.labelme import read_labelme
from data_prep.annotations.supervisely import read_supervisely
from data_prep.text_files import text_encoding
from slrnet.data.manifest import DataError

__all__ = ["AnnotationExport", "ImageAnnotation", "Tool", "rasterize", "read_annotations", "reserved_id"]

Tool = Literal["labelme", "cvat", "label-studio", "coco", "supervisely"]
HEAD = 1 << 16
"""Bytes by which the form of a file is known."""
READERS: Mapping[Tool, Callable[[Path], AnnotationExport]] = {
    "labelme": read_labelme,
    "cvat": read_cvat,
    "label-studio": read_label_studio,
    "coco": read_coco,
    "supervisely": read_supervisely,
}


def read_annotations(path: str | Path, tool: Tool | Literal["auto"] = "auto") -> AnnotationExport:
    """Reads what an annotation tool exported.

    Args:
        path: The exported file, or the folder into which the export was unpacked.
        tool: Which tool; `auto` for the one whose form the first file has.

    Raises:
        DataError: there is no such file, it cannot be read, or it has the form of no tool.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"--annotations {path} is missing; give the exported file, or the folder with the export")
    if path.suffix.lower() in (".zip", ".tar", ".gz"):
        raise DataError(f"--annotations {path} is an archive; unpack it and give the folder")
    export = READERS[_tool(path) if tool == "auto" else tool](path)
    suffix = ".json" if export.tool == "cvat" else ".xml"
    others = [] if path.is_file() else [str(file) for file in find_files(path, suffix)]
    kind = f"{suffix[1:].upper()} files, which are not of {export.tool}"
    return replace(export, left_out={**export.left_out, kind: others}) if others else export


def _tool(path: Path) -> Tool:
    """The tool whose form the first JSON or XML file has."""
    meta = path / "meta.json" if path.is_dir() else path
    if meta.name == "meta.json" and meta.is_file():
        return "supervisely"
    for file in find_files(path, ".json"):
        if (tool := _form(file)) is not None:
            return tool
    if any(file.suffix.lower() == ".xml" for file in find_files(path, ".xml")):
        return "cvat"
    raise DataError(
        f"--annotations {path} holds no JSON or XML file of a known form; known are {', '.join(get_args(Tool))}: give "
        "the file or folder that one of them exported"
    )


def _form(file: Path) -> Tool | None:
    """The tool that has written a JSON file, by its first words: some files are too long to be read twice."""
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    text = head.decode(text_encoding(head) or "utf-8", errors="replace").lstrip()
    if text.startswith("["):
        return "label-studio"
    if text.startswith("{") and re.search(r'"(shapes|imagePath)"\s*:', text):
        return "labelme"
    return "coco" if text.startswith("{") and re.search(r'"(images|annotations|categories)"\s*:', text) else None
