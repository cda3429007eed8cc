"""The review's page: an image with its mask, a brush, and three decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from nicegui import events, ui
from PIL import Image, ImageDraw

from slrnet.data.catalog import IGNORE_INDEX
from slrnet.tools.app.local import serve_page
from slrnet.tools.review.desk import ReviewDesk
from slrnet.viz.overlay import draw_overlay

__all__ = ["paint", "serve"]

Mask = npt.NDArray[np.uint8]
Point = tuple[float, float]
_KEYS: dict[str, str] = {"a": "accept", "d": "discard", "z": "undo", "ArrowRight": "next", "ArrowLeft": "previous"}
_MOST_UNDONE = 50


def serve(desk: ReviewDesk, *, name: str, port: int) -> None:
    """Serves the review of a run, with its name as heading, on 127.0.0.1 until Ctrl-C."""
    serve_page(lambda: _Page(desk, name).build(), title=f"slrnet review: {name}", port=port)


def paint(mask: Mask, stroke: list[Point], *, label: int, width: float) -> Mask:
    """The mask (H, W) after a stroke of the brush: class id `label` along points (x, y), `width` pixels wide."""
    canvas = Image.fromarray(mask)
    draw, half = ImageDraw.Draw(canvas), width / 2
    if len(stroke) > 1:
        draw.line(stroke, fill=label, width=max(1, round(width)), joint="curve")
    for x, y in stroke:
        draw.ellipse((x - half, y - half, x + half, y + half), fill=label)
    return np.asarray(canvas).copy()


class _Page:
    """One visitor's page."""

    def __init__(self, desk: ReviewDesk, name: str) -> None:
        self.desk, self.name = desk, name
        undecided = [place for place, key in enumerate(desk.keys) if key not in desk.decisions]
        self.place = undecided[0] if undecided else 0
        self.stroke: list[Point] = []
        self.undo: list[Mask] = []

    @property
    def key(self) -> str:
        return self.desk.keys[self.place]

    def build(self) -> None:
        """Lays the page out."""
        with ui.column().classes("w-full max-w-5xl mx-auto p-2 gap-3"):
            ui.label(f"slrnet review: {self.name}").classes("text-xl font-medium")
            self.status = ui.label().classes("status")
            self.figures = ui.label().classes("figures text-sm")
            with ui.row().classes("w-full gap-6 items-start"):
                on = ["mousedown", "mousemove", "mouseup", "mouseleave"]
                self.picture = ui.interactive_image(on_mouse=self._mouse, events=on, cross=False, sanitize=False)
                self.picture.classes("picture w-full max-w-2xl").style("touch-action: none")
                with ui.column().classes("gap-3 w-64"):
                    self._controls()
        ui.keyboard(on_key=self._press)
        self._load()

    def _controls(self) -> None:
        names = dict(enumerate(self.desk.classes)) | {IGNORE_INDEX: "void (not known)"}
        self.label = ui.select(names, value=min(1, len(names) - 1), label="brush paints").classes("brush w-full")
        ui.label("width of the brush, pixels").classes("text-sm")
        self.width = ui.slider(min=1, max=80, value=12).props("label").classes("width")
        self.plain = ui.switch("image without its mask", on_change=self._draw)
        buttons = {
            "accept": ("Accept (A)", "the mask is right, or you corrected it"),
            "discard": ("Discard (D)", "no mask of this image is to be learned; its image labels stay"),
            "undo": ("Undo a stroke (Z)", ""),
            "previous": ("Previous", ""),
            "next": ("Next", ""),
        }
        for action, (text, tip) in buttons.items():
            button = ui.button(text, on_click=lambda action=action: self._act(action)).classes(f"{action} w-full")
            if tip:
                button.tooltip(tip)

    def _press(self, event: events.KeyEventArguments) -> None:
        if event.action.keydown and not event.action.repeat and event.key.name in _KEYS:
            self._act(_KEYS[event.key.name])

    def _act(self, action: str) -> None:
        if action == "undo":
            if self.undo:
                self.mask = self.undo.pop()
                self._draw()
            return
        if action == "accept":
            changed = self.undo or self.desk.decisions.get(self.key) == "redrawn"
            self.desk.decide(self.key, "redrawn" if changed else "accepted", self.mask)
        elif action == "discard":
            self.desk.decide(self.key, "discarded")
        step = -1 if action == "previous" else 1
        self.place = min(max(self.place + step, 0), len(self.desk.keys) - 1)
        self._load()

    def _load(self) -> None:
        self.image, self.mask, self.undo = self.desk.image(self.key), self.desk.mask(self.key), []
        doubt, decided = self.desk.record["images"][self.place], len(self.desk.decisions)
        total = len(self.desk.keys)
        done = "all are decided: end the server with Ctrl-C, its last line says how to go on"
        self.status.set_text(
            f"{self.place + 1} of {total}: {self.key}, {self.desk.decisions.get(self.key, 'undecided')}; "
            + (done if decided == total else f"{decided} decided")
        )
        loss = "" if doubt["loss"] is None else f", classification loss {doubt['loss']:.3f}"
        self.figures.set_text(
            f"confidence {100 * doubt['confidence']:.0f} %, views disagree on "
            f"{100 * doubt['disagreement']:.1f} % of the pixels{loss}"
        )
        self._draw()

    def _draw(self) -> None:
        shown = (
            Image.fromarray(self.image) if self.plain.value else draw_overlay(self.image, self.mask, self.desk.palette)
        )
        self.picture.set_source(shown)
        self.picture.set_content("")

    def _mouse(self, event: events.MouseEventArguments) -> None:
        point = (event.image_x, event.image_y)
        if event.type == "mousedown":
            self.stroke = [point]
        elif self.stroke and event.type == "mousemove":
            self.stroke.append(point)
            self.picture.set_content(self._trace())
        elif self.stroke:
            self.undo = [*self.undo, self.mask][-_MOST_UNDONE:]
            self.mask = paint(self.mask, self.stroke, label=int(self.label.value), width=float(self.width.value))
            self.stroke = []
            self._draw()

    def _trace(self) -> str:
        """The stroke under way, as SVG."""
        color: Any = (
            (255, 255, 255) if self.label.value == IGNORE_INDEX else self.desk.palette[self.label.value].tolist()
        )
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.stroke)
        style = f'stroke="rgb({",".join(map(str, color))})" stroke-width="{self.width.value}"'
        return f'<polyline points="{points}" fill="none" stroke-linecap="round" stroke-linejoin="round" {style}/>'
