"""Own folders: classes, splits and labels from every source, image kinds, and what is refused."""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.conversion import Output
from data_prep.folder import FolderInput, convert
from slrnet.cli.main import main
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, load_dataset
from tests.fixtures.gray_png import gray_png
from tests.fixtures.shards import table_of

Array = npt.NDArray[Any]
PALETTE = "background #000000\ncat 255 0 0\ndog #0000ff\nvoid #ffffff\n"


def noise(seed: int, height: int = 20, width: int = 30) -> Image.Image:
    """Soft noise, as JPEG keeps it."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def stripes(ids: Sequence[int], height: int = 20, width: int = 30) -> Array:
    return np.array(ids, dtype=np.uint8)[np.arange(width) * len(ids) // width][None].repeat(height, axis=0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images of different kinds, in a folder and one below it, with masks beside."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks):
        (folder / "more").mkdir(parents=True)
    noise(0).save(images / "one.jpg")
    noise(1).save(images / "two.png")
    noise(2).save(images / "more" / "three.v2.webp")
    noise(3).convert("CMYK").save(images / "more" / "four.jpg")
    for path, ids in (("one", [0, 1]), ("two", [2, 255]), ("more/three.v2", [1, 2]), ("more/four", [0])):
        Image.fromarray(stripes(ids)).save(masks / f"{path}.png")
    return tmp_path


def rows(folder: Path) -> dict[str, tuple[str, list[int], bool]]:
    return {row["key"]: (row["split"], row["classes"], row["has_mask"]) for row in table_of(folder).to_pylist()}


def make(photos: Path, **options: Any) -> dict[str, tuple[str, list[int], bool]]:
    shared = {name: options.pop(name) for name in ("subsets", "skip_damaged") if name in options}
    convert(FolderInput(images=photos / "images", **options), Output(photos / "out", shards=1, **shared))
    return rows(photos / "out")


def test_masks_give_labels_and_all_kinds_of_images_are_taken(photos: Path) -> None:
    found = make(photos, masks=photos / "masks", classes=["cat", "dog"])
    assert found == {
        "one": ("train", [1], True),
        "two": ("train", [2], True),
        "more_three_v2": ("train", [1, 2], True),
        "more_four": ("train", [], True),
    }
    shards = load_dataset(photos / "out")
    assert shards.info.classes == ("background", "cat", "dog")
    samples = {sample.key: sample for sample in EvalLoader(shards, split="train")}
    assert np.array_equal(np.asarray(samples["two"].pixel_labels), stripes([2, 255]))
    with Image.open(photos / "images" / "two.png") as image:
        error = np.abs(samples["two"].image.permute(1, 2, 0).numpy().astype(int) - np.asarray(image).astype(int))
    assert error.mean() < 10
    assert samples["more_four"].image.shape == (3, 20, 30)


def test_jpeg_files_are_copied_and_turned_ones_stand_upright(photos: Path) -> None:
    image = noise(5)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(photos / "images" / "turned.jpg", exif=exif)
    Image.fromarray(stripes([0, 1], 30, 20)).save(photos / "masks" / "turned.png")
    make(photos, masks=photos / "masks", classes=["cat", "dog"])
    with tarfile.open(photos / "out" / "train-000000.tar") as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    assert files["one.jpg"] == (photos / "images" / "one.jpg").read_bytes()
    with Image.open(io.BytesIO(files["turned.jpg"])) as turned:
        assert turned.size == (20, 30)
        assert turned.getexif().get(0x0112, 1) == 1


def test_masks_in_colors(photos: Path) -> None:
    (photos / "palette.txt").write_text(PALETTE)
    colors = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255), 255: (255, 255, 255)}
    for path in (photos / "masks").rglob("*.png"):
        with Image.open(path) as image:
            ids = np.asarray(image)
        table = np.zeros((256, 3), dtype=np.uint8)
        for label, color in colors.items():
            table[label] = color
        Image.fromarray(table[ids]).save(path)
    found = make(photos, masks=photos / "masks", palette=photos / "palette.txt")
    assert found["more_three_v2"] == ("train", [1, 2], True)
    shards = load_dataset(photos / "out")
    assert shards.info.classes == ("background", "cat", "dog")
    samples = {sample.key: sample for sample in EvalLoader(shards, split="train")}
    assert np.array_equal(np.asarray(samples["two"].pixel_labels), stripes([2, 255]))


def test_a_table_gives_labels_and_splits(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "labels.csv").write_text(
        "image,labels,split\none.jpg,cat,train\ntwo,dog; cat,val\nmore/three.v2.webp,,\nmore/four.jpg,dog,test\n"
    )
    found = make(photos, labels=photos / "labels.csv")
    assert "labels.csv names the classes: cat, dog\n" in capsys.readouterr().out
    assert found == {
        "one": ("train", [1], False),
        "two": ("val", [1, 2], False),
        "more_three_v2": ("train", [], False),
        "more_four": ("test", [2], False),
    }


def test_a_label_of_one_image_that_resembles_a_frequent_one_is_a_likely_typo(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["image,labels", "one,dog", "two,dgo;ant", "more/three.v2,dog;cat", "more/four,cat"]
    (photos / "labels.csv").write_text("\n".join(lines) + "\n")
    make(photos, labels=photos / "labels.csv")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1  # `ant` is rare, and resembles none
    assert "one image alone shows the class 'dgo', and 2 show 'dog'; if that is what is meant, correct" in warnings[0]


def test_labels_and_masks_together(photos: Path) -> None:
    """The table's labels count; an image without a mask needs a line in it."""
    (photos / "labels.csv").write_text("image,labels\none.jpg,dog\ntwo,dog\n")
    (photos / "masks" / "one.png").unlink()
    found = make(photos, labels=photos / "labels.csv", masks=photos / "masks", classes=["cat", "dog"])
    assert found["one"] == ("train", [2], False)
    assert found["two"] == ("train", [2], True)
    assert found["more_three_v2"] == ("train", [1, 2], True)


