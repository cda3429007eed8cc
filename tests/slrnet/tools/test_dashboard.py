"""MLflow's page over a store that the tracker has written: what a visitor finds there without a click."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slrnet.cli.main import main
from slrnet.config import Config
from slrnet.tools.dashboard import default_storages, serve_command
from slrnet.tracking.location import resolve_uri
from slrnet.tracking.mlflow import MlflowTracker, create_run
from slrnet.tracking.protocol import SAMPLES, RunHandle
from slrnet.tracking.reader import runs_page

CURVES = ("pseudo_mask/miou", "pseudo_mask/mfdr", "pseudo_mask/mfnr")


def test_places_without_runs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLRNET_STORAGE", str(tmp_path / "usual"))
    monkeypatch.chdir(tmp_path)
    assert default_storages() == [tmp_path / "usual", tmp_path / "runs"]
    assert main(["dashboard"]) == 2
    said = capsys.readouterr().err
    assert f"no mlflow.db in {tmp_path / 'usual'} or {tmp_path / 'runs'}" in said
    assert "make demo" in said


def test_a_port_that_is_taken_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["dashboard", "--storage", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


def test_the_link_leads_to_the_runs(run: RunHandle) -> None:
    assert runs_page(run.uri) == f"#/experiments/{run.experiment_id}/runs?workflowType=machine_learning"


def test_it_listens_on_loopback_alone(tmp_path: Path) -> None:
    command = serve_command(tmp_path / "mlflow.db", 5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.fixture
def run(storage: Path, tiny_config: Config) -> RunHandle:
    """Three epochs of curves and one picture each, as a training logs them."""
    handle = create_run(resolve_uri("", storage), "slrnet", "seen", params=tiny_config.flat(), tags={}, resume=False)
    tracker = MlflowTracker(handle)
    for epoch in range(3):
        tracker.log_metrics(dict.fromkeys(CURVES, 0.3 + 0.1 * epoch), step=10 * epoch)
        tracker.log_image(SAMPLES + "photo", np.full((24, 48, 3), 80 * epoch, np.uint8), step=epoch)
    tracker.describe("Best checkpoint: epoch 3.")
    tracker.finish()
    return handle


@pytest.fixture
def address(run: RunHandle, storage: Path, serve: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    with serve("slrnet", "dashboard", "--storage", str(storage), path="health") as found:
        yield f"{found}#/experiments/{run.experiment_id}/runs/{run.run_id}"


@pytest.mark.slow
def test_a_visitor_finds_curves_and_pictures(
    address: str, run: RunHandle, browser: Any, keep_screenshot: Callable[[str], None]
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    screen = {"width": 1400, "height": 1600, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def text() -> str:
        return str(browser.execute_script("return document.body.innerText"))

    wait = WebDriverWait(browser, 300, poll_frequency=0.5)
    shown = "return [...document.images].filter(i => i.src.includes('photo') && i.naturalWidth > 1).length"
    browser.get(address.partition("#")[0] + runs_page(run.uri))  # what the command prints
    wait.until(lambda _: "seen" in text(), "the list of runs")
    assert "/runs?" in browser.current_url  # and not the page of traces
    keep_screenshot("runs")
    browser.get(address)
    wait.until(lambda _: "Best checkpoint: epoch 3." in text(), "the description")
    wait.until(lambda _: browser.execute_script(shown), "its picture")
    browser.get(f"{address}/model-metrics")
    drawn = "return document.querySelectorAll('.js-plotly-plot .main-svg').length"
    wait.until(lambda _: browser.execute_script(drawn), "curves")
    wait.until(lambda _: all(key in text() for key in CURVES), "names of the curves")
    wait.until(lambda _: browser.execute_script(shown), "the picture")
    assert text().index(CURVES[0]) < text().index(SAMPLES + "photo")
    keep_screenshot("dashboard")
