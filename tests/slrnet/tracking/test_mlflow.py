"""Runs, curves, pictures and files in MLflow, and a store that stops answering."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slrnet.tracking import mlflow as tracking
from slrnet.tracking.location import database_of, resolve_uri
from slrnet.tracking.mlflow import NOTE_TAG, MlflowTracker, check_artifacts, client_of, create_run
from slrnet.tracking.protocol import RunHandle, metric_key
from slrnet.tracking.reader import metric_history, run_tags
from tests.fixtures.servers import serving


def run_of(handle: RunHandle) -> Any:
    return client_of(handle.uri).get_run(handle.run_id)


def artifact_root(handle: RunHandle) -> Path:
    return Path(urllib.request.url2pathname(run_of(handle).info.artifact_uri.removeprefix("file://")))


class TestCreateRun:
    @pytest.mark.slow
    def test_params_tags_and_config_are_stored(self, uri: str) -> None:
        params = {"optim.lr": 0.5, "views.scales": [1.0, 0.5], "data.path": "x", "cvlr.enabled": True}
        handle = create_run(uri, "exp", "stored", params=params, tags={"data": "abc"}, resume=False)
        run = run_of(handle)
        assert run.info.run_name == "stored"
        assert run.info.status == "RUNNING"
        assert run.info.experiment_id == handle.experiment_id
        assert run.data.params == {
            "optim.lr": "0.5",
            "views.scales": "[1.0, 0.5]",
            "data.path": "x",
            "cvlr.enabled": "true",
        }
        assert run.data.tags["data"] == "abc"
        assert json.loads((artifact_root(handle) / "config.json").read_text()) == params

    def test_the_data_set_is_an_input(self, uri: str) -> None:
        data = ("photos", "f" * 64, "s3://bucket/photos")
        run = run_of(create_run(uri, "exp", "fed", params={}, tags={}, resume=False, data=data))
        (dataset,) = (entry.dataset for entry in run.inputs.dataset_inputs)
        assert (dataset.name, dataset.digest) == ("photos", "f" * 36)
        assert json.loads(dataset.source) == {"uri": "s3://bucket/photos"}

    def test_artifacts_lie_beside_the_database_at_an_absolute_path(self, handle: RunHandle) -> None:
        database = database_of(handle.uri)
        assert database is not None
        assert artifact_root(handle) == database.parent / "mlartifacts" / handle.run_id / "artifacts"

    def test_many_and_long_params(self, uri: str) -> None:
        params: dict[str, Any] = {f"p{i}": i for i in range(230)}
        params["long"] = "x" * 7000
        handle = create_run(uri, "exp", "long", params=params, tags={"t": "y" * 9000}, resume=False)
        stored = run_of(handle).data.params
        assert len(stored) == 231
        assert stored["long"] == "x" * 5996 + " ..."
        assert json.loads((artifact_root(handle) / "config.json").read_text())["long"] == "x" * 7000

    def test_existing_name_is_refused_without_resume(self, handle: RunHandle, uri: str) -> None:
        name = run_of(handle).info.run_name
        with pytest.raises(ValueError, match=f"has a run '{name}' already.*--resume {name}"):
            create_run(uri, "exp", name, params={}, tags={}, resume=False)
        other = create_run(uri, "exp2", name, params={}, tags={}, resume=False)
        assert other.run_id != handle.run_id

    def test_resume_of_an_unknown_name_is_refused(self, uri: str) -> None:
        with pytest.raises(ValueError, match="no run 'never' to resume.*--name never"):
            create_run(uri, "exp", "never", params={}, tags={}, resume=True)

    def test_resume_attaches_to_the_same_run(self, uri: str) -> None:
        first = create_run(uri, "exp", "again", params={"epochs": 2, "lr": 0.1}, tags={}, resume=False)
        tracker = MlflowTracker(first)
        tracker.log_metrics({"loss": 2.0}, step=1)
        tracker.log_metrics({"loss": 1.5}, step=2)
        tracker.finish("FAILED", reason="node lost")
        assert run_of(first).info.status == "FAILED"
        assert run_of(first).data.tags["reason"] == "node lost"

        second = create_run(uri, "exp", "again", params={"epochs": 4, "lr": 0.1, "new": 1}, tags={}, resume=True)
        assert second == first
        run = run_of(second)
        assert run.info.status == "RUNNING"
        assert "reason" not in run.data.tags
        assert run.data.params == {"epochs": "2", "lr": "0.1", "new": "1"}
        assert run.data.tags["resumed.epochs"] == "4"
        assert "resumed.lr" not in run.data.tags
        assert json.loads((artifact_root(second) / "config.json").read_text())["epochs"] == 4
        MlflowTracker(second).log_metrics({"loss": 1.25}, step=2)
        assert metric_history(second, "loss") == [(1, 2.0), (2, 1.5), (2, 1.25)]

    def test_two_runs_of_one_name_are_not_guessed_between(self, uri: str) -> None:
        first = create_run(uri, "exp", "twin", params={}, tags={}, resume=False)
        client = client_of(uri)
        second = client.create_run(first.experiment_id, run_name="twin").info.run_id
        with pytest.raises(ValueError, match="2 runs 'twin'") as caught:
            create_run(uri, "exp", "twin", params={}, tags={}, resume=True)
        assert first.run_id in str(caught.value)
        assert second in str(caught.value)

    def test_deleted_experiment_is_named_with_its_remedy(self, uri: str) -> None:
        handle = create_run(uri, "gone", "a", params={}, tags={}, resume=False)
        client_of(uri).delete_experiment(handle.experiment_id)
        with pytest.raises(ValueError, match=f"restore --experiment-id {handle.experiment_id}"):
            create_run(uri, "gone", "b", params={}, tags={}, resume=False)

    @pytest.mark.parametrize("name", ["", "a b", "it's", "../up", "a/b", "x" * 201])
    def test_unusable_names_are_refused(self, name: str, uri: str) -> None:
        with pytest.raises(ValueError, match="is no name of a run; allowed are"):
            create_run(uri, "exp", name, params={}, tags={}, resume=False)

    def test_handle_survives_the_way_to_a_worker(self, handle: RunHandle) -> None:
        assert pickle.loads(pickle.dumps(handle)) == handle


class TestTracker:
    def test_history(self, handle: RunHandle) -> None:
        tracker = MlflowTracker(handle)
        for step, value in [(1, 0.5), (3, 0.25), (2, 1.0)]:
            tracker.log_metrics({"train/loss": value, "b": -value}, step)
        assert metric_history(handle, "train/loss") == [(1, 0.5), (2, 1.0), (3, 0.25)]
        assert metric_history(handle, "b") == [(1, -0.5), (2, -1.0), (3, -0.25)]
        assert metric_history(handle, "never") == []

    def test_more_metrics_than_one_batch_takes(self, handle: RunHandle) -> None:
        MlflowTracker(handle).log_metrics({f"m{i:04d}": float(i) for i in range(1003)}, step=1)
        stored = run_of(handle).data.metrics
        assert stored == {f"m{i:04d}": float(i) for i in range(1003)}

    def test_values_that_are_not_finite_are_counted_and_left_out(self, handle: RunHandle) -> None:
        tracker = MlflowTracker(handle)
        tracker.log_metrics({"iou/a": math.nan, "iou/b": 0.5, "iou/c": math.inf}, step=1)
        tracker.log_metrics({"iou/a": math.nan}, step=2)
        assert tracker.skipped == 3
        tracker.finish()
        assert run_of(handle).data.metrics == {"iou/b": 0.5}
        assert run_of(handle).data.tags["skipped_values"] == "3"

    def test_class_names_become_keys(self, handle: RunHandle) -> None:
        names = ["potted-plant", "tv/monitor", "dining table", "hair drier (electric)", "été"]
        tracker = MlflowTracker(handle)
        tracker.log_metrics({metric_key("iou", name): 1.0 for name in names}, step=0)
        assert sorted(run_of(handle).data.metrics) == sorted(
            ["iou/potted-plant", "iou/tv-monitor", "iou/dining table", "iou/hair drier _electric_", "iou/_t_"]
        )
        assert tracker.lost == 0

    @pytest.mark.parametrize("kind", ["pil", "array"])
    def test_images_are_artifacts_that_the_page_groups_by_key_and_step(self, handle: RunHandle, kind: str) -> None:
        pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
        image = Image.fromarray(pixels) if kind == "pil" else pixels
        MlflowTracker(handle).log_image("panels/2007_000032", image, step=7)
        files = sorted(path.name for path in (artifact_root(handle) / "images").iterdir())
        assert len(files) == 2
        assert all(name.startswith("panels~2007_000032+step+7+timestamp+") for name in files)
        (png,) = (artifact_root(handle) / "images").glob("*.png")
        assert np.array_equal(np.asarray(Image.open(png)), pixels)
        assert run_of(handle).data.tags["mlflow.loggedImages"] == "True"

    def test_what_a_restarted_training_makes_again_is_left_out(self, handle: RunHandle) -> None:
        pixels = np.zeros((4, 5, 3), dtype=np.uint8)
        first = MlflowTracker(handle, once=True)
        for step in (10, 20):
            first.log_metrics({"train/loss": step / 100, "train/loss_a": 1.0}, step)
            first.log_image("panels/a", pixels, step)
        second = MlflowTracker(handle, once=True)
        for step in (20, 30):
            second.log_metrics({"train/loss": step / 100, "train/new": 2.0}, step)
            second.log_image("panels/a", pixels, step)
        second.log_image("panels/b", pixels, 20)
        assert metric_history(handle, "train/loss") == [(10, 0.1), (20, 0.2), (30, 0.3)]
        assert metric_history(handle, "train/loss_a") == [(10, 1.0), (20, 1.0)]
        assert metric_history(handle, "train/new") == [(20, 2.0), (30, 2.0)]
        pictures = [path.name.split("+timestamp")[0] for path in (artifact_root(handle) / "images").glob("*.png")]
        assert sorted(pictures) == [f"panels~{name}" for name in ("a+step+10", "a+step+20", "a+step+30", "b+step+20")]
        MlflowTracker(handle).log_metrics({"train/loss": 7.0}, 10)  # not a training's: figures that are measured again
        assert metric_history(handle, "train/loss")[:2] == [(10, 0.1), (10, 7.0)]

    def test_a_description_keeps_what_people_wrote_above_the_result(self, uri: str) -> None:
        handle = create_run(uri, "exp", "described", params={}, tags={}, resume=False, description="- setting wsss")
        tracker = MlflowTracker(handle)
        tracker.describe("first")
        assert run_tags(handle)[NOTE_TAG] == "- setting wsss\n\n## Result\n\nfirst"
        tracker.set_tags({NOTE_TAG: "- setting wsss\n\nMine.\n\n## Result\n\nfirst"})
        create_run(uri, "exp", "described", params={}, tags={}, resume=True, description="- another")
        tracker.describe("second" + 9000 * "!")
        note = run_tags(handle)[NOTE_TAG]
        assert note.startswith("- setting wsss\n\nMine.\n\n## Result\n\nsecond!")
        assert len(note) == 5000
        for step in (0, 1):
            tracker.log_image("samples/a", np.zeros((4, 4, 3), np.uint8), step)
        tracker.describe("third")
        shown = re.findall(
            r"!\[(\w+)\]\(get-artifact\?path=images%2Fsamples~a%2Bstep%2B1\S+\.png&run_uuid=(\w+)\)",
            run_tags(handle)[NOTE_TAG],
        )
        assert shown == [("a", handle.run_id)]
        experiment = client_of(uri).get_experiment(handle.experiment_id)
        assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    def test_folders_and_texts(self, handle: RunHandle, tmp_path: Path) -> None:
        (tmp_path / "ckpt" / "deep").mkdir(parents=True)
        (tmp_path / "ckpt" / "deep" / "state.json").write_text("{}")
        tracker = MlflowTracker(handle)
        tracker.log_artifacts(tmp_path / "ckpt", "checkpoints/best")
        tracker.log_text("hello", "notes/two.txt")
        root = artifact_root(handle)
        files = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
        files.pop("config.json")
        assert files == {
            "checkpoints/best/deep/state.json": "{}",
            "notes/two.txt": "hello",
        }

    def test_a_missing_folder_is_refused_by_the_caller(self, handle: RunHandle, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is not a folder"):
            MlflowTracker(handle).log_artifacts(tmp_path / "none")

    def test_finish_and_tags(self, handle: RunHandle) -> None:
        tracker = MlflowTracker(handle)
        tracker.set_tags({"a": "1", "long": "z" * 6000})
        tracker.set_tags({"a": "2"})
        tracker.finish("KILLED", reason="stopped by hand")
        run = run_of(handle)
        assert run.info.status == "KILLED"
        assert run.data.tags["a"] == "2"
        assert run.data.tags["long"] == "z" * 5000
        assert run.data.tags["reason"] == "stopped by hand"

    def test_a_deleted_run_loses_records_aloud_and_does_not_stop_the_training(
        self, handle: RunHandle, caplog: pytest.LogCaptureFixture
    ) -> None:
        client_of(handle.uri).delete_run(handle.run_id)
        tracker = MlflowTracker(handle)
        with caplog.at_level(logging.ERROR, logger="slrnet"):
            tracker.log_metrics({"a": 1.0}, step=1)
        assert (tracker.lost, tracker.undelivered) == (1, 0)
        assert "refused a record" in caplog.text


class Outage:
    """A connection that can be cut; `asked` says whether it was used meanwhile."""

    def __init__(self) -> None:
        self.down = True
        self.asked = False

    def __call__(self, uri: str) -> Any:
        if self.down:
            self.asked = True
            raise ConnectionError("connection refused")
        return client_of(uri)


class TestOutage:
    """The store stops answering in the middle of a run and comes back."""

    @pytest.fixture
    def outage(self, monkeypatch: pytest.MonkeyPatch) -> Outage:
        outage = Outage()
        monkeypatch.setattr(tracking, "client_of", outage)
        return outage

    def test_records_are_kept_in_order_and_delivered_later(
        self, uri: str, request: pytest.FixtureRequest, outage: Outage, caplog: pytest.LogCaptureFixture
    ) -> None:
        outage.down = False
        handle = create_run(uri, "exp", request.node.name, params={}, tags={}, resume=False)
        tracker = MlflowTracker(handle, retry_after=0.0)
        outage.down = True
        tracker.log_metrics({"loss": 1.0}, step=1)
        tracker.log_metrics({"loss": 2.0}, step=2)
        assert tracker.undelivered == 2
        assert "behind by 2 records: connection refused" in caplog.text
        outage.down = False
        tracker.log_metrics({"loss": 3.0}, step=3)
        assert tracker.undelivered == 0
        assert metric_history(handle, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]

    def test_no_attempt_before_the_time_and_flush_does_not_wait(self, outage: Outage) -> None:
        tracker = MlflowTracker(RunHandle(uri="sqlite:////x.db", run_id="r", experiment_id="0"), retry_after=1e9)
        tracker.log_metrics({"loss": 1.0}, step=1)
        assert outage.asked
        outage.asked = False
        tracker.log_metrics({"loss": 2.0}, step=2)
        assert not outage.asked
        assert tracker.flush() == 2
        assert outage.asked

    def test_what_never_arrives_is_reported_at_the_end(
        self, outage: Outage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(tracking, "PENDING_LIMIT", 3)
        monkeypatch.setattr(tracking, "PATIENCE", 0.0)
        tracker = MlflowTracker(RunHandle(uri="http://me:secret@host", run_id="r", experiment_id="0"))
        for step in range(4):
            tracker.log_metrics({"loss": 1.0}, step)
        tracker.finish()
        assert (tracker.lost, tracker.undelivered) == (2, 3)
        assert "5 records never reached the tracking store http://host" in caplog.text

    def test_the_end_of_a_run_waits_for_the_store(
        self,
        uri: str,
        request: pytest.FixtureRequest,
        outage: Outage,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        outage.down = False
        handle = create_run(uri, "exp", request.node.name, params={}, tags={}, resume=False)
        outage.down = True
        tracker = MlflowTracker(handle)
        tracker.log_metrics({"loss": 1.0}, step=4)
        assert tracker.undelivered_points() == [(4, {"loss": 1.0})]
        monkeypatch.setattr(tracking.time, "sleep", lambda seconds: setattr(outage, "down", False))
        assert tracker.drain() == 0
        assert tracker.undelivered_points() == []
        assert metric_history(handle, "loss") == [(4, 1.0)]

    def test_a_folder_that_vanished_meanwhile_does_not_block_the_rest(
        self, uri: str, request: pytest.FixtureRequest, outage: Outage, tmp_path: Path
    ) -> None:
        outage.down = False
        handle = create_run(uri, "exp", request.node.name, params={}, tags={}, resume=False)
        outage.down = True
        tracker = MlflowTracker(handle, retry_after=0.0)
        (tmp_path / "ckpt").mkdir()
        (tmp_path / "ckpt" / "a").write_text("a")
        tracker.log_artifacts(tmp_path / "ckpt")
        shutil.rmtree(tmp_path / "ckpt")
        outage.down = False
        tracker.log_metrics({"loss": 1.0}, step=1)
        assert (tracker.lost, tracker.undelivered) == (1, 0)
        assert metric_history(handle, "loss") == [(1, 1.0)]


@pytest.mark.slow
def test_the_process_stays_quiet_and_needs_no_active_run(tmp_path: Path, uri: str) -> None:
    # A fresh process with an existing database: no notice, no ./mlruns, no global tracking URI.
    script = (
        "import sys\n"
        "from slrnet.tracking.location import resolve_uri\n"
        "from slrnet.tracking.mlflow import NOTE_TAG, MlflowTracker, create_run\n"
        "assert 'mlflow' not in sys.modules\n"
        f"handle = create_run({uri!r}, 'exp', 'quiet', params={{'a': 1}}, tags={{}}, resume=False)\n"
        "MlflowTracker(handle).log_metrics({'a': 1.0}, 1)\n"
        "import mlflow\n"
        "assert mlflow.active_run() is None\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_server(storage: Path, tmp_path: Path) -> None:
    with serving(storage) as address:
        uri = resolve_uri(address, tmp_path)
        handle = create_run(uri, "exp", "served", params={"a": 1}, tags={"t": "x"}, resume=False)
        tracker = MlflowTracker(handle)
        tracker.log_metrics({"train/loss": 0.5, "iou/tv-monitor": 0.25}, step=3)
        tracker.log_image("panel", np.full((6, 8, 3), 90, np.uint8), step=3)
        tracker.log_text("hello", "notes/a.txt")
        tracker.finish("FAILED", reason="test")
        assert (tracker.lost, tracker.undelivered) == (0, 0)
        again = create_run(uri, "exp", "served", params={"a": 2}, tags={}, resume=True)
        assert again == handle
        assert metric_history(handle, "train/loss") == [(3, 0.5)]
        assert run_of(handle).info.status == "RUNNING"
        images = [item.path for item in client_of(uri).list_artifacts(handle.run_id, "images")]
        assert len(images) == 2
        (png,) = (path for path in images if path.endswith(".png"))
        query = urllib.parse.urlencode({"run_id": handle.run_id, "path": png})
        with urllib.request.urlopen(f"{address}/get-artifact?{query}") as answer:
            assert np.asarray(Image.open(io.BytesIO(answer.read()))).tolist() == np.full((6, 8, 3), 90).tolist()
    # The server is gone: a new run is refused, a running one goes on without it.
    tracker.log_metrics({"train/loss": 0.25}, step=4)
    assert (tracker.lost, tracker.undelivered) == (0, 1)
    with pytest.raises(ValueError, match="does not answer"):
        resolve_uri(address, tmp_path)


@pytest.mark.parametrize(
    ("uri", "artifacts", "taken"),
    [
        ("sqlite:////s/mlflow.db", "file:///s/mlartifacts/1/r", True),
        ("sqlite:////s/mlflow.db", "/s/mlartifacts/1/r", True),
        ("sqlite:////s/mlflow.db", "https://evil.example/r", False),
        ("sqlite:////s/mlflow.db", "s3://evil/r", False),
        ("sqlite:////s/mlflow.db", "file://evil.example/r", False),
        ("http://server:5000", "s3://bucket/r", True),
    ],
)
def test_a_database_of_others_sends_no_files_away(uri: str, artifacts: str, taken: bool) -> None:
    if taken:
        check_artifacts(uri, artifacts)
    else:
        with pytest.raises(ValueError, match="keeps the run's files at .*evil.*, which nobody else names"):
            check_artifacts(uri, artifacts)


@pytest.mark.slow
def test_runs_that_start_at_once_on_a_fresh_storage_all_begin(tmp_path: Path) -> None:
    code = (
        "import sys; from slrnet.tracking.location import resolve_uri; from slrnet.tracking import mlflow\n"
        "mlflow.load_mlflow(); print('ready', flush=True); sys.stdin.readline()\n"
        "uri = resolve_uri('', storage=sys.argv[1])\n"
        "print(mlflow.create_run(uri, 'exp', sys.argv[2], params={}, tags={}, resume=False).experiment_id)"
    )
    options: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], **options) for name in ("a", "b")]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    ended = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