def test_unlabeled_images_say_so_in_the_manifest(photos: Path) -> None:
    (photos / "labels.csv").write_text("image,labels\none.jpg,\n")
    for key in ("one", "two"):
        (photos / "masks" / f"{key}.png").unlink()
    given: dict[str, Any] = {"labels": photos / "labels.csv", "masks": photos / "masks", "classes": ["cat", "dog"]}
    make(photos, unlabeled=True, **given)
    shards = load_dataset(photos / "out")
    found = {
        row["key"]: (row["classes"], row["has_image_labels"], row["has_mask"])
        for row in table_of(shards.folder).to_pylist()
    }
    assert found == {
        "one": ([], True, False),  # a line without labels: the background alone
        "two": ([], False, False),
        "more_three_v2": ([1, 2], True, True),
        "more_four": ([], True, True),
    }
    assert "--unlabeled" in shards.info.made_by


def test_the_british_spelling_is_an_alias_that_help_does_not_list(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--images", str(photos / "images"), "--out", str(photos / "out"), "--classes", "cat", "--processes", "1"]
    assert main(["prepare", "folder", *words, "--unlabelled"]) == 0
    assert "--unlabeled" in load_dataset(photos / "out").info.made_by
    with pytest.raises(SystemExit):
        main(["prepare", "folder", "--help"])
    assert "--unlabelled" not in capsys.readouterr().out


def test_images_alone(photos: Path) -> None:
    make(photos, classes=["cat", "dog"], unlabeled=True)
    train = load_dataset(photos / "out").split("train")
    assert train.num_samples == 4
    assert not len(train.with_image_labels)
    assert not len(train.with_masks)
    assert load_dataset(photos / "out").info.classes == ("background", "cat", "dog")


def test_subsets_mark_images(photos: Path) -> None:
    (photos / "few.txt").write_text("more/four.jpg\none\n")
    make(photos, masks=photos / "masks", classes=["cat", "dog"], subsets={"few": photos / "few.txt"})
    train = load_dataset(photos / "out").split("train")
    assert sorted(train.keys.filter(train.in_subset("few")).to_pylist()) == ["more_four", "one"]


def test_masks_are_copied_unless_they_must_be_written_anew(photos: Path) -> None:
    Image.fromarray(stripes([0, 1]).astype(bool)).save(photos / "masks" / "one.png")
    make(photos, masks=photos / "masks", classes=["cat", "dog"])
    with tarfile.open(photos / "out" / "train-000000.tar") as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    assert files["two.png"] == (photos / "masks" / "two.png").read_bytes()
    with Image.open(io.BytesIO(files["one.png"])) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), stripes([0, 1]))


