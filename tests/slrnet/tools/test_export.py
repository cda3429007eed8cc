"""Exported networks: equal to the network at any size, and served over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slrnet.checkpoints.checkpoint import Checkpoint, load_checkpoint, restore_model
from slrnet.cli.main import main
from slrnet.config import Config, apply_overrides
from slrnet.launch.train import LaunchOptions, launch
from slrnet.ops.maps import resize
from slrnet.tools import export
from slrnet.tools.export import SingleView, export_network

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("export")
    return out, export_network(checkpoint, out)


@pytest.mark.slow
def test_the_files_agree_with_the_network_at_other_sizes(
    exported: tuple[Path, dict[str, Any]], checkpoint: Checkpoint
) -> None:
    out, record = exported
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "network.onnx", "network.pt2"]
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(record))
    assert record["input"]["side"] == {"multiple_of": 16, "plus": 0, "at_most": 4096}
    model = restore_model(checkpoint).eval()
    program = torch.export.load(out / "network.pt2").module()
    session = onnxruntime.InferenceSession(out / "network.onnx", providers=["CPUExecutionProvider"])
    for size in ((80, 48), (32, 160)):
        images = torch.rand(2, 3, *size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (model.encoder.mean, model.encoder.std))
        with torch.no_grad():
            outputs = model([(images - mean) / std])
        expected = resize(outputs.logits[0].softmax(dim=1), size)
        for probs, scores in (program(images), map(torch.from_numpy, session.run(None, {"images": images.numpy()}))):
            torch.testing.assert_close(probs, expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(scores, outputs.class_scores[0].sigmoid(), atol=1e-4, rtol=1e-3)


def test_the_example_has_the_sizes_that_the_network_is_used_to(checkpoint: Checkpoint, tiny_config: Config) -> None:
    view = SingleView(restore_model(checkpoint), apply_overrides(tiny_config, ["data.crop_size=65"]))
    assert view.example((3, 5), 2).shape == (2, 3, 49, 81)


def test_a_file_that_disagrees_is_refused(checkpoint: Checkpoint) -> None:
    view = SingleView(restore_model(checkpoint), checkpoint.config)

    class Off(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            probs, scores = view(images)
            return probs + 2e-4, scores

    with pytest.raises(ValueError, match=r"network.pt2 differs from the network by 2\.\de-04"):
        export._compare(view, Off(), "network.pt2")
    assert export._compare(view, view, "network.pt2") == 0


def test_refusals(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", str(checkpoint.path), "--out", str(tmp_path / "out")]) == 2
    assert "ONNX needs onnxscript; run `pip install 'slrnet[export]'`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mlflow_serves_the_logged_model(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = launch(tiny_config, LaunchOptions(name="run", storage=tmp_path, num_workers=0), say=lambda line: None)
    assert main(["export", str(result.best), "--out", str(tmp_path / "out"), "--mlflow", "network"]) == 0
    uri = f"runs:/{result.run.run_id}/models/network"
    assert f"mlflow models serve -m {uri}" in capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mlflow starts uvicorn by its name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": result.run.uri, "PATH": path}
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        images = np.random.default_rng(0).random((1, 3, 48, 64), dtype=np.float32)
        answer = _ask(server, port, {"inputs": {"images": images.tolist()}})
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.communicate()
    best = load_checkpoint(result.best)
    view = SingleView(restore_model(best), best.config)
    with torch.no_grad():
        probs, scores = view(torch.from_numpy(images))
    np.testing.assert_allclose(np.array(answer["predictions"]["probabilities"]), probs.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.array(answer["predictions"]["class_scores"]), scores.numpy(), atol=1e-4)


def _ask(server: subprocess.Popen[bytes], port: int, content: dict[str, Any]) -> dict[str, Any]:
    """Posts a request as soon as the server answers."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    for _ in range(1200):
        if server.poll() is not None:
            assert server.stderr is not None
            raise AssertionError(server.stderr.read().decode())
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except OSError:
            time.sleep(0.25)
    raise AssertionError("the server does not answer")
