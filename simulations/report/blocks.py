"""What a page is made of: blocks, figures as they are shown, and one HTML file of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.results import rounded_up
from simulations.output.files import DASH, TextTable, blocks, duration, signed

HERE = Path(__file__).parent
NUMBER = re.compile(rf"[-+−±×≥<≤ ]*\d.*|{DASH}|none|no bound")
"""What a column of figures has in its cells."""


def percent(share: float | None) -> str:
    """Return a share of 0 to 1 in per cent, without the sign; a dash where there is none."""
    return DASH if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """Return a difference of shares in points, with its sign."""
    return DASH if difference is None else signed(difference)


def whole(count: float | None) -> str:
    """Return a count."""
    return DASH if count is None else f"{count:,.0f}".replace(",", " ")


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a figure to so many significant digits."""
    return DASH if value is None else f"{value:.{digits}g}"


def at_most(value: float | None, digits: int = 3) -> str:
    """Return a bound to so many significant digits, never a smaller one: an epsilon, a delta."""
    return DASH if value is None else rounded_up(value, digits)


def size(count: float | None) -> str:
    """Return bytes in the unit that suits them."""
    if count is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def time(seconds: float | None) -> str:
    """Return seconds as a time for people; below ten with a digit after the point."""
    if seconds is None:
        return DASH
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_number(self, place: int) -> bool:
        """Whether a column holds figures, which are aligned to the right."""
        return place > 0 and all(NUMBER.fullmatch(row[place]) for row in self.rows if row[place])


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map.

    Attributes:
        text: shown in it.
        share: 0 to 1, for its colour.
        mark: ``learnt`` (just now, by its last learner), ``future`` (not begun), or neither.
    """

    text: str
    share: float
    mark: Literal["", "learnt", "future"] = ""

    @property
    def level(self) -> int:
        """Of its colour, 0 to 9."""
        return min(9, int(10 * self.share))


@dataclass(frozen=True)
class HeatMap:
    """A matrix as a table with coloured cells.

    Attributes:
        caption: what it shows.
        corner: what the names of the rows are.
        columns: their names.
        rows: name of the row, and its cells; None: nothing is known there.
        marked: whether cells have marks, which are explained.
    """

    caption: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell | None, ...]], ...]
    marked: bool = True


@dataclass(frozen=True)
class Figure:
    """A drawing; ``table`` has what is drawn, unless one on the page has it."""

    caption: str
    svg: Markup
    table: Table | None = None


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
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notice:
    """A paragraph that must not be missed."""

    text: str
    tone: Literal["good", "warn", "bad"] = "warn"


@dataclass(frozen=True)
class Heading:
    """A title within a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of short sentences or names."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Links:
    """Pages beside this one: address, relative to it, and name."""

    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when asked for, and in print."""

    title: str
    blocks: tuple[Block, ...]


Block = (
    Table | HeatMap | Figure | Tiles | Facts | Text | Notice | Heading | Bullets | Links | Folded
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
        sections: in their order.
        state: ``finished``, ``stopped``, ...; empty: it has none.
        tone: of the state.
        meta: short facts below the title.
        source: name of the file that the page is made from; empty: none.
    """

    kind: str
    title: str
    subtitle: str
    sections: tuple[Section, ...]
    state: str = ""
    tone: Literal["good", "warn", "bad"] = "good"
    meta: tuple[str, ...] = ()
    source: str = ""


def from_markdown(lines: Iterable[str], caption: str) -> tuple[Block, ...]:
    """Return the blocks of a part of a Markdown page: its tables, each with the caption, and the
    paragraphs between them."""
    made: list[Block] = []
    for block in blocks(list(lines)):
        if isinstance(block, TextTable):
            made.append(Table(caption, block.columns, block.rows))
        else:
            made += [Text(plain(part)) for part in block.split("\n\n")]
    return tuple(made)


def plain(text: str) -> str:
    """Return a paragraph of our own Markdown without its marks."""
    return " ".join(text.replace("`", "").split())


@cache
def _environment() -> Environment:
    """Everything is escaped, and a name that is not there is an error."""
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["kind"] = lambda block: type(block).__name__
    made.globals["style"] = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return made


def render(page: Page) -> str:
    """Return the HTML."""
    return _environment().get_template("page.html").render(page=page)
