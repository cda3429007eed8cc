"""The archive (.tgz) of indexed PNGs that VOC's evaluation server takes: `slrnet voc-archive`."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from slrnet.data.catalog import VOC_CLASSES, voc_ids, voc_palette
from slrnet.data.images import as_rgb, encode_mask, open_image, rgb_pixels
from slrnet.data.tars import tar_end, tar_members
from slrnet.inference.predictor import Predictor
from slrnet.storage.files import written_whole

__all__ = ["FOLDER", "check_voc_archive", "list_images", "write_voc_archive"]

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where the server expects the masks."""


def list_images(folder: Path, names: Path | None = None) -> dict[str, Path]:
    """Returns the images ID.jpg of a folder by id: those in the list `names`, one id per line, or all.

    Raises:
        ValueError: the list, or an image of it, is missing, or there is no image.
    """
    try:
        ids = names.read_text(encoding="utf-8").split() if names else sorted(path.stem for path in folder.glob("*.jpg"))
    except OSError as error:
        raise ValueError(f"cannot read the list {names}: {error.strerror}") from None
    images = {name: folder / f"{name}.jpg" for name in ids}
    if (missing := [name for name, path in images.items() if not path.is_file()]) or len(ids) != len(images):
        raise ValueError(
            f"{names} lists {len(ids)} images, {len(ids) - len(images)} of them twice; {len(missing)} are not in "
            f"{folder}" + (f", for instance {missing[0]}.jpg" if missing else "")
        )
    if not images:
        raise ValueError(f"{names or folder} names no image; the folder must hold ID.jpg files (VOC's JPEGImages)")
    return images


def write_voc_archive(predictor: Predictor, images: Mapping[str, Path], out: Path) -> None:
    """Predicts images by id, writes the archive, reads it back, and checks it; if anything fails there is no file.

    Raises:
        ValueError: a class is none of VOC's, an image cannot be read, or the check fails.
    """
    table, palette = voc_ids(predictor.classes), voc_palette()
    with written_whole(out) as incoming:
        # Without name and time in the header, so that equal masks give equal archives.
        with incoming.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as archive:
            size = 0
            for name, path in tqdm(images.items(), unit="image", disable=None):
                mask = table[predictor(_read(path)).mask]
                size += archive.write(tar_members({f"{FOLDER}/{name}.png": encode_mask(mask, palette)}))
            archive.write(tar_end(size))
        if problems := check_voc_archive(incoming, images):
            raise ValueError(f"the archive is not what the server takes: {'; '.join(problems[:5])}")


def check_voc_archive(path: Path, images: Mapping[str, Path]) -> list[str]:
    """Compares an archive with the images, by id, that it must hold masks of; returns a line about each problem."""
    problems: list[str] = []
    seen: set[str] = set()
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            name = member.name.removeprefix(f"{FOLDER}/").removesuffix(".png")
            content = archive.extractfile(member) if member.isfile() else None
            if content is None or member.name != f"{FOLDER}/{name}.png" or name not in images:
                problems.append(f"{member.name} does not belong there")
                continue
            if name in seen:
                problems.append(f"{name} is there twice")
            seen.add(name)
            with open_image(content.read(), name=member.name) as mask, open_image(images[name]) as photo:
                if mask.mode != "P":
                    problems.append(f"{name} has mode {mask.mode}, not P")
                if mask.size != photo.size:
                    sizes = [f"{width} x {height}" for width, height in (mask.size, photo.size)]
                    problems.append(f"{name} has {sizes[0]} pixels, its image {sizes[1]}")
                highest = int(np.asarray(mask).max())
                if highest >= len(VOC_CLASSES):
                    problems.append(f"{name} has the id {highest}; VOC's are 0 to {len(VOC_CLASSES) - 1}")
    if missing := [name for name in images if name not in seen]:
        problems.append(f"{len(missing)} of {len(images)} masks are missing, for instance {missing[0]}")
    return problems


def _read(path: Path) -> npt.NDArray[np.uint8]:
    """Reads the image as it is stored: true masks ignore the EXIF orientation."""
    with open_image(path) as file:
        return rgb_pixels(as_rgb(file))