def test_large_images_are_scaled_down_with_their_masks(photos: Path) -> None:
    noise(4, 60, 160).save(photos / "images" / "wide.jpg")
    Image.fromarray(stripes([1, 0, 255, 2], 60, 160)).save(photos / "masks" / "wide.png")
    make(photos, masks=photos / "masks", classes=["cat", "dog"], longest_side=40)
    with tarfile.open(photos / "out" / "train-000000.tar") as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    for key, size, ids in (("wide", (40, 15), [1, 0, 255, 2]), ("one", (30, 20), [0, 1])):
        with Image.open(io.BytesIO(files[f"{key}.jpg"])) as image:
            assert image.size == size
        with Image.open(io.BytesIO(files[f"{key}.png"])) as mask:
            assert np.array_equal(np.asarray(mask), stripes(ids, *size[::-1]))
    assert files["one.jpg"] == (photos / "images" / "one.jpg").read_bytes()
    assert " --longest-side 40 " in load_dataset(photos / "out").info.made_by


def test_command_makes_shards_that_its_own_record_makes_again(photos: Path) -> None:
    (photos / "few.txt").write_text("one\n")
    (photos / "val.txt").write_text("two\n")
    (photos / "masks" / "more" / "four.png").unlink()

    def run(*words: str) -> int:
        return main(["prepare", "folder", *words, "--processes", "1"])

    options = ["--masks", str(photos / "masks"), "--classes", "cat,dog", "--unlabeled", "--name", "mine"]
    options += ["--subset", f"few={photos / 'few.txt'}", "--split", f"val={photos / 'val.txt'}", "--shards", "1"]
    options += ["--seed", "2", "--longest-side", "25"]
    assert run("--images", str(photos / "images"), "--out", str(photos / "first"), *options) == 0
    assert rows(photos / "first")["two"][0] == "val"
    program, script, *recorded = shlex.split(load_dataset(photos / "first").info.made_by)
    assert (program, script) == ("python", "data_prep/folder.py")
    assert run(*recorded, "--out", str(photos / "second")) == 0
    for path in (photos / "first").iterdir():
        assert (photos / "second" / path.name).read_bytes() == path.read_bytes()
    assert run("--images", str(photos / "images"), "--split", "val", "--out", str(photos / "third")) == 2


def test_lists_and_fractions_split(photos: Path) -> None:
    (photos / "val.txt").write_text("two.png\nmore/four\n\n")
    found = make(photos, masks=photos / "masks", classes=["cat", "dog"], split={"val": photos / "val.txt"})
    assert {key for key, row in found.items() if row[0] == "val"} == {"two", "more_four"}


def test_a_fraction_depends_on_keys_and_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(60):
        noise(i, 4, 4).save(tmp_path / "images" / f"{i:02}.png")
    (tmp_path / "labels.csv").write_text("image,labels\n" + "".join(f"{i:02},cat\n" for i in range(60)))

    def val(out: str, **options: Any) -> set[str]:
        output = Output(tmp_path / out, shards=1, **options)
        convert(FolderInput(images=tmp_path / "images", labels=tmp_path / "labels.csv", val_fraction=0.3), output)
        return {key for key, row in rows(tmp_path / out).items() if row[0] == "val"}

    first = val("a")
    assert 8 <= len(first) <= 28
    assert val("c", seed=1) != first
    (tmp_path / "images" / "00.png").unlink()
    (tmp_path / "labels.csv").write_text("image,labels\n" + "".join(f"{i:02},cat\n" for i in range(1, 60)))
    assert val("d") == first - {"00"}


def palette_png(ids: Array, colors: Sequence[int], path: Path) -> None:
    image = Image.fromarray(ids)
    image.putpalette(colors)
    image.save(path)


