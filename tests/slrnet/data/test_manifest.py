from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrnet.data.catalog import voc_palette
from slrnet.data.manifest import (
    SCHEMA,
    DataError,
    DatasetInfo,
    SplitView,
    fingerprint,
    load_dataset,
    save_dataset,
)

CLASSES = ("background", "fish", "kite", "ladybird")
VERSION_1_FINGERPRINT = "a99d74a32c16cde9f8e651f749ed194e21e3332ac2410b05b8f103ff5d366139"
"""What the program that wrote version 1 gave the samples of `_columns`."""


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
        _columns(**changes),
        name="tiny",
        classes=CLASSES,
        palette=voc_palette(),
        made_by="python data_prep/demo.py --seed 0",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _save(tmp_path / "shards")
    return tmp_path / "shards"


def test_description_survives_writing_and_reading(tmp_path: Path) -> None:
    info = _save(tmp_path / "shards")
    assert load_dataset(tmp_path / "shards").info == info
    assert info.classes == CLASSES
    assert info.num_classes == 4
    assert info.counts == {"train": 4, "val": 2}
    assert info.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    np.testing.assert_array_equal(info.palette_array(), voc_palette())


def test_split_lists_samples_by_shard_and_offset(folder: Path) -> None:
    train = load_dataset(folder).split("train")
    assert train.num_samples == 4
    assert train.keys.to_pylist() == ["a", "b", "c", "d"]
    assert [train.key(index) for index in range(4)] == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(train.sizes, [[13, 23], [15, 25], [12, 22], [14, 24]])
    np.testing.assert_array_equal(train.has_masks, [True, True, True, False])
    np.testing.assert_array_equal(train.has_image_labels, [False, True, True, True])


def test_shards_cover_the_split_in_order(folder: Path) -> None:
    first, second = load_dataset(folder).split("train").shards
    assert (first.name, second.name) == ("train-000000.tar", "train-000001.tar")
    assert first.path == folder / "train-000000.tar"
    assert (first.first, first.num_samples, second.first, second.num_samples) == (0, 2, 2, 2)
    np.testing.assert_array_equal(first.offsets, [0, 1024])
    np.testing.assert_array_equal(second.offsets, [0, 2048])
    np.testing.assert_array_equal(second.sizes, [2048, 3072])


def test_image_labels_are_multi_hot_without_the_background(folder: Path) -> None:
    train = load_dataset(folder).split("train")
    expected = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]], dtype=np.float32)
    np.testing.assert_array_equal(train.image_labels(), expected)
    np.testing.assert_array_equal(train.image_labels([3, 0, 3]), expected[[3, 0, 3]])
    assert train.image_labels([]).shape == (0, 3)
    assert train.image_labels().dtype == np.float32


@given(st.lists(st.sets(st.integers(1, 5)), min_size=1, max_size=8), st.data())
def test_image_labels_equal_a_slow_loop(classes: list[set[int]], data: st.DataObject) -> None:
    count = len(classes)
    indices = data.draw(st.lists(st.integers(0, count - 1)))
    columns = {name: [None] * count for name in SCHEMA.names}
    columns |= {"shard": ["s"] * count, "offset": list(range(count)), "classes": [sorted(ids) for ids in classes]}
    view = SplitView("train", table=_table(columns), folder=Path(), num_classes=6)
    expected = np.zeros((len(indices), 5), dtype=np.float32)
    for row, index in enumerate(indices):
        for label in classes[index]:
            expected[row, label - 1] = 1
    np.testing.assert_array_equal(view.image_labels(indices), expected)


def _table(columns: dict[str, Any]) -> Any:
    import pyarrow as pa

    return pa.table(columns, schema=SCHEMA)


def test_subsets_name_their_samples(folder: Path) -> None:
    train = load_dataset(folder).split("train")
    assert train.subset_names == ("half", "odd")
    np.testing.assert_array_equal(train.in_subset("half"), [True, False, True, False])
    np.testing.assert_array_equal(train.in_subset("odd"), [True, False, False, False])


