"""The app's page: an image goes in, controls beside it, pictures below. One page a visitor, all on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from nicegui import events, run, ui
from PIL import Image

from slrnet.data.images import encode_mask, open_image
from slrnet.tools.app.analyzer import MAX_SIDE, Analysis, Analyzer, shrink
from slrnet.tools.app.local import MAX_BYTES, serve_page
from slrnet.tools.codes import heat
from slrnet.viz.overlay import Pixels, draw_overlay
from slrnet.viz.panels import class_legend

__all__ = ["serve"]

MAX_PIXELS = 100_000_000
"""Of an uploaded image; it takes about ten bytes a pixel for a moment."""
_MOST_SCORES = 10
_STRIPES = "repeating-linear-gradient(135deg, #fafafa 0 4px, #969696 4px 8px)"
"""CSS of the legend's swatch for undecided pixels."""
_PICTURES = {"image": "Image", "mask": "Mask", "refined": "Fused and refined", "pseudo": "Pseudo label"}


def serve(analyzer: Analyzer, *, name: str, port: int, examples: Mapping[str, Pixels]) -> None:
    """Serves the app, with the checkpoint's name as its heading and images to begin with, on 127.0.0.1 until Ctrl-C."""
    serve_page(lambda: _Page(analyzer, name, examples).build(), title=f"slrnet: {name}", port=port)


