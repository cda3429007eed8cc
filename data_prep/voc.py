# PYTHON_ARGCOMPLETE_OK
"""PASCAL VOC 2012, with or without SBD's masks, as tar shards.

    slrnet prepare voc --root VOCdevkit/VOC2012 --out DIR [--sbd DIR] [--classes cat,dog] [--subset NAME=LISTFILE]

Reads any folder in VOC's layout: JPEGImages/NAME.jpg (or .jpeg, .png, ...), SegmentationClass/NAME.png,
Annotations/NAME.xml, ImageSets/Segmentation/{train,val}.txt. A file labels.txt in it, one name a line with `background`
first, replaces VOC's 21 classes; so does CVAT's labelmap.txt, with its colors. Text files may be UTF-8 or UTF-16, with
any line ends. A key is an image's name, dots and spaces as `_`. What is made:

- Split `val` is val.txt. Split `train` is train_aug.txt where there is one, else train.txt, joined by SBD's images that
  are not in val.txt where SBD is found. Images of train.txt make up the subset `voc_train` of `train`. One of the two
  lists is enough: a folder with val.txt alone becomes a data set to evaluate on. CVAT's default.txt is a train.txt.
- A list has a name a line; JPEGImages/NAME.jpg stands for its NAME. Later columns of paths, 0 and 1 are passed over.
- A mask is the official one, else SegmentationClassAug's, else that of SBD's .mat file. It serves for measuring. An
  indexed or gray PNG has ids as values; in an RGB one, classes have VOC's colors (or labelmap.txt's).
- Image labels come from the XML annotation where there is one, else from the classes in the mask; nothing else of the
  masks reaches them.
- With `--classes`, images that show none of the chosen classes are left out, the chosen ones get ids 1..n in the order
  of VOC's ids, and pixels of other classes become void (255): neither background nor anything else is known there.

JPEG files are copied as they are (others become JPEG), masks too unless they are RGB or their ids change.
"""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

if not __package__:  # run as a script: the folder above holds both packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.conversion import Output, Source, add_common_arguments, convert_items, required
from data_prep.found_files import key_of
from data_prep.mat_files import read_mat_mask
from data_prep.palettes import Palette, read_palette
from data_prep.shard_writer import Item, Sample, check_output
from data_prep.source_files import (
    ImageForm,
    check_size,
    checked_ids,
    copied,
    measure_mask,
    read_objects,
    split_words,
)
from data_prep.text_files import read_lines
from slrnet.data.catalog import BACKGROUND, IGNORE_INDEX, VOC_CLASSES, voc_palette
from slrnet.data.images import encode_mask, open_image
from slrnet.data.manifest import DataError, DatasetInfo
from slrnet.storage.shown import say

__all__ = ["VocFolder", "add_arguments", "convert", "make", "read_list", "train_aug_keys"]

FORM = ImageForm()
PNG_REMEDY = "take the original PNGs, not ones in other colors, or fetch it again"
SUFFIXES = tuple(
    each for suffix in ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff") for each in (suffix, suffix.upper())
)
"""Those that images may have, the usual one first."""
OFFICIAL_SUBSET = "voc_train"
FULL_TRAIN, FULL_VAL, FULL_TRAIN_AUG = 1_464, 1_449, 10_582
"""Images in VOC 2012's train and val lists, and in what is known as train_aug."""


def convert(
    root: str | Path, output: Output, *, sbd: str | Path | None = None, classes: Sequence[str] | None = None
) -> DatasetInfo:
    """Makes shards of a folder in VOC's layout.

    Args:
        root: The folder, usually VOCdevkit/VOC2012.
        output: What to write.
        sbd: Folder with SBD's masks: PNGs (itself or in its SegmentationClassAug) or the SBD release (cls/*.mat).
        classes: Names of the foreground classes to keep; None for all.

    Raises:
        DataError: something about the folder, its files or the options is refused; nothing is written then.
    """
    check_output(output.folder)
    folder = VocFolder.find(root, sbd=sbd, classes=classes)
    if OFFICIAL_SUBSET in output.subsets:
        raise DataError(f"--subset {OFFICIAL_SUBSET} is taken: it is VOC's own train list; use another name")
    words = {
        "--root": folder.root,
        "--sbd": None if sbd is None else Path(sbd),
        "--classes": None if classes is None else ",".join(classes),
    }
    output = output.named("voc2012", "data_prep/voc.py", words)
    items = _items(folder)
    reader = _KeyReader(frozenset(item.name for item in items))
    return convert_items(folder, items, output, keep_background=classes is None, read_keys=reader)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item(Item):
    name: str
    """Of its files, without suffix."""