def test_unknown_subset_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no subset 'labelled'; it has: half, odd.*--subset labelled=LISTFILE"):
        load_dataset(folder).split("train").in_subset("labelled")
    with pytest.raises(DataError, match="it has: none"):
        load_dataset(folder).split("val").in_subset("half")


def test_unknown_split_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has: train, val"):
        load_dataset(folder).split("test")


def test_folder_without_shards_is_refused_with_the_commands_that_make_them(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no shards in .*data_prep/voc.py .*--out .*data_prep/demo.py --out"):
            load_dataset(missing)


def test_foreign_version_is_refused(folder: Path) -> None:
    _rewrite(folder, version=7)
    with pytest.raises(DataError, match="format version 7, this program reads versions 1 to 2"):
        load_dataset(folder)


def test_a_folder_of_version_1_has_image_labels_everywhere_and_keeps_its_fingerprint(folder: Path) -> None:
    table = pq.read_table(folder / "manifest.parquet").drop_columns(["has_image_labels"])
    pq.write_table(table, folder / "manifest.parquet")
    _rewrite(folder, version=1, fingerprint=VERSION_1_FINGERPRINT)
    dataset = load_dataset(folder)
    assert dataset.info.version == 1
    assert dataset.info.fingerprint == VERSION_1_FINGERPRINT
    assert dataset.table.schema.equals(SCHEMA)
    np.testing.assert_array_equal(dataset.split("train").has_image_labels, [True] * 4)


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
    with pytest.raises(DataError, match=r"does not belong to .*make the data set anew: rm -r .*data_prep/demo.py"):
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
    digests = {fingerprint(CLASSES, _table(_columns())), fingerprint(CLASSES[:3], _table(_columns()))}
    for name, value in others.items():
        column = [*_columns()[name]]
        column[2] = value
        digests.add(fingerprint(CLASSES, _table(_columns(**{name: column}))))
    assert len(digests) == 2 + len(SCHEMA.names)


def test_fingerprint_tells_where_one_value_ends_and_the_next_begins() -> None:
    first = _table(_columns(key=["ab", "c", "d", "e", "f", "g"], classes=[[1, 2], [3], [], [], [], []]))
    moved_key = _table(_columns(key=["a", "bc", "d", "e", "f", "g"], classes=[[1, 2], [3], [], [], [], []]))
    moved_class = _table(_columns(key=["ab", "c", "d", "e", "f", "g"], classes=[[1], [2, 3], [], [], [], []]))
    assert len({fingerprint(CLASSES, table) for table in (first, moved_key, moved_class)}) == 3


def test_fingerprint_does_not_depend_on_chunks() -> None:
    import pyarrow as pa

    table = _table(_columns())
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    assert fingerprint(CLASSES, chunked) == fingerprint(CLASSES, table)


def test_commands_name_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my shards"
    _save(folder)
    dataset = load_dataset(folder)
    assert dataset.repair_command == f"rm -r '{folder}' && python data_prep/demo.py --seed 0 --out '{folder}'"
    assert dataset.verify_command == f"python data_prep/demo.py --verify '{folder}'"


def _rewrite(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(values | changes))


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
    table = pq.read_table(folder / "manifest.parquet")
    columns = table.to_pydict()
    columns[column][0] = value
    changed = pa.table(columns, schema=table.schema)
    pq.write_table(changed, folder / "manifest.parquet")
    description = json.loads((folder / "dataset.json").read_text())
    if value is not None and value != [None]:
        description["fingerprint"] = fingerprint(description["classes"], changed)
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=message):
        load_dataset(folder)


@pytest.mark.parametrize("classes", [["background"], ["background", "a", "a"], ["background", 3], []])
def test_classes_that_are_none_are_refused(folder: Path, classes: list[object]) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"classes": classes}))
    with pytest.raises(DataError, match="two names or more are needed, each once"):
        load_dataset(folder)
