"""What a page is made of: blocks, tables, figures as they are shown, and one HTML file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.results import rounded_up
from simulations.output.files import DASH, TextTable, blocks
from simulations.run.live_view import duration, signed


def percent(share: float | None, source: str = "") -> Cell:
    """Return a share of 0 to 1 in per cent, without the sign; a dash where there is none."""
    return DASH if share is None else Number(share, f"{100 * share:.1f}", source)


def points(difference: float | None, source: str = "") -> Cell:
    """Return a difference of shares in points, with its sign."""
    return DASH if difference is None else Number(difference, signed(difference), source)


def whole(count: float | None, source: str = "") -> Cell:
    """Return a count."""
    return DASH if count is None else Number(count, f"{count:,.0f}".replace(",", " "), source)


def decimal(value: float | None, digits: int = 3, source: str = "") -> Cell:
    """Return a figure to so many significant digits."""
    return DASH if value is None else Number(value, f"{value:.{digits}g}", source)


def at_most(value: float | None, digits: int = 3, source: str = "") -> Cell:
    """Return a bound to so many significant digits, never a smaller one: an epsilon, a delta."""
    return DASH if value is None else Number(value, rounded_up(value, digits), source)


def size(count: float | None, source: str = "") -> Cell:
    """Return bytes in the unit that suits them."""
    if count is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return Number(count, f"{count / scale:.1f} {unit}", source)
    return Number(count, f"{count:.0f} B", source)


def time(seconds: float | None, source: str = "") -> Cell:
    """Return seconds as a time for people; below ten with a digit after the point."""
    if seconds is None:
        return DASH
    text = f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
    return Number(seconds, text, source)


def pointer(*parts: str | int) -> str:
    """Return a JSON pointer (RFC 6901) from the keys and places that lead to a value."""
    escaped = (str(part).replace("~", "~0").replace("/", "~1") for part in parts)
    return "".join(f"/{part}" for part in escaped)


def from_markdown(
    lines: Iterable[str], caption: str, words: tuple[int, ...] = ()
) -> tuple[Block, ...]:
    """Return the blocks of a part of a Markdown page: its tables, each with the caption, and the
    paragraphs between them.

    Args:
        lines: of the page.
        caption: of every table.
        words: places of columns of words, though the page aligns them as figures.
    """
    made: list[Block] = []
    for block in blocks(list(lines)):
        if isinstance(block, TextTable):
            made.append(table(block, caption, words))
        else:
            made += [Text(plain(part)) for part in block.split("\n\n")]
    return tuple(made)


def table(text: TextTable, caption: str, words: tuple[int, ...] = ()) -> Table:
    """Return the table for a page; ``words`` as in :func:`from_markdown`."""
    left = tuple(i for i, right in enumerate(text.right) if i and not right)
    return Table(caption, text.columns, text.rows, (*left, *words))


def plain(text: str) -> str:
    """Return a paragraph of our own Markdown without its marks."""
    return " ".join(text.replace("`", "").split())


TEMPLATES = Path(__file__).parent


@cache
def environment() -> Environment:
    """Return the template engine: everything is escaped, and a name that is not there is an
    error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.tests["number"] = lambda cell: isinstance(cell, Number)
    made.globals["style"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return made


def render(page: Page) -> str:
    """Return the HTML."""
    return environment().get_template("page.html").render(page=page)


@dataclass(frozen=True)
class Number:
    """A figure on the page.

    Attributes:
        value: as computed, in its own unit.
        text: as shown.
        source: JSON pointer (RFC 6901) to the value in the file that the page is made from; empty:
            it was computed here.
    """

    value: float
    text: str
    source: str = ""


Cell = str | Number


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        caption: what it shows.
        columns: their names.
        rows: as many cells each.
        words: places of columns of words, which are aligned to the left; the first always is.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[int, ...] = ()

    def is_number(self, place: int) -> bool:
        """Whether a column holds figures."""
        return place > 0 and place not in self.words


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map.

    Attributes:
        number: shown in it.
        level: of its colour, 0 to 9.
        mark: ``learnt`` (just now, by its last learner), ``future`` (begun by nobody), or neither.
    """

    number: Number
    level: int
    mark: Literal["", "learnt", "future"] = ""


@dataclass(frozen=True)
class HeatMap:
    """A matrix as a table with coloured cells.

    Attributes:
        caption: what it shows.
        corner: what the names of the rows are.
        columns: their names.
        rows: name of the row, and its cells; None: nothing is known there.
        low, high: ends of the colours, as shown.
        marked: whether cells have marks, which are explained.
    """

    kind: ClassVar[str] = "heat"
    caption: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell | None, ...]], ...]
    low: str
    high: str
    marked: bool = True


@dataclass(frozen=True)
class Figure:
    """A drawing with the table behind it.

    Attributes:
        caption: what it shows.
        svg: inline, without a reference to anything outside of it.
        table: what is drawn; None: the table that follows on the page has it.
        narrow: the same for narrow windows, where ``svg`` is as wide as the page; None: it is half
            as wide, which suits both.
    """

    kind: ClassVar[str] = "figure"
    caption: str
    svg: Markup
    table: Table | None
    narrow: Markup | None = None


@dataclass(frozen=True)
class Figures:
    """Drawings side by side, below each other where there is no room."""

    kind: ClassVar[str] = "figures"
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Tile:
    """A headline measure.

    Attributes:
        name: of the measure.
        cell: its value.
        unit: behind it.
        note: in a few words, below it.
    """

    name: str
    cell: Cell
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Headline measures."""

    kind: ClassVar[str] = "tiles"
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Facts:
    """Names and what is known of them."""

    kind: ClassVar[str] = "facts"
    facts: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Notice:
    """A paragraph that must not be missed; ``good``, ``warn`` or ``bad``."""

    kind: ClassVar[str] = "notice"
    text: str
    tone: Literal["good", "warn", "bad"] = "warn"


@dataclass(frozen=True)
class Heading:
    """A title within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of short sentences or names."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Links:
    """Pages beside this one: address, relative to it, and name."""

    kind: ClassVar[str] = "links"
    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when asked for, and in print."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: tuple[Block, ...]


Block = (
    Table
    | HeatMap
    | Figure
    | Figures
    | Tiles
    | Facts
    | Text
    | Notice
    | Heading
    | Bullets
    | Links
    | Folded
)


@dataclass(frozen=True)
class Section:
    """A part of a page; ``name`` is the anchor of its title."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kind: of what it is a report, e.g. ``Run``.
        title: of the thing.
        subtitle: one sentence; empty: none.
        state: ``finished``, ``stopped``, ...; empty: it has none.
        tone: of the state.
        meta: short facts below the title.
        sections: in their order.
        source: name of the file that pointers point into; empty: none.
    """

    kind: str
    title: str
    subtitle: str
    sections: tuple[Section, ...]
    state: str = ""
    tone: Literal["good", "warn", "bad"] = "good"
    meta: tuple[str, ...] = ()
    source: str = ""
