"""A row for each client, arm or run: a dot at its value, with an interval where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from simulations.report.charts.inline_svg import draw
from simulations.report.charts.theme import HALF, INK, MUTED, PAPER, RULE, SERIES, WIDE

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
    """Return the drawing; see :func:`~simulations.report.charts.inline_svg.draw`.

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
