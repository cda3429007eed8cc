"""The prediction command: what it writes, and what it refuses before it starts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slrnet import load
from slrnet.checkpoints.checkpoint import TrainState, load_checkpoint, save_checkpoint
from slrnet.cli.main import main
from slrnet.config import Config
from slrnet.data.catalog import voc_palette
from slrnet.models.slrnet import build_network
from slrnet.tools.predict import batches, find_images, load_predictor

CLASSES = ("background", "ant", "bee", "cat")


@pytest.fixture(scope="module")
def checkpoint(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = build_network(tiny_config, num_classes=4)
    torch.nn.init.normal_(model.mask_head.classify.weight)
    state = TrainState(epoch=1, step=1, classes=CLASSES, data_fingerprint="-", world_size=1)
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return save_checkpoint(folder, config=tiny_config, state=state, model=model.state_dict(), optimizer={})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (40, 60)), ("b.png", (64, 32))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_masks_overlays_and_areas(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    assert main(["predict", str(checkpoint), str(photos), "--out", str(out), "--device", "cpu"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "a.overlay.jpg",
        "a.png",
        "b.overlay.jpg",
        "b.png",
        "predictions.json",
    ]
    with Image.open(out / "b.png") as image, Image.open(photos / "b.png") as photo:
        assert image.mode == "P"
        assert np.array_equal(np.array(image.getpalette("RGB")).reshape(-1, 3), voc_palette())
        mask = np.asarray(image)
        assert np.array_equal(mask, load(checkpoint, device="cpu")(photo).mask)
    record: dict[str, Any] = json.loads((out / "predictions.json").read_text())
    assert record["protocol"] == "ss"
    entry = record["images"]["b"]
    assert (entry["height"], entry["width"]) == (64, 32)
    areas = {name: values["area"] for name, values in entry["classes"].items()}
    assert areas == {CLASSES[i]: pytest.approx((mask == i).mean(), abs=1e-6) for i in np.unique(mask)}
    assert sum(areas.values()) == pytest.approx(1, abs=1e-5)
    for name, values in entry["classes"].items():
        assert (values["score"] is None) == (name == "background")


def test_patterns_and_files_may_name_an_image_twice(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    places = [str(photos / "*.jpg"), str(photos / "a.jpg")]
    assert main(["predict", str(checkpoint), *places, "--out", str(tmp_path / "masks"), "--device", "cpu"]) == 0
    assert list(json.loads((tmp_path / "masks" / "predictions.json").read_text())["images"]) == ["a"]


def test_images_that_differ_in_the_suffix_alone_keep_it_in_the_names_of_their_outputs(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(photos / "a.png")
    found = find_images([str(photos)])
    assert {name: path.name for name, path in found.items()} == {"a.jpg": "a.jpg", "a.png": "a.png", "b": "b.png"}
    out = tmp_path / "masks"
    arguments = ["predict", str(checkpoint), str(photos), "--out", str(out), "--device", "cpu", "--also", "labelme"]
    assert main(arguments) == 0
    sizes = {"a.jpg": (60, 40), "a.png": (48, 32), "b": (32, 64)}
    for name, size in sizes.items():
        for file in (f"{name}.png", f"{name}.overlay.jpg"):
            with Image.open(out / file) as image:
                assert image.size == size
        record = json.loads((out / "labelme" / f"{name}.json").read_text())
        assert (record["imageWidth"], record["imageHeight"]) == size
        assert (out / "labelme" / record["imagePath"]).resolve() == found[name]


def test_annotations_for_other_tools_hold_the_masks(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    out, photo = tmp_path / "masks", photos / "b.png"
    arguments = ["predict", str(checkpoint), str(photo), "--out", str(out), "--device", "cpu", "--tolerance", "0"]
    assert main([*arguments, "--also", "coco", "--also", "coco-polygons", "--also", "labelme"]) == 0
    with Image.open(out / "b.png") as image:
        mask = np.asarray(image)
    shapes = json.loads((out / "labelme" / "b.json").read_text())["shapes"]
    parts = {"labelme": [(CLASSES.index(s["label"]), [np.ravel(s["points"]).tolist()]) for s in shapes]}
    for form in ("coco", "coco-polygons"):
        record = json.loads((out / f"{form}.json").read_text())
        assert [entry["file_name"] for entry in record["images"]] == ["b.png"]
        parts[form] = [(entry["category_id"], entry["segmentation"]) for entry in record["annotations"]]
    for form, regions in parts.items():
        again = np.zeros_like(mask)
        for label, shape in regions:
            runs = coco_mask.merge(coco_mask.frPyObjects(shape, *mask.shape)) if isinstance(shape, list) else shape
            again[coco_mask.decode(runs) > 0] = label
        np.testing.assert_array_equal(again, mask, err_msg=form)


def test_masks_have_the_colors_of_the_training_data(
    checkpoint: Path, photos: Path, tmp_path: Path, tiny_config: Config
) -> None:
    colors = ((0, 0, 0), (10, 20, 30), (255, 0, 7), (1, 2, 3))
    first = load_checkpoint(checkpoint)
    state = replace(first.state, palette=colors)
    path = save_checkpoint(tmp_path / "run", config=first.config, state=state, model=first.model, optimizer={})
    assert load_checkpoint(path).state.palette == colors
    assert first.state.palette == ()  # that of a checkpoint from before palettes were kept
    assert main(["predict", str(path), str(photos / "b.png"), "--out", str(tmp_path / "masks"), "--device", "cpu"]) == 0
    with Image.open(tmp_path / "masks" / "b.png") as image:
        stored = np.array(image.getpalette("RGB")).reshape(-1, 3)
    assert stored[:4].tolist() == [list(color) for color in colors]
    assert np.array_equal(stored[4:], voc_palette()[4:])


def test_batches_are_of_one_size_each_and_change_nothing(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("c", "d", "e"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(photos / f"{name}.png")
    turned = Image.fromarray(rng.integers(0, 256, (60, 40, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # upright it is 40 x 60
    turned.save(photos / "f.png", exif=exif)
    images = find_images([str(photos)])
    assert sorted(batches(images, 3)) == [["a", "c", "d"], ["b"], ["e", "f"]]
    arguments = [str(checkpoint), str(photos), "--device", "cpu", "--out"]
    assert main(["predict", *arguments, str(tmp_path / "one")]) == 0
    assert main(["predict", *arguments, str(tmp_path / "three"), "--batch-size", "3"]) == 0
    records = [json.loads((tmp_path / name / "predictions.json").read_text())["images"] for name in ("one", "three")]
    assert list(records[0]) == list(records[1]) == list("abcdef")
    for name in records[0]:
        masks = [np.asarray(Image.open(tmp_path / folder / f"{name}.png")) for folder in ("one", "three")]
        assert (masks[0] != masks[1]).mean() < 1e-3  # ties within rounding


def test_an_unreadable_image_is_named_and_the_others_are_done(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.jpg").write_bytes(b"no JPEG")
    assert main(["predict", str(checkpoint), str(photos), "--out", str(tmp_path / "masks"), "--device", "cpu"]) == 3
    assert re.search(r"a\.jpg cannot be read: no image, .*; it is left out\n", capsys.readouterr().err)
    assert (tmp_path / "masks" / "b.png").exists()
    assert not list((tmp_path / "masks").glob(".incoming*"))


def test_images_beyond_the_limits_are_named_and_the_others_are_done(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for old in photos.iterdir():
        old.unlink()
    Image.new("RGB", (30, 20)).save(photos / "small.png")
    Image.new("RGB", (40, 20)).save(photos / "large.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(photos / "deep.png")
    (photos / "damaged.png").write_bytes(b"P5\n32 ")

    def predicted(out: str, *options: str) -> tuple[set[str], str]:
        command = ["predict", str(checkpoint), str(photos), "--out", str(tmp_path / out), "--device", "cpu"]
        assert main([*command, *options]) == 3
        return {path.stem for path in (tmp_path / out).glob("*.png")}, capsys.readouterr().err

    done, said = predicted("masks", "--max-pixels", "600")
    assert done == {"small"}
    assert re.search(r"large\.png cannot be read: it has 40 x 20 pixels; at most 600 are read; it is left out", said)
    assert re.search(r"deep\.png cannot be read: it has uint16 samples, here from 0 to 599: say .* --depth", said)
    assert re.search(r"damaged\.png cannot be read: ", said)
    assert predicted("more", "--depth", "10")[0] == {"small", "large", "deep"}
    words = ["predict", str(checkpoint), str(photos), "--out", str(tmp_path / "last"), "--device", "cpu"]
    assert main([*words, "--skip-damaged"]) == 0


def test_a_checkpoint_knows_the_depth_of_its_data(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    deep = replace(loaded, state=replace(loaded.state, depth="uint16=12"))
    assert str(load_predictor(deep, device="cpu").depth) == "uint16=12"


def test_mistakes_are_refused_before_anything_is_written(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["predict", *arguments, "--device", "cpu"]) == 2
        return capsys.readouterr().err

    def misused(*arguments: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(["predict", *arguments])
        return capsys.readouterr().err

    out = tmp_path / "masks"
    assert "is no file, no folder with images" in refused(str(checkpoint), str(photos / "z.jpg"), "--out", str(out))
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "b.png")
    assert "several images are called 'b.png'" in refused(
        str(checkpoint), str(photos), str(tmp_path / "more"), "--out", str(out)
    )
    assert "invalid choice: 'voc'" in misused(str(checkpoint), str(photos), "--out", str(out), "--also", "voc")
    assert "the tolerance is -1.0 pixels" in refused(
        str(checkpoint), str(photos), "--out", str(out), "--tolerance", "-1", "--also", "coco"
    )
    assert "none" in refused(str(tmp_path / "none"), str(photos), "--out", str(out))
    assert not out.exists()
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    assert "a.png exists; give another --out, or allow it with --overwrite" in refused(
        str(checkpoint), str(photos), "--out", str(out)
    )
    assert (out / "a.png").read_bytes() == b"mine"
    assert main(["predict", str(checkpoint), str(photos), "--out", str(out), "--overwrite", "--device", "cpu"]) == 0
    assert (out / "a.png").read_bytes() != b"mine"
