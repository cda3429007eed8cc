"""A review as a folder: which images, what the network proposes, and what a person decided.

review.json names the checkpoint, the data set and the images, the most doubtful first; images/KEY.jpg,
proposed/KEY.png (indexed masks) and, for accepted and redrawn ones, masks/KEY.png; decisions.json. Each file appears
whole, so a review goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from slrnet.checkpoints.checkpoint import Checkpoint
from slrnet.data.annotation_files import TOLERANCE, AnnotationFormat, AnnotationWriter
from slrnet.data.catalog import IGNORE_INDEX, mask_palette
from slrnet.data.images import encode_mask, open_image
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.data.transforms import decode_mask
from slrnet.evaluation.examine import EvaluationTarget
from slrnet.storage.files import read_json, write_json, written_whole
from slrnet.storage.folders import whole_folder
from slrnet.tools.review.doubt import candidates, look, measure_doubts, read_unmasked

__all__ = ["REVIEW", "Decision", "ReviewDesk", "open_desk"]

Decision = Literal["accepted", "redrawn", "discarded"]
"""What was decided about an image: its proposed mask, another one, or none."""
REVIEW = "review.json"
"""File that names a review's checkpoint, data set and images."""
DECISIONS = "decisions.json"
Mask = npt.NDArray[np.uint8]


@dataclass
class ReviewDesk:
    """A folder of a review; see the module's docstring."""

    folder: Path
    record: Mapping[str, Any]
    """Content of review.json."""

    def __post_init__(self) -> None:
        path = self.folder / DECISIONS
        self.decisions: dict[str, Decision] = read_json(path) if path.is_file() else {}
        if unknown := [key for key, text in self.decisions.items() if text not in get_args(Decision)]:
            raise DataError(f"{path} has an unknown decision about {unknown[0]!r}; remove that line")

    @property
    def keys(self) -> list[str]:
        """Names of the images, the most doubtful first."""
        return [image["key"] for image in self.record["images"]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes, background first."""
        return tuple(self.record["classes"])

    @property
    def palette(self) -> npt.NDArray[np.uint8]:
        """(256, 3) uint8 RGB by id."""
        return mask_palette([tuple(color) for color in self.record["palette"]])

    def image(self, key: str) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of an image."""
        with open_image(self.folder / "images" / f"{key}.jpg") as file:
            return np.asarray(file.convert("RGB"))

    def mask(self, key: str) -> Mask:
        """(H, W) class ids: the decided mask, else the proposed one."""
        decided = self.folder / "masks" / f"{key}.png"
        path = decided if decided.is_file() else self.folder / "proposed" / f"{key}.png"
        return decode_mask(path.read_bytes()).numpy()

    def decide(self, key: str, decision: Decision, mask: Mask | None = None) -> None:
        """Keeps what was decided about an image; a `mask` (H, W) for an accepted or redrawn one.

        Raises:
            DataError: the mask has another size, or ids that are no classes.
        """
        path = self.folder / "masks" / f"{key}.png"
        if mask is not None:
            if mask.shape != (shape := self.image(key).shape[:2]):
                raise DataError(f"the mask of {key} is {mask.shape}, its image {shape}; correct the mask of this image")
            if foreign := [i for i in np.unique(mask).tolist() if len(self.classes) <= i != IGNORE_INDEX]:
                raise DataError(f"the mask of {key} has the ids {foreign}; the classes are {', '.join(self.classes)}")
            with written_whole(path) as incoming:
                incoming.write_bytes(encode_mask(mask, self.palette))
        self.decisions[key] = decision
        write_json(
            self.folder / DECISIONS, {name: self.decisions[name] for name in self.keys if name in self.decisions}
        )

    def masks(self) -> dict[str, Mask]:
        """The masks that were accepted or redrawn, by name."""
        return {key: self.mask(key) for key, decision in self.decisions.items() if decision != "discarded"}

    def hand_out(self, form: AnnotationFormat, out: Path) -> None:
        """Writes the images and their masks to a new folder for an annotation tool; it appears when it is complete."""
        with whole_folder(out.expanduser().resolve()) as partial:
            images = partial / "images"
            images.mkdir()
            tool = AnnotationWriter(
                out=partial, labelme=images, classes=self.classes, formats=[form], tolerance=TOLERANCE, keep_void=True
            )
            for key in self.keys:
                (images / f"{key}.jpg").write_bytes((self.folder / "images" / f"{key}.jpg").read_bytes())
                tool.add(key, f"{key}.jpg", self.mask(key))
            tool.close()


def open_desk(
    folder: Path, checkpoint: Checkpoint, *, data: str | None, number: int, device: str | None = None
) -> tuple[ReviewDesk, ShardSet]:
    """Opens a review, or begins one: of the training images of which the network is least sure.

    Args:
        folder: the review's folder.
        checkpoint: the run's network.
        data: location of the shards; None: those of the training.
        number: images to review, >= 1.
        device: the network's device; None: a GPU if there is one.

    Raises:
        DataError: the folder holds the review of another checkpoint or data set, or there is nothing to review.
    """
    shards = load_dataset(data or checkpoint.config.data.path)
    made = {"checkpoint": str(checkpoint.path.resolve()), "fingerprint": shards.info.fingerprint}
    if (folder / REVIEW).is_file():
        record = read_json(folder / REVIEW)
        if differing := [name for name, value in made.items() if record.get(name) != value]:
            name = differing[0]
            raise DataError(
                f"{folder} holds another review ({name} {record.get(name)}, now {made[name]}); choose another --out"
            )
        return ReviewDesk(folder, record), shards
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no review; choose another --out")
    with whole_folder(folder.resolve()) as partial:
        record = _begin(partial, EvaluationTarget.of(checkpoint, shards, device), number, made)
    return ReviewDesk(folder, record), shards


def _begin(folder: Path, target: EvaluationTarget, number: int, made: Mapping[str, str]) -> dict[str, Any]:
    """Writes a review's images and proposals; returns its record."""
    for name in ("images", "proposed", "masks"):
        (folder / name).mkdir()
    chosen = measure_doubts(target)[:number]
    supervision, _ = candidates(target)
    palette = target.shards.info.palette_array()
    for sample in read_unmasked(target, supervision, sorted(index for index, _ in chosen)):
        (folder / "images" / f"{sample.key}.jpg").write_bytes(sample.jpeg)
        mask, _ = look(target.inference, sample)
        (folder / "proposed" / f"{sample.key}.png").write_bytes(encode_mask(mask, palette))
    info = target.shards.info
    record: dict[str, Any] = {
        **made,
        "data": target.shards.location,
        "classes": info.classes,
        "palette": info.palette,
        "images": [{"index": index, **asdict(doubt)} for index, doubt in chosen],
    }
    write_json(folder / REVIEW, record)
    return record
