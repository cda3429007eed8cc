"""What a folder without shards holds instead, and the command that makes shards of it: for error messages."""

from __future__ import annotations

import shlex
from itertools import islice
from pathlib import Path

from PIL import Image

__all__ = ["how_to_make_shards"]

LOOKED_AT = 2000
"""Most files and folders that are looked at."""


def how_to_make_shards(path: Path, *, marker: str) -> str:
    """Says what is at a path that is no data set, and what to do.

    Args:
        path: absolute path of something that has no `marker` file.
        marker: name of the file that makes a folder a data set.
    """
    if path.is_file() or path.parent.is_file():
        return f"{path} is a file or is in one; give the folder of shards, which holds {marker}"
    if not path.exists():
        return (
            "there is no such folder on this machine; make one with `slrnet prepare voc --root VOCdevkit/VOC2012 "
            f"--out {_quoted(path)}`, or the synthetic demo with `slrnet prepare demo --out {_quoted(path)}`"
        )
    below = sorted(islice(path.rglob("*"), LOOKED_AT))
    if sets := [file.parent for file in below if file.name == marker]:
        return f"give one of the data sets in it: {', '.join(map(str, sets[:10]))}"
    if (path / "checkpoints").is_dir():
        return "it is the folder of a run; give the folder of shards that it was trained on, or leave --data out"
    return f"{_command(path, below)}; `slrnet prepare --help` lists what else can be converted"


def _command(path: Path, below: list[Path]) -> str:
    """The conversion that fits what is below a folder."""
    out = f"--out {_quoted(path.with_name(f'{path.name}_shards'))}"
    for file in below:
        if file.name == "JPEGImages":
            return f"it holds a VOC folder; make shards with `slrnet prepare voc --root {_quoted(file.parent)} {out}`"
        if file.match("annotations/instances_*.json"):
            return f"it holds COCO; make shards with `slrnet prepare coco --root {_quoted(file.parents[1])} {out}`"
    suffixes = {file.suffix.lower() for file in below}
    if ".tar" in suffixes:
        return f"it holds tars; make shards with `slrnet prepare tars --tars {_quoted(path)} --classes A,B {out}`"
    if suffixes & Image.registered_extensions().keys():
        return (
            f"it holds images; make shards with `slrnet prepare folder --images {_quoted(path)} --labels LABELS.csv "
            f"{out}`, or with --masks DIR --classes A,B instead of --labels"
        )
    return f"it holds nothing to train on; try the embedded synthetic data set: `slrnet prepare demo {out}`"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
