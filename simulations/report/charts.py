"""Drawings by matplotlib."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

from simulations.report.blocks import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b232c", "#55616e", "#d5dce3"
SERIES = ("#0b5cad", "#c2500a", "#0a7f5c", "#9b4f96", "#8a6d00", "#4b5a69")
"""Colours that people who are colour-blind can tell apart; lines differ in their dashes, too."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))
FONT, WIDTH, HEIGHT, LEGEND_HEIGHT = 11.0, 430.0, 200.0, 16.0
"""Points, the last of a row of the legend: a drawing is shown at about its own size."""
ROW_HEIGHT, FRAME_HEIGHT = 19.0, 58.0
"""Points: of a row of dots, and of what is around them."""
LABEL_LETTERS = 32
MANY = 25
"""Points of a line above which it has no marks."""
SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "text.parse_math": False,  # a name may have a dollar sign
    **dict.fromkeys(("font.size", "axes.labelsize", "legend.fontsize"), FONT),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), FONT),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), RULE),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    "text.color": INK,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}
"""Of matplotlib."""


def draw(height: float, paint: Callable[[Figure], None], form: str) -> bytes:
    """Return the file of a drawing that ``paint`` makes, ``height`` points high."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = io.BytesIO()
    with rc_context(SETTINGS), warnings.catch_warnings():
        # The reader's font draws the text, not the one that it is measured with.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        paint(canvas)
        undated = {"svg": "Date", "pdf": "CreationDate"}[form]
        canvas.savefig(written, format=form, metadata={undated: None, "Creator": None})
    return written.getvalue()


@dataclass(frozen=True)
class Dot:
    """A value on a row of its own."""

    label: str
    value: float
    half_width: float | None
    """Of the interval around it; None: it has none."""
    marked: bool
    """In the second colour: a candidate."""
    hollow: bool
    """A bound, a reference."""


def dots(
    caption: str, rows: Sequence[Dot], axis_name: str, level: tuple[float, str] | None = None
) -> Drawing:
    """Return rows of dots, from top to bottom, whose figures a table on the page has.

    Args:
        caption: of the drawing.
        rows: from top to bottom.
        axis_name: of the values.
        level: vertical line to compare with, and its name.
    """

    def paint(canvas: Figure) -> None:
        axis: Any = canvas.add_subplot()
        axis.grid(visible=False, axis="y")
        if level is not None:
            axis.axvline(level[0], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axis.annotate(level[1], (level[0], 1), xytext=(0, 3), ha="center", color=MUTED, **place)
        for y, row in enumerate(rows):
            colour = SERIES[row.marked]
            axis.axhline(y, color=RULE, linewidth=0.6, zorder=0)
            if row.half_width is not None:
                ends = [row.value - row.half_width, row.value + row.half_width]
                axis.plot(ends, [y, y], color=colour, linewidth=1.6, marker="|", markersize=6)
            fill = "none" if row.hollow else colour
            axis.plot([row.value], [y], "o", color=colour, markerfacecolor=fill, markersize=5.5)
        axis.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
        axis.tick_params(axis="y", labelcolor=INK)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel(axis_name)

    return Drawing(caption, partial(draw, ROW_HEIGHT * len(rows) + FRAME_HEIGHT, paint))


def _short(label: str, most: int = LABEL_LETTERS) -> str:
    """Return a label in so many letters, without characters that XML lacks, such as a bell."""
    seen = "".join(letter for letter in label if letter.isprintable())
    return seen if len(seen) <= most else seen[: most - 1] + "…"


@dataclass(frozen=True)
class Curve:
    """A line through points; a ``y`` that is None is not known."""

    name: str
    """In the legend; empty: none."""
    xs: Sequence[float]
    ys: Sequence[float | None]
    half_widths: Sequence[float] = ()
    """Of intervals around the points; empty: there are none."""


def lines(
    caption: str,
    curves: Sequence[Curve],
    axes: tuple[str, str],
    *,
    levels: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    budgets: bool = False,
) -> Drawing:
    """Return curves.

    Args:
        caption: of the drawing.
        curves: in the order of colours.
        axes: names of the horizontal and the vertical one.
        levels: horizontal lines to compare with: value and name.
        from_zero: the values are amounts.
        budgets: points stand at privacy budgets: a logarithmic axis.
    """

    def paint(canvas: Figure) -> None:
        plot: Any = canvas.add_subplot()
        plot.grid(visible=False, axis="x")
        for (value, name), style in zip(levels, cycle(DASHES[1:]), strict=False):
            plot.axhline(value, color=MUTED, linestyle=style, linewidth=1.2, label=name)
        for i, curve in enumerate(curves):
            ys = [math.nan if y is None else y for y in curve.ys]
            look = {"color": SERIES[i % 6], "linestyle": DASHES[(i + i // 6) % 6]}
            marker = "o" if len(ys) <= MANY else ""
            plot.plot(curve.xs, ys, marker=marker, label=_short(curve.name, 64) or None, **look)
            if curve.half_widths:
                plot.errorbar(curve.xs, ys, curve.half_widths, fmt="none", ecolor=look["color"])
        plot.set(xlabel=axes[0], ylabel=axes[1])
        if from_zero:
            plot.set_ylim(min(0.0, plot.dataLim.y0), 1.06 * plot.dataLim.y1 or 1.0)
        if budgets:
            ticks = sorted({x for curve in curves for x in curve.xs})
            plot.set_xscale("log")
            plot.set_xticks(ticks, [f"{x:g}" for x in ticks])
            plot.minorticks_off()
        else:
            plot.xaxis.get_major_locator().set_params(integer=True)
        if names:
            canvas.legend(loc="outside upper left", ncols=columns, handlelength=2.2)

    levels = [(value, _short(name, 64)) for value, name in levels]
    names = [name for name in (*(c.name for c in curves), *(label for _, label in levels)) if name]
    columns = 1 if any(len(name) > LABEL_LETTERS for name in names) else 2
    height = HEIGHT + LEGEND_HEIGHT * math.ceil(len(names) / columns)
    return Drawing(caption, partial(draw, height, paint))
