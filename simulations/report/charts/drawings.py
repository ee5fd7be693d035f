"""Drawings: lines over rounds, dots with intervals, panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from simulations.report.charts.svg import (
    DASHES,
    FONT,
    HALF,
    INK,
    MUTED,
    PAPER,
    RULE,
    SERIES,
    WIDE,
    draw,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_HEIGHT, FRAME_HEIGHT = 19.0, 58.0
"""Points."""
LABEL_LETTERS = {True: 60, False: 26}
"""Of a wide drawing, and of one that is not."""


@dataclass(frozen=True)
class Dot:
    """One row.

    Attributes:
        label: at its left.
        value: of the dot.
        half_width: of the interval; None: there is none.
        series: number of its colour.
        hollow: a dot that is not filled: a bound, a reference.
        before: value of a small grey dot on the same row; None: there is none.
    """

    label: str
    value: float
    half_width: float | None = None
    series: int = 0
    hollow: bool = False
    before: float | None = None


@dataclass(frozen=True)
class Level:
    """A vertical line with a name."""

    value: float
    name: str


def dots(
    name: str,
    alt: str,
    rows: Sequence[Dot],
    axis_name: str,
    levels: Sequence[Level] = (),
    from_zero: bool = False,
    wide: bool = False,
) -> Markup:
    """Return the drawing; see :func:`~simulations.report.charts.svg.draw`.

    Args:
        name: of the drawing.
        alt: for those who do not see it.
        rows: from top to bottom.
        axis_name: of the values.
        levels: to compare with.
        from_zero: lines from zero to the dots: the values are amounts.
        wide: as wide as the page.
    """
    size = (WIDE if wide else HALF, ROW_HEIGHT * len(rows) + FRAME_HEIGHT)

    def paint(figure: Figure) -> None:
        axis: Any = figure.add_subplot()
        axis.grid(visible=True, axis="x")
        axis.grid(visible=False, axis="y")
        for level in levels:
            axis.axvline(level.value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
            axis.annotate(
                level.name,
                (level.value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=MUTED,
            )
        for place, row in enumerate(rows):
            _row(axis, place, row, from_zero)
        axis.set_yticks(range(len(rows)), [_short(row.label, wide) for row in rows])
        axis.tick_params(axis="y", labelcolor=INK)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        if from_zero:
            largest = max([row.value for row in rows] + [level.value for level in levels])
            axis.set_xlim(0, largest * 1.08 or 1)
        axis.set_xlabel(axis_name)

    return draw(name, alt, size, paint)


def _row(axis: Any, place: int, row: Dot, from_zero: bool) -> None:
    colour = SERIES[row.series]
    if from_zero:
        axis.plot([0, row.value], [place, place], color=colour, linewidth=3)
    else:
        axis.axhline(place, color=RULE, linewidth=0.6, zorder=0)
    if row.half_width is not None:
        ends = [row.value - row.half_width, row.value + row.half_width]
        axis.plot(ends, [place, place], color=colour, linewidth=1.6, marker="|", markersize=6)
    if row.before is not None:
        axis.plot([row.before, row.value], [place, place], color=MUTED, linewidth=1)
        axis.plot([row.before], [place], "o", color=MUTED, markerfacecolor=PAPER, markersize=4.5)
    fill = "none" if row.hollow else colour
    axis.plot([row.value], [place], "o", color=colour, markerfacecolor=fill, markersize=5.5)


def _short(label: str, wide: bool) -> str:
    most = LABEL_LETTERS[wide]
    return label if len(label) <= most else label[: most - 1] + "…"


HEIGHT = 210.0
MANY = 25
"""Points of a line above which it has no marks."""


@dataclass(frozen=True)
class Curve:
    """A line, with a band or with intervals around it.

    Attributes:
        name: in the legend; empty: none.
        xs, ys: its points; None: not known there.
        low, high: of the band or the intervals, at the same places; empty: there is none.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Axis:
    """The two axes.

    Attributes:
        x, y: their names.
        log: which of them are logarithmic.
        ticks: places and names on the horizontal axis; empty: as they come.
        levels: horizontal lines to compare with: value and name.
        intervals: draw intervals, and no band.
        breaks: places of vertical lines: where stages end.
        from_zero: the values are amounts.
    """

    x: str
    y: str
    log: Literal["", "x", "y"] = ""
    ticks: tuple[tuple[float, str], ...] = ()
    levels: tuple[tuple[float, str], ...] = ()
    intervals: bool = False
    breaks: tuple[float, ...] = ()
    from_zero: bool = False


