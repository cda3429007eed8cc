"""Pseudo masks as a data set: what it holds, how good it is said to be, and what being killed leaves of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import fs

from data_prep.shard_writer import verify
from slrnet.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from slrnet.checkpoints.run_store import RunStore, local_run
from slrnet.cli.main import main
from slrnet.config import apply_overrides
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.distributed.process import Process
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.inference.forward import Inference
from slrnet.launch import pseudo_label
from slrnet.launch.cluster import WorkerRequest
from slrnet.launch.evaluation import launch_evaluation
from slrnet.launch.prediction import MaskJob
from slrnet.launch.pseudo_label import RECORD, SUBSET, check_distillation, launch_pseudo_labels
from slrnet.launch.train import LaunchOptions, TrainingError
from slrnet.storage.remote import RemoteError, copy_to
from tests.fixtures.shards import shards_of

ROOT = Path(__file__).resolve().parents[3]
GATED = ("evaluation.gating=image_labels", "inference.void_below=0.5")


def label(
    checkpoint: Checkpoint, data: ShardSet, out: Path | str, *changes: str, splits: tuple[str, ...] = ("train",)
) -> dict[str, Any]:
    config = apply_overrides(checkpoint.config, changes)
    return launch_pseudo_labels(MaskJob(checkpoint, config, data, splits), out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def notes(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    entries = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if member.name.endswith(".json") and file is not None:
                    entries[member.name.removesuffix(".json")] = json.load(file)
    return entries


@pytest.fixture(scope="module")
def made(
    checkpoint: Checkpoint, tiny_data: ShardSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ShardSet, dict[str, Any]]:
    """The training split, gated by image labels, one scale."""
    out = tmp_path_factory.mktemp("pseudo") / "shards"
    record = label(checkpoint, tiny_data, out, *GATED)
    return load_dataset(out), record


class TestTheDataSet:
    def test_is_whole(self, made: tuple[ShardSet, Any], tiny_data: ShardSet) -> None:
        shards = made[0]
        assert verify(shards.folder) == []
        names = {path.name for path in shards.folder.iterdir()}
        old = {path.name for path in tiny_data.folder.iterdir()}
        assert names == old | {RECORD}
        assert shards.info.classes == tiny_data.info.classes
        assert shards.info.made_by.startswith("python ray_jobs/pseudo_label.py --checkpoint ")
        assert not list(shards.folder.parent.glob(".*"))

    def test_labeled_samples_keep_image_and_labels_and_belong_to_the_subset(
        self, made: tuple[ShardSet, Any], tiny_data: ShardSet
    ) -> None:
        before, after = tiny_data.split("train"), made[0].split("train")
        assert after.keys.equals(before.keys)
        assert after.column("classes").equals(before.column("classes"))
        assert after.in_subset(SUBSET).all()
        assert len(after.with_masks) == after.num_samples
        for old, new in zip(EvalLoader(tiny_data, split="train"), EvalLoader(made[0], split="train"), strict=True):
            assert old.image.equal(new.image)

    def test_other_splits_are_taken_over(self, made: tuple[ShardSet, Any], tiny_data: ShardSet) -> None:
        for entry in shards_of(tiny_data.split("val")):
            assert (made[0].folder / entry.name).read_bytes() == entry.path.read_bytes()
        assert SUBSET not in made[0].split("val").subset_names

    def test_masks_are_the_networks_void_where_it_is_not_sure(
        self, made: tuple[ShardSet, Any], checkpoint: Checkpoint
    ) -> None:
        from slrnet.checkpoints.checkpoint import restore_model

        model = restore_model(checkpoint).eval()
        described = notes(made[0].folder, "train")
        void = 0
        for sample in EvalLoader(made[0], split="train"):
            probs = Inference(model, checkpoint.config).predict(sample.image, "ss")[0][0]
            probs[1:] *= sample.image_labels[:, None, None]
            confidence, mask = (probs / probs.sum(dim=0)).max(dim=0)
            expected = torch.where(confidence < 0.5, IGNORE_INDEX, mask)
            assert sample.pixel_labels is not None
            assert (sample.pixel_labels != expected).float().mean() < 1e-3  # ties within rounding
            note = described[sample.key]["pseudo_label"]
            assert note["confidence"] == pytest.approx(float(confidence.mean()), abs=2e-4)
            assert note["coverage"] == pytest.approx(
                float((sample.pixel_labels != IGNORE_INDEX).float().mean()), abs=1e-4
            )
            assert note["protocol"] == "ss+gated_by_image_labels"
            assert set(note["class_confidence"]) == {made[0].info.classes[int(i)] for i in mask.unique()}
            void += int((sample.pixel_labels == IGNORE_INDEX).sum())
        assert void > 0

    def test_quality_is_that_of_the_masks(self, made: tuple[ShardSet, Any], tiny_data: ShardSet) -> None:
        kept = ConfusionMatrix(4)
        pairs = zip(EvalLoader(made[0], split="train"), EvalLoader(tiny_data, split="train"), strict=True)
        for new, true in pairs:
            assert new.pixel_labels is not None
            assert true.pixel_labels is not None
            kept.update(new.pixel_labels, true.pixel_labels)
        quality = made[1]["quality"]["train"]
        assert list(quality) == ["ss+gated_by_image_labels", "ss+gated_by_image_labels, void below 0.5"]
        thresholded = quality["ss+gated_by_image_labels, void below 0.5"]
        assert thresholded["images"] == 9
        assert thresholded["metrics"]["miou"] == pytest.approx(kept.miou(), abs=1e-12)
        assert thresholded["metrics"]["coverage"] == pytest.approx(kept.coverage(), abs=1e-12)
        assert quality["ss+gated_by_image_labels"]["metrics"]["coverage"] == 1

    def test_quality_is_what_an_evaluation_says(
        self, made: tuple[ShardSet, Any], checkpoint: Checkpoint, tiny_data: ShardSet, tmp_path: Path
    ) -> None:
        config = apply_overrides(checkpoint.config, GATED)
        options = LaunchOptions(name="evaluation", storage=tmp_path, num_workers=0)
        record = launch_evaluation(MaskJob(checkpoint, config, tiny_data, ("train",)), options)
        metrics = made[1]["quality"]["train"][record["protocol"]]["metrics"]
        assert metrics["miou"] == pytest.approx(record["metrics"]["val/miou"], abs=1e-12)

    def test_the_record_lies_beside_the_shards(self, made: tuple[ShardSet, Any]) -> None:
        record = json.loads((made[0].folder / RECORD).read_text())
        assert record == {name: value for name, value in made[1].items() if name != "mlflow"}
        assert record["job"]["splits"] == ["train"]


def test_the_crf_is_measured_beside_what_it_started_from(
    checkpoint: Checkpoint, tiny_data: ShardSet, tmp_path: Path
) -> None:
    pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")
    changes = (*GATED, "evaluation.protocol=ms_crf", "evaluation.scales=1.0")
    record = label(checkpoint, tiny_data, tmp_path / "out", *changes, splits=("val",))
    without, with_crf, kept = record["quality"]["val"].values()
    names = list(record["quality"]["val"])
    assert names[:2] == [f"{name}+scales_1+gated_by_image_labels" for name in ("ms", "ms_crf")]
    assert without["metrics"]["miou"] != with_crf["metrics"]["miou"]
    assert kept["metrics"]["coverage"] <= 1
    config = apply_overrides(checkpoint.config, changes)
    options = LaunchOptions(name="evaluation", storage=tmp_path, num_workers=0)
    measured = launch_evaluation(MaskJob(checkpoint, config, tiny_data, ("val",)), options)
    assert with_crf["metrics"]["miou"] == pytest.approx(measured["metrics"]["val/miou"], abs=1e-12)


def test_true_masks_change_nothing_but_the_measure(
    made: tuple[ShardSet, Any], checkpoint: Checkpoint, write_tiny: Callable[..., ShardSet], tmp_path: Path
) -> None:
    blank = np.zeros((1, 1), dtype=np.uint8)

    def empty(sample: Any, png: bytes) -> bytes:
        import io

        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(np.broadcast_to(blank, (sample.height, sample.width)).copy()).save(file, "PNG")
        return file.getvalue()

    other = write_tiny(tmp_path / "shards", mask_bytes=empty)
    record = label(checkpoint, other, tmp_path / "out", *GATED)
    for entry in shards_of(made[0].split("train")):
        assert (tmp_path / "out" / entry.name).read_bytes() == entry.path.read_bytes()
    assert record["quality"] != made[1]["quality"]


def test_workers_in_any_order_on_machines_that_share_no_folder_make_the_same_shards(
    made: tuple[ShardSet, Any],
    checkpoint: Checkpoint,
    tiny_data: ShardSet,
    s3: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint is in an object store: each machine fetches that one, and the shards come back as bytes."""
    s3.create_dir("runs")
    run = tmp_path / "run"
    parts: dict[str, Any] = {"config": checkpoint.config, "model": checkpoint.model, "optimizer": {}}
    for epoch, score in ((1, 0.9), (2, 0.1)):
        state = replace(checkpoint.state, epoch=epoch, step=epoch, metrics={"val/miou_ss": score})
        save_checkpoint(run / "checkpoints", state=state, **parts)
    RunStore("s3://runs/mine", run).upload()

    def two_workers(open_work: Any, values: dict[str, Any], parts: list[Any], request: Any) -> Iterator[Any]:
        workers = []
        for name in ("one", "two"):
            monkeypatch.setenv("SLRNET_CACHE", str(tmp_path / name))
            workers.append(open_work(values | {"cpus": 1}, Process(), lambda: None))
        for place in (2, 3, 0, 1):
            yield from workers[place % 2]([parts[place]])

    monkeypatch.setattr(pseudo_label, "hand_out", two_workers)
    config = apply_overrides(checkpoint.config, GATED)
    job = MaskJob(load_checkpoint(local_run("s3://runs/mine")), config, tiny_data, ("train",))
    record = launch_pseudo_labels(job, tmp_path / "shards", request=WorkerRequest(num_workers=2))
    assert record["job"]["checkpoint"] == "s3://runs/mine/checkpoints/checkpoint-0001"  # the best
    ours, theirs = (
        {n: b for n, b in content(f).items() if n.endswith(".tar")} for f in (tmp_path / "shards", made[0].folder)
    )
    assert ours == theirs
    for name in ("cache", "one", "two"):
        assert [path.name for path in (tmp_path / name).glob("*/mine/checkpoints/c*")] == ["checkpoint-0001"]