def masks_in(folder: Path) -> dict[str, Array]:
    with tarfile.open(folder / "train-000000.tar") as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    return {
        name[:-4]: np.asarray(Image.open(io.BytesIO(data))) for name, data in files.items() if name.endswith(".png")
    }


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two images and an empty folder for masks."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for place, name in enumerate(("a.jpg", "b.jpg")):
        noise(place, 6, 8).save(tmp_path / "images" / name)
    return tmp_path


def test_masks_of_0_and_255_are_refused_or_taken_by_a_flag(pair: Path) -> None:
    shape = np.zeros((6, 8), dtype=np.uint8)
    shape[2:5, 3:6] = 255
    shape[0, 0] = 40
    Image.fromarray(shape * (shape == 255)).save(pair / "masks" / "a.png")
    Image.fromarray(shape * 0).save(pair / "masks" / "b.png")
    with pytest.raises(DataError, match=r"1 mask\(s\) hold no value but 0 and 255, such as .*a.png.*--binary-masks"):
        make(pair, masks=pair / "masks", classes=["object"])
    Image.fromarray(shape).save(pair / "masks" / "a.png")
    found = make(pair, masks=pair / "masks", classes=["object"], binary_masks=True)
    assert found == {"a": ("train", [1], True), "b": ("train", [], True)}
    assert masks_in(pair / "out")["a"].tolist() == (shape > 0).astype(int).tolist()
    assert " --binary-masks " in load_dataset(pair / "out").info.made_by + " "


def test_gray_masks_of_two_bits_keep_their_values(pair: Path) -> None:
    ids = np.array([[0, 1, 2, 3] * 2] * 6, dtype=np.uint8)
    for name in ("a.png", "b.png"):
        (pair / "masks" / name).write_bytes(gray_png(ids, 2))
    found = make(pair, masks=pair / "masks", classes=["x", "y", "z"])
    assert found["a"] == ("train", [1, 2, 3], True)
    assert masks_in(pair / "out")["a"].tolist() == ids.tolist()


def test_palettes_that_differ_are_refused_and_colors_are_the_way_out(pair: Path) -> None:
    black, red, blue = (0, 0, 0), (255, 0, 0), (0, 0, 255)
    palette_png(stripes([0, 1], 6, 8), [*black, *red, *blue], pair / "masks" / "a.png")
    palette_png(stripes([0, 1], 6, 8), [*black, *blue, *red], pair / "masks" / "b.png")
    with pytest.raises(DataError, match="id 1 is #ff0000 in .*a.png and #0000ff in .*b.png; .* --palette FILE"):
        make(pair, masks=pair / "masks", classes=["cat", "dog"])
    (pair / "palette.txt").write_text(PALETTE)
    found = make(pair, masks=pair / "masks", palette=pair / "palette.txt")
    assert found == {"a": ("train", [1], True), "b": ("train", [2], True)}