@dataclass(frozen=True)
class _KeyReader:
    """Reads the keys in a list file."""

    known: frozenset[str]

    def __call__(self, path: Path) -> list[str]:
        return [key_of(name) for name in read_list(path, self.known)]


@dataclass(frozen=True, kw_only=True)
class VocFolder(Source[_Item]):
    """A folder in VOC's layout, and which of its classes are wanted under which ids."""

    root: Path
    """Absolute path."""
    names: tuple[str, ...]
    """All classes of the folder, background first; the place is the id in its masks."""
    colors: Palette
    """Their colors."""
    chosen: tuple[int, ...]
    """Ids of the foreground classes that are kept, ascending; their new ids are 1, 2, ..."""
    png_folders: tuple[Path, ...]
    """Folders with indexed masks, the preferred one first."""
    mat_folder: Path | None
    """Folder with SBD's .mat files."""

    @classmethod
    def find(cls, root: str | Path, *, sbd: str | Path | None, classes: Sequence[str] | None) -> VocFolder:
        """Looks what a folder holds.

        Raises:
            DataError: it is not in VOC's layout, `sbd` holds no masks, or a name in `classes` is not among its classes.
        """
        root = Path(root).absolute()
        for part in ("JPEGImages", "ImageSets/Segmentation"):
            if not (root / part).is_dir():
                raise DataError(
                    f"{root} has no folder {part}; --root is the folder VOC2012 within VOCdevkit "
                    "(--download fetches it where there is a network)"
                )
        pngs, mat_folder = _sbd_folders(root, None if sbd is None else Path(sbd).absolute())
        colors = _classes(root)
        chosen = _chosen(colors.names, classes)
        return cls(
            place=str(root),
            class_names=(BACKGROUND, *(colors.names[label] for label in chosen)),
            root=root,
            names=colors.names,
            colors=colors,
            chosen=chosen,
            png_folders=(root / "SegmentationClass", *pngs),
            mat_folder=mat_folder,
        )

    @property
    def palette(self) -> npt.NDArray[np.uint8]:
        """(256, 3) uint8: every class keeps the color that it has in the folder's masks."""
        colors = voc_palette()
        colors[: len(self.chosen) + 1] = self.colors.colors[[0, *self.chosen]]
        return colors

    @property
    def lookup(self) -> npt.NDArray[np.uint8]:
        """(256,) uint8: new id of each id in the folder's masks; void for classes that are not kept."""
        table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        table[[0, *self.chosen]] = np.arange(len(self.chosen) + 1)
        return table

    def list_file(self, name: str) -> Path:
        """Path of a list of images."""
        return self.root / "ImageSets" / "Segmentation" / f"{name}.txt"

    def image_path(self, name: str) -> Path:
        """Path of an image; that of a .jpg file if there is none."""
        return _first([self.root / "JPEGImages"], name, SUFFIXES) or self.root / "JPEGImages" / f"{name}.jpg"

    def scan(self, item: _Item) -> Sample:
        """Reads and checks all files of one image."""
        image = self.image_path(item.name)
        size, image_as_is = FORM.measure(image)
        path = self._mask_path(item.name)
        mask, mask_as_is = self._read_mask(path)
        check_size(path, mask, image, size, remedy="take both from the same release")
        remedy = "correct the mask, or name all classes in labels.txt of the folder"
        present = checked_ids(path, mask, len(self.names), remedy=remedy)
        labels = self._xml_labels(item.name)
        shown = present if labels is None else labels
        classes = tuple(self.chosen.index(label) + 1 for label in self.chosen if label in shown)
        mask_as_is = mask_as_is and len(self.chosen) == len(self.names) - 1
        return Sample.of(item, size, classes, source=(image, path), image_as_is=image_as_is, mask_as_is=mask_as_is)

    def encode(self, sample: Sample) -> tuple[bytes, bytes]:
        """Bytes of one sample's JPEG and of its indexed PNG mask, copied unless ids change."""
        path, mask_path = sample.source
        image = FORM.jpeg(path, as_is=sample.image_as_is)
        if sample.mask_as_is:
            return image, copied(mask_path, remedy=PNG_REMEDY)
        return image, encode_mask(self.lookup[self._read_mask(mask_path)[0]], self.palette)

    def _mask_path(self, name: str) -> Path:
        if path := _first(self.png_folders, name, ("png", "PNG")):
            return path
        candidates = [folder / f"{name}.png" for folder in self.png_folders]
        if self.mat_folder is not None:
            candidates.append(self.mat_folder / f"{name}.mat")
            if os.path.isfile(candidates[-1]):
                return candidates[-1]
        places = " nor ".join(str(path) for path in candidates)
        raise DataError(f"no mask of {name!r}: neither {places}; give SBD's masks with --sbd, or drop it from the list")

    def _read_mask(self, path: Path) -> tuple[npt.NDArray[np.uint8], bool]:
        """Ids of a mask, and whether its file could be copied."""
        if path.suffix == ".mat":
            return _read_mat(path), False
        with open_image(path, remedy=PNG_REMEDY) as image:
            pixels = np.asarray(image) if image.mode in ("RGB", "RGBA") else None
        if pixels is None:
            return measure_mask(path, remedy=PNG_REMEDY)
        if (pixels[..., 3:] < 255).any():
            raise DataError(f"{path} has transparent pixels, which are no class; {PNG_REMEDY}")
        try:
            return self.colors.ids(pixels[..., :3]), False
        except DataError as error:
            problem = str(error).partition(";")[0].replace("palette file", "palette")
            raise DataError(f"{path} {problem}; {PNG_REMEDY}") from None

    def _xml_labels(self, name: str) -> list[int] | None:
        """Ids of the classes that the XML annotation names; None where there is none."""
        path = _first([self.root / "Annotations"], name, ("xml",))
        if path is None:
            return None
        objects = read_objects(path, remedy="fetch it again or remove it")
        if unknown := sorted(objects - set(self.names[1:])):
            raise DataError(
                f"{path} names the classes {unknown}, not among {', '.join(self.names[1:])}; correct or remove it"
            )
        return sorted(self.names.index(name) for name in objects)