def test_a_distillation_takes_pseudo_masks_in_an_object_store(
    made: tuple[ShardSet, Any], checkpoint: Checkpoint, s3: Any
) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `distill` is not installed")
    s3.create_dir("data")
    for path in made[0].folder.iterdir():
        with s3.open_output_stream(f"data/pseudo/{path.name}") as file:
            file.write(path.read_bytes())
    config = apply_overrides(checkpoint.config, ["data.path=s3://data/pseudo"])
    assert check_distillation(config).startswith(f"teacher {checkpoint.path}, masks by ss")
    with pytest.raises(RemoteError, match="s3://data/none.* does not exist"):
        check_distillation(apply_overrides(config, ["data.path=s3://data/none"]))


class TestStops:
    @pytest.fixture
    def predicted(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Counts predicted images, and stops where the list's first entry says so."""
        calls, predict = [0, 10**6], Inference.predict

        def counted(*arguments: Any) -> Any:
            if calls[0] == calls[1]:
                raise RuntimeError("stopped here")
            calls[0] += 1
            return predict(*arguments)

        monkeypatch.setattr(Inference, "predict", counted)
        return calls

    def test_a_stopped_job_goes_on_with_what_is_missing(
        self,
        predicted: list[int],
        made: tuple[ShardSet, Any],
        checkpoint: Checkpoint,
        tiny_data: ShardSet,
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "shards"
        for stop in (4, 6):  # in the second shard, then again
            predicted[1] = stop
            with pytest.raises(TrainingError, match="stopped here"):
                label(checkpoint, tiny_data, out, *GATED)
            assert not out.exists()
        predicted[1] = 10**6
        before = predicted[0]
        label(checkpoint, tiny_data, out, *GATED)
        assert [entry.num_samples for entry in shards_of(tiny_data.split("train"))] == [2, 2, 2, 3]
        assert (before, predicted[0]) == (6, 9)  # no finished shard is made again
        assert content(out) == content(made[0].folder)
        label(checkpoint, tiny_data, out, *GATED)  # all is done
        assert predicted[0] == 9
        assert content(out) == content(made[0].folder)

    def test_a_damaged_shard_is_made_anew(
        self,
        predicted: list[int],
        made: tuple[ShardSet, Any],
        checkpoint: Checkpoint,
        tiny_data: ShardSet,
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "shards"
        predicted[1] = 6
        with pytest.raises(TrainingError):
            label(checkpoint, tiny_data, out, *GATED)
        first = tmp_path / ".shards.partial" / shards_of(tiny_data.split("train"))[0].name
        first.write_bytes(first.read_bytes()[:-1] + b"x")
        predicted[1] = 10**6
        label(checkpoint, tiny_data, out, *GATED)
        assert content(out) == content(made[0].folder)

    def test_unfinished_or_finished_work_of_another_job_is_not_touched(
        self,
        predicted: list[int],
        checkpoint: Checkpoint,
        tiny_data: ShardSet,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "shards"
        predicted[1] = 4
        with pytest.raises(TrainingError):
            label(checkpoint, tiny_data, out, *GATED)
        predicted[1] = 10**6
        with pytest.raises(ValueError, match=r"unfinished work of another job \(void_below 0.5, now 0.7\)"):
            label(checkpoint, tiny_data, out, GATED[0], "inference.void_below=0.7")
        label(checkpoint, tiny_data, out, *GATED)
        with pytest.raises(ValueError, match="holds other pseudo masks"):
            label(checkpoint, tiny_data, out, GATED[0], "inference.void_below=0.7")
        assert "already holds these" not in capsys.readouterr().out
        label(checkpoint, tiny_data, out, *GATED)
        assert f"{out} already holds these pseudo masks; none was made again" in capsys.readouterr().out


def test_mistakes_are_refused_before_anything_is_written(
    checkpoint: Checkpoint, tiny_data: ShardSet, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    with pytest.raises(DataError, match="has no split 'test'"):
        label(checkpoint, tiny_data, out, splits=("test",))
    state = replace(checkpoint.state, classes=("background", "other"))
    with pytest.raises(CheckpointError, match="the checkpoint knows 2 classes"):
        label(replace(checkpoint, state=state), tiny_data, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ValueError, match="exists and holds no pseudo masks"):
        label(checkpoint, tiny_data, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_damaged_sample_costs_itself_alone(
    checkpoint: Checkpoint, write_tiny: Callable[..., ShardSet], tmp_path: Path
) -> None:
    shards = write_tiny(tmp_path / "data")
    entry = shards_of(shards.split("train"))[1]
    with entry.path.open("r+b") as file:
        file.seek(int(entry.offsets[0]) + 512)
        file.write(b"\0" * 300)
    key, *others = shards.split("train").keys.to_pylist()[entry.first : entry.first + entry.num_samples]
    record = label(checkpoint, shards, tmp_path / "out")
    assert list(record["left_out"]) == [f"{entry.name}: {key}"]
    made = load_dataset(tmp_path / "out").split("train")
    assert made.num_samples == shards.split("train").num_samples - 1
    assert set(others) < set(made.keys.to_pylist())
    assert label(checkpoint, shards, tmp_path / "out")["left_out"] == record["left_out"]


@pytest.mark.slow
def test_killed_twice_the_bytes_are_those_of_an_undisturbed_run(
    checkpoint: Checkpoint, write_tiny: Callable[..., ShardSet], tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", num_train=48, shards=12, num_val=12)
    arguments = ["--checkpoint", str(checkpoint.path), "--data", str(data.folder), "--splits", "all"]
    arguments += ["--protocol", "ms", "--out"]
    started = time.monotonic()
    assert main(["pseudo-label", *arguments, str(tmp_path / "undisturbed")]) == 0
    seconds, rng = time.monotonic() - started, random.Random(time.time_ns())
    for _ in range(2):
        script = [sys.executable, str(ROOT / "ray_jobs" / "pseudo_label.py"), *arguments, str(tmp_path / "killed")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(script, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _wait_for_trace(process, tmp_path / ".killed.partial")
        time.sleep(rng.uniform(0, seconds / 3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    assert main(["pseudo-label", *arguments, str(tmp_path / "killed")]) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    assert verify(tmp_path / "killed") == []


def _wait_for_trace(process: subprocess.Popen[bytes], path: Path) -> None:
    """Until the path exists or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def test_into_an_object_store(
    checkpoint: Checkpoint, tiny_data: ShardSet, made: tuple[ShardSet, dict[str, Any]], s3: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A copying that is killed leaves no data set, and the next start completes it."""
    s3.create_dir("masks")
    place = "s3://masks/all/first"

    def kill(source: Path, target: str) -> None:
        if source.name == "dataset.json":
            raise KeyboardInterrupt
        copy_to(source, target)

    def stored() -> dict[str, bytes]:
        files = s3.get_file_info(fs.FileSelector("masks/all/first", recursive=True, allow_not_found=True))
        return {info.base_name: s3.open_input_stream(info.path).read() for info in files}

    monkeypatch.setattr(pseudo_label, "copy_to", kill)
    with pytest.raises(KeyboardInterrupt):
        label(checkpoint, tiny_data, place, *GATED)
    with pytest.raises(RemoteError, match=r"dataset.json does not exist"):
        load_dataset(place)
    with pytest.raises(ValueError, match="the unfinished copy of other pseudo masks; choose another --out"):
        label(checkpoint, tiny_data, place)
    monkeypatch.setattr(pseudo_label, "copy_to", copy_to)
    record = label(checkpoint, tiny_data, f"{place}/", *GATED)
    assert record["quality"] == made[1]["quality"]
    here = content(Path(made[0].location))
    assert {name: data for name, data in stored().items() if name != RECORD} == {
        name: data for name, data in here.items() if name != RECORD
    }
    assert not list((tmp_path / "cache").rglob("made"))  # nothing stays on this machine
    capsys.readouterr()
    assert label(checkpoint, tiny_data, place, *GATED) == record
    assert f"{place} already holds these pseudo masks" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds other pseudo masks"):
        label(checkpoint, tiny_data, place)
    copy_to(tmp_path / "cache", "s3://masks/other")
    with pytest.raises(ValueError, match="holds no pseudo masks but .*; choose another --out"):
        label(checkpoint, tiny_data, "s3://masks/other")
