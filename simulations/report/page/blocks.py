"""What a page is made of, as values; the template says how each looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from markupsafe import Markup


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