def read_list(path: str | Path, known: Collection[str] = ()) -> list[str]:
    """Names of images in a list file, one a line; the module's docstring has its form.

    Args:
        path: The file.
        known: Names that may have spaces.

    Raises:
        DataError: the file is missing or empty, or a line holds something else.
    """
    names = []
    for number, line in enumerate(read_lines(path, "list of images"), start=1):
        text = line.strip().replace("\\", "/")
        first, *others = text.split() or [""]
        if _name(text) in known:
            first = text
        elif any("/" not in other and other not in ("0", "1") for other in others):
            raise DataError(
                f"{path}, line {number}: {line!r} has more than an image id; keep one id a line, "
                "without those of images that do not show the class (-1)"
            )
        if first:
            names.append(_name(first))
    if not names:
        raise DataError(f"the list file {path} is empty; it holds one image id a line")
    return list(dict.fromkeys(names))


def _name(text: str) -> str:
    """The name in a path or a name, without a suffix of images."""
    name = PurePosixPath(text).name
    stem, _, suffix = name.rpartition(".")
    return stem if stem and suffix in SUFFIXES else name


def train_aug_keys(train: Sequence[str], val: Sequence[str], sbd: Sequence[str]) -> list[str]:
    """The augmented training list: VOC's train and all of SBD but VOC's val, sorted.

    Raises:
        DataError: the lists are VOC's full ones and the result does not have the 10,582 images that it must have.
    """
    keys = sorted((set(train) | set(sbd)) - set(val))
    if (len(set(train)), len(set(val))) == (FULL_TRAIN, FULL_VAL) and len(keys) != FULL_TRAIN_AUG:
        raise DataError(
            f"VOC's train list and {len(set(sbd))} SBD images without VOC's val list make {len(keys)} images, not the "
            f"{FULL_TRAIN_AUG} of train_aug; SBD is incomplete or of another kind: fetch all of it, or say which "
            "images to take in ImageSets/Segmentation/train_aug.txt"
        )
    return keys


