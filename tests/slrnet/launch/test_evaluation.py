"""Evaluations of a checkpoint: the protocol's arithmetic, its name, and any split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slrnet.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from slrnet.config import Config, apply_overrides
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet
from slrnet.distributed.process import Process
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.launch import evaluation
from slrnet.launch.evaluation import launch_evaluation
from slrnet.launch.prediction import MaskJob
from slrnet.launch.train import LaunchOptions, launch
from slrnet.tools.predict import load_predictor
from slrnet.tracking.reader import metric_history

PROTOCOLS = ("ss", "ms", "ms_crf")


def need(protocol: str) -> None:
    if protocol == "ms_crf":
        pytest.importorskip("pydensecrf", reason="the extra `crf` is not installed")


def evaluate(checkpoint: Checkpoint, data: ShardSet, config: Config, folder: Path) -> dict[str, Any]:
    options = LaunchOptions(name="evaluation", storage=folder, num_workers=0)
    return launch_evaluation(MaskJob(checkpoint, config, data, ("val",)), options)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_figures_are_those_of_the_predictor(
    protocol: Any, checkpoint: Checkpoint, tiny_data: ShardSet, tiny_config: Config, tmp_path: Path
) -> None:
    need(protocol)
    record = evaluate(
        checkpoint, tiny_data, apply_overrides(tiny_config, [f"evaluation.protocol={protocol}"]), tmp_path
    )
    predictor = load_predictor(checkpoint, protocol=protocol, device="cpu")
    matrix = ConfusionMatrix(4)
    for sample in EvalLoader(tiny_data, split="val"):
        assert sample.pixel_labels is not None
        mask = predictor(sample.image.permute(1, 2, 0).numpy()).mask
        matrix.update(torch.from_numpy(mask), sample.pixel_labels)
    assert record["metrics"]["val/miou"] == pytest.approx(matrix.miou(), abs=1e-12)
    assert (record["protocol"], record["images"], record["split"]) == (protocol, 5, "val")
    assert record["data_fingerprint"] == tiny_data.info.fingerprint
    assert record["environment"]["git_commit"]
    assert (record["crf"] is None) == (protocol != "ms_crf")


def test_a_split_without_masks_is_refused(
    checkpoint: Checkpoint, write_tiny: Any, tiny_config: Config, tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", mask_bytes=lambda sample, png: None)
    with pytest.raises(DataError, match=f"split 'val' of {tmp_path}/data has no masks to compare with; .*--masks"):
        evaluate(checkpoint, data, tiny_config, tmp_path)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.slow
def test_protocols_differ(checkpoint: Checkpoint, tiny_data: ShardSet, tiny_config: Config, tmp_path: Path) -> None:
    need("ms_crf")
    figures = [
        evaluate(checkpoint, tiny_data, apply_overrides(tiny_config, [f"evaluation.protocol={name}"]), tmp_path / name)
        for name in PROTOCOLS
    ]
    own = apply_overrides(tiny_config, ["evaluation.protocol=ms_crf", "crf.background_power=0.3"])
    powered = evaluate(checkpoint, tiny_data, own, tmp_path / "powered")
    assert powered["protocol"] == "ms_crf+background_power_0.3"
    plain = apply_overrides(tiny_config, ["evaluation.protocol=ms", "evaluation.background_power=0.3"])
    assert powered["before_crf"] == {
        "ms+background_power_0.3": evaluate(checkpoint, tiny_data, plain, tmp_path / "plain")["metrics"]
    }
    single, multi, crf = figures
    assert len({str(record["metrics"]) for record in figures}) == 3
    assert crf["before_crf"] == {"ms": multi["metrics"]}
    assert single["before_crf"] == multi["before_crf"] == {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parts_in_any_order_count_the_same(
    protocol: str,
    checkpoint: Checkpoint,
    tiny_data: ShardSet,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need(protocol)
    config = apply_overrides(tiny_config, [f"evaluation.protocol={protocol}"])
    whole = evaluate(checkpoint, tiny_data, config, tmp_path)

    def two_workers(open_work: Any, values: dict[str, Any], parts: list[range], request: Any) -> Iterator[Any]:
        assert parts == [range(2), range(2, 4), range(4, 5)]
        workers = [open_work(values | {"cpus": 1}, Process(), lambda: None) for _ in range(2)]
        for place in (2, 0, 1):
            yield from workers[place % 2]([parts[place]])

    monkeypatch.setattr(evaluation, "PART", 2)
    monkeypatch.setattr(evaluation, "hand_out", two_workers)
    job = MaskJob(checkpoint, config, tiny_data, ("val",))
    record = launch_evaluation(job, LaunchOptions(name="parts", storage=tmp_path, num_workers=2))
    assert record == whole
    assert record["images"] == 5


def test_an_evaluation_repeats_the_figures_of_the_training(
    tiny_config: Config, tiny_data: ShardSet, storage: Path
) -> None:
    options = LaunchOptions(name="run", storage=storage, num_workers=0)
    result = launch(tiny_config, options, say=lambda line: None)
    best = load_checkpoint(result.best)
    record = evaluate(best, tiny_data, best.config, storage)
    assert record["metrics"]["val/miou"] == pytest.approx(best.state.metrics["val/miou_ss"], abs=1e-12)
    assert metric_history(result.run, "val/miou_ss")[-1] == (best.state.step, record["metrics"]["val/miou"])
    assert result.run.run_id in record["mlflow"]
    gated = apply_overrides(best.config, ["evaluation.gating=image_labels", "evaluation.scale=0.75"])
    assert evaluate(best, tiny_data, gated, storage)["protocol"] == "ss+scale_0.75+gated_by_image_labels"
    assert len(metric_history(result.run, "val/miou_ss_scale_0.75_gated_by_image_labels")) == 1
    (storage / "mlflow.db").unlink()
    assert evaluate(best, tiny_data, gated, storage)["mlflow"] is None
    assert not (storage / "mlflow.db").exists()


def test_mistakes_are_refused_before_anything_runs(
    checkpoint: Checkpoint, tiny_data: ShardSet, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrnet.inference.crf.find_spec", lambda name: None)
    crf = apply_overrides(tiny_config, ["evaluation.protocol=ms_crf"])
    with pytest.raises(ValueError, match="ms_crf needs pydensecrf2"):
        evaluate(checkpoint, tiny_data, crf, tmp_path)
    state = replace(checkpoint.state, classes=("background", "other"))
    with pytest.raises(CheckpointError, match="the checkpoint knows 2 classes"):
        evaluate(replace(checkpoint, state=state), tiny_data, tiny_config, tmp_path)
    assert not (tmp_path / "evaluation").exists()
