from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.demo import CLASSES, Brush, build_demo, draw_scene, write_voc_folder
from data_prep.shard_writer import verify
from slrnet.data.manifest import DataError, load_dataset
from tests.fixtures.shards import table_of

Scenes = list[tuple[np.ndarray, np.ndarray]]


def drawn(*, hard: bool) -> Scenes:
    return [draw_scene(np.random.default_rng((0, 0, n)), 96, first_class=1 + n % 4, hard=hard) for n in range(40)]


@pytest.fixture(scope="module")
def easy() -> Scenes:
    return drawn(hard=False)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Of the hard set."""
    return drawn(hard=True)


def spread_of_colors(scenes: Scenes) -> tuple[float, float]:
    """Standard deviation of the mean color: of a class between pictures, and between the classes' means."""
    means: dict[int, list[np.ndarray]] = {label: [] for label in (1, 2, 3, 4)}
    for image, mask in scenes:
        for label in np.unique(mask):
            if label:
                means[int(label)].append(image[mask == label].mean(axis=0))
    within = np.mean([np.std(values, axis=0) for values in means.values()])
    return float(within), float(np.std([np.mean(values, axis=0) for values in means.values()], axis=0).mean())


def touches_border(mask: np.ndarray) -> bool:
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    for name, seed, processes in (("a", 3, 1), ("b", 3, 2), ("c", 4, 1)):
        build_demo(
            tmp_path / name, seed=seed, num_train=5, num_val=2, image_size=32, samples_per_shard=3, processes=processes
        )
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert files["a"]["train-000000.tar"] != files["c"]["train-000000.tar"]
    assert load_dataset(tmp_path / "a").info.fingerprint != load_dataset(tmp_path / "c").info.fingerprint


def test_takes_the_same_road_as_voc(tmp_path: Path) -> None:
    info = build_demo(tmp_path / "out", num_train=8, num_val=4, image_size=48, voc_folder=tmp_path / "voc")
    assert info.classes == CLASSES
    assert info.counts == {"train": 8, "val": 4}
    assert verify(tmp_path / "out") == []
    assert (tmp_path / "voc" / "labels.txt").read_text().split() == list(CLASSES)
    dataset = load_dataset(tmp_path / "out")
    for row in table_of(dataset.folder).to_pylist():
        with tarfile.open(tmp_path / "out" / row["shard"]) as archive:
            content = archive.extractfile(f"{row['key']}.png")
            assert content is not None
            with Image.open(io.BytesIO(content.read())) as image:
                assert (image.mode, image.size) == ("P", (48, 48))
                present = set(np.unique(np.asarray(image)).tolist()) - {0}
        assert set(row["classes"]) == present
        assert "voc_train" in row["subsets"] or row["split"] == "val"


def test_splits_show_different_pictures(tmp_path: Path) -> None:
    write_voc_folder(tmp_path, seed=0, num_train=6, num_val=6, image_size=32)
    pictures = [path.read_bytes() for path in (tmp_path / "JPEGImages").iterdir()]
    assert len(pictures) == len(set(pictures)) == 12


def test_every_class_is_frequent_and_pictures_show_several(scenes: Scenes) -> None:
    classes = [set(np.unique(mask).tolist()) - {0} for _, mask in scenes]
    counts = Counter(label for present in classes for label in present)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) >= 10
    assert sum(len(present) > 1 for present in classes) >= 12
    assert all(classes)


def test_sizes_vary_and_the_background_prevails(scenes: Scenes) -> None:
    shares = [float((mask == label).mean()) for _, mask in scenes for label in np.unique(mask) if label]
    assert min(shares) < 0.04
    assert max(shares) > 0.16
    assert 0.6 < np.mean([mask == 0 for _, mask in scenes]) < 0.95


def test_objects_overlap_and_are_cut_by_the_border(scenes: Scenes) -> None:
    touching = 0
    for _, mask in scenes:
        left, right = mask[:, :-1], mask[:, 1:]
        touching += bool(((left != right) & (left > 0) & (right > 0)).any())
    assert touching >= 5
    assert sum(touches_border(mask) for _, mask in scenes) >= 10


def test_color_alone_does_not_tell_the_hard_classes(scenes: Scenes) -> None:
    within, between = spread_of_colors(scenes)
    assert between < within


def test_color_tells_the_easy_classes_and_most_pictures_show_one_object(easy: Scenes) -> None:
    within, between = spread_of_colors(easy)
    assert between > 1.5 * within
    classes = [set(np.unique(mask).tolist()) - {0} for _, mask in easy]
    assert {label for present in classes for label in present} == {1, 2, 3, 4}
    assert sum(len(present) == 1 for present in classes) > len(classes) / 2
    assert sum(touches_border(mask) for _, mask in easy) < len(easy) / 2


def test_the_hard_set_has_other_pictures_and_says_so(tmp_path: Path) -> None:
    for name, hard in (("easy", False), ("hard", True)):
        build_demo(tmp_path / name, num_train=2, num_val=1, image_size=32, hard=hard)
    infos = {name: load_dataset(tmp_path / name).info for name in ("easy", "hard")}
    assert infos["easy"].fingerprint != infos["hard"].fingerprint
    assert [name for name, info in infos.items() if "--hard" in info.made_by.split()] == ["hard"]


def test_mask_is_what_was_painted() -> None:
    """A disc of radius 5 pixels around a known place covers exactly the pixels whose center is within it."""
    canvas, covered = np.zeros((40, 40, 3)), np.zeros((40, 40), dtype=np.bool_)
    brush = Brush.place(canvas, covered, np.random.default_rng(0), scale=10.0, angle=0.7, mirror=-1.0, margin=0.5)
    brush.paint(np.hypot(brush.x, brush.y) - 0.5, np.full(3, 200.0))
    rows, columns = np.mgrid[:40, :40] + 0.5
    distance = np.hypot(rows - 20, columns - 20)
    np.testing.assert_array_equal(covered, distance < 5)
    assert (canvas[distance < 4.5] == 200).all()
    assert (canvas[distance > 5.5] == 0).all()


def test_refused_numbers_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--val 0"):
        build_demo(tmp_path / "out", num_val=0)
    with pytest.raises(DataError, match="--image-size 16"):
        build_demo(tmp_path / "out", image_size=16)
    assert list(tmp_path.iterdir()) == []


def test_output_folder_that_is_not_empty_is_refused_before_drawing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        build_demo(tmp_path)
    with pytest.raises(DataError, match="is not empty"):
        build_demo(tmp_path / "out", voc_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