def lines(name: str, alt: str, curves: Sequence[Curve], axis: Axis) -> Markup:
    """Return the drawing; see :func:`~simulations.report.charts.svg.draw`."""

    def paint(figure: Figure) -> None:
        plot: Any = figure.add_subplot()
        for place in axis.breaks:
            plot.axvline(place, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        for (value, label), style in zip(axis.levels, cycle(DASHES[1:]), strict=False):
            plot.axhline(value, color=MUTED, linestyle=style, linewidth=1.2, label=label)
        for curve, colour, dashes in zip(curves, cycle(SERIES), cycle(DASHES), strict=False):
            _curve(plot, curve, colour, dashes, axis.intervals)
        if axis.from_zero and axis.log != "y":
            low, high = plot.dataLim.intervaly
            plot.set_ylim(min(0.0, low), 1.06 * high or 1.0)
        plot.set(xlabel=axis.x, ylabel=axis.y)
        if axis.log:
            getattr(plot, f"set_{axis.log}scale")("log")
            getattr(plot, f"{axis.log}axis").set_major_formatter(lambda value, _: f"{value:g}")
        if axis.ticks:
            plot.set_xticks([x for x, _ in axis.ticks], [label for _, label in axis.ticks])
            plot.minorticks_off()
        elif axis.log != "x":
            plot.xaxis.get_major_locator().set_params(integer=True)
        if any(curve.name for curve in curves) or axis.levels:
            figure.legend(loc="outside upper left", ncols=2, handlelength=2.2)

    return draw(name, alt, (HALF, HEIGHT), paint)


def _curve(plot: Any, curve: Curve, colour: str, dashes: Any, intervals: bool) -> None:
    ys = [math.nan if y is None else y for y in curve.ys]
    marker = "o" if len(ys) <= MANY else ""
    if curve.low and not intervals:
        plot.fill_between(curve.xs, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    if curve.low and intervals:
        plot.vlines(curve.xs, curve.low, curve.high, color=colour, linewidth=1.4)
    plot.plot(curve.xs, ys, color=colour, linestyle=dashes, marker=marker, label=curve.name or None)


COLUMNS = {True: 5, False: 2}
"""Panels in a row of a wide drawing, and of one that is not."""
PANEL_HEIGHT, SHARED_HEIGHT = 128.0, 48.0
"""Points: of a row of panels, and of what they share."""
TITLE_LETTERS = 20


@dataclass(frozen=True)
class Line:
    """Values at the whole numbers from ``start``; None: not known."""

    values: tuple[float | None, ...]
    start: int = 0


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: above it.
        lines: in the order of colours.
        mark: place on the first line of a mark; None: there is none.
        level: of a dotted horizontal line; None: there is none.
    """

    title: str
    lines: tuple[Line, ...]
    mark: int | None = None
    level: float | None = None


@dataclass(frozen=True)
class Axes:
    """What all panels share.

    Attributes:
        x, y: names of the axes.
        ticks: places and names on the horizontal axis.
        context: draw the first lines of all other panels in grey.
    """

    x: str
    y: str
    ticks: tuple[tuple[int, str], ...] = field(default=())
    context: bool = False


def panels(name: str, alt: str, each: Sequence[Panel], axes: Axes, wide: bool = True) -> Markup:
    """Return the drawing; see :func:`~simulations.report.charts.svg.draw`."""
    columns = min(COLUMNS[wide], len(each))
    rows = math.ceil(len(each) / columns)
    size = (WIDE if wide else HALF, PANEL_HEIGHT * rows + SHARED_HEIGHT)

    def paint(figure: Figure) -> None:
        grid: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        flat = [axis for row in grid for axis in row]
        for axis, panel in zip(flat, each, strict=False):
            if axes.context:
                for other in each:
                    if other is not panel:
                        _line(axis, other.lines[0], RULE, "-", 0.9)
            _panel(axis, panel)
        for number, axis in enumerate(flat):
            if number >= len(each):
                axis.set_axis_off()
            elif number + columns >= len(each):
                axis.tick_params(labelbottom=True)
        if axes.ticks:
            flat[0].set_xticks([x for x, _ in axes.ticks], [label for _, label in axes.ticks])
        figure.supxlabel(axes.x, color=MUTED, fontsize=FONT)
        figure.supylabel(axes.y, color=MUTED, fontsize=FONT)

    return draw(name, alt, size, paint)


def _panel(axis: Any, panel: Panel) -> None:
    title = panel.title
    axis.set_title(title if len(title) <= TITLE_LETTERS else title[: TITLE_LETTERS - 1] + "…")
    if panel.level is not None:
        axis.axhline(panel.level, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    for line, colour, dashes in zip(panel.lines, SERIES, DASHES, strict=False):
        _line(axis, line, colour, dashes, 1.8)
    first = panel.lines[0]
    if panel.mark is not None and first.values[panel.mark - first.start] is not None:
        value = first.values[panel.mark - first.start]
        axis.plot([panel.mark], [value], "o", color=SERIES[0], markeredgecolor=PAPER, zorder=3)


def _line(axis: Any, line: Line, colour: str, dashes: Any, width: float) -> None:
    places = range(line.start, line.start + len(line.values))
    values = [math.nan if value is None else value for value in line.values]
    axis.plot(list(places), values, color=colour, linestyle=dashes, linewidth=width)
