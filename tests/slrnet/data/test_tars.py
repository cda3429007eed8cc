"""Tar headers: what is read is what tarfile reads, damage is noticed; WebDataset reads our tars, and we read its."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_prep.conversion import Output
from data_prep.tars import convert
from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.config import Config, apply_overrides
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.data.tars import BLOCK, read_header, tar_members
from slrnet.launch.train import LaunchOptions, launch

SIZE = (72, 64)
CLASSES = ["ant", "bee", "cat"]

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it to the collector


@pytest.mark.parametrize(
    "name", ["a.jpg", "ä ö.png", "x" * 96 + ".jpg", "folder/" * 14 + "long.json", "in\udcffvalid.jpg"]
)
@pytest.mark.parametrize("size", [0, 1, 12345])
def test_what_is_written_is_read(name: str, size: int) -> None:
    block = bytearray(tar_members({name: bytes(size)})[:BLOCK])
    assert read_header(block) == (name, size)
    found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    assert (found.name, found.size) == (name, size)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_are_read(form: int) -> None:
    header = tarfile.TarInfo("image.jpg")
    header.size, header.mtime, header.uname = 777, 1_700_000_000, "somebody"
    assert read_header(bytearray(header.tobuf(form)[:BLOCK])) == ("image.jpg", 777)


def test_every_changed_byte_is_noticed() -> None:
    """Within the sum itself another digit or other filling may mean the same."""
    whole = tar_members({"a.jpg": bytes(9)})[:BLOCK]
    for place in (*range(148), *range(156, BLOCK)):
        block = bytearray(whole)
        block[place] ^= 0x40
        with pytest.raises(DataError, match="no tar header is where the manifest says"):
            read_header(block)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_what_is_no_file_is_refused(kind: bytes) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.type = kind
    with pytest.raises(DataError, match="no tar header is where the manifest says"):
        read_header(bytearray(header.tobuf(tarfile.USTAR_FORMAT)))


@pytest.mark.parametrize("block", [bytes(BLOCK), b"\xff" * BLOCK, b"text" * (BLOCK // 4)])
def test_other_bytes_are_refused(block: bytes) -> None:
    with pytest.raises(DataError, match="no tar header is where the manifest says"):
        read_header(bytearray(block))


# WebDataset: its reader reads our shards, and what its writer writes trains after one command.


def _encoded(array: Any, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


def _sample(number: int) -> dict[str, Any]:
    """Noise with a band of one class: number % 3 + 1."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    mask = np.zeros((SIZE[1], SIZE[0]), dtype=np.uint8)
    mask[:, 20:40] = number % 3 + 1
    return {"__key__": f"photos/{number:06d}", "jpg": _encoded(pixels, "JPEG"), "png": _encoded(mask, "PNG")}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """What `webdataset.ShardWriter` writes: labels as .json in `train`, as .cls in `val`."""
    (tmp_path / "tars").mkdir()
    labels: dict[str, Callable[[int], dict[str, Any]]] = {
        "train": lambda number: {"json": {"classes": [CLASSES[number % 3]], "source": "camera"}},
        "val": lambda number: {"cls": number % 3},
    }
    for split, count in (("train", 9), ("val", 5)):
        with wds.ShardWriter(f"{tmp_path}/tars/{split}-%06d.tar", maxcount=4, verbose=0) as writer:
            for number in range(count):
                writer.write(_sample(number) | labels[split](number))
    return tmp_path / "tars"


def test_webdataset_alone_reads_our_shards(tiny_data: ShardSet) -> None:
    for name in tiny_data.splits:
        split = tiny_data.split(name)
        urls = [str(tiny_data.folder / shard) for shard in split.shard_names]
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
        assert len(samples) == split.num_samples == tiny_data.info.counts[name]
        for index, sample in enumerate(samples):
            row = split.row(index)
            assert sample["__key__"] == row.key == sample["json"]["key"]
            assert sample["jpg"].size == (row.width, row.height)
            assert sample["json"]["classes"] == list(row.classes)
            assert ("png" in sample) is row.has_mask
            assert sample["png"].size == sample["jpg"].size


def test_what_its_writer_writes_becomes_a_data_set(tars: Path, tmp_path: Path) -> None:
    info = convert(tars, Output(tmp_path / "out", shards=2), classes=CLASSES)
    assert (info.classes, info.counts) == (("background", *CLASSES), {"train": 9, "val": 5})
    shards = load_dataset(tmp_path / "out")
    for split in shards.splits:
        samples = {sample.key: sample for sample in EvalLoader(shards, split=split)}
        assert len(samples) == info.counts[split]
        for number in range(info.counts[split]):
            written, read = _sample(number), samples[f"photos_{number:06d}"]
            with Image.open(io.BytesIO(written["jpg"])) as image, Image.open(io.BytesIO(written["png"])) as mask:
                error = read.image.permute(1, 2, 0).numpy().astype(int) - np.asarray(image.convert("RGB"))
                assert read.pixel_labels is not None
                np.testing.assert_array_equal(read.pixel_labels.numpy(), np.asarray(mask))
            assert np.abs(error).max() <= 2, "two JPEG decoders"
            assert read.image_labels.tolist() == [float(label == number % 3) for label in range(3)]


def test_it_trains(tars: Path, tmp_path: Path, storage: Path, tiny_config: Config) -> None:
    convert(tars, Output(tmp_path / "out", shards=2), classes=CLASSES)
    config = apply_overrides(
        tiny_config, [f"data.path={tmp_path / 'out'}", "train.epochs=1", "train.pretrain_epochs=0"]
    )
    result = launch(config, LaunchOptions(name="run", storage=storage, num_workers=0), say=lambda line: None)
    state = load_checkpoint(result.last).state
    assert (state.epoch, state.step) == (1, 2)
    assert np.isfinite(list(state.metrics.values())).all()
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["made_by"].startswith(
        f"python data_prep/tars.py --tars {tars} --classes ant,bee,cat"
    )
