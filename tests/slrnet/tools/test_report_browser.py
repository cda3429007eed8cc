"""The page in a browser: no errors, sorting, the slider, a narrow screen, dark mode."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from slrnet.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    run = out.with_name("run")
    shutil.copytree(tiny_run, run)
    for place, panel in enumerate(sorted((run / "panels").iterdir())):  # that differ for certain
        Image.new("RGB", (1200, 240), (60 * place, 90, 160)).save(panel)
    assert main(["report", str(run), str(run), "--out", str(out), "--images", "2"]) == 0
    return out.as_uri()


@pytest.fixture
def opened(browser: Any, address: str) -> Any:
    show(browser, width=1400)
    for log in ("browser", "performance"):  # of pages before
        browser.get_log(log)
    browser.get(address)
    return browser


def show(browser: Any, *, width: int, mode: str = "light") -> None:
    """A screen of some width, in CSS pixels, of a reader who prefers a mode."""
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def test_it_opens_without_errors_and_without_the_network(opened: Any, keep_screenshot: Callable[[str], None]) -> None:
    keep_screenshot("report")
    assert opened.execute_script("return [...document.images].every(i => i.hidden || i.naturalWidth > 0)")
    assert opened.get_log("browser") == []
    requests = [entry["message"] for entry in opened.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert requests
    assert not [message for message in requests if '"url":"http' in message]


def test_a_click_on_a_heading_sorts(opened: Any) -> None:
    script = """
        const table = document.querySelector(".sortable"), button = table.querySelectorAll("th button")[arguments[0]];
        button.click();
        return [[...table.tBodies[0].rows].map(row => row.cells[arguments[0]].dataset.value),
                button.parentElement.getAttribute("aria-sort")];
    """
    values, order = opened.execute_script(script, 1)
    numbers = [float(value) for value in values]
    assert (numbers, order) == (sorted(numbers, reverse=True), "descending")
    values, order = opened.execute_script(script, 1)
    assert ([float(value) for value in values], order) == (sorted(numbers), "ascending")
    names, order = opened.execute_script(script, 0)
    assert (names, order) == (sorted(names), "ascending")
    # What was not measured stays last, whichever way.
    opened.execute_script('document.querySelector(".sortable tbody td:nth-child(3)").dataset.value = ""')
    for _ in range(2):
        assert opened.execute_script(script, 2)[0][-1] == ""


def test_the_slider_changes_the_image(opened: Any) -> None:
    script = """
        const figure = document.querySelector(".evolution"), slider = figure.querySelector("input");
        if (arguments[0] !== null) { slider.value = arguments[0]; slider.dispatchEvent(new Event("input")); }
        const shown = [...figure.querySelectorAll("img")].filter(image => image.offsetParent !== null);
        return [shown.map(image => image.alt), shown[0].src, figure.querySelector("output").value];
    """
    alts, last, output = opened.execute_script(script, None)
    assert (alts, output) == (["epoch 2"], "epoch 2")
    alts, first, output = opened.execute_script(script, 0)
    assert (alts, output) == (["epoch 1"], "epoch 1")
    assert first != last


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
def test_the_page_never_scrolls_sideways(opened: Any, width: int) -> None:
    show(opened, width=width)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    columns = opened.execute_script('return getComputedStyle(document.querySelector(".columns")).gridTemplateColumns')
    assert len(columns.split()) == (1 if width < 760 else 2)


def test_dark_mode_changes_paper_and_text(opened: Any) -> None:
    script = """
        const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
        return [of("body", "backgroundColor"), of("body", "color"), of(".chart text", "fill"), of(".line", "stroke")];
    """
    light = opened.execute_script(script)
    show(opened, width=1400, mode="dark")
    dark = opened.execute_script(script)
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] == "rgb(20, 23, 26)"
    assert dark[1] == dark[2] != light[1] == light[2]
    assert dark[3] != light[3]
