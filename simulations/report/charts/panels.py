"""Small multiples: a panel for each task or arm, all of one scale, the others in grey behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from simulations.report.charts.inline_svg import draw
from simulations.report.charts.theme import DASHES, FONT, HALF, MUTED, PAPER, RULE, SERIES, WIDE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Return the drawing; see :func:`~simulations.report.charts.inline_svg.draw`."""
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
