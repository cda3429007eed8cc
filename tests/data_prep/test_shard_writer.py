from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.conversion import add_common_arguments, run_conversion
from data_prep.shard_writer import Sample, check_output, verify, write_dataset
from data_prep.workers import ConversionPool
from slrnet.cli.main import exit_code
from slrnet.data.catalog import voc_palette
from slrnet.data.manifest import DataError, DatasetInfo, load_dataset
from tests.fixtures.shards import shards_of, table_of

CLASSES = ("background", "cat", "dog")
ROOT = Path(__file__).resolve().parents[2]


def _encode(sample: Sample) -> tuple[bytes, bytes | None]:
    """Bytes that depend on the key alone, of lengths that are no whole tar blocks; every third has no mask."""
    random_ = random.Random(sample.key)
    image = random_.randbytes(random_.randint(1, 1500))
    return image, None if int(sample.key[1:]) % 3 == 0 else random_.randbytes(512)


def _fail_at_seven(sample: Sample) -> tuple[bytes, bytes | None]:
    if sample.key == "k7":
        raise DataError("k7.jpg cannot be read")
    return _encode(sample)


def _samples(count: int = 20, split: str = "train") -> list[Sample]:
    return [
        Sample(
            key=f"k{n}", split=split, width=n + 1, height=2 * n + 1, classes=(1 + n % 2,), subsets=("few",) * (n < 3)
        )
        for n in range(count)
    ]


