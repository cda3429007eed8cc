"""What the app answers, and its page in a browser with a real upload."""

from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.cli.main import main
from slrnet.tools.app.analyzer import MAX_SIDE, Analyzer, shrink
from slrnet.tools.app.guard import Guard
from slrnet.tools.dashboard import newest_run

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def analyzer(tiny_run: Path) -> Analyzer:
    return Analyzer(load_checkpoint(tiny_run), device="cpu")


@pytest.fixture(scope="module")
def image() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def test_an_analysis_has_all_that_the_page_shows(analyzer: Analyzer, image: Pixels) -> None:
    analysis = analyzer.analyze(image, analyzer.defaults)
    for mask in (analysis.mask, analysis.refined, analysis.pseudo_labels):
        assert mask.shape == (64, 96)
    assert set(analysis.scores) == set(analyzer.classes[1:])
    assert list(analysis.scores.values()) == sorted(analysis.scores.values(), reverse=True)
    assert set(analysis.classes) <= set(analyzer.classes[1:])
    assert analysis.codes
    assert set(analysis.codes) <= set(analyzer.classes)


def test_gamma_decides_how_much_is_labeled(analyzer: Analyzer, image: Pixels) -> None:
    every = replace(analyzer.defaults, classes=analyzer.classes[1:], refine_iters=0)
    covered = [analyzer.analyze(image, replace(every, gamma=gamma)).coverage for gamma in (0.0, 0.5, 1.0)]
    assert covered[0] != covered[2]
    masks = [analyzer.analyze(image, replace(every, gamma=gamma)).refined for gamma in (0.0, 1.0)]
    assert (masks[0] == masks[1]).all()  # before the threshold


def test_iterations_change_codes_and_leave_the_network_as_it_was(analyzer: Analyzer, image: Pixels) -> None:
    first = analyzer.analyze(image, analyzer.defaults)
    other = analyzer.analyze(image, replace(analyzer.defaults, num_iters=6))
    name = next(iter(set(first.codes) & set(other.codes)))
    assert not np.allclose(first.codes[name], other.codes[name], atol=1e-6)
    again = Analyzer(load_checkpoint_of(analyzer), device="cpu").analyze(image, analyzer.defaults)
    assert (analyzer.analyze(image, analyzer.defaults).mask == again.mask).all()


def load_checkpoint_of(analyzer: Analyzer) -> Any:
    from slrnet.checkpoints.checkpoint import Checkpoint, TrainState

    state = TrainState(epoch=1, step=1, classes=analyzer.classes, data_fingerprint="", world_size=1)
    return Checkpoint(Path(), analyzer.config, state, analyzer._inference.model.state_dict(), {})


def test_chosen_classes_alone_are_labeled(analyzer: Analyzer, image: Pixels) -> None:
    chosen = analyzer.analyze(image, replace(analyzer.defaults, classes=(analyzer.classes[2],)))
    assert set(np.unique(chosen.pseudo_labels)) <= {0, 2, 255}
    assert chosen.classes == (analyzer.classes[2],)


def test_large_images_are_scaled_down() -> None:
    assert shrink(Image.new("RGB", (3000, 1000))).shape == (round(1000 * MAX_SIDE / 3000), MAX_SIDE, 3)
    assert shrink(Image.new("L", (30, 20))).shape == (20, 30, 3)


def test_the_newest_run_is_taken(tiny_run: Path, tmp_path: Path) -> None:
    assert newest_run([tmp_path, tiny_run.parent]) == tiny_run
    with pytest.raises(ValueError, match="there is no run with a checkpoint in .*; train one with `make demo`"):
        newest_run([tmp_path])


def test_refusals(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["app", str(tiny_run), "--port", str(taken.getsockname()[1])]) == 2
    assert "is taken" in capsys.readouterr().err


def answer(scope: dict[str, Any], parts: Sequence[bytes] = (b"x",), *, at_once: int = 1) -> list[Any]:
    """First words of the guarded app to some equal requests at once, which it answers when it has read all of it."""
    answers: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "http" and (await receive()).get("more_body"):
            await asyncio.sleep(0)
        await send({"type": f"{scope['type']}.response.start", "status": 200})

    async def ask(guard: Guard) -> None:
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages[-1]["more_body"] = False

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            if not message["type"].endswith(".body"):
                answers.append(message)

        await guard(scope, receive, send)

    async def run() -> None:
        guard = Guard(app, most_bytes=1000)
        await asyncio.gather(*(ask(guard) for _ in range(at_once)))

    asyncio.run(run())
    return answers


