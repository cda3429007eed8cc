"""The training loader on tiny shards: repeatable, the same on any cluster, unharmed by damage, blind to masks."""

from __future__ import annotations

import io
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.shard_writer import Sample, verify
from slrnet.config import DataConfig
from slrnet.data import readers as readers_module
from slrnet.data import samples as samples_module
from slrnet.data import train_loader as train_loader_module
from slrnet.data import transforms
from slrnet.data.batch import Batch
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.epoch_plan import Pool, choose_subset
from slrnet.data.manifest import DataError, SampleRow, ShardSet, SplitView
from slrnet.data.sample_set import SampleSet
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.data.supervision import Supervision, plan_supervision
from slrnet.data.train_loader import TrainLoader
from tests.fixtures.shards import shards_of

from .conftest import COUNTS, NUM_SHARDS, NUM_TRAIN, classes_of, encode_masks_of_noise, write_shards


def _loader(data: ShardSet, **changes: Any) -> TrainLoader:
    settings: dict[str, Any] = {"crop_size": 8, "crop_scale": (0.5, 1.0), "shuffle_buffer": 4, "workers": 0}
    others: dict[str, Any] = {"batch_size": 2, "seed": 3, "supervision": None}
    for name, value in changes.items():
        (settings if name in DataConfig.model_fields else others)[name] = value
    config = DataConfig(**settings)
    supervision = others.pop("supervision") or plan_supervision(data.split("train"), config, "wsss")
    return TrainLoader(data, config, supervision, **others)


