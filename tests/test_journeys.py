"""From a messy folder to masks: five ways that people's data come, each through the real commands.

Each journey is a dry run, the conversion, `slrnet browse`, a training of a few tiny steps, and masks of new images.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from slrnet.cli.main import main
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.images import ORIENTATION
from slrnet.data.manifest import load_dataset
from tests.fixtures.stores import Stock

pytestmark = pytest.mark.slow
Array = npt.NDArray[Any]
SETTINGS = [
    *["model.encoder=timm:test_efficientnet", "model.encoder_weights=none", "model.aspp_dilations=1,2,3"],
    *["model.decoder_dim=8", "model.skip_dim=4", "cvlr.dim=8", "calibration.refine_dilations=1,2", "data.crop_size=64"],
    *["data.workers=0", "train.epochs=1", "train.pretrain_epochs=0", "train.batch_size=2", "train.precision=fp32"],
    *["evaluation.pseudo_mask_images=2", "evaluation.panel_images=1"],
]
HALVES = np.repeat([0, 1], (20, 28))[:, None].repeat(40, axis=1).astype(np.uint8)
"""(48, 40) ids: the upper 20 rows are 0, the others 1."""


@dataclass(frozen=True, kw_only=True)
class Journey:
    """What is converted, and what must come of it."""

    words: list[str]
    """Options of `slrnet prepare folder`."""
    says: list[str]
    """Parts of what the dry run prints."""
    labels: dict[str, list[str]]
    """Names of the classes by key."""
    new: list[Path]
    """Images to predict."""
    classes: list[str]
    size: tuple[int, int] = (40, 48)
    """Width and height of all images, upright."""
    ids: dict[str, Array] = field(default_factory=dict)
    """Masks by key."""
    gray: dict[str, list[int]] = field(default_factory=dict)
    """Values of the first and the last row by key, of the second color."""
    same: list[str] = field(default_factory=list)
    """Other options that make the same data."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Other options that are refused, by a part of the message."""


def colors(top: int, bottom: int, *, deep: bool = False) -> Array:
    """An image in two values, (48, 40) uint16 if deep, else (48, 40, 3) uint8."""
    picture = np.where(HALVES == 0, top, bottom)
    return picture.astype(np.uint16) if deep else picture[..., None].repeat(3, axis=2).astype(np.uint8)


def phone(root: Path) -> Journey:
    """HEIC and turned JPEG photos in folders of their classes, beside what phones and servers put there."""
    from pillow_heif import from_pillow

    for folder in ("Cat", "dog", "background", ".thumbnails", "@eaDir"):
        (root / folder).mkdir(parents=True)
    turned = Image.Exif()
    turned[ORIENTATION] = 6  # as a phone held upright stores it: to be turned clockwise
    sideways = Image.fromarray(np.rot90(colors(20, 220)).copy())
    for path in ("Cat/IMG_1.jpg", "dog/IMG_3.JPG", "background/IMG_4.jpeg"):
        sideways.save(root / path, "JPEG", exif=turned)
    for path in ("Cat/IMG_2.HEIC", "dog/IMG_5.heic"):
        from_pillow(Image.fromarray(colors(20, 220))).save(root / path, quality=95)
    for path in (".thumbnails/1.jpg", "@eaDir/2.jpg", "Cat/._IMG_1.jpg"):
        sideways.save(root / path, "JPEG")
    (root / "dog" / "IMG_6.MOV").write_bytes(b"film")
    return Journey(
        words=["--images", str(root), "--labels-from-folders", "--val-fraction", "0.4", "--seed", "6"],
        says=[
            "left out 3 file(s) or folder(s) that are hidden or of a tool: .thumbnails/, @eaDir/, Cat/._IMG_1.jpg",
            "no images by their suffix: dog/IMG_6.MOV",
            "2 Cat, 2 dog, 1 none of them",
            "40x48",
        ],
        labels={
            "Cat_IMG_1": ["Cat"],
            "Cat_IMG_2": ["Cat"],
            "dog_IMG_3": ["dog"],
            "background_IMG_4": [],
            "dog_IMG_5": ["dog"],
        },
        gray={"Cat_IMG_1": [20, 220], "Cat_IMG_2": [20, 220]},
        new=[root / "dog" / "IMG_5.heic", root / "dog" / "IMG_3.JPG"],
        classes=["Cat", "dog"],
    )