# Finding things.


def _items(folder: VocFolder) -> list[_Item]:
    """All images of both splits; those of VOC's own train list are in a subset."""
    known = {path.stem for path in (folder.root / "JPEGImages").iterdir()}
    val, official = _listed(folder, "val", known), _listed(folder, "train", known)
    if official is None:
        official = _listed(folder, "default", known)
    train = _train_names(folder, official, val or [], known)
    if not train and val is None:
        lists = sorted(path.name for path in folder.list_file("train").parent.glob("*.txt"))
        raise DataError(
            f"{folder.list_file('train').parent} has neither train.txt nor val.txt, only {lists}; name the lists so"
        )
    if both := sorted(set(train) & set(val or [])):
        raise DataError(
            f"{len(both)} image(s) are both in the training list and in val.txt, such as {both[:3]}; "
            f"training on validation images makes the score worthless: remove them from train_aug.txt or train.txt"
        )
    own = {*(official or [])}
    splits = [(name, "train", (OFFICIAL_SUBSET,) if name in own else ()) for name in train]
    splits += [(name, "val", ()) for name in val or []]
    return [_Item(key=key_of(name), name=name, split=split, subsets=subsets) for name, split, subsets in splits]


def _listed(folder: VocFolder, name: str, known: Collection[str]) -> list[str] | None:
    """Names in a list of the folder; None where there is no such list."""
    path = folder.list_file(name)
    return read_list(path, known) if path.is_file() else None


def _train_names(folder: VocFolder, official: list[str] | None, val: list[str], known: Collection[str]) -> list[str]:
    """Names of the training images; none where nothing lists any."""
    aug = _listed(folder, "train_aug", known)
    if aug is not None:
        names, how = aug, "train_aug.txt"
    elif sbd := _sbd_keys(folder):
        names = train_aug_keys(official or [], val, sbd)
        how = f"train.txt and {len(sbd)} SBD images without val.txt"
    elif official is not None:
        names, how = official, "train.txt alone"
        how += "; SBD's masks (--sbd DIR) would add to it" if folder.names == VOC_CLASSES else ""
    else:
        names, how = [], "no train.txt: a data set to evaluate on, which no training takes"
    say(f"train: {len(names)} images ({how}); val: {len(val)} images")
    return names


def _sbd_keys(folder: VocFolder) -> list[str]:
    """Ids of the images that SBD has masks of; its own lists count where there are any."""
    if folder.mat_folder is not None:
        lists = [folder.mat_folder.parent / name for name in ("train.txt", "val.txt")]
        if all(path.is_file() for path in lists):
            return sorted({key for path in lists for key in read_list(path)})
        return sorted(path.stem for path in folder.mat_folder.glob("*.mat"))
    return sorted({path.name[:-4] for pngs in folder.png_folders[1:] for path in pngs.glob("*.png")})


def _sbd_folders(root: Path, sbd: Path | None) -> tuple[tuple[Path, ...], Path | None]:
    """Folders with SegmentationClassAug PNGs, and the one with .mat files."""
    own = root / "SegmentationClassAug"
    pngs = (own,) if own.is_dir() else ()
    if sbd is None:
        return pngs, None
    for folder in (sbd / "dataset" / "cls", sbd / "benchmark_RELEASE" / "dataset" / "cls", sbd / "cls", sbd):
        if next(folder.glob("*.mat"), None):
            return pngs, folder
    for folder in (sbd / "SegmentationClassAug", sbd):
        if next(folder.glob("*.png"), None):
            return (*pngs, folder), None
    raise DataError(
        f"--sbd {sbd} holds no masks of SBD; it must hold the PNGs of SegmentationClassAug (itself or in a folder of "
        "that name) or the SBD release (dataset/cls/*.mat)"
    )


