"""The MLflow page: what is served, and in a browser the curves and pictures of a run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slrnet.config import Config, apply_overrides
from slrnet.dashboard import default_storages, main
from slrnet.data.manifest import ShardSet
from slrnet.training.ray_loop import LaunchOptions, RunResult, launch

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_to_show_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLRNET_STORAGE", str(tmp_path / "store"))
    assert default_storages() == [tmp_path / "store", tmp_path / "runs"]
    assert main([]) == 2
    said = capsys.readouterr().err
    assert f"no mlflow.db in {tmp_path}/store or {tmp_path}/runs" in said
    assert "make demo" in said
    assert main(["--storage", "elsewhere"]) == 2
    assert f"no mlflow.db in {tmp_path}/elsewhere;" in capsys.readouterr().err


def test_a_taken_port_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--storage", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


@pytest.fixture
def trained(tiny_data: ShardSet, tiny_config: Config, tmp_path: Path) -> RunResult:
    """A training of two epochs in this process, with its MLflow run."""
    options = LaunchOptions(name="tiny", storage=tmp_path, num_workers=0)
    return launch(apply_overrides(tiny_config, ["evaluation.pseudo_mask_images=9"]), options)


@pytest.fixture
def address(trained: RunResult, tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "slrnet.dashboard", "--storage", str(tmp_path), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/#/experiments/{trained.run.experiment_id}/runs/{trained.run.run_id}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not come")


@pytest.mark.slow
def test_a_run_in_the_browser(address: str, browser: Any, trained: RunResult, tmp_path: Path) -> None:
    """Keeps screenshots in the folder that SLRNET_SCREENSHOTS names, else in the test's own."""
    from selenium.webdriver.support.ui import WebDriverWait

    shots = Path(os.environ.get("SLRNET_SCREENSHOTS", tmp_path))
    size = {"width": 1500, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def text() -> str:
        return str(browser.execute_script("return document.body.innerText"))

    def wait(condition: Any) -> None:
        WebDriverWait(browser, 120, poll_frequency=0.2).until(lambda _: condition(), "what was waited for")

    browser.get(address)
    wait(lambda: "Result" in text() and "slrnet.report" in text())
    assert "setting wsss (image labels)" in text()
    assert browser.save_screenshot(str(shots / "run.png"))
    browser.get(f"{address}/model-metrics")
    # Without a click: the curves of the pseudo masks come first, and pictures below them.
    wait(
        lambda: browser.execute_script(
            "return document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length"
        )
    )
    wait(lambda: "samples" in text() and "Step" in text())
    shown = text()
    assert shown.index("\npseudo_mask\n") < shown.index("\nsamples\n")
    assert 0 < shown.index("tiny (pseudo_mask/miou)") < shown.index("\nsamples\n")
    assert browser.save_screenshot(str(shots / "curves.png"))
    for heading in browser.find_elements("xpath", "//*[starts-with(text(), 'samples/')]")[:1]:
        browser.execute_script("arguments[0].scrollIntoView()", heading)
    pictures = "return [...document.images].filter(i => i.src.includes('samples')).map(i => i.naturalWidth)"
    wait(lambda: any(browser.execute_script(pictures)))
    assert browser.save_screenshot(str(shots / "samples.png"))