def request(kind: str = "http", method: str = "POST", **headers: str) -> dict[str, Any]:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": kind, "method": method, "headers": [(b"host", b"127.0.0.1:80"), *named]}


class TestGuard:
    @pytest.mark.parametrize(
        ("headers", "parts", "status"),
        [
            ({"content_length": "1000"}, [b"x"], 200),
            ({"content_length": str(10**9)}, [b"x"], 413),
            ({"content_length": "x"}, [b"x"], 413),
            ({}, [bytes(60_000)] * 2, 413),  # says no length
            ({}, [bytes(30_000)] * 2, 200),
            ({"origin": "http://127.0.0.1:80"}, [b"x"], 200),
            ({"origin": "http://evil.example"}, [b"x"], 403),
            ({"origin": "null"}, [b"x"], 403),
        ],
    )
    def test_uploads_are_limited_on_the_server(self, headers: dict[str, str], parts: list[bytes], status: int) -> None:
        assert [message["status"] for message in answer(request(**headers), parts)] == [status]

    def test_few_uploads_are_read_at_a_time(self) -> None:
        answers = answer(request(), [b"x"] * 9, at_once=5)
        assert sorted(message["status"] for message in answers) == [200, 200, 429, 429, 429]

    def test_another_sites_page_gets_no_socket(self) -> None:
        (closed,) = answer(request("websocket", origin="http://evil.example"))
        assert closed["type"] == "websocket.close"
        (taken,) = answer(request("websocket", origin="http://127.0.0.1:80"))
        assert taken["status"] == 200

    def test_pages_have_a_policy(self) -> None:
        (page,) = answer(request(method="GET"))
        assert b"frame-ancestors 'none'" in dict(page["headers"])[b"content-security-policy"]


@pytest.fixture
def address(tiny_run: Path, serve: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    with serve("slrnet", "app", str(tiny_run)) as found:
        yield found


@pytest.mark.slow
def test_an_image_is_dropped_and_gamma_moved(
    address: str, browser: Any, image: Pixels, tmp_path: Path, keep_screenshot: Callable[[str], None]
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def text(selector: str) -> str:
        return str(browser.execute_script("return document.querySelector(arguments[0])?.innerText || ''", selector))

    def source(selector: str) -> str:
        return str(browser.execute_script("return document.querySelector(arguments[0] + ' img')?.src || ''", selector))

    def wait(condition: Any) -> None:
        WebDriverWait(browser, 120, poll_frequency=0.2).until(lambda _: condition(), "what was waited for")

    Image.fromarray(image).save(tmp_path / "photo.png")
    behavior = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    browser.get_log("performance")  # of pages before, the browser's start page included
    browser.get(address)
    wait(lambda: browser.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    wait(lambda: "The pseudo label decides" in text(".status"))  # of the first validation image, without a click
    assert browser.execute_script("return document.querySelectorAll('.examples img').length") == 4
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "photo.png"))
    wait(lambda: "96 x 64 pixels. The pseudo label decides" in text(".status") and source(".picture-mask"))
    assert text(".scores")
    assert browser.execute_script("return document.querySelectorAll('.codes img').length") > 0
    browser.find_element(By.CSS_SELECTOR, ".save").click()
    wait((tmp_path / "mask.png").is_file)
    with Image.open(tmp_path / "mask.png") as saved:
        assert saved.size == (96, 64)
    keep_screenshot("app")
    before, mask = source(".picture-pseudo"), source(".picture-mask")
    browser.find_element(By.CSS_SELECTOR, ".control-gamma").click()  # to the middle, and from there to 1
    browser.switch_to.active_element.send_keys(10 * Keys.ARROW_RIGHT)
    wait(lambda: source(".picture-pseudo") != before)
    assert source(".picture-mask") == mask
    requested = [entry["message"] for entry in browser.get_log("performance") if '"url":"http' in entry["message"]]
    assert all('"url":"http://127.0.0.1:' in message for message in requested)
    # Another site's page, which calls this one by a name of its own.
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "example.org"}), timeout=30)
    assert refusal.value.code == 400