class _Page:
    """One visitor's page: the image, the controls and what is shown."""

    def __init__(self, analyzer: Analyzer, name: str, examples: Mapping[str, Pixels]) -> None:
        self.analyzer, self.name, self.examples = analyzer, name, examples
        self.mask: npt.NDArray[np.uint8] | None = None
        self.controls = analyzer.defaults
        self.image: Pixels | None = None
        self.request = 0
        self.pictures: dict[str, Any] = {}

    def build(self) -> None:
        """Lays the page out."""
        with ui.column().classes("w-full max-w-7xl mx-auto p-2 gap-4"):
            ui.label(f"slrnet: {self.name}").classes("text-xl font-medium")
            with ui.row().classes("w-full gap-6 items-start"):
                ui.upload(
                    label="Drop an image here, or click +",
                    on_upload=self._upload,
                    on_rejected=lambda: ui.notify(f"an image file of up to {MAX_BYTES // 1_000_000} MB is wanted"),
                    auto_upload=True,
                    max_file_size=MAX_BYTES,
                ).props('accept="image/*" flat bordered').classes("w-80")
                with ui.column().classes("gap-3 w-96 max-w-full"):
                    self._controls()
                with ui.row().classes("examples gap-2"):
                    for key, image in self.examples.items():
                        shown = ui.image(Image.fromarray(image)).classes("w-20 cursor-pointer").tooltip(f"try {key}")
                        shown.on("click", lambda key=key: self._take(self.examples[key]))
            self.status = ui.label("No image yet.").classes("status")
            with ui.element("div").classes("grid grid-cols-1 sm:grid-cols-2 lg:grid-cols-4 gap-3 w-full"):
                for key, caption in _PICTURES.items():
                    with ui.column().classes("gap-1"):
                        ui.label(caption).classes("text-sm font-medium")
                        self.pictures[key] = ui.image().classes(f"picture-{key} w-full").props("no-transition")
            text = "the mask as a palette PNG, of the size shown; `slrnet predict` writes masks of full size"
            self.save = ui.button("Save the mask", on_click=self._save).classes("save").props("outline").tooltip(text)
            self.save.disable()
            self.below = ui.column().classes("w-full gap-2")
        if self.examples:
            ui.timer(0.1, lambda: self._take(next(iter(self.examples.values()))), once=True)

    def _controls(self) -> None:
        if self.analyzer.has_codes:
            text = "how often CVLR updates its dictionary and its codes; more makes pixels that look alike more alike "
            text += "in the mask (cvlr.num_iters)"
            self._slider("T", text, 1, 10, 1, "num_iters")
        text = "how sure a pixel must be for the pseudo label, as a share of its class's highest value in the image; "
        text += "higher labels fewer pixels, and more of them rightly (calibration.confidence_threshold)"
        self._slider("gamma", text, 0, 1, 0.05, "gamma")
        switch = ui.switch("refinement", value=self.controls.refine_iters > 0).classes("refinement")
        text = "of the refinement (calibration.refine_iters)"
        slider = self._slider("iterations", text, 1, 30, 1, "refine_iters")
        slider.bind_enabled_from(switch, "value")
        switch.on_value_change(lambda event: self._change(refine_iters=int(slider.value) if event.value else 0))
        label = "classes of the pseudo label (else: by their scores)"
        chosen = ui.select(list(self.analyzer.classes[1:]), multiple=True, label=label)
        chosen.classes("w-full").props("use-chips clearable dense")
        chosen.on_value_change(lambda event: self._change(classes=tuple(event.value) if event.value else None))

    def _slider(self, name: str, text: str, low: float, high: float, step: float, control: str) -> Any:
        value = max(getattr(self.controls, control), low)
        with ui.row().classes("w-full items-center no-wrap gap-3"):
            shown = ui.label().classes("w-32 shrink-0 text-sm")
            slider = ui.slider(min=low, max=max(high, value), step=step, value=value).classes(f"control-{control}")
            slider.props(f'aria-label="{name}: {text}"').tooltip(text)
            shown.bind_text_from(slider, "value", lambda now: f"{name} = {now:g}")
        # Not at every place that it passes: an answer may take a second.
        slider.on(
            "update:model-value",
            lambda event: self._change(**{control: type(value)(event.args)}),
            throttle=0.5,
            leading_events=False,
        )
        return slider

    async def _upload(self, event: events.UploadEventArguments) -> None:
        event.sender.reset()
        try:
            self.image = await run.io_bound(self._read, await event.file.read(), event.file.name)
        except ValueError as error:
            ui.notify(str(error), type="negative")
            return
        await self._show()

    async def _take(self, image: Pixels) -> None:
        if self.image is None or self.image is not image:
            self.image = image
            await self._show()

    def _save(self) -> None:
        if self.mask is not None:
            ui.download(encode_mask(self.mask, self.analyzer.palette), "mask.png")

    def _read(self, data: bytes, name: str) -> Pixels:
        with open_image(data, name=name, remedy="try another image", max_pixels=MAX_PIXELS) as file:
            return shrink(file, self.analyzer.depth)

    async def _change(self, **changes: Any) -> None:
        self.controls = replace(self.controls, **changes)
        await self._show()

    async def _show(self) -> None:
        """Analyzes the image with the controls' settings; drops the result if a newer request came meanwhile."""
        if self.image is None:
            return
        self.request += 1
        request, image = self.request, self.image
        self.status.set_text("analyzing ...")
        analysis = await run.io_bound(self.analyzer.analyze, image, self.controls)
        if request == self.request:
            self._draw(image, analysis)

    def _draw(self, image: Pixels, analysis: Analysis) -> None:
        palette = self.analyzer.palette
        self.mask = analysis.mask.astype(np.uint8)
        self.save.enable()
        self.pictures["image"].set_source(Image.fromarray(image))
        for key, mask in (("mask", analysis.mask), ("refined", analysis.refined), ("pseudo", analysis.pseudo_labels)):
            self.pictures[key].set_source(draw_overlay(image, mask, palette))
        large = f"; larger images are scaled down to {MAX_SIDE}" if max(image.shape[:2]) == MAX_SIDE else ""
        self.status.set_text(
            f"{image.shape[1]} x {image.shape[0]} pixels{large}. The pseudo label decides "
            f"{100 * analysis.coverage:.1f} % of them; classes that it may show: {', '.join(analysis.classes)}"
        )
        self.below.clear()
        with self.below:
            self._draw_legend(analysis, palette)
            self._draw_scores(analysis)
            self._draw_codes(analysis)

    def _draw_legend(self, analysis: Analysis, palette: Pixels) -> None:
        with ui.row().classes("legend gap-4"):
            masks = (analysis.mask, analysis.refined, analysis.pseudo_labels)
            for name, color in class_legend(masks, palette, self.analyzer.classes):
                fill = "rgb({}, {}, {})".format(*color) if color else _STRIPES
                with ui.row().classes("items-center gap-2"):
                    ui.element("div").classes("w-4 h-4").style(f"background: {fill}; border: 1px solid currentColor")
                    ui.label(name if color else "undecided")

    def _draw_scores(self, analysis: Analysis) -> None:
        if not analysis.scores:
            ui.label("The network has no class scores (setting sss).").classes("text-sm")
            return
        ui.label("Class scores").classes("text-sm font-medium")
        rows = ui.element("div").classes("scores grid gap-x-4 gap-y-1 w-full max-w-xl")
        with rows.style("grid-template-columns: max-content 1fr max-content"):
            for name, score in list(analysis.scores.items())[:_MOST_SCORES]:
                ui.label(name).classes("text-sm")
                ui.linear_progress(score, show_value=False).props("instant-feedback").classes("self-center")
                ui.label(f"{score:.2f}").classes("text-sm")

    def _draw_codes(self, analysis: Analysis) -> None:
        if not analysis.codes:
            ui.label("The network has no low-rank module, and no codes.").classes("text-sm")
            return
        ui.label(f"Code maps, T = {self.controls.num_iters} (dark 0, yellow 1)").classes("text-sm font-medium")
        with ui.element("div").classes("codes grid grid-cols-2 sm:grid-cols-3 lg:grid-cols-6 gap-3 w-full"):
            for name, codes in analysis.codes.items():
                with ui.column().classes("gap-1"):
                    ui.image(Image.fromarray(heat(codes))).classes("w-full").props("no-transition")
                    ui.label(name).classes("text-sm")