def spreadsheet(root: Path) -> Journey:
    """A workbook whose cells differ in case and spaces, and the same as a CSV file with semicolons."""
    from openpyxl import Workbook

    lines = [("Image", "Labels", "Split"), ("a.png", " Cat", "train"), ("b.png", "cat; DOG ", "train")]
    lines += [("c.png", "dog", "train"), ("d.png", "", "train"), ("e.png", "CAT", "val")]
    (root / "photos").mkdir(parents=True)
    for name, *_ in lines[1:]:
        Image.fromarray(colors(20, 220)).save(root / "photos" / name)
    book = Workbook()
    for line in lines:
        book.active.append(line)
    book.save(root / "labels.xlsx")
    with (root / "labels.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows(
            (name, labels.replace(";", ","), split) for name, labels, split in lines
        )
    words = ["--images", str(root / "photos"), "--classes", "cat,dog", "--name", "pets"]
    return Journey(
        words=[*words, "--labels", str(root / "labels.xlsx")],
        same=[*words, "--labels", str(root / "labels.csv")],
        says=["4 train, 1 val", "3 cat, 2 dog, 1 none of them"],
        labels={"a": ["cat"], "b": ["cat", "dog"], "c": ["dog"], "d": [], "e": ["cat"]},
        new=[root / "photos" / "e.png"],
        classes=["cat", "dog"],
    )


