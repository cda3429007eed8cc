from __future__ import annotations

from pathlib import Path

import pytest

from slrnet.data.manifest import DataError, load_dataset


@pytest.mark.parametrize(
    ("files", "given", "told"),
    [
        (
            ["a/x.jpg"],
            "a",
            "it holds images; make shards with `slrnet prepare folder --images {}/a --labels .* --out {}/a_",
        ),
        (["a/in/x.PNG"], "a", "slrnet prepare folder --images {}/a --labels"),
        (
            ["my photos/x.webp"],
            "my photos",
            "--images '{}/my photos' --labels LABELS.csv --out '{}/my photos_shards'`, or",
        ),
        (["v/VOC2012/JPEGImages/x.jpg"], "v", "slrnet prepare voc --root {}/v/VOC2012 --out {}/v_shards`"),
        (["v/JPEGImages/x.jpg"], "v", "slrnet prepare voc --root {}/v --out"),
        (["c/annotations/instances_val2017.json"], "c", "slrnet prepare coco --root {}/c --out {}/c_shards`"),
        (["t/train-000000.tar"], "t", "slrnet prepare tars --tars {}/t --classes A,B --out"),
        (["s/one/dataset.json", "s/two/dataset.json"], "s", "give one of the data sets in it: {}/s/one, {}/s/two$"),
        (
            ["d/dataset.json"],
            "d/dataset.json",
            "is a file or is in one; give the folder of shards, which holds dataset.json",
        ),
        (["d/x.tar"], "d/x.tar", "is a file or is in one"),
        (["r/checkpoints/checkpoint-0001/state.json"], "r", "it is the folder of a run"),
        (["n/readme.txt"], "n", "holds nothing to train on; try .*`slrnet prepare demo --out {}/n_shards`"),
        (
            [],
            "nowhere",
            "there is no such folder .*slrnet prepare voc .*--out {}/nowhere`.*slrnet prepare demo --out {}/nowhere`",
        ),
    ],
)
def test_what_a_folder_without_shards_is_and_what_to_do(
    files: list[str], given: str, told: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"^no shards in {tmp_path / given}: .*{told.replace('{}', str(tmp_path))}"):
        load_dataset(tmp_path / given)
