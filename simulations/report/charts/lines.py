"""Lines over a number that goes on: rounds, singular values, budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from simulations.report.charts.inline_svg import draw
from simulations.report.charts.theme import DASHES, HALF, MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Return the drawing; see :func:`~simulations.report.charts.inline_svg.draw`."""

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