def _keys(batches: Iterator[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def _equal(one: list[Batch], two: list[Batch]) -> bool:
    return [batch.keys for batch in one] == [batch.keys for batch in two] and all(
        torch.equal(a.images, b.images) and torch.equal(a.image_labels, b.image_labels)
        for a, b in zip(one, two, strict=True)
    )


def test_subsets_are_fixed_and_sorted(data: ShardSet) -> None:
    split = data.split("train")
    chosen = choose_subset(split, 6, seed=1, among=split.with_masks)
    assert chosen == choose_subset(split, 6, seed=1, among=split.with_masks)
    assert chosen != choose_subset(split, 6, seed=2, among=split.with_masks)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == 6
    assert split.with_masks.has(chosen).all()
    assert choose_subset(split, 1000, seed=0) == tuple(range(NUM_TRAIN))


# Training.


def _global_steps(data: ShardSet, world_size: int, *, batch: int = 4, **changes: Any) -> list[dict[str, torch.Tensor]]:
    """Per step of a global batch, its crops by key, gathered from all ranks."""
    steps: list[dict[str, torch.Tensor]] = []
    for rank in range(world_size):
        loader = _loader(data, world_size=world_size, rank=rank, batch_size=batch, **changes)
        first, end = batch * rank // world_size, batch * (rank + 1) // world_size
        batches = list(loader.epoch(1))
        assert len(batches) == loader.steps_per_epoch
        assert all(made.images.shape == (end - first, 3, 8, 8) for made in batches)
        steps = steps or [{} for _ in batches]
        for step, made in zip(steps, batches, strict=True):
            step |= {
                f"{place} {key}": image
                for place, (key, image) in enumerate(zip(made.keys, made.images, strict=True), start=first)
            }
    return steps


@pytest.mark.parametrize("kinds", [False, True])
def test_each_global_batch_is_the_same_whatever_the_number_of_ranks(data: ShardSet, kinds: bool) -> None:
    """The same samples in the same places with the same crops; three ranks have shares of 1, 1 and 2."""
    supervision = _half_labeled(data) if kinds else None
    alone, *others = (_global_steps(data, world_size, supervision=supervision) for world_size in (1, 2, 3, 4))
    assert len(alone) == (27 if kinds else NUM_TRAIN) // 4
    assert all(len(step) == 4 for step in alone)
    for other in others:
        assert [list(step) for step in other] == [list(step) for step in alone]
        for one, same in zip(alone, other, strict=True):
            assert all(torch.equal(one[place], same[place]) for place in one)
    if not kinds:
        keys = [place.split()[1] for step in alone for place in step]
        assert len(keys) == len(set(keys)) == 20
        loader = _loader(data, batch_size=4)
        assert data.split("train").num_samples - loader.steps_per_epoch * 4 == 3


def test_an_epoch_repeats_and_epochs_differ(data: ShardSet) -> None:
    loader = _loader(data)
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    assert _equal(first, list(_loader(data).epoch(0)))
    assert _keys(iter(first)) != _keys(iter(second))
    left_out = {frozenset(_keys(loader.epoch(epoch))) for epoch in range(4)}
    assert len(left_out) > 1, "other samples are left over in other epochs"
    assert _keys(_loader(data, seed=4).epoch(0)) != _keys(iter(first))


def test_crops_follow_from_seed_epoch_and_sample_alone(data: ShardSet) -> None:
    def crops(**changes: Any) -> dict[str, torch.Tensor]:
        batches = list(_loader(data, **changes).epoch(2))
        return {key: image for batch in batches for key, image in zip(batch.keys, batch.images, strict=True)}

    one, other = crops(), crops(batch_size=5, shuffle_buffer=1, workers=1)
    both = one.keys() & other.keys()
    assert len(both) > 15
    assert all(torch.equal(one[key], other[key]) for key in both)
    reseeded = crops(seed=4)
    assert not any(torch.equal(one[key], reseeded[key]) for key in one.keys() & reseeded.keys())


@pytest.mark.slow
def test_a_buffer_of_one_keeps_the_shards_together_and_a_larger_one_shuffles(data: ShardSet) -> None:
    def shards(buffer: int) -> list[str]:
        return [_shard_of(data, key) for key in _keys(_loader(data, shuffle_buffer=buffer, batch_size=1).epoch(0))]

    in_order, mixed = shards(1), shards(100)
    changes = sum(one != other for one, other in pairwise(in_order))
    assert changes == NUM_SHARDS - 1
    assert sum(one != other for one, other in pairwise(mixed)) > NUM_SHARDS
    assert sorted(in_order) == sorted(mixed)


def test_image_labels_are_those_of_the_manifest(data: ShardSet) -> None:
    for batch in _loader(data).epoch(0):
        assert batch.image_labels.dtype == torch.float32
        for key, labels in zip(batch.keys, batch.image_labels, strict=True):
            present = classes_of(int(key.removeprefix("train_")))
            assert labels.tolist() == [float(c in present) for c in (1, 2, 3)]


def test_starting_late_equals_skipping_the_first_batches(data: ShardSet) -> None:
    whole = list(_loader(data).epoch(3))
    for start in (0, 1, 6, 11):
        assert _equal(list(_loader(data).epoch(3, start)), whole[start:])
    with pytest.raises(ValueError, match="start_step is 12; an epoch has the steps 0 to 11"):
        _loader(data).epoch(0, 12)


def test_reader_processes(data: ShardSet) -> None:
    """Two reader processes: nothing twice, repeatable also by new ones, and a late start keeps the order."""
    loader = _loader(data, workers=2)
    whole, again, other = list(loader.epoch(0)), list(loader.epoch(0)), list(loader.epoch(1))
    assert len(whole) == 11
    assert len(set(_keys(iter(whole)))) == 22
    assert _equal(whole, again)
    assert not _equal(whole, other)
    next(loader.epoch(0))
    assert _equal(list(loader.epoch(1)), other), "an epoch that was given up leaves no trace"
    loader.close()
    assert _equal(list(loader.epoch(0, 4)), whole[4:]), "worker 0 has to make an even step"
    assert _equal(list(loader.epoch(0, 3)), whole[3:]), "worker 0 has to make an odd step"
    loader.close()


def test_the_global_generators_are_left_alone(data: ShardSet) -> None:
    before = torch.get_rng_state()
    list(_loader(data).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_grant_masks_change_nothing(data: ShardSet, tmp_path: Path) -> None:
    """The masks are bytes of noise here, of other lengths than the real ones: nobody looks at them."""
    noise = write_shards(tmp_path / "noise", encode_masks_of_noise)
    assert noise.info.fingerprint != data.info.fingerprint
    batches = list(_loader(data).epoch(0))
    assert _equal(batches, list(_loader(noise).epoch(0)))
    assert all(batch.pixel_labels is None and not batch.has_pixel_labels.any() for batch in batches)
    with pytest.raises(DataError, match="the mask cannot be read"):
        list(_loader(noise, supervision=_half_labeled(noise)).epoch(0))


def _half_labeled(data: ShardSet, *, image_labels: bool = True) -> Supervision:
    """Four masks (2, 4, 8, 10), drawn twice; the other 19 samples once: 27 draws."""
    split = data.split("train")
    numbers = np.array([int(split.key(i).removeprefix("train_")) for i in range(NUM_TRAIN)])
    masks = (numbers % 2 == 0) & (numbers % 3 != 0) & (numbers < 14)
    pools = tuple(Pool(SampleSet.of(which), draws) for which, draws in ((masks, 2.0), (~masks, 1.0)))
    return Supervision(SampleSet.of(masks), SampleSet.all(NUM_TRAIN if image_labels else 0), pools)


def test_granted_labels_come_with_their_images_and_no_others(data: ShardSet) -> None:
    crops: dict[str, list[torch.Tensor]] = {}
    for batch in _loader(data, supervision=_half_labeled(data), batch_size=9).epoch(0):
        for i, key in enumerate(batch.keys):
            number = int(key.removeprefix("train_"))
            expected = number % 2 == 0 and number % 3 != 0 and number < 14
            assert bool(batch.has_pixel_labels[i]) is expected
            assert batch.pixel_labels is not None
            assert batch.pixel_labels[i].unique().tolist() == [number % 4 if expected else 255]
            crops.setdefault(key, []).append(batch.images[i])
        assert batch.has_image_labels.all()
        assert 2 <= int(batch.has_pixel_labels.sum()) <= 4
    twice = {key: made for key, made in crops.items() if len(made) == 2}
    assert set(twice) == {f"train_{i}" for i in (2, 4, 8, 10)}
    assert not any(torch.equal(*made) for made in twice.values()), "each draw has its own crop"


def _encode_bands(sample: Sample) -> tuple[bytes, bytes | None]:
    """Each column has a grey level of its own, eleven apart; the mask counts columns by sevens."""
    columns = np.tile(np.arange(sample.width, dtype=np.uint8), (sample.height, 1))
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(columns * 11).save(image, "JPEG", quality=95)
    Image.fromarray(columns // 7).save(mask, "PNG")
    return image.getvalue(), mask.getvalue()


def test_images_that_are_decoded_smaller_stay_on_their_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large photographs are; these would be too small for it."""
    data = write_shards(tmp_path / "bands", _encode_bands)
    reductions, decode = set(), samples_module.decode_image
    monkeypatch.setattr(transforms, "_REDUCED_FROM", 1)
    monkeypatch.setattr(samples_module, "decode_image", lambda data, by: reductions.add(by) or decode(data, by))
    loader = _loader(data, crop_size=4, crop_scale=(0.1, 1.0), supervision=_half_labeled(data))
    for batch in chain.from_iterable(loader.epoch(epoch) for epoch in range(4)):
        for image, mask in zip(batch.images, batch.pixel_labels, strict=True) if batch.pixel_labels is not None else ():
            found = mask != IGNORE_INDEX
            columns = image[0][found].float() / 11 + 0.5  # of pixels' centres, from the image's left edge
            assert ((columns / 7 - mask[found] - 0.5).abs() < 0.8).all()
    assert reductions == {1, 2, 4}


def test_an_image_of_another_size_is_found_whatever_its_reduction(data: ShardSet) -> None:
    view = data.split("train")
    index = SampleIndex(shard_set=data, split=view)
    with ShardFiles(index) as files:
        read = files.read(0)
    row = view.row(0)
    assert index.decode(row, read, 4).shape == (3, -(-row.height // 4), -(-row.width // 4))
    wrong = replace(row, width=40)
    with pytest.raises(DataError, match=f"the image has {row.width} x {row.height} pixels, the manifest says 40 x"):
        index.decode(wrong, read)
    with pytest.raises(DataError, match="the image has about 2[04] x (16|20) pixels, the manifest says 40 x"):
        index.decode(wrong, read, 4)


def test_image_labels_that_are_not_granted_stay_unread(data: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    row = SplitView.row

    def poisoned(view: SplitView, sample: int) -> SampleRow:
        return replace(row(view, sample), classes=("read",))  # type: ignore[arg-type]

    loader = _loader(data, supervision=_half_labeled(data, image_labels=False))
    monkeypatch.setattr(SplitView, "row", poisoned)
    for batch in loader.epoch(0):
        assert not batch.has_image_labels.any()
        assert batch.image_labels.tolist() == [[0.0] * 3] * 2
    with pytest.raises(TypeError, match="'str' and 'int'"):
        list(_loader(data).epoch(0))


@pytest.mark.parametrize(("world_size", "readers"), [(1, 2), (1, 5), (2, 2), (5, 1), (2, 9)])
@pytest.mark.parametrize("start", [1, 3])
def test_readers_of_all_ranks_take_disjoint_samples(data: ShardSet, world_size: int, readers: int, start: int) -> None:
    """And each rank makes the steps from `start` on, in turns beginning with the first reader process."""
    keys = []
    for rank in range(world_size):
        loader = _loader(data, rank=rank, world_size=world_size, workers=readers, batch_size=2 * world_size)
        turns = {
            begin: [
                delivery.batch
                for turn in zip_longest(*(loader.reader.deliver(w, 0, begin) for w in range(readers)))
                for delivery in turn
                if delivery and delivery.batch
            ]
            for begin in (0, min(start, loader.steps_per_epoch))
        }
        assert len(turns[0]) == loader.steps_per_epoch
        assert _equal(turns[min(start, loader.steps_per_epoch)], turns[0][start:])
        keys += _keys(iter(turns[0]))
    assert len(keys) == len(set(keys)) == NUM_TRAIN // (2 * world_size) * 2 * world_size


# Users' mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 24}, "has 23 samples, fewer than the global batch of 24; use a global batch of 23 or less"),
        ({"world_size": 3}, "a global batch of 2 cannot be shared by 3 ranks"),
        ({"train_split": "test"}, "no split 'test'; it has: train, val"),
        ({"rank": 2, "world_size": 2}, "rank is 2; with world_size 2 allowed are 0 to 1"),
        ({"workers": -1}, "workers\n  Input should be greater than or equal to 0"),
        ({"on_error": "ignore"}, "on_error\n  Input should be 'stop' or 'skip'"),
        ({"shuffle_buffer": 0}, "shuffle_buffer\n  Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(data: ShardSet, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _loader(data, **changes)


# Damage.


def _damage_header(data: ShardSet, shard: int, sample: int) -> str:
    entry = shards_of(data.split("train"))[shard]
    with entry.path.open("r+b") as file:
        file.seek(int(entry.offsets[sample]) + 3)
        file.write(b"\xff\x00\xff")
    return data.split("train").key(entry.first + sample)


def _damage_image(data: ShardSet, shard: int, sample: int) -> str:
    entry = shards_of(data.split("train"))[shard]
    with entry.path.open("r+b") as file:
        file.seek(int(entry.offsets[sample]) + 512)
        file.write(bytes(40))
    return data.split("train").key(entry.first + sample)


def _truncate(data: ShardSet, shard: int) -> list[str]:
    """Cuts a shard within the third sample's last file; returns the keys that are lost."""
    split = data.split("train")
    entry = shards_of(split)[shard]
    with entry.path.open("r+b") as file:
        file.truncate(int(entry.offsets[2] + entry.sizes[2]) - 600)
    return [split.key(i) for i in range(entry.first + 2, entry.first + entry.num_samples)]


def _stopped(loader: TrainLoader) -> str:
    """The error within three epochs: a single one may leave the damaged sample out."""
    with pytest.raises(DataError) as caught:
        list(chain.from_iterable(loader.epoch(epoch) for epoch in range(3)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_damage_header, "no tar header is where the manifest says"),
        (_damage_image, "the image cannot be decoded as JPEG: Not a JPEG file"),
        (lambda data, shard, sample: shards_of(data.split("train"))[shard].path.unlink(), "the shard is missing"),
        (lambda data, shard, sample: _truncate(data, shard), "the shard is cut off: it has"),
    ],
)
def test_damage_stops_the_run(copy: ShardSet, damage: Callable[[ShardSet, int, int], object], reason: str) -> None:
    damage(copy, 2, 1)
    message = _stopped(_loader(copy))
    assert f"shard {copy.folder / 'train-000002.tar'}: sample 'train_" in message
    assert reason in message
    assert f"`python data_prep/tiny.py --verify {copy.folder}`" in message
    assert f"`python data_prep/tiny.py --root here --out {copy.folder}-new`" in message
    assert {found.shard for found in verify(copy.folder)} == {"train-000002.tar"}, "and that command finds it"


def test_skipped_samples_are_counted_named_and_replaced(copy: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    lost = {_damage_header(copy, 0, 1), _damage_image(copy, 1, 0), *_truncate(copy, 3)}
    lost |= {key for key in map(str, copy.split("train").keys) if "000004" in _shard_of(copy, key)}
    shards_of(copy.split("train"))[4].path.unlink()
    with caplog.at_level(logging.WARNING, logger=readers_module.__name__):
        loader = _loader(copy, on_error="skip", batch_size=1)
        for epoch in range(2):
            batches = list(loader.epoch(epoch))
            assert len(batches) == loader.steps_per_epoch == NUM_TRAIN
            keys = Counter(_keys(iter(batches)))
            assert {skipped.key for skipped in loader.skipped} == lost
            assert keys.keys() == {f"train_{i}" for i in range(NUM_TRAIN)} - lost, "every good sample still comes"
    reasons = {skipped.shard: skipped.reason for skipped in loader.skipped}
    assert reasons["train-000004.tar"] == "the shard is missing"
    assert "cut off" in reasons["train-000003.tar"]
    assert "decoded" in reasons["train-000001.tar"]
    assert "header" in reasons["train-000000.tar"]
    assert len(caplog.records) == 4, "one line per shard, however many samples and epochs"
    assert _equal(list(loader.epoch(1)), batches), "stand-ins are repeatable too"


def _shard_of(data: ShardSet, key: str) -> str:
    split = data.split("train")
    index = [split.key(i) for i in range(split.num_samples)].index(key)
    return next(s.name for s in shards_of(split) if s.first <= index < s.first + s.num_samples)


def test_a_stand_in_is_cropped_anew(copy: ShardSet) -> None:
    for shard in range(1, 5):
        shards_of(copy.split("train"))[shard].path.unlink()
    batches = list(_loader(copy, on_error="skip", batch_size=23).epoch(0))
    assert len(set(batches[0].keys)) == COUNTS[0]
    assert len(batches[0].images.flatten(1).unique(dim=0)) > 18, "not the same crops over again"


def test_nothing_readable_is_an_error_even_when_skipping(copy: ShardSet) -> None:
    for path in copy.folder.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"none of the 22 samples of a reader \(shards train-000000.tar, .*--verify"):
        list(_loader(copy, on_error="skip").epoch(0))


def test_damage_reaches_the_training_process_as_a_plain_message(copy: ShardSet) -> None:
    shards_of(copy.split("train"))[2].path.unlink()
    message = _stopped(_loader(copy, workers=2))
    assert message.startswith("shard ")
    assert "Traceback" not in message


def test_a_swapped_shard_is_noticed(copy: ShardSet) -> None:
    """A shard in the place of another one of the same layout."""
    entries = shards_of(copy.split("train"))
    shutil.copy(entries[1].path, entries[3].path)
    assert "its place in the tar holds 'train_" in _stopped(_loader(copy)) or "no tar header" in _stopped(_loader(copy))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ((3, 1), "a batch of 2 crops has 1 samples"),
        ((10, 0), "gave this rank 10 batches of 20 samples in all, planned were 11 .* of 22"),
    ],
)
def test_a_sample_lost_within_the_pipeline_is_noticed(
    data: ShardSet, monkeypatch: pytest.MonkeyPatch, lost: tuple[int, int], message: str
) -> None:
    plan = train_loader_module._TrainReader._plan_batches

    def lossy(*arguments: Any) -> Iterator[Any]:
        items = list(plan(*arguments))
        del items[lost[0]][lost[1] :]
        return iter(batch for batch in items if batch)

    monkeypatch.setattr(train_loader_module._TrainReader, "_plan_batches", lossy)
    with pytest.raises(DataError, match=message):
        list(_loader(data).epoch(0))
