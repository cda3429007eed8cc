"""One page about a run in motion: score, curves and pictures, from its folder alone (`slrnet watch`).

The page needs no server of MLflow, no checkpoint and no GPU, so it is there from the first epoch on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from slrnet.checkpoints.run_store import CONFIG, validation_scores
from slrnet.config import Config, load_config
from slrnet.data.images import open_image
from slrnet.data.manifest import DataError
from slrnet.tools.report.charts import Chart, Series
from slrnet.tools.report.page import environment
from slrnet.tracking.run_log import read_log

__all__ = ["Seen", "page_server", "render", "see", "serve"]

REFRESH = 10
"""Seconds after which a browser loads the page again."""
MOST_PICTURES, MOST_SMALL, MOST_POINTS = 4, 8, 300
_PANEL = re.compile(r"(?P<key>.+)-epoch-(?P<epoch>\d+)\.png")


@dataclass(frozen=True)
class Pictures:
    """How an image's masks look, and looked."""

    epoch: int
    panel: Image.Image
    """The last one: all stages."""
    small: list[tuple[int, Image.Image]]
    """Pseudo labels by epoch."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a run's folder says of it."""

    name: str
    status: str
    """Epoch, step, and when the last line was written."""
    score: float | None
    """The last validation mIoU, a share; None if none was measured."""
    charts: list[Chart]
    notices: list[str] = field(default_factory=list)
    """Why it failed or may stop."""
    pictures: dict[str, Pictures] = field(default_factory=dict)
    """By the key of the image."""


def see(folder: Path) -> Seen:
    """Reads a run's folder.

    Raises:
        DataError: it holds no run; the message names the runs in it.
    """
    if not (folder / CONFIG).is_file():
        runs = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))[:10])
        raise DataError(
            f"{folder} holds no run ({CONFIG} is missing); "
            + (f"runs in it: {runs}" if runs else "name a run's folder")
        )
    config, log = load_config(folder / CONFIG), folder / "logs" / "rank-0.jsonl"
    records = list(read_log(log)) if log.is_file() else []
    epochs = [record for record in records if record["event"] == "epoch"]
    scores = [score for record in epochs for score in validation_scores(record)]
    notes = [record for record in records[-1:] if record["event"] in ("failure", "hang", "notice")]
    return Seen(
        name=folder.name,
        status=_status(records, config),
        score=scores[-1] if scores else None,
        charts=_charts(records, epochs),
        notices=[f"{record['event']} at step {record.get('step')}: {record.get('message')}" for record in notes],
        pictures=_pictures(folder),
    )


def render(seen: Seen, *, refresh: int = 0) -> str:
    """The page, which loads nothing from anywhere; with `refresh`, a browser loads it again after so many seconds."""
    page, pictures = environment([chart for chart in seen.charts if chart.series])
    return page.get_template("watch.html.jinja").render(seen=seen, refresh=refresh, **pictures)


def serve(folder: Path, port: int) -> None:
    """Serves the page on 127.0.0.1 until Ctrl-C; each request reads the folder again."""
    with page_server(folder, port) as server:
        server.serve_forever()


def page_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """The server of a run's page on 127.0.0.1; port 0: any free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, folder))


class _Handler(BaseHTTPRequestHandler):
    """Answers with the page, and nothing else; another site's page under a name of its own gets none."""

    def __init__(self, folder: Path, *rest: Any) -> None:
        self._folder = folder
        super().__init__(*rest)

    def do_GET(self) -> None:
        _, port, *_ = self.connection.getsockname()
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}") or self.path != "/":
            self.send_error(404)
            return
        try:
            content = render(see(self._folder), refresh=REFRESH).encode()
        except (ValueError, OSError) as error:
            self.send_error(503, explain=str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that loads again by itself is no news."""


def _status(records: list[dict[str, Any]], config: Config) -> str:
    if not records:
        return "It has started; no step is logged yet."
    step = max((record.get("step", 0) for record in records if record["event"] in ("step", "epoch")), default=0)
    epoch = max((record["epoch"] for record in records if record["event"] == "epoch"), default=0)
    written = datetime.fromisoformat(records[-1]["time"]).astimezone()
    done = "finished" if epoch == config.train.epochs else "in motion or stopped"
    last = f"{written:%Y-%m-%d %H:%M:%S}"
    return f"{done}: {epoch} of {config.train.epochs} epochs measured, step {step}, last line {last}"


def _charts(records: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> list[Chart]:
    steps = {record["step"]: record["loss"] for record in records if record["event"] == "step" and "loss" in record}
    points = sorted((float(step), float(loss)) for step, loss in steps.items())
    points = points[:: max(1, len(points) // MOST_POINTS)]
    charts = [Chart("Training loss", [Series("of a step", points, dots=False)], "step", "loss", "on random crops")]
    for title, prefix in (("Pseudo masks of training images", "pseudo_mask/"), ("Validation", "val/")):
        series = []
        for name, start in (("mIoU", "miou"), ("mFDR", "mfdr"), ("mFNR", "mfnr"), ("coverage", "coverage")):
            named = {r["epoch"]: v for r in epochs for key, v in r.items() if key.startswith(prefix + start)}
            if named:
                series.append(Series(name, [(float(epoch), 100 * value) for epoch, value in sorted(named.items())]))
        charts.append(Chart(title, series, "epoch", "%", "as MLflow has them"))
    return charts


def _pictures(folder: Path) -> dict[str, Pictures]:
    found: dict[str, dict[int, Path]] = {}
    for path in sorted((folder / "panels").rglob("*.png")):
        if match := _PANEL.fullmatch(path.relative_to(folder / "panels").as_posix()):
            found.setdefault(match["key"], {})[int(match["epoch"])] = path
    pictures = {}
    for key, panels in list(found.items())[:MOST_PICTURES]:
        last = max(panels)
        small = [
            (epoch, _read(folder / "history" / path.relative_to(folder / "panels")))
            for epoch, path in sorted(panels.items())[-MOST_SMALL:]
            if (folder / "history" / path.relative_to(folder / "panels")).is_file()
        ]
        pictures[key] = Pictures(last, _read(panels[last]), small)
    return pictures


def _read(path: Path) -> Image.Image:
    with open_image(path) as picture:
        return picture.convert("RGB")
