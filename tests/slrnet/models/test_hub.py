"""Weights from a hub that runs here, from folders, and what is said where there is none."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file

from slrnet.config import ModelConfig
from slrnet.models.encoders import build_encoder, resolve_weights, weights_line
from slrnet.models.hub import fetch_command, file_of, license_note

MODEL = "test_vit.r160_in1k"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub with the files of the dictionary by path; an empty one answers 404."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            body = files.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            if not body:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    yield files
    server.shutdown()
    server.server_close()


def _random() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: torch.rand_like(tensor) for name, tensor in timm.create_model("test_vit").state_dict().items()}


def test_auto_takes_the_hubs_file_and_then_the_cache(hub: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _random()
    hub[f"/timm/{MODEL}/resolve/main/model.safetensors"] = save(tensors)
    config = ModelConfig(encoder=f"timm:{MODEL}", output_stride=16)
    assert resolve_weights(config.encoder, "auto") == "auto"
    for endpoint in (None, "http://127.0.0.1:9"):  # the second one does not answer
        if endpoint:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
        own = build_encoder(config).backbone.state_dict()
        assert own
        assert all(torch.equal(tensor, tensors[name.removeprefix("model.")]) for name, tensor in own.items())


def test_what_cannot_be_fetched_is_refused_before_the_run_with_the_command(hub: dict[str, bytes]) -> None:
    assert not hub
    command = f"`hf download timm/{MODEL} --local-dir FOLDER`.*model.encoder_weights=FOLDER, or to none"
    with pytest.raises(ValueError, match=f"cannot get the weights of timm:{MODEL} .*{command}"):
        resolve_weights(f"timm:{MODEL}", "auto")


def test_a_folder_with_positions_of_another_size_and_names_of_the_authors(tmp_path: Path) -> None:
    tensors = _random()
    grid = torch.rand(1, 1 + 14 * 14, 64)
    save_file(tensors | {"pos_embed": grid}, tmp_path / "model.safetensors")
    weights = resolve_weights("timm:test_vit", str(tmp_path))
    assert weights == str(tmp_path / "model.safetensors")
    config = ModelConfig(encoder="timm:test_vit", output_stride=16, encoder_weights=str(tmp_path))
    own = build_encoder(config).backbone.state_dict()
    assert torch.equal(own["model.blocks.0.attn.qkv.weight"], tensors["blocks.0.attn.qkv.weight"])
    assert torch.equal(own["model.pos_embed"][:, :1], grid[:, :1])
    assert own["model.pos_embed"].shape == (1, 101, 64)


def test_folders_that_hold_no_weights_or_several(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no weights file; model.encoder_weights takes a file, or a folder with"):
        file_of(tmp_path)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds a.pth, b.pth"):
        file_of(tmp_path)


def test_licenses_and_commands_of_the_names_that_people_use() -> None:
    assert license_note("vit_base_patch14_dinov2.lvd142m").endswith(
        "vit_base_patch14_dinov2.lvd142m, license apache-2.0"
    )
    assert "license dinov3-license, which may restrict use; read its terms" in license_note("vit_base_patch16_dinov3")
    assert fetch_command("small_vit_without_weights") == ""
    line = weights_line(ModelConfig(encoder="timm:vit_base_patch16_dinov3"))
    assert line == license_note("vit_base_patch16_dinov3")
    assert weights_line(ModelConfig(encoder="timm:vit_base_patch16_dinov3", encoder_weights="none")) == ""
    assert weights_line(ModelConfig(encoder="efficientnet_lite0")) == ""
