"""Archives for VOC's evaluation server: what is in them, and what the check finds."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slrnet import load
from slrnet.checkpoints.checkpoint import TrainState, save_checkpoint
from slrnet.cli.main import main
from slrnet.config import Config
from slrnet.data.catalog import voc_palette
from slrnet.data.tars import tar_end, tar_members
from slrnet.models.slrnet import build_network
from slrnet.tools.voc_archive import FOLDER, check_voc_archive, list_images

SIZES = {"2008_000001": (40, 60), "2008_000002": (64, 32), "2009_000003": (50, 50)}


@pytest.fixture(scope="module")
def checkpoint(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = build_network(tiny_config, num_classes=3)
    torch.nn.init.normal_(model.mask_head.classify.weight, std=3.0)
    with torch.no_grad():  # no class dominates
        logits = model.eval()([torch.randn(4, 3, 64, 64)]).logits[0]
        model.mask_head.classify.bias += 1 - logits[:, 1:].mean(dim=(0, 2, 3))
    classes = ("background", "cow", "person")
    state = TrainState(epoch=1, step=1, classes=classes, data_fingerprint="-", world_size=1)
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return save_checkpoint(folder, config=tiny_config, state=state, model=model.state_dict(), optimizer={})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "JPEGImages"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
    return folder


def test_the_archive_holds_vocs_ids_of_the_listed_images(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    names = tmp_path / "test.txt"
    names.write_text("2008_000002\n2009_000003\n")
    out = tmp_path / "results.tgz"
    assert (
        main(["voc-archive", str(checkpoint), str(photos), "--list", str(names), "--out", str(out), "--device", "cpu"])
        == 0
    )
    with tarfile.open(out) as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
        assert list(members) == [f"{FOLDER}/2008_000002.png", f"{FOLDER}/2009_000003.png"]
        file = members[f"{FOLDER}/2008_000002.png"]
        assert file is not None
        mask = np.asarray(Image.open(io.BytesIO(file.read())))
    with Image.open(photos / "2008_000002.jpg") as photo:
        own = load(checkpoint, device="cpu")(photo).mask
    np.testing.assert_array_equal(mask, np.array([0, 10, 15])[own])
    assert len(np.unique(mask)) > 1
    assert FOLDER == "results/VOC2012/Segmentation/comp6_test_cls"
    again = tmp_path / "again.tgz"
    assert (
        main(
            ["voc-archive", str(checkpoint), str(photos), "--list", str(names), "--out", str(again), "--device", "cpu"]
        )
        == 0
    )
    assert again.read_bytes() == out.read_bytes()


def png(size: tuple[int, int], value: int = 0, mode: str = "P") -> bytes:
    image = Image.new(mode, size[::-1], value)
    if mode == "P":
        image.putpalette(voc_palette().tobytes())  # with fewer colours Pillow would write fewer bits
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"2008_000001": None}, "1 of 3 masks are missing, for instance 2008_000001"),
        ({"2008_000001": png((40, 61))}, "2008_000001 has 61 x 40 pixels, its image 60 x 40"),
        ({"2008_000001": png((40, 60), 21)}, "2008_000001 has the id 21; VOC's are 0 to 20"),
        ({"2008_000001": png((40, 60), mode="L")}, "2008_000001 has mode L, not P"),
        ({"2008_000009": png((40, 60))}, "2008_000009.png does not belong there"),
        ({"../../2008_000009": png((40, 60))}, "does not belong there"),
    ],
)
def test_the_check(change: dict[str, Any], found: str | None, photos: Path, tmp_path: Path) -> None:
    files = {name: png(size) for name, size in SIZES.items()} | change
    data = tar_members({f"{FOLDER}/{name}.png": data for name, data in files.items() if data is not None})
    path = tmp_path / "results.tar"
    path.write_bytes(data + tar_end(len(data)))
    problems = check_voc_archive(path, list_images(photos))
    assert problems == [] if found is None else found in problems[0]


def test_mistakes_are_refused(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "test.txt"
    out = tmp_path / "results.tgz"

    def refused(*arguments: str) -> str:
        assert (
            main(["voc-archive", str(checkpoint), str(photos), "--out", str(out), "--device", "cpu", *arguments]) == 2
        )
        assert not out.exists()
        return capsys.readouterr().err

    names.write_text("2008_000002\n2010_000001\n2008_000002\n")
    assert "lists 3 images, 1 of them twice; 1 are not in" in refused("--list", str(names))
    assert "cannot read the list" in refused("--list", str(tmp_path / "none.txt"))
    (photos / "2008_000001.jpg").write_bytes(b"no JPEG")
    assert "2008_000001.jpg cannot be read" in refused()
    assert not list(tmp_path.glob(".incoming*"))