def cvat(root: Path) -> Journey:
    """CVAT's export of segmentation masks: labelmap.txt, masks in colors, a list of the images of val."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    colormap = {"background": (0, 0, 0), "sky": (250, 50, 83), "road": (61, 61, 245)}
    text = "# label:color_rgb:parts:actions\n" + "".join(
        f"{name}:{','.join(map(str, color))}::\n" for name, color in colormap.items()
    )
    (root / "labelmap.txt").write_text(text)
    table = np.array(list(colormap.values()), dtype=np.uint8)
    ids = {"a": HALVES, "b": 2 * HALVES, "c": HALVES + 1, "d": 2 - HALVES}
    for key, mask in ids.items():
        Image.fromarray(colors(20, 220)).save(root / "JPEGImages" / f"{key}.jpg")
        Image.fromarray(table[mask]).save(root / "SegmentationClass" / f"{key}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("d\n")
    return Journey(
        words=[
            *["--images", str(root / "JPEGImages"), "--masks", str(root / "SegmentationClass")],
            *["--palette", str(root / "labelmap.txt"), "--split", f"val={root}/ImageSets/Segmentation/val.txt"],
        ],
        says=["3 train, 1 val", "3 sky, 3 road"],
        labels={"a": ["sky"], "b": ["road"], "c": ["sky", "road"], "d": ["sky", "road"]},
        ids=ids,
        new=[root / "JPEGImages" / "d.jpg"],
        classes=["sky", "road"],
    )


def tiles(root: Path) -> Journey:
    """Tiles of 12-bit values in TIFF and PNG files of 16 bits, with gray masks of ids and void."""
    (root / "tiles").mkdir(parents=True)
    (root / "masks").mkdir()
    ids = {"a": HALVES, "b": HALVES * 2, "c": np.where(HALVES == 1, 255, 0).astype(np.uint8), "d": HALVES}
    for key, suffix in zip(ids, ("tif", "png", "tif", "png"), strict=True):
        Image.fromarray(colors(0, 2048, deep=True)).save(root / "tiles" / f"{key}.{suffix}")
        Image.fromarray(ids[key]).save(root / "masks" / f"{key}_mask.png")
    return Journey(
        words=[
            *["--images", str(root / "tiles"), "--masks", str(root / "masks"), "--classes", "roof,tree"],
            *["--depth", "12", "--val-fraction", "0.3", "--seed", "3"],
        ],
        says=["depth 12: 4 image(s) of more than 8 bits; 0 is black, 4095 white", "2 roof, 1 tree, 1 none of them"],
        labels={"a": ["roof"], "b": ["tree"], "c": [], "d": ["roof"]},
        ids=ids,
        gray={"a": [0, 128], "b": [0, 128]},
        new=[root / "tiles" / "d.png"],
        classes=["roof", "tree"],
    )


def scans(root: Path) -> Journey:
    """Scans that use a few of their 65,536 gray levels, with masks of 0 and 255."""
    (root / "scans").mkdir(parents=True)
    (root / "masks").mkdir()
    for key in "abcd":
        Image.fromarray(colors(30000, 30400, deep=True)).save(root / "scans" / f"{key}.png")
        Image.fromarray(HALVES * 255 * (key != "c")).save(root / "masks" / f"{key}.png")
    words = ["--images", str(root / "scans"), "--masks", str(root / "masks"), "--classes", "lesion"]
    return Journey(
        words=[*words, "--binary-masks", "--depth", "percentiles", "--val-fraction", "0.3", "--seed", "3"],
        refused={
            "hold no value but 0 and 255": [*words, "--depth", "percentiles"],
            "--depth percentiles for the": [*words, "--binary-masks"],
        },
        says=["30000 is black, 30400 white", "3 lesion, 1 none of them"],
        labels={"a": ["lesion"], "b": ["lesion"], "c": [], "d": ["lesion"]},
        ids={"a": HALVES, "c": 0 * HALVES},
        gray={"a": [0, 255]},
        new=[root / "scans" / "b.png"],
        classes=["lesion"],
    )


@pytest.fixture(scope="module")
def storage(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder of all runs."""
    return str(stock(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("pack", [phone, spreadsheet, cvat, tiles, scans])
def test_journey(
    pack: Callable[[Path], Journey], storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journey, data, run = pack(tmp_path / "in"), tmp_path / "data", f"{storage}/{pack.__name__}"
    prepare = ["prepare", "folder", "--processes", "1"]
    for message, words in journey.refused.items():
        assert main([*prepare, *words, "--dry-run"]) == 2
        assert message in capsys.readouterr().err

    assert main([*prepare, *journey.words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not [text for text in journey.says if text not in printed], printed

    assert main([*prepare, *journey.words, "--out", str(data)]) == 0
    dataset = load_dataset(data)
    if journey.same:
        assert main([*prepare, *journey.same, "--out", str(tmp_path / "same")]) == 0
        assert load_dataset(tmp_path / "same").info.fingerprint == dataset.info.fingerprint
    assert list(dataset.info.classes) == ["background", *journey.classes]
    samples = {sample.key: sample for split in dataset.splits for sample in EvalLoader(dataset, split=split)}
    labels = {
        key: [name for name, has in zip(journey.classes, sample.image_labels, strict=True) if has]
        for key, sample in samples.items()
    }
    assert labels == journey.labels
    assert {tuple(sample.image.shape[1:]) for sample in samples.values()} == {journey.size[::-1]}
    for key, ids in journey.ids.items():
        assert np.array_equal(samples[key].pixel_labels, ids), key
    for key, ends in journey.gray.items():
        assert np.abs(samples[key].image[1, [0, -1], 5].numpy().astype(int) - ends).max() <= 3, key

    assert main(["browse", str(data), "--out", str(tmp_path / "browse")]) in (0, 1)
    assert f"val: {dataset.info.counts['val']} images" in capsys.readouterr().out
    assert (tmp_path / "browse" / "val.jpg").is_file()

    changes = [word for change in SETTINGS for word in ("--set", change)]
    train = ["train", "--recipe", "demo", "--data", str(data), "--num-workers", "0", "--name", pack.__name__]
    assert main([*train, "--storage", storage, *changes]) == 0
    assert main(["predict", run, *map(str, journey.new), "--out", str(tmp_path / "masks")]) == 0
    for path in journey.new:
        with Image.open(tmp_path / "masks" / f"{path.stem}.png") as mask:
            assert mask.size == journey.size
            assert max(np.unique(np.asarray(mask))) <= len(journey.classes)
