"""The page of a run in motion: from its folder alone, from the first epoch on."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.cli.main import main
from slrnet.tools import watch


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run without checkpoints, as within its second epoch."""
    shutil.copytree(tiny_run / "panels", tmp_path / "run" / "panels")
    shutil.copytree(tiny_run / "history", tmp_path / "run" / "history")
    (tmp_path / "run" / "config.json").write_text(load_checkpoint(tiny_run).config.to_json())
    common = {"time": "2026-01-02T03:04:05.678+00:00", "rank": 0}
    lines = [{"event": "step", "step": step, "loss": 2.0 / step} for step in (1, 2, 3)]
    lines.insert(2, {"event": "epoch", "step": 2, "epoch": 1, "val/miou_ss": 0.437, "pseudo_mask/miou": 0.5})
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "rank-0.jsonl").write_text("".join(json.dumps(common | line) + "\n" for line in lines))
    return tmp_path / "run"


def test_score_curves_and_pictures_before_the_end(run: Path) -> None:
    assert main(["watch", str(run), "--out", str(run / "page.html")]) == 0
    page = (run / "page.html").read_text(encoding="utf-8")
    assert "<b>43.7 %</b> val mIoU" in page
    assert "1 of 2 epochs measured, step 3" in page
    assert page.count("<circle") == 2  # a dot for each epoch; losses are a line
    assert page.count("after epoch 2") >= 2  # the panel of each image
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_a_browser_shows_its_pictures_without_errors(
    run: Path, browser: Any, keep_screenshot: Callable[[str], None]
) -> None:
    assert main(["watch", str(run), "--out", str(run / "page.html")]) == 0
    browser.get_log("browser")  # of pages before
    browser.get((run / "page.html").as_uri())
    keep_screenshot("watch")
    assert browser.execute_script(
        "return [...document.images].every(i => i.naturalWidth > 0) && document.images.length"
    )
    assert browser.get_log("browser") == []


def test_what_is_no_run_and_a_run_that_failed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run.parent)]) == 2
    assert "holds no run (config.json is missing); runs in it: run" in capsys.readouterr().err
    with (run / "logs" / "rank-0.jsonl").open("a") as log:
        failure = {"event": "failure", "time": "2026-01-02T03:05:00+00:00", "step": 3, "message": "<b>no</b> memory"}
        log.write(json.dumps(failure) + "\n")
    assert "failure at step 3: &lt;b&gt;no&lt;/b&gt; memory" in watch.render(watch.see(run))


def test_the_server_answers_with_the_page_of_now_and_no_other_site(run: Path) -> None:
    server = watch.page_server(run, 0)
    address = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert "43.7 %" in urllib.request.urlopen(address, timeout=60).read().decode()
        foreign = urllib.request.Request(address, headers={"Host": "example.org"})
        for wrong in (foreign, address + "config.json"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(wrong, timeout=60)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert isinstance(server, ThreadingHTTPServer)
