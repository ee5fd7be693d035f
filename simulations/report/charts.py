"""Drawings as inline SVG whose colours and font are those of the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from simulations.report.blocks import Figure, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

INK, MUTED, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#010200", "#010201", "#010202", "#010203", "#010204", "#010205")
"""Colours that people who are colour-blind can tell apart; lines differ in their dashes, too."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))
"""Of the lines of each colour."""
VARIABLES = {
    **{INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"},
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}
"""Placeholder to the variable of the style sheet."""

FONT, WIDTH, HEIGHT, LEGEND_HEIGHT = 11.0, 430.0, 200.0, 16.0
"""Points, the last of a row of the legend: a drawing is shown at about its own size."""
ROW_HEIGHT, FRAME_HEIGHT = 19.0, 58.0
"""Points: of a row of dots, and of what is around them."""
LABEL_LETTERS = 32
MANY = 25
"""Points of a line above which it has no marks."""
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
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

HEAD = re.compile(r".*?<svg\b[^>]*?viewBox=\"([^\"]*)\"[^>]*>", re.DOTALL)
NOT_OURS = re.compile(r"<style.*?</style>| id=\"[\w.]+_\d+\"", re.DOTALL)
"""Styles for the whole page, and identifiers that other drawings on it have, too."""
STYLE = re.compile(r'style="[^"]*"')
FONT_FAMILY = re.compile(r"font-family:[^;\"]*;?\s*|font:\s*(?=[\d.]+px)")
COLOURS = re.compile("|".join(["#000000", *VARIABLES]))
FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML has no way to write, such as those that ring a bell."""


def draw(caption: str, height: float, paint: Callable[[Canvas], None]) -> Markup:
    """Return a drawing.

    Args:
        caption: its own on its page; also for those who do not see the drawing.
        height: points.
        paint: draws on the figure, with the colours above.

    Returns:
        An ``svg`` element without a reference to anything outside of it, colours as variables of
        the style sheet, text in the font of the page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    written = io.StringIO()
    settings: Any = {**SETTINGS, "svg.hashsalt": caption}
    with rc_context(settings), warnings.catch_warnings():
        # The page's font draws the text, not the one that it is measured with.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas = Canvas(figsize=(WIDTH / 72, height / 72), layout="constrained")
        paint(canvas)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(written, format="svg", metadata=nothing)
    text = NOT_OURS.sub("", FORBIDDEN.sub("", written.getvalue()))
    text = STYLE.sub(lambda style: COLOURS.sub(_variable, FONT_FAMILY.sub("", style[0])), text)
    view, body = HEAD.match(text), HEAD.sub("", text, count=1)
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}">')
    return head.format(view and view[1], FORBIDDEN.sub("", caption)) + Markup(body)


def _variable(found: re.Match[str]) -> str:
    return f"var(--{VARIABLES.get(found[0], 'ink')})"


@dataclass(frozen=True)
class Dot:
    """A value on a row of its own.

    Attributes:
        label: of the row.
        value: where the dot is.
        half_width: of the interval around it; None: it has none.
        marked: in the second colour: a candidate, something refuted.
        hollow: a dot that is not filled: a bound, a reference.
        before: value of a small grey dot on the same row; None: there is none.
    """

    label: str
    value: float
    half_width: float | None = None
    marked: bool = False
    hollow: bool = False
    before: float | None = None


def dots(
    caption: str, rows: Sequence[Dot], axis_name: str, level: tuple[float, str] | None = None
) -> Figure:
    """Return rows of dots, whose figures a table on the page has.

    Args:
        caption: its own on its page.
        rows: from top to bottom.
        axis_name: of the values.
        level: vertical line to compare with, and its name.
    """

    def paint(canvas: Canvas) -> None:
        axis: Any = canvas.add_subplot()
        axis.grid(visible=False, axis="y")
        if level is not None:
            axis.axvline(level[0], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axis.annotate(level[1], (level[0], 1), xytext=(0, 3), ha="center", color=MUTED, **place)
        for place_of, row in enumerate(rows):
            _row(axis, place_of, row)
        axis.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
        axis.tick_params(axis="y", labelcolor=INK)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel(axis_name)

    return Figure(caption, draw(caption, ROW_HEIGHT * len(rows) + FRAME_HEIGHT, paint))


def _row(axis: Any, place: int, row: Dot) -> None:
    colour = SERIES[row.marked]
    axis.axhline(place, color=RULE, linewidth=0.6, zorder=0)
    if row.half_width is not None:
        ends = [row.value - row.half_width, row.value + row.half_width]
        axis.plot(ends, [place, place], color=colour, linewidth=1.6, marker="|", markersize=6)
    if row.before is not None:
        axis.plot([row.before, row.value], [place, place], color=MUTED, linewidth=1)
        axis.plot([row.before], [place], "o", color=MUTED, markerfacecolor=PAPER, markersize=4.5)
    fill = "none" if row.hollow else colour
    axis.plot([row.value], [place], "o", color=colour, markerfacecolor=fill, markersize=5.5)


def _short(label: str, labels: int = 1) -> str:
    """Return a label in the room of so many."""
    most = labels * LABEL_LETTERS
    return label if len(label) <= most else label[: most - 1] + "…"


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


def lines(
    caption: str,
    curves: Sequence[Curve],
    axes: tuple[str, str],
    behind: Table | None = None,
    *,
    levels: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    budgets: bool = False,
) -> Figure:
    """Return curves.

    Args:
        caption: its own on its page.
        curves: in the order of colours.
        axes: names of the horizontal and the vertical one.
        behind: what is drawn; None: a table on the page has it.
        levels: horizontal lines to compare with: value and name.
        from_zero: the values are amounts.
        budgets: points have intervals, and stand at privacy budgets: a logarithmic axis.
    """

    def paint(canvas: Canvas) -> None:
        plot: Any = canvas.add_subplot()
        plot.grid(visible=False, axis="x")
        for (value, name), style in zip(levels, cycle(DASHES[1:]), strict=False):
            short = _short(name, 2)
            plot.axhline(value, color=MUTED, linestyle=style, linewidth=1.2, label=short)
        for i, curve in enumerate(curves):
            colour, dashes = SERIES[i % 6], DASHES[(i + i // 6) % 6]
            ys = [math.nan if y is None else y for y in curve.ys]
            label, marker = _short(curve.name, 2) or None, "o" if len(ys) <= MANY else ""
            if curve.low and budgets:
                plot.vlines(curve.xs, curve.low, curve.high, color=colour, linewidth=1.4)
            elif curve.low:
                plot.fill_between(curve.xs, curve.low, curve.high, color=colour, alpha=0.18, lw=0)
            plot.plot(curve.xs, ys, color=colour, linestyle=dashes, marker=marker, label=label)
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

    names = [name for name in (*(c.name for c in curves), *(label for _, label in levels)) if name]
    columns = 1 if any(len(name) > LABEL_LETTERS for name in names) else 2
    height = HEIGHT + LEGEND_HEIGHT * math.ceil(len(names) / columns)
    return Figure(caption, draw(caption, height, paint), behind)