def _write(
    out: Path,
    samples: Sequence[Sample] | None = None,
    *,
    processes: int = 1,
    samples_per_shard: int = 6,
    **options: int,
) -> DatasetInfo:
    with ConversionPool(processes) as workers:
        return write_dataset(
            out,
            [*_samples(), *_samples(5, "val")] if samples is None else samples,
            _encode,
            name="tiny",
            classes=CLASSES,
            palette=voc_palette(),
            made_by="python data_prep/voc.py --root VOC2012",
            samples_per_shard=samples_per_shard,
            workers=workers,
            **options,
        )


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "shards"
    _write(folder)
    return folder


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A fresh copy that a test may damage."""
    _write(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.slow
def test_output_is_byte_identical_for_any_number_of_processes(shards: Path, tmp_path: Path) -> None:
    _write(tmp_path / "two", processes=2)
    assert _contents(tmp_path / "two") == _contents(shards)


def test_output_does_not_depend_on_the_order_of_the_samples_but_on_the_seed(shards: Path, tmp_path: Path) -> None:
    _write(tmp_path / "reversed", [*_samples(), *_samples(5, "val")][::-1])
    _write(tmp_path / "seeded", seed=1)
    assert _contents(tmp_path / "reversed") == _contents(shards)
    assert _contents(tmp_path / "seeded")["train-000000.tar"] != _contents(shards)["train-000000.tar"]


def test_shards_are_even_and_mixed(shards: Path) -> None:
    train = load_dataset(shards).split("train")
    assert [entry.num_samples for entry in shards_of(train)] == [5, 5, 5, 5]  # 20 samples, at most 6 each
    assert sorted(train.keys.to_pylist()) == sorted(f"k{n}" for n in range(20))
    assert train.keys.to_pylist() != sorted(train.keys.to_pylist())


def test_number_of_shards_can_be_given(tmp_path: Path) -> None:
    _write(tmp_path / "shards", shards=3)
    assert [entry.num_samples for entry in shards_of(load_dataset(tmp_path / "shards").split("train"))] == [6, 7, 7]
    assert len(shards_of(load_dataset(tmp_path / "shards").split("val"))) == 3


def test_manifest_says_what_lies_at_each_offset(shards: Path) -> None:
    dataset = load_dataset(shards)
    by_key = {sample.key: sample for sample in _samples()}
    for row in table_of(dataset.folder).to_pylist():
        data = (shards / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["bytes"]]
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
        key, sample = row["key"], by_key[row["key"]]
        image, mask = _encode(sample)
        record = files.pop(f"{key}.json")
        assert files == {f"{key}.jpg": image} | ({f"{key}.png": mask} if mask is not None else {})
        assert list(files) == [f"{key}.jpg", f"{key}.png"][: len(files)]
        assert row["sha256"] == hashlib.sha256(image + (mask or b"") + record).hexdigest()
        assert row["has_mask"] == (mask is not None)
        assert (row["width"], row["height"]) == (sample.width, sample.height)
        assert row["classes"] == list(sample.classes or ())
        assert row["has_image_labels"]
        assert row["subsets"] == list(sample.subsets)
        assert json.loads(record) == {
            "key": key,
            "classes": row["classes"],
            "subsets": row["subsets"],
            "width": row["width"],
            "height": row["height"],
        }


def test_unknown_labels_are_not_the_same_as_no_objects(tmp_path: Path) -> None:
    samples = [
        Sample(key=key, split="train", width=1, height=1, classes=classes)
        for key, classes in {"k1": (), "k2": None}.items()
    ]
    _write(tmp_path / "shards", samples)
    rows = table_of(tmp_path / "shards").sort_by("key").to_pylist()
    assert [(row["classes"], row["has_image_labels"]) for row in rows] == [([], True), ([], False)]
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as archive:
        records = [json.load(archive.extractfile(f"k{n}.json")) for n in (1, 2)]  # type: ignore[arg-type]
    assert [record["classes"] for record in records] == [[], None]


def test_tar_headers_carry_nothing_of_the_machine(shards: Path) -> None:
    with tarfile.open(shards / "train-000000.tar") as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert {m.pax_headers == {} for m in members} == {True}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it to the collector
def test_webdataset_reads_the_shards_in_the_order_of_the_manifest(shards: Path) -> None:
    import webdataset as wds  # here, for the worker processes import this file and need no torch

    val = load_dataset(shards).split("val")
    read = list(wds.WebDataset([str(entry.path) for entry in shards_of(val)], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == val.keys.to_pylist()
    assert [set(sample) & {"jpg", "png", "json"} for sample in read] == [
        {"jpg", "png", "json"} if has_mask else {"jpg", "json"} for has_mask in val.column("has_mask").to_pylist()
    ]


# Refusals.


def test_output_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"out is not empty; give another --out"):
        _write(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_output_in_rays_copy_of_the_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ValueError, match=r"own would be in Ray's copy of the project.*such as \$PWD/own"):
        check_output("own")
    assert check_output(tmp_path / "own") == tmp_path / "own"


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="is a file; give another --out"):
        _write(tmp_path / "out")


def test_empty_output_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out")
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("img.1", r"key 'img.1' has a dot.*rename"),
        ("a/b", "key 'a/b' is empty or has a space, slash"),
        ("", "key '' is empty"),
        ("a b", "key 'a b' is empty or has a space"),
        ("k" * 91, "is longer than 90 bytes"),
    ],
)
def test_unfit_keys_are_refused(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _write(tmp_path / "out", [Sample(key=key, split="train", width=1, height=1, classes=(1,))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("split", "subset"), [("../x", "a"), ("train", "../x"), ("/x", "a"), ("a\nb", "a")])
def test_splits_and_subsets_that_could_become_paths_are_refused(tmp_path: Path, split: str, subset: str) -> None:
    sample = Sample(key="k", split=split, width=1, height=1, classes=(1,), subsets=(subset,))
    with pytest.raises(DataError, match="the (split|subset) is .* is needed"):
        _write(tmp_path / "out", [sample])
    assert list(tmp_path.iterdir()) == []


def test_longest_key_fits_a_tar_header(tmp_path: Path) -> None:
    sample = Sample(key="0" * 90, split="train", width=1, height=1, classes=(1,))
    write_dataset(tmp_path / "out", [sample], _constant, name="t", classes=CLASSES, palette=voc_palette(), made_by="x")
    assert verify(tmp_path / "out") == []


def _constant(sample: Sample) -> tuple[bytes, None]:
    return b"jpg", None


def test_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="key 'k1' occurs twice in split 'train'"):
        _write(tmp_path / "out", [*_samples(3), _samples(3)[1]])


@pytest.mark.parametrize("label", [0, 3, 255])
def test_class_ids_outside_the_classes_are_refused(tmp_path: Path, label: int) -> None:
    with pytest.raises(DataError, match=rf"has classes \({label},\); allowed are 1 to 2"):
        _write(tmp_path / "out", [Sample(key="a", split="train", width=1, height=1, classes=(label,))])


def test_fewer_samples_than_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split 'val' has 5 samples, fewer than the 6 shards .*--shards 5 or fewer"):
        _write(tmp_path / "out", shards=6)
    assert list(tmp_path.iterdir()) == []


def test_no_samples_and_senseless_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample to write"):
        _write(tmp_path / "out", [])
    with pytest.raises(DataError, match="must be at least 1"):
        _write(tmp_path / "out", samples_per_shard=0)


def test_problems_are_listed_up_to_ten_and_counted(tmp_path: Path) -> None:
    samples = [Sample(key=f"a.{n}", split="train", width=1, height=1, classes=(1,)) for n in range(25)]
    with pytest.raises(DataError) as caught:
        _write(tmp_path / "out", samples)
    message = str(caught.value)
    assert message.startswith("25 problem(s)")
    assert message.count("has a dot") == 10
    assert message.endswith("... and 15 more")


# Nothing is left behind.


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_failure_midway_leaves_nothing_behind(tmp_path: Path, processes: int) -> None:
    with ConversionPool(processes) as workers, pytest.raises(DataError, match=r"k7.jpg cannot be read"):
        write_dataset(
            tmp_path / "out",
            _samples(),
            _fail_at_seven,
            name="tiny",
            classes=CLASSES,
            palette=voc_palette(),
            made_by="x",
            samples_per_shard=2,
            workers=workers,
        )
    assert list(tmp_path.iterdir()) == []


SLOW_WRITER = """
import argparse, signal, sys, time
from data_prep.conversion import add_common_arguments, run_conversion
from data_prep.shard_writer import Sample, write_dataset
from slrnet.cli.main import exit_code
from slrnet.data.catalog import voc_palette

