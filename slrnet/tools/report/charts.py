"""Line charts as geometry that the page's template draws.

The SVG is our own because matplotlib's has fixed colors. This one takes its colors and font from the page, so it
follows the reader's light or dark mode, and its dots tell their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

__all__ = ["SIZE", "Chart", "Drawing", "Line", "Series", "draw_chart"]

SIZE = (420, 290)
"""Width and height of a chart in its own units, in which its text is 13 high."""
_ACROSS, _UP = (52, 404), (246, 14)  # where the axes begin and end
_TICKS = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
Limits = tuple[float, float]


class Series(NamedTuple):
    """Points of one line; those that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = True
    """Whether to draw a dot at each point."""
    labels: Sequence[str] = ()
    """A text beside each point; empty for none."""


class Chart(NamedTuple):
    """What a chart shows; the labels name quantity and unit of the axes."""

    title: str
    series: Sequence[Series]
    """At most six, as many as there are colors."""
    x_label: str
    y_label: str
    note: str
    """Protocol of the figures."""
    limits: Limits | None = None
    """Range of both axes; None for the range of the points."""
    diagonal: bool = False
    """Whether to draw the line x = y."""


class Line(NamedTuple):
    """A series in the chart's units."""

    series: Series
    path: str
    """Of SVG; empty without points."""
    points: list[tuple[float, float, str, str]]
    """Place, what a dot there says when pointed at, and the text beside it."""


class Drawing(NamedTuple):
    """The geometry that a template needs to draw a chart."""

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    diagonal: str
    """Path of the line x = y; empty for none."""


def draw_chart(chart: Chart, others: Sequence[Chart] = ()) -> Drawing:
    """Places the series of a chart; points of `others` with its title, to compare it with, widen the axes."""
    alike = [chart, *(other for other in others if other.title == chart.title)]
    points = [point for one in alike for series in one.series for point in series.points]
    x_limits, y_limits = (chart.limits or _limits([point[axis] for point in points]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return _scale(x, x_limits, *_ACROSS), _scale(y, y_limits, *_UP)

    lines = []
    for series in chart.series:
        pairs = zip(series.points, series.labels or [""] * len(series.points), strict=True)
        finite = [(x, y, label) for (x, y), label in pairs if math.isfinite(x) and math.isfinite(y)]
        placed = [(*place(x, y), f"{series.name}: {y:.4g} at {x:.4g}", label) for x, y, label in finite]
        lines.append(Line(series, _path([(left, top) for left, top, *_ in placed]), placed))
    low, high = max(x_limits[0], y_limits[0]), min(x_limits[1], y_limits[1])
    return Drawing(
        [(place(tick, y_limits[0])[0], f"{tick:g}") for tick in _ticks(x_limits)],
        [(place(x_limits[0], tick)[1], f"{tick:g}") for tick in _ticks(y_limits)],
        lines,
        _path([place(low, low), place(high, high)]) if chart.diagonal and low < high else "",
    )


def _limits(values: Sequence[float]) -> Limits:
    """The range that holds all finite values, widened to whole ticks; (0, 1) without values."""
    finite = list(filter(math.isfinite, values))
    ticks = _TICKS.tick_values(min(finite), max(finite)) if finite else (0, 1)
    return float(ticks[0]), float(ticks[-1])


def _ticks(limits: Limits) -> list[float]:
    slack = 1e-9 * (limits[1] - limits[0])
    ticks = [round(float(tick), 10) for tick in _TICKS.tick_values(*limits)]
    return [tick for tick in ticks if limits[0] - slack <= tick <= limits[1] + slack]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:g} {y:g}" for x, y in places) if places else ""


def _scale(value: float, limits: Limits, start: float, end: float) -> float:
    return round(start + (value - limits[0]) / (limits[1] - limits[0]) * (end - start), 1)
