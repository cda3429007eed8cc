"""Line charts as geometry, for the page's template to draw: hand-made SVG whose colours follow the reader's mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

__all__ = ["HEIGHT", "WIDTH", "Chart", "Line", "Series", "draw_chart", "limits_of"]

WIDTH = 420
"""Width of a chart in its own units, in which its text is 13 high."""
HEIGHT = 290
"""Its height in the same units."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 44
Limits = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points that belong together."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = True
    """Draw a dot at each point."""
    labels: Sequence[str] = ()
    """A text beside each point; empty for none."""


@dataclass(frozen=True)
class Line:
    """A series in the chart's units."""

    name: str
    path: str
    """The `d` of an SVG path."""
    dots: list[tuple[float, float, str]]
    """Place of each dot, and what it says when pointed at."""
    labels: list[tuple[float, float, str]]
    """Place and text of each label."""


@dataclass(frozen=True)
class Chart:
    """All that a template needs to draw a chart."""

    title: str
    note: str
    """Protocol of the figures."""
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    diagonal: str
    """Path of the line x = y; empty for none."""


def limits_of(series: Sequence[Series], axis: int) -> Limits:
    """The range that holds all points on an axis (0: x, 1: y), widened to whole ticks; (0, 1) without points."""
    values = [point[axis] for one in series for point in one.points if math.isfinite(point[axis])]
    if not values:
        return 0.0, 1.0
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(min(values), max(values))
    return float(ticks[0]), float(ticks[-1])


def draw_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_limits: Limits,
    y_limits: Limits,
    note: str,
    diagonal: bool = False,
) -> Chart:
    """Places series in a chart; points that are not finite are left out.

    Args:
        title: of the chart.
        series: at most six, as many as there are colours.
        x_label: what the horizontal axis shows, with its unit.
        y_label: what the vertical axis shows, with its unit.
        x_limits: its range.
        y_limits: its range.
        note: protocol of the figures.
        diagonal: draw the line x = y.
    """

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return _scale(point[0], x_limits, _LEFT, WIDTH - _RIGHT), _scale(point[1], y_limits, HEIGHT - _BOTTOM, _TOP)

    lines = []
    for one in series:
        finite = [i for i, point in enumerate(one.points) if all(map(math.isfinite, point))]
        places = [place(one.points[i]) for i in finite]
        texts = [f"{one.name}: {one.points[i][1]:.4g} at {one.points[i][0]:.4g}" for i in finite]
        dots = [(x, y, text) for (x, y), text in zip(places, texts, strict=True)] if one.dots else []
        labels = [(*places[place], one.labels[i]) for place, i in enumerate(finite)] if one.labels else []
        lines.append(Line(one.name, "M" + " L".join(f"{x:g} {y:g}" for x, y in places) if places else "", dots, labels))
    low, high = max(x_limits[0], y_limits[0]), min(x_limits[1], y_limits[1])
    ends = [place((end, end)) for end in (low, high)]
    return Chart(
        title,
        note,
        x_label,
        y_label,
        [(place((tick, y_limits[0]))[0], f"{tick:g}") for tick in _ticks(x_limits)],
        [(place((x_limits[0], tick))[1], f"{tick:g}") for tick in _ticks(y_limits)],
        lines,
        "M" + " L".join(f"{x:g} {y:g}" for x, y in ends) if diagonal and low < high else "",
    )


def _ticks(limits: Limits) -> list[float]:
    slack = 1e-9 * (limits[1] - limits[0])
    found = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(*limits)
    return [round(float(tick), 10) for tick in found if limits[0] - slack <= tick <= limits[1] + slack]


def _scale(value: float, limits: Limits, start: float, end: float) -> float:
    return round(start + (value - limits[0]) / (limits[1] - limits[0]) * (end - start), 1)
