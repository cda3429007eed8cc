"""Data sets in an object store, against a real S3 server on loopback."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.config import Config, DataConfig, apply_overrides
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.data.supervision import plan_supervision
from slrnet.data.train_loader import TrainLoader
from slrnet.launch.train import LaunchOptions, launch
from slrnet.storage import remote
from slrnet.storage.remote import RemoteError, cached, is_remote, open_cached
from tests.fixtures.shards import shards_of


@pytest.fixture
def bucket(s3: Any, tiny_data: ShardSet) -> Callable[[str, bytes | None], None]:
    """Uploads the tiny data set to s3://data/tiny; the function replaces or removes one of its files."""
    s3.create_dir("data/tiny")

    def put(name: str, content: bytes | None) -> None:
        if content is None:
            s3.delete_file(f"data/tiny/{name}")
            return
        with s3.open_output_stream(f"data/tiny/{name}") as file:
            file.write(content)

    for path in tiny_data.folder.iterdir():
        put(path.name, path.read_bytes())
    return put


Put = Callable[[str, bytes | None], None]
PLACE = "s3://data/tiny"


def test_training_and_evaluation_see_what_lies_in_the_bucket(bucket: Put, tiny_data: ShardSet) -> None:
    shards = load_dataset(PLACE)
    assert (shards.location, shards.info) == (PLACE, tiny_data.info)
    assert not list(shards.folder.glob("*.tar"))  # not before they are needed
    for split in ("train", "val"):
        pairs = zip(EvalLoader(shards, split=split), EvalLoader(tiny_data, split=split), strict=True)
        assert all(one.key == two.key and one.image.equal(two.image) for one, two in pairs)
    config = DataConfig(crop_size=32, crop_scale=(0.5, 1.0), workers=0)
    supervision = plan_supervision(shards.split("train"), config, "wsss")
    loaders = (TrainLoader(data, config, supervision, batch_size=3, seed=1) for data in (shards, tiny_data))
    batches = zip(*(loader.epoch(0) for loader in loaders), strict=True)
    assert all(one.images.equal(two.images) for one, two in batches)


def test_a_shard_is_copied_once_and_the_server_is_not_asked_again(bucket: Put) -> None:
    shards = load_dataset(PLACE)
    first = [sample.key for sample in EvalLoader(shards, split="val")]
    for name in {path.name for path in shards.folder.glob("val-*.tar")}:
        bucket(name, None)
    assert [sample.key for sample in EvalLoader(load_dataset(PLACE), split="val")] == first


def _copy_shard(name: str) -> float:
    return open_cached(PLACE, name).stat().st_mtime_ns


@pytest.mark.slow
def test_processes_share_one_copy(bucket: Put) -> None:
    with get_context("spawn").Pool(3) as pool:
        pool.map(_copy_shard, ["train-000000.tar"] * 6)
    assert [path.name for path in cached(PLACE).glob("*.tar")] == ["train-000000.tar"]
    assert not list(cached(PLACE).glob(".incoming*"))


def test_a_copy_that_is_not_the_manifests_is_made_again_once(
    bucket: Put, tiny_data: ShardSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = shards_of(tiny_data.split("val"))[0].name
    whole = (tiny_data.folder / name).read_bytes()
    real, damaged = remote._download, iter([True])

    def download(source: str, target: Path) -> None:
        real(source, target)
        if source.endswith(name) and next(damaged, False):
            target.write_bytes(whole[:700] + b"\1" * 700 + whole[1400:])

    monkeypatch.setattr(remote, "_download", download)
    with caplog.at_level(logging.WARNING):
        assert len(list(EvalLoader(load_dataset(PLACE), split="val"))) == 5
    assert f"the copy of {PLACE}/{name} is damaged" in caplog.text
    assert (cached(PLACE) / name).read_bytes() == whole


def test_a_shard_that_is_damaged_in_the_bucket_is_refused_and_not_kept(bucket: Put, tiny_data: ShardSet) -> None:
    name = shards_of(tiny_data.split("val"))[0].name
    whole = (tiny_data.folder / name).read_bytes()
    bucket(name, whole[: len(whole) // 3])
    with pytest.raises(DataError, match="the shard is cut off"):
        list(EvalLoader(load_dataset(PLACE), split="val"))
    assert not (cached(PLACE) / name).exists()


def test_another_data_set_in_the_same_place_replaces_the_copies(
    bucket: Put, write_tiny: Callable[..., ShardSet], tmp_path: Path
) -> None:
    list(EvalLoader(load_dataset(PLACE), split="val"))
    other = write_tiny(tmp_path / "other", num_val=4)
    for path in other.folder.iterdir():
        bucket(path.name, path.read_bytes())
    shards = load_dataset(PLACE)
    assert shards.info == other.info
    assert len(list(EvalLoader(shards, split="val"))) == 4


def test_the_cache_keeps_to_its_limit_and_drops_what_was_not_used_for_longest(
    bucket: Put, tiny_data: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in tiny_data.folder.glob("train-*.tar"))
    sizes = [(tiny_data.folder / name).stat().st_size for name in names]
    monkeypatch.setenv("SLRNET_CACHE_GB", str((sum(sizes[:3]) + 1) / 1e9))
    for place, name in enumerate(names[:3]):
        os.utime(open_cached(PLACE, name), (place, place))
    os.utime(cached(PLACE) / names[0], (9, 9))  # used again
    open_cached(PLACE, names[3])
    left = {path.name for path in cached(PLACE).glob("*.tar")}
    assert names[1] not in left
    assert {names[0], names[3]} <= left


def test_what_is_not_there_is_said(bucket: Put) -> None:
    with pytest.raises(RemoteError, match=r"s3://data/nothing/dataset\.json does not exist"):
        load_dataset("s3://data/nothing")
    bucket("train-000000.tar", None)
    with pytest.raises(DataError, match=r"s3://data/tiny/train-000000\.tar does not exist"):
        list(EvalLoader(load_dataset(PLACE), split="train"))


def test_a_store_that_fails_for_a_while_is_tried_again(
    bucket: Put, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failures = remote.filesystem_of, iter([True, True])

    def filesystem(source: str) -> object:
        if next(failures, False):
            raise OSError("When reading: SLOW_DOWN")
        return real(source)

    monkeypatch.setattr(remote, "filesystem_of", filesystem)
    assert load_dataset(PLACE).location == PLACE
    assert caplog.text.count("SLOW_DOWN); trying again") == 2

    def gone(source: str) -> object:
        raise OSError("no route to host")

    monkeypatch.setattr(remote, "filesystem_of", gone)
    with pytest.raises(RemoteError, match=r"cannot be read: no route to host; check credentials .* and endpoint"):
        load_dataset(PLACE)


def test_a_training_takes_its_data_from_a_bucket(bucket: Put, tiny_config: Config, storage: Path) -> None:
    config = apply_overrides(tiny_config, [f"data.path={PLACE}", "train.epochs=1", "train.pretrain_epochs=0"])
    result = launch(config, LaunchOptions(name="run", storage=storage, num_workers=0), say=lambda line: None)
    assert load_checkpoint(result.last).config.data.path == PLACE
    assert load_checkpoint(result.last).state.epoch == 1


@pytest.mark.parametrize(("location", "expected"), [("/data/voc", False), ("data", False), ("s3://a/b", True)])
def test_locations(location: str, expected: bool) -> None:
    assert is_remote(location) is expected


def test_other_kinds_of_locations_are_refused() -> None:
    with pytest.raises(RemoteError, match=r"http://x/y is of a kind that is not known; allowed are folders, s3:// and"):
        load_dataset("http://x/y")