@pytest.mark.parametrize("place", ["beside", "below"])
def test_masks_may_lie_among_the_images(place: str, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = pair / "images" if place == "beside" else pair / "images" / "masks"
    masks.mkdir(exist_ok=True)
    Image.fromarray(stripes([0, 1], 6, 8)).save(masks / "a.png")
    Image.fromarray(stripes([2], 6, 8)).save(masks / "b_mask.png")
    found = make(pair, masks=masks, classes=["cat", "dog"])
    assert found == {"a": ("train", [1], True), "b": ("train", [2], True)}
    assert "b_mask.png for b.jpg" in capsys.readouterr().out


def test_masks_of_no_image_are_refused(pair: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(stripes([1], 6, 8)).save(pair / "masks" / name)
    with pytest.raises(DataError, match=r"--masks has 1 mask\(s\) of no image: c.png; .*--skip-unmatched"):
        make(pair, masks=pair / "masks", classes=["cat"])


def test_what_nothing_belongs_to_can_be_left_out(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(stripes([1], 6, 8)).save(pair / "masks" / "c.png")
    (pair / "labels.csv").write_text("image,labels\na.jpg,cat\nnine.jpg,cat\n")
    given: dict[str, Any] = {"masks": pair / "masks", "labels": pair / "labels.csv", "classes": ["cat"]}
    found = make(pair, **given, skip_unmatched=True)
    assert found == {"a": ("train", [1], False)}
    out = capsys.readouterr().out
    assert "left out 1 name(s) of no image: 'nine.jpg' (line 3)" in out
    assert "--masks: left out 1 mask(s) of no image: c.png" in out
    assert "--images: left out: 1 image(s) have no mask and no label in" in out


def test_folders_of_classes(tmp_path: Path) -> None:
    for place, path in enumerate(("train/cat/1.jpg", "train/hot dog/1.jpg", "val/cat/2.jpg", "val/background/1.jpg")):
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        noise(place, 6, 8).save(tmp_path / "images" / path)
    found = make(tmp_path, labels_from_folders=True)
    assert found == {
        "train_cat_1": ("train", [1], False),
        "train_hot_dog_1": ("train", [2], False),
        "val_cat_2": ("val", [1], False),
        "val_background_1": ("val", [], False),
    }
    info = load_dataset(tmp_path / "out").info
    assert info.classes == ("background", "cat", "hot dog")
    assert info.made_by.count("--labels-from-folders") == 1


def test_class_names_from_a_file_may_have_commas(pair: Path) -> None:
    (pair / "classes.txt").write_text("background\nbig, old tree\ncat\n")
    (pair / "labels.csv").write_text('image,labels\na.jpg,"cat, big, old tree"\nb.jpg,"Big, old tree"\n')
    with pytest.raises(DataError, match="no class: 'big'"):
        make(pair, labels=pair / "labels.csv", classes_file=pair / "classes.txt")
    (pair / "labels.csv").write_text('image,labels\na.jpg,"cat; big, old tree"\nb.jpg,"Big, old tree"\n')
    found = make(pair, labels=pair / "labels.csv", classes_file=pair / "classes.txt")
    assert found == {"a": ("train", [1, 2], False), "b": ("train", [1], False)}
    assert load_dataset(pair / "out").info.classes == ("background", "big, old tree", "cat")


def test_a_dry_run_says_what_it_understood_and_writes_nothing(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "images" / "notes.txt").touch()
    (photos / "val.txt").write_text("two\n")
    words = [
        "prepare",
        "folder",
        "--images",
        str(photos / "images"),
        "--masks",
        str(photos / "masks"),
        "--processes",
        "1",
    ]
    words += ["--split", f"val={photos / 'val.txt'}"]
    before = sorted(photos.rglob("*"))
    assert main([*words, "--classes", "cat,traffic light", "--dry-run"]) == 0
    assert sorted(photos.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert "--images: left out 1 file(s) or folder(s) that are no images by their suffix: notes.txt" in lines
    assert "images: 4: 3 train, 1 val" in lines
    assert "images by label: 2 cat, 2 traffic light, 1 none of them, 0 unknown" in lines
    assert "more/three.v2.webp  more/three.v2.png  more_three_v2  train    30x20   cat, traffic light" in lines
    assert lines[-1] == "wrote nothing, as --dry-run asks"
    assert main([*words, "--classes", "cat", "--dry-run", "--out", str(photos / "out")]) == 2
    assert "has ids [2]; allowed are 0 to 1" in capsys.readouterr().err
    assert main([*words, "--classes", "cat,dog", "--dry-run", "--shards", "3"]) == 2
    assert "split 'val' has 1 samples, fewer than the 3 shards" in capsys.readouterr().err
    assert main([*words, "--classes", "cat,dog"]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert sorted(photos.rglob("*")) == before


class TestRefusals:
    def refuse(self, photos: Path, match: str, **options: Any) -> None:
        with pytest.raises(DataError, match=match):
            make(photos, **options)
        assert not (photos / "out").exists()

    def test_options_that_do_not_go_together(self, photos: Path) -> None:
        masks, table = photos / "masks", photos / "labels.csv"
        table.write_text("image,labels,split\none.jpg,cat,val\n")
        (photos / "palette.txt").write_text(PALETTE)
        self.refuse(photos, "neither --masks nor --labels nor --annotations is given")
        with pytest.raises(DataError, match="--images .*nope is no folder"):
            FolderInput(images=photos / "nope").check()
        self.refuse(photos, "name the classes 1, 2, ... with --classes", masks=masks)
        self.refuse(
            photos,
            "--classes and --palette name the classes; give one of them",
            masks=masks,
            classes=["a"],
            palette=photos / "palette.txt",
        )
        self.refuse(photos, "in several ways", masks=masks, classes=["cat", "dog"], labels=table, val_fraction=0.1)
        self.refuse(photos, "--val-fraction is 1.5", masks=masks, classes=["cat", "dog"], val_fraction=1.5)
        self.refuse(
            photos, r"no class: 'cat' \(line 2\); the classes are ant, bee", labels=table, classes=["ant", "bee"]
        )
        self.refuse(
            photos, "3 image.* have no label in .*: more/four.jpg, .*--unlabeled", labels=table, classes=["cat"]
        )
        self.refuse(photos, "nothing names the classes", unlabeled=True)
        self.refuse(photos, "--masks .*nowhere is no folder", masks=photos / "nowhere", classes=["cat"])
        self.refuse(
            photos, "--binary-masks is for one class; 2 are named", masks=masks, classes=["a", "b"], binary_masks=True
        )
        self.refuse(photos, "both give image labels", labels=table, labels_from_folders=True)
        self.refuse(
            photos, r"--split has the splits 'valid' \(a name: write 'val'\)", labels=table, split={"valid": table}
        )
        self.refuse(photos, "--longest-side is -1", masks=masks, classes=["cat", "dog"], longest_side=-1)
        few = {"few": photos / "palette.txt"}
        self.refuse(photos, r"lists 4 image\(s\) that are not there", masks=masks, classes=["cat", "dog"], subsets=few)

    def test_files_that_do_not_fit(self, photos: Path) -> None:
        masks = photos / "masks"
        named: dict[str, Any] = {"masks": masks, "classes": ["cat", "dog"]}
        self.refuse(photos, r"two.png has ids \[2\]; allowed are 0 to 1 and 255", masks=masks, classes=["cat"])
        Image.fromarray(stripes([0], 20, 31)).save(masks / "one.png")
        self.refuse(photos, r"one.png is 31x20 pixels, its image one.jpg 30x20; make them of one size", **named)
        noise(0).save(masks / "one.png")
        self.refuse(photos, "one.png is a RGB image; masks must be indexed.*--palette FILE", **named)
        (photos / "palette.txt").write_text(PALETTE)
        self.refuse(
            photos,
            "one.png has 600 pixel.* in 600 color.* that the palette file lacks",
            masks=masks,
            palette=photos / "palette.txt",
        )
        (masks / "one.png").unlink()
        self.refuse(photos, r"1 image\(s\) have no mask: one.jpg", **named)
        Image.fromarray(stripes([1])).save(masks / "one.png")
        noise(0).save(photos / "images" / "one.png")
        self.refuse(photos, "would have the name of another one in the shards.*one.jpg and one.png", **named)

    def test_tables_and_lists(self, photos: Path) -> None:
        table, named = photos / "labels.csv", {"masks": photos / "masks", "classes": ["cat", "dog"]}
        table.write_text("where,labels\none,cat\n")
        self.refuse(photos, r"\['image'\] must be among them", labels=table)
        table.write_text("image,labels\nnine,cat\n")
        self.refuse(photos, r"lists 1 image\(s\) that are not there: 'nine' \(line 2\)", labels=table)
        self.refuse(photos, "cannot read the table of labels", labels=photos / "none.csv")
        (photos / "a.txt").write_text("one\n")
        (photos / "b.txt").write_text("one.jpg\n")
        lists = {"val": photos / "a.txt", "test": photos / "b.txt"}
        self.refuse(photos, "is in the splits 'val' and 'test'", split=lists, **named)
        (photos / "a.txt").write_text("nine\n")
        self.refuse(
            photos,
            r"a.txt lists 1 image\(s\) that are not there: 'nine' \(line 1\)",
            split={"val": photos / "a.txt"},
            **named,
        )


class TestDepth:
    """Images of more than 8 bits."""

    def make(self, tmp_path: Path, images: dict[str, Array], **options: Any) -> dict[str, Array]:
        """Pixels that are written, by key."""
        (tmp_path / "images").mkdir()
        for name, image in images.items():
            Image.fromarray(image).save(tmp_path / "images" / name)
        given = FolderInput(images=tmp_path / "images", unlabeled=True, classes=["a"], **options)
        convert(given, Output(tmp_path / "out", shards=1))
        shards = load_dataset(tmp_path / "out")
        return {sample.key: np.asarray(sample.image[0]) for sample in EvalLoader(shards, split="train")}

    def test_one_range_serves_the_whole_set_and_is_recorded(self, tmp_path: Path) -> None:
        ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
        written = self.make(tmp_path, {"a.tif": ramp, "b.png": ramp // 2})
        assert abs(int(written["a"].max()) - 255) <= 3
        assert abs(int(written["b"].max()) - 128) <= 3
        info = load_dataset(tmp_path / "out").info
        assert info.depth == "uint16=12"
        assert "--depth" not in info.made_by

    def test_the_option_is_part_of_the_record(self, tmp_path: Path) -> None:
        ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
        written = self.make(tmp_path, {"a.tif": ramp}, depth="0..8190")
        assert abs(int(written["a"].max()) - 128) <= 3
        info = load_dataset(tmp_path / "out").info
        assert info.depth == "0..8190"
        assert "--depth 0..8190" in info.made_by

    def test_a_value_that_is_no_number_is_named_and_can_be_left_out(self, tmp_path: Path, capsys: Any) -> None:
        ramp = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
        spoilt = ramp.copy()
        spoilt[3, 4] = np.nan
        with pytest.raises(DataError, match=r"b\.tif cannot be read: 1 of its 4096 values are NaN or infinite"):
            self.make(tmp_path, {"a.tif": ramp, "b.tif": spoilt})
        output = Output(tmp_path / "out", shards=1, skip_damaged=True)
        assert convert(FolderInput(images=tmp_path / "images", unlabeled=True, classes=["a"]), output).counts == {
            "train": 1
        }
        assert "b.tif cannot be read: 1 of its 4096 values" in capsys.readouterr().err

    def test_a_wrong_option_is_refused_before_files_are_read(self, tmp_path: Path) -> None:
        given = FolderInput(images=tmp_path, unlabeled=True, classes=["a"], depth="twelve")
        with pytest.raises(DataError, match="the depth 'twelve' is neither bits from 8 to 32 nor"):
            convert(given, Output(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp", "avif"])
def test_turned_images_of_every_format_have_the_size_that_the_manifest_says(tmp_path: Path, kind: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, height=20, width=30).save(tmp_path / "images" / f"a.{kind}", exif=exif)
    Image.fromarray(stripes([0, 1], height=30, width=20)).save(tmp_path / "masks" / "a.png")
    make(tmp_path, masks=tmp_path / "masks", classes=["cat"])
    (sample,) = EvalLoader(load_dataset(tmp_path / "out"), split="train")
    assert sample.image.shape == (3, 30, 20)


@pytest.mark.parametrize("damage", ["image", "mask", "text"])
def test_a_damaged_file_costs_its_image_and_status_3(
    damage: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photos / ("masks/one.png" if damage == "mask" else "images/one.jpg")
    path.write_bytes(b"<html>404</html>" if damage == "text" else path.read_bytes()[:60])
    words = ["prepare", "folder", "--images", photos / "images", "--masks", photos / "masks", "--classes", "cat,dog"]
    command = [*map(str, words), "--processes", "1", "--out"]
    assert main([*command, str(photos / "three")]) == 3
    printed = capsys.readouterr()
    assert f"left out: {path} cannot be read: " in printed.err
    assert "left out 1 damaged images, 3 remain" in printed.out
    assert "wrote " in printed.out
    assert main([*command, str(photos / "zero"), "--skip-damaged"]) == 0
    assert set(rows(photos / "zero")) == set(rows(photos / "three")) == {"two", "more_three_v2", "more_four"}
    Image.fromarray(stripes([7])).save(photos / "masks" / "two.png")  # no damage: a mistake about the classes
    assert main([*command, str(photos / "none")]) == 2
    assert not (photos / "none").exists()
