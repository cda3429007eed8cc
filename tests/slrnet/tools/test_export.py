"""Exported networks: equal to the network at any size, and served over HTTP."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slrnet.checkpoints.checkpoint import Checkpoint, TrainState, load_checkpoint, restore_model, save_checkpoint
from slrnet.cli.main import main
from slrnet.config import Config, apply_overrides
from slrnet.inference.forward import Inference
from slrnet.launch.train import LaunchOptions, launch
from slrnet.models.network import Network
from slrnet.models.slrnet import build_network
from slrnet.recipes import RECIPES, get_recipe
from slrnet.tools import export
from slrnet.tools.export import SingleView, export_network
from tests.fixtures import small_encoders

PAGE = Path(__file__).resolve().parents[3] / "docs" / "encoders.md"
onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


CLASSES = ("background", "ant", "bee", "cat")


def _distinct_networks() -> list[Any]:
    """A configuration for each network that a recipe names, with a thin decoder; those of other encoders are slow."""
    networks: dict[tuple[Any, ...], tuple[Config, list[str]]] = {}
    for name in RECIPES:
        config = get_recipe(name)
        if "_dinov" in name:
            continue  # below on small models
        structure = (config.model.architecture, config.model.encoder, config.predicts_background)
        networks.setdefault(structure, (config, []))[1].append(name)
    thin = ["model.encoder_weights=none", "model.decoder_dim=8", "model.skip_dim=4", "cvlr.dim=8"]
    return [pytest.param(apply_overrides(config, thin), id="+".join(names)) for config, names in networks.values()]


NETWORKS = _distinct_networks()
FAST = [network for network in NETWORKS if network.values[0].model.encoder == "efficientnet_lite0"]
SLOW = [network for network in NETWORKS if network not in FAST]
SIZES = ((2, 3, 77, 103), (1, 3, 48, 32), (3, 3, 33, 15), (1, 3, 1, 130))
"""Even, odd, and smaller than the output stride."""


def _network(config: Config) -> Network:
    torch.manual_seed(5)
    return build_network(config, num_classes=len(CLASSES), weights=False).eval()


def _save(config: Config, model: Network, folder: Path) -> Checkpoint:
    state = TrainState(epoch=1, step=1, classes=CLASSES, data_fingerprint="-", world_size=1)
    folder /= "run/checkpoints"
    return load_checkpoint(save_checkpoint(folder, config=config, state=state, model=model.state_dict(), optimizer={}))


def _differences(
    run: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    model: Network,
    config: Config,
    sizes: Sequence[tuple[int, ...]] = SIZES,
) -> list[float]:
    """The largest difference from what slrnet.load computes in one view, for each size."""
    differences = []
    for shape in sizes:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        probs, scores = Inference(model, config).single_scale(images)
        expected = [probs] if scores is None else [probs, scores.sigmoid()]
        with torch.no_grad():
            pairs = list(zip(run(images / 255), expected, strict=True))
        assert all(output.shape == right.shape for output, right in pairs)
        differences.append(max(float((output - right).abs().max()) for output, right in pairs))
    return differences


def test_the_networks_are_those_of_all_recipes() -> None:
    names = [name for network in NETWORKS for name in str(network.id).split("+")]
    transformers = {name for name in RECIPES if get_recipe(name).model.encoder.startswith("timm:vit_")}
    assert sorted(names) == sorted(RECIPES.keys() - transformers), "small transformers have a test of their own"
    settings = {(n.values[0].model.encoder, n.values[0].setting, n.values[0].model.architecture) for n in FAST}
    assert {setting for _, setting, _ in settings} == {"wsss", "sss"}
    assert {architecture for *_, architecture in settings} == {"slrnet", "deeplabv3plus"}


@pytest.mark.parametrize("config", FAST)
def test_a_single_view_predicts_images_of_any_size_as_the_network_does(config: Config) -> None:
    model = _network(config)
    for scale in (1.0, 0.6):
        scaled = apply_overrides(config, [f"evaluation.scale={scale}"])
        assert max(_differences(SingleView(copy.deepcopy(model), scaled), model, scaled)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("config", SLOW)
def test_a_single_view_of_a_larger_network_predicts_as_it_does(config: Config) -> None:
    model = _network(config)
    assert max(_differences(SingleView(copy.deepcopy(model), config), model, config, SIZES[1:3])) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("config", [network for network in FAST if network.values[0].setting != "wsss"])
def test_the_files_agree_with_the_network(config: Config, tmp_path: Path) -> None:
    """On a small encoder; a network for image labels on the default one is exported to be served, below."""
    config = apply_overrides(config, ["model.encoder=timm:test_efficientnet", "model.aspp_dilations=1,2,3"])
    model = _network(config)
    record = export_network(_save(config, model, tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == json.loads(json.dumps(record))
    _check_files(tmp_path / "out", model, config)


def _check_files(out: Path, model: Network, config: Config, sizes: Sequence[tuple[int, ...]] = SIZES) -> None:
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "network.onnx", "network.pt2"]
    outputs = json.loads((out / "export.json").read_text())["outputs"]
    program = torch.export.load(out / "network.pt2")
    assert max(_differences(program.module(), model, config, sizes)) <= 1e-6
    session = onnxruntime.InferenceSession(out / "network.onnx", providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

    assert max(_differences(run, model, config, sizes)) <= 1e-4
    assert [output.name for output in session.get_outputs()] == list(outputs)
    nodes = [(str(node.target), str(node.meta.get("nn_module_stack"))) for node in program.graph.nodes]
    assert any("Conv2d" in modules for _, modules in nodes)
    assert not [node for node in nodes if "slrnet" in node[0] or "slrnet.cpu" in node[1]]
    graph = onnx.load(out / "network.onnx")
    assert {node.domain for node in graph.graph.node} == {""}


def test_the_record_states_preprocessing_and_what_is_left_out(checkpoint: Checkpoint) -> None:
    changes = ["evaluation.protocol=ms_crf", "evaluation.gating=scores", "evaluation.background_power=0.5"]
    record = export._describe(
        replace(checkpoint, config=apply_overrides(checkpoint.config, changes)), ["probabilities"]
    )
    assert record["classes"] == CLASSES
    assert record["input"]["layout"] == "(N, 3, H, W) float32 RGB in [0, 1]"
    assert record["input"]["preprocessing"].startswith("Divide 8-bit values by 255. Subtract no mean")
    assert list(record["outputs"]) == ["probabilities"]
    assert record["left_out"] == {
        "evaluation.protocol": "ms_crf",
        "evaluation.gating": "scores",
        "evaluation.background_power": 0.5,
    }
    assert export._describe(checkpoint, ["probabilities"])["left_out"] == {}


def test_a_file_that_disagrees_is_refused() -> None:
    images, right = torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2, 2), 0.5)
    samples = [(images, [right, right])]
    assert export._compare(samples, lambda x: [right, right], "network.pt2", lambda: 0.0) == 0
    for name, off in (("network.pt2", 2e-6), ("network.onnx", 2e-4)):
        with pytest.raises(ValueError, match=rf"{name} differs from the network by 2\.\de-0"):
            export._compare(samples, lambda x, off=off: [right, right + off], name, lambda: 1e-6)
    for off in (torch.nan, -torch.nan):
        with pytest.raises(ValueError, match="differs from the network by nan"):
            export._compare(samples, lambda x, off=off: [right, right * off], "network.onnx", lambda: 1.0)


def test_a_file_may_differ_as_much_as_a_tiny_change_of_the_input_makes() -> None:
    samples = [(torch.zeros(1, 3, 2, 2), [torch.zeros(1)])]
    answers = [torch.full((1,), 1e-3)]
    assert export._compare(samples, lambda x: answers, "network.onnx", lambda: 2e-3) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="differs from the network"):
        export._compare(samples, lambda x: answers, "network.onnx", lambda: 9e-4)


def test_what_pytorch_cannot_export_is_refused_in_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^torch.export cannot trace it \(KeyError: 'x'\); use slrnet.load$"),
        export._explained("torch.export cannot trace it"),
    ):
        raise KeyError("x")


def test_refusals(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", str(checkpoint.path), "--out", str(tmp_path / "out")]) == 2
    assert "ONNX needs onnxscript; run `pip install 'slrnet[export]'`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_files_of_the_default_encoder_agree_and_mlflow_serves_them(
    tiny_config: Config, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"model.encoder={get_recipe('demo').model.encoder}", "train.epochs=1", "train.pretrain_epochs=0"]
    config = apply_overrides(tiny_config, [*changes, "evaluation.pseudo_mask_images=0", "evaluation.panel_images=0"])
    result = launch(config, LaunchOptions(name="run", storage=storage, num_workers=0), say=lambda line: None)
    assert main(["export", str(result.best), "--out", str(tmp_path / "out"), "--mlflow", "network"]) == 0
    uri = f"runs:/{result.run.run_id}/models/network"
    assert f"mlflow models serve -m {uri}" in capsys.readouterr().out
    best = load_checkpoint(result.best)
    assert best.config.model.encoder == "efficientnet_lite0"
    model = restore_model(best).eval()
    _check_files(tmp_path / "out", model, best.config)
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
        images = np.random.default_rng(0).integers(0, 256, (2, 3, 47, 61), dtype=np.uint8)
        answer = _ask(server, port, {"inputs": {"images": (images / 255).tolist()}})
        for wrong in (images.tolist(), (images / 255)[0].tolist(), "x"):
            with pytest.raises(AssertionError, match="^400 "):
                _ask(server, port, {"inputs": {"images": wrong}})
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.communicate()
    probs, scores = Inference(model, best.config).single_scale(torch.from_numpy(images))
    assert scores is not None
    np.testing.assert_allclose(np.array(answer["predictions"]["probabilities"]), probs.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.array(answer["predictions"]["class_scores"]), scores.sigmoid().numpy(), atol=1e-4)


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
            raise AssertionError(f"{error.code} {error.read().decode()}") from None
        except OSError:
            time.sleep(0.25)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), small_encoders.FAMILIES.items())
def test_each_family_exports_as_the_documentation_says(
    family: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thin = ["model.encoder_weights=none", "model.decoder_dim=8", "model.skip_dim=4", "cvlr.dim=8"]
    crop = 70 if name in ("small_dinov2", "small_eva02") else 64
    changes = [f"model.encoder=timm:{name}", "model.output_stride=16", f"data.crop_size={crop}", *thin]
    if name in ("small_vit", "small_dinov3"):  # what the training keeps of attention is in no program
        changes += ["calibration.feature_share=0.5", "calibration.feature_source=attention"]
    config = apply_overrides(get_recipe("voc_wsss"), [*changes, "model.aspp_dilations=1,2,3"])
    model = _network(config)
    given = export_network(_save(config, model, tmp_path), tmp_path / "out")["input"]
    assert "def forward" not in capsys.readouterr().err, "the graph of a failed trace is not the user's"
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {family} | ")]
    if "why_one_size" in given:
        assert row.endswith(" | the crop's size |")
        assert given["layout"] == f"(N, 3, {crop}, {crop}) float32 RGB in [0, 1]"
        assert given["why_one_size"].startswith("torch.export cannot trace the network (Guard")
        sizes: tuple[tuple[int, ...], ...] = ((3, 3, crop, crop), (1, 3, crop, crop))
    else:
        assert row.endswith(" | any size |")
        sizes = (*SIZES, (1, 3, crop, crop), (1, 3, 160, 90))
    _check_files(tmp_path / "out", model, config, sizes)