def encode(sample):
    print("encoding", flush=True)
    time.sleep(0.2)
    return b"jpg", None

def make(_):
    samples = [Sample(key=f"k{n}", split="train", width=1, height=1, classes=(1,)) for n in range(1000)]
    return write_dataset(options.out, samples, encode, name="slow", classes=("background", "cat"),
                         palette=voc_palette(), made_by="x", samples_per_shard=2)

# A shell that starts tests in the background has them ignore the interrupt key, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
parser = argparse.ArgumentParser()
add_common_arguments(parser)
options = parser.parse_args()
sys.exit(exit_code(lambda: run_conversion(options, make), interrupted=options.interrupted))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_interruption_leaves_nothing_behind(tmp_path: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-c", SLOW_WRITER, "--out", str(tmp_path / "shards" / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "encoding\n"
        deadline = time.monotonic() + 120
        while not list((tmp_path / "shards").glob(".out.*.partial/out/*.tar")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(sent)
        assert process.wait(timeout=120) == 128 + sent
        assert process.stderr.read().endswith("interrupted; nothing was written\n")
    assert [path for path in tmp_path.rglob("*") if path.name != "shards"] == []


# Verifying.


def test_whole_shards_verify(shards: Path) -> None:
    assert verify(shards) == []


@pytest.mark.slow
def test_any_flipped_byte_is_found_and_its_sample_named(damaged: Path) -> None:
    """Contents, headers and padding alike."""
    dataset = load_dataset(damaged)
    entry = shards_of(dataset.split("train"))[1]
    whole = entry.path.read_bytes()
    random_ = random.Random(0)
    for index in range(entry.num_samples):
        key = dataset.split("train").key(entry.first + index)
        start, size = int(entry.offsets[index]), int(entry.sizes[index])
        # The name, the mode, the checksum, the padding of the header, the last byte of the padding, and some others.
        places = [0, 100, 148, 511, size - 1, *(random_.randrange(size) for _ in range(3))]
        for place in places:
            broken = bytearray(whole)
            broken[start + place] ^= 1 << random_.randrange(8)
            entry.path.write_bytes(broken)
            damage = verify(damaged)
            assert [(d.shard, d.keys) for d in damage] == [(entry.name, (key,))], f"byte {place} of {key}"


def test_cut_off_shard_names_the_samples_that_are_gone(damaged: Path) -> None:
    entry = shards_of(load_dataset(damaged).split("train"))[0]
    keys = load_dataset(damaged).split("train").keys.to_pylist()[: entry.num_samples]
    entry.path.write_bytes(entry.path.read_bytes()[: entry.offsets[2] + 700])
    (damage,) = verify(damaged)
    assert (damage.shard, list(damage.keys)) == (entry.name, keys[2:])


def test_missing_shard_is_named(damaged: Path) -> None:
    (damaged / "val-000000.tar").unlink()
    (damage,) = verify(damaged)
    assert str(damage).startswith("val-000000.tar: is missing, with 5 sample(s): k")


def test_foreign_bytes_and_foreign_shards_are_named(damaged: Path) -> None:
    with (damaged / "val-000000.tar").open("ab") as file:
        file.write(bytes(512))
    (damaged / "extra-000000.tar").write_bytes(b"")
    assert [(d.shard, d.keys) for d in verify(damaged)] == [("val-000000.tar", ()), ("extra-000000.tar", ())]


def test_swapped_samples_are_found(damaged: Path) -> None:
    """Each intact by itself, yet not where the manifest says."""
    first, second, *_ = shards_of(load_dataset(damaged).split("train"))
    data = first.path.read_bytes()
    first.path.write_bytes(second.path.read_bytes())
    second.path.write_bytes(data)
    assert {damage.shard for damage in verify(damaged)} == {first.name, second.name}


# Command line.


def _run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    options = parser.parse_args(words)
    return exit_code(lambda: run_conversion(options, lambda _: _write(options.out, processes=options.processes)))


def test_command_writes_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert _run("--out", out, "--processes", "1") == 0
    assert "20 train, 5 val samples, 3 classes" in capsys.readouterr().out
    assert _run("--verify", out, "--processes", "1") == 0
    assert "all 25 samples are intact" in capsys.readouterr().out


def test_command_says_how_to_repair(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged / "val-000000.tar").unlink()
    assert _run("--verify", str(damaged), "--processes", "1") == 1
    text = capsys.readouterr().err
    assert "val-000000.tar: is missing" in text
    assert f"repair with: python data_prep/voc.py --root VOC2012 --out {damaged}-new" in text


def test_command_refuses_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert _run("--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith("error: the output folder")
    with pytest.raises(SystemExit):
        _run()
    assert "one of the arguments --out --verify is required" in capsys.readouterr().err
