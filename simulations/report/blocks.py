"""What a page is made of: figures as they are shown, blocks, drawings by matplotlib, and one HTML
file of them."""

from __future__ import annotations

import io
import math
import warnings
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.results import rounded_up
from simulations.output import DASH, Table, duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
Tone = Literal["", "good", "warn", "bad"]


def whole(count: float | None) -> str:
    """Return a count."""
    return DASH if count is None else f"{count:,.0f}".replace(",", " ")


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a figure to so many significant digits."""
    return DASH if value is None else f"{value:.{digits}g}"


def at_most(value: float | None, digits: int = 3) -> str:
    """Return a bound to so many significant digits, never a smaller one: an epsilon, a delta."""
    return DASH if value is None else rounded_up(value, digits)


def time(seconds: float | None) -> str:
    """Return seconds as a time for people; below ten with a digit after the point."""
    if seconds is None:
        return DASH
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


@dataclass(frozen=True)
class Drawing:
    """A drawing; a table on the page has its figures."""

    caption: str
    drawn: Callable[[str], bytes]
    """Its file in a format, ``svg`` or ``pdf``."""

    @property
    def address(self) -> str:
        """Return an address that holds the drawing whole."""
        return f"data:image/svg+xml;base64,{b64encode(self.drawn('svg')).decode()}"


@dataclass(frozen=True)
class Tiles:
    """Headline measures: name, value, and a note of a few words."""

    tiles: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Facts:
    """Names and what is known of them."""

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Text:
    """A paragraph; with a tone it is set off from the others."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Heading:
    """A title within a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of short sentences, or of links: what is shown, and its address relative to the page
    (empty: none)."""

    items: tuple[tuple[str, str], ...]


Block = Table | Drawing | Tiles | Facts | Text | Heading | Bullets


@dataclass(frozen=True)
class Section:
    """A part of a page; ``name`` is the anchor of its title."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole page."""

    kind: str
    """Of what it is a report, e.g. ``Run``."""
    title: str
    subtitle: str
    """One sentence; empty: none."""
    sections: tuple[Section, ...]
    state: str = ""
    """``finished``, ``stopped``, ...; empty: it has none."""
    tone: Tone = "good"
    """Of the state."""
    meta: tuple[str, ...] = ()
    """Short facts below the title."""
    source: str = ""
    """Name of the file that the page is made from; empty: none."""


def render(page: Page) -> str:
    """Return the HTML. Everything is escaped, and a name that is missing is an error."""
    jinja = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["kind"] = lambda block: type(block).__name__
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return jinja.get_template("page.html").render(page=page, style=style)


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
    "font.size": FONT,
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
    """Return rows of dots, from top to bottom; ``level`` is a vertical line to compare with, and
    its name."""

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
    """Return curves, in the order of colours; ``axes`` are names of the horizontal and the vertical
    one, ``levels`` value and name of horizontal lines to compare with. Values that are amounts are
    drawn ``from_zero``; ``budgets`` have a logarithmic axis.
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