def _classes(root: Path) -> Palette:
    """The folder's classes with the colors that they have in masks."""
    path, colors = root / "labels.txt", voc_palette()
    if not path.is_file() and (root / "labelmap.txt").is_file():
        return read_palette(root / "labelmap.txt")
    names = VOC_CLASSES
    if path.is_file():
        names = tuple(line.strip() for line in read_lines(path, "list of classes") if line.strip())
    if len(set(names)) < len(names) or not 2 <= len(names) <= IGNORE_INDEX or names[0] != BACKGROUND:
        raise DataError(
            f"{path} has {len(names)} names {list(names[:3])}...; it must have 2 to {IGNORE_INDEX} different names, "
            f"one a line, {BACKGROUND!r} first"
        )
    return Palette(names, colors[: len(names)], colors[IGNORE_INDEX])


def _chosen(names: tuple[str, ...], classes: Sequence[str] | None) -> tuple[int, ...]:
    if classes is None:
        return tuple(range(1, len(names)))
    if unknown := [name for name in classes if name not in names[1:]]:
        raise DataError(f"--classes has {unknown}; the classes of this folder are {', '.join(names[1:])}")
    if not classes:
        raise DataError(f"--classes is empty; choose from {', '.join(names[1:])}")
    return tuple(sorted({names.index(name) for name in classes}))


# Reading and writing of files.


def _first(folders: Sequence[Path], name: str, suffixes: Sequence[str]) -> Path | None:
    """The first file by a name, its accents composed as in the list or otherwise; None where there is none."""
    forms = dict.fromkeys([name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)])
    paths = (folder / f"{form}.{suffix}" for folder in folders for suffix in suffixes for form in forms)
    return next((path for path in paths if os.path.isfile(path)), None)  # false also for a name that no file can have


def _read_mat(path: Path) -> npt.NDArray[np.uint8]:
    """Ids of one of SBD's class masks, (H, W) uint8."""
    try:
        return read_mat_mask(path)
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read as one of SBD's class masks (struct GTcls with Segmentation): {error}; "
            "fetch it again"
        ) from None


# Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder in VOC's layout, VOCdevkit/VOC2012")
    parser.add_argument("--sbd", type=Path, metavar="DIR", help="SBD's masks: SegmentationClassAug PNGs or cls/*.mat")
    parser.add_argument("--classes", metavar="A,B", help="keep these classes only; ids become 1, 2, ...")
    parser.add_argument("--download", action="store_true", help="fetch VOC 2012 into --root first (2 GB)")
    add_common_arguments(parser, name="voc2012")


def make(args: argparse.Namespace) -> DatasetInfo:
    """Makes the data set that the options ask for."""
    required(args, "root")
    check_output(args.out)
    if args.download:
        _download(args.root)
    return convert(args.root, Output.of_arguments(args), sbd=args.sbd, classes=split_words(args.classes))


def _download(root: Path) -> None:
    """Fetches VOC 2012 into `root` unless it is there."""
    root = root.absolute()
    if (root / "JPEGImages").is_dir():
        say(f"{root} is there already; nothing to download")
        return
    if root.parts[-2:] != ("VOCdevkit", "VOC2012"):
        raise DataError(f"--download makes a folder VOCdevkit/VOC2012; --root {root} must end in that")
    from torchvision.datasets import VOCSegmentation  # an import of seconds that nothing else here needs

    try:
        VOCSegmentation(str(root.parents[1]), year="2012", image_set="train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"could not download VOC 2012 to {root}: {error}; fetch VOCtrainval_11-May-2012.tar by hand and unpack it "
            f"in {root.parents[1]}"
        ) from None


if __name__ == "__main__":
    from slrnet.cli.main import main

    sys.exit(main(["prepare", "voc", *sys.argv[1:]]))
